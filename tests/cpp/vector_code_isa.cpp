// SPDX-License-Identifier: Apache-2.0
#include "vector_code.h"

#include "kernels/cpu/vector.h"

namespace mixture_of_mamba::MOM_ISA {

namespace {

template <typename T, Vec<T> (*function)(Vec<T>)>
void apply(const T* x, T* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int n = static_cast<int>(smaller(kLanes<T>, count - i));
    store(y + i, function(load(x + i, n)), n);
  }
}

template <typename T>
Vec<T> softplus_alone(Vec<T> x) {
  return softplus<T>(x);
}
template <typename T>
Vec<T> slope_of_softplus(Vec<T> x) {
  Vec<T> slope;
  softplus<T>(x, &slope);
  return slope;
}
template <typename T>
Vec<T> maximum_one(Vec<T> x) {
  return maximum<T>(x, 1);
}
template <typename T>
Vec<T> minimum_one(Vec<T> x) {
  return minimum<T>(x, 1);
}

template <typename T>
void sums_of_vectors(const T* from, T* to) {
  Vec<T> vectors[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) vectors[i] = load(from + i * kLanes<T>);
  store(to, sum_each<T>(vectors));
}

template <typename T>
constexpr testing::VectorMath<T> kMath = {kLanes<T>,
                                          apply<T, exp2<T, false>>,
                                          apply<T, exp2<T, true>>,
                                          apply<T, log1p_unit<T>>,
                                          apply<T, softplus_alone<T>>,
                                          apply<T, slope_of_softplus<T>>,
                                          apply<T, sigmoid<T>>,
                                          apply<T, reciprocal<T>>,
                                          apply<T, maximum_one<T>>,
                                          apply<T, minimum_one<T>>,
                                          sums_of_vectors<T>};

// Calls function(a number of the type).
template <typename Function>
auto of_type(ScalarType type, Function&& function) {
  return type == ScalarType::kBFloat16 ? function(BFloat16{}) : function(Float16{});
}

void load_all(ScalarType type, const uint16_t* from, float* to, int64_t count) {
  of_type(type, [&](auto number) {
    using Scalar = decltype(number);
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const int n = static_cast<int>(smaller(kLanes<float>, count - i));
      store(to + i, load(reinterpret_cast<const Scalar*>(from) + i, n), n);
    }
  });
}

void store_all(ScalarType type, const float* from, uint16_t* to, int64_t count) {
  of_type(type, [&](auto number) {
    using Scalar = decltype(number);
    for (int64_t i = 0; i < count; i += kLanes<float>) {
      const int n = static_cast<int>(smaller(kLanes<float>, count - i));
      store(reinterpret_cast<Scalar*>(to) + i, load(from + i, n), n);
    }
  });
}

float decode_one(ScalarType type, uint16_t bits) {
  return of_type(type, [&](auto number) {
    number.bits = bits;
    return to_float(number);
  });
}

uint16_t encode_one(ScalarType type, float value) {
  return of_type(type, [&](auto number) { return from_float<decltype(number)>(value).bits; });
}

}  // namespace

const testing::VectorCode kVectorCode = {kMath<float>, kMath<double>, load_all,
                                         store_all,    decode_one,    encode_one};

}  // namespace mixture_of_mamba::MOM_ISA
