// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "arena.h"
#include "catch.h"
#include "support.h"
#include "vector_code.h"

// The vector functions of the chosen instruction set against long double.

namespace mixture_of_mamba::testing {
namespace {

template <typename T>
std::vector<T> apply(typename VectorMath<T>::Function function, const std::vector<T>& x) {
  HostArena arena;  // the last, partial vector must not be read or written beyond its end
  T* const y = arena.place(std::vector<T>(x.size()));
  function(arena.place(x), y, x.size());
  CHECK(arena.intact());
  return arena.fetch(y, x.size());
}

// Numbers of both signs and every size up to `most`, dense around 0.
template <typename T>
std::vector<T> arguments(Real most) {
  std::vector<T> x = {T(0), -T(0)};
  for (Real size = most; size > 1e-12L; size *= 0.9993L) {
    x.push_back(static_cast<T>(size));
    x.push_back(static_cast<T>(-size));
  }
  for (int sixteenth = 0; sixteenth <= 16 * std::min(most, Real(126)); ++sixteenth) {
    x.push_back(static_cast<T>(sixteenth / 16.0L));
    x.push_back(static_cast<T>(-sixteenth / 16.0L));
  }
  return x;
}

// The largest error relative to the expected value, in units of the type's epsilon.
template <typename T, typename Expected>
Real largest_error(typename VectorMath<T>::Function function, const std::vector<T>& x,
                   const Expected& expected) {
  const std::vector<T> y = apply<T>(function, x);
  Real largest = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const Real right = expected(Real(x[i])), error = std::fabs(y[i] - right);
    largest = std::max(largest, std::isfinite(error) ? error / std::fabs(right) : Real(INFINITY));
  }
  return largest / std::numeric_limits<T>::epsilon();
}

Real sigmoid_of(Real x) { return 1 / (1 + std::exp(-x)); }
Real softplus_of(Real x) { return std::fmax(x, Real(0)) + std::log1p(std::exp(-std::fabs(x))); }

TEMPLATE_TEST_CASE("exp2 is accurate over the whole range of normal results", "[vector]", float, double) {
  const VectorMath<TestType>& math = vector_math<TestType>();
  const Real most = sizeof(TestType) == 4 ? 126 : 1022;
  const auto right = [](Real x) { return std::exp2(x); };
  std::vector<TestType> x = arguments<TestType>(most);
  CHECK(largest_error<TestType>(math.exp2, x, right) < 2);
  x.erase(std::remove_if(x.begin(), x.end(), [](TestType value) { return value > 0; }), x.end());
  CHECK(largest_error<TestType>(math.exp2_negative, x, right) < 2);
}

// A decay near 1 acts over 1 / (1 - decay) tokens, so what counts is the error of 1 - decay: half a unit in
// the last place of the decay cannot be helped, beyond that it must be right relative to itself.
TEMPLATE_TEST_CASE("the rate of a decay close to 1 is accurate", "[vector]", float, double) {
  const Real epsilon = std::numeric_limits<TestType>::epsilon();
  std::vector<TestType> x;
  for (Real size = 0.03L; size > 1e-12L; size *= 0.999L) x.push_back(static_cast<TestType>(-size));
  const std::vector<TestType> y = apply<TestType>(vector_math<TestType>().exp2_negative, x);
  Real largest = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const Real rate = -std::expm1(x[i] * std::log(Real(2)));
    const Real error = std::fabs((1 - Real(y[i])) - rate) - epsilon / 4;
    largest = std::max(largest, error / rate);
  }
  CHECK(largest < 2 * epsilon);
}

TEST_CASE("the memory of a decay from the table times its rounding stays below 1.3e-7", "[vector]") {
  const int lanes = vector_math<float>().lanes, entries = lanes >= 8 ? lanes : 1;
  std::vector<float> x;
  for (int j = 1; j < 4 * entries; ++j) x.push_back(-j / static_cast<float>(entries));
  const std::vector<float> decay = apply<float>(vector_math<float>().exp2_negative, x);
  for (size_t i = 0; i < x.size(); ++i) {
    const Real right = std::exp2(Real(x[i]));
    INFO("2^" << x[i]);
    CHECK(std::fabs(decay[i] / right - 1) / (1 - right) < 1.3e-7L);
  }
}

TEMPLATE_TEST_CASE("exp2 stays at the ends of its range beyond them", "[vector]", float, double) {
  const int lowest = sizeof(TestType) == 4 ? -126 : -1022;
  const TestType infinity = std::numeric_limits<TestType>::infinity();
  const std::vector<TestType> x = {TestType(lowest),     TestType(lowest - 1), -infinity,
                                   TestType(1 - lowest), TestType(2 - lowest), infinity};
  const TestType low = std::ldexp(TestType(1), lowest), high = std::ldexp(TestType(1), 1 - lowest);
  CHECK(apply<TestType>(vector_math<TestType>().exp2, x) ==
        std::vector<TestType>{low, low, low, high, high, high});
  CHECK(apply<TestType>(vector_math<TestType>().exp2_negative, {x[0], x[1], x[2]}) ==
        std::vector<TestType>{low, low, low});
}

TEMPLATE_TEST_CASE("log1p is accurate on the unit interval, for the smallest numbers too", "[vector]", float,
                   double) {
  std::vector<TestType> x = {TestType(1)};
  for (Real size = 1; size > std::numeric_limits<TestType>::min(); size *= 0.999L) x.push_back(size);
  CHECK(largest_error<TestType>(vector_math<TestType>().log1p_unit, x, [](Real v) { return std::log1p(v); }) <
        3);
}

TEMPLATE_TEST_CASE("softplus and sigmoid are accurate at every size", "[vector]", float, double) {
  const VectorMath<TestType>& math = vector_math<TestType>();
  // Beyond, e^-|x| stays at the smallest normal number.
  const std::vector<TestType> x = arguments<TestType>(sizeof(TestType) == 4 ? 87 : 708);
  // An argument of exp that is rounded to the type loses its size in units.
  const Real units = sizeof(TestType) == 4 ? 64 : 512;
  std::vector<TestType> small;
  std::copy_if(x.begin(), x.end(), std::back_inserter(small), [](TestType v) { return std::fabs(v) < 8; });
  CHECK(largest_error<TestType>(math.softplus, x, softplus_of) < units);
  CHECK(largest_error<TestType>(math.softplus, small, softplus_of) < 8);
  for (const auto function : {math.sigmoid, math.slope_of_softplus}) {
    CHECK(largest_error<TestType>(function, x, sigmoid_of) < units);
    CHECK(largest_error<TestType>(function, small, sigmoid_of) < 8);
  }
}

TEMPLATE_TEST_CASE("the reciprocal is accurate between 1 and 2", "[vector]", float, double) {
  std::vector<TestType> x;
  for (int i = 0; i <= 4096; ++i) x.push_back(1 + i / TestType(4096));
  CHECK(largest_error<TestType>(vector_math<TestType>().reciprocal, x, [](Real v) { return 1 / v; }) <= 1);
}

TEMPLATE_TEST_CASE("infinities and NaN give what their limits are", "[vector]", float, double) {
  const VectorMath<TestType>& math = vector_math<TestType>();
  const TestType infinity = std::numeric_limits<TestType>::infinity();
  CHECK(apply<TestType>(math.softplus, {infinity})[0] == infinity);
  CHECK(std::fabs(apply<TestType>(math.softplus, {-infinity})[0]) < 1e-37);
  CHECK(apply<TestType>(math.sigmoid, {infinity})[0] == 1);
  CHECK(std::fabs(apply<TestType>(math.sigmoid, {-infinity})[0]) < 1e-37);
  CHECK(apply<TestType>(math.maximum_one, {-infinity, 0, 2, infinity}) ==
        std::vector<TestType>{1, 1, 2, infinity});
  CHECK(apply<TestType>(math.minimum_one, {-infinity, 0, 2, infinity}) ==
        std::vector<TestType>{-infinity, 0, 1, 1});
  for (const char* payload : {"0", "1", "1234567"}) {
    const TestType positive = sizeof(TestType) == 4 ? std::nanf(payload) : std::nan(payload);
    for (TestType nan : {positive, -positive}) {
      INFO("payload " << payload << (std::signbit(nan) ? ", negative" : ""));
      CHECK(std::isnan(apply<TestType>(math.exp2, {nan})[0]));
      CHECK(std::isnan(apply<TestType>(math.exp2_negative, {nan})[0]));
      CHECK(std::isnan(apply<TestType>(math.softplus, {nan})[0]));
      CHECK(std::isnan(apply<TestType>(math.slope_of_softplus, {nan})[0]));
      CHECK(std::isnan(apply<TestType>(math.sigmoid, {nan})[0]));
      CHECK(std::isnan(apply<TestType>(math.maximum_one, {nan})[0]));
      CHECK(std::isnan(apply<TestType>(math.minimum_one, {nan})[0]));
    }
  }
}

TEMPLATE_TEST_CASE("each of a vector of sums is the sum of one vector", "[vector]", float, double) {
  const VectorMath<TestType>& math = vector_math<TestType>();
  std::vector<TestType> vectors(math.lanes * math.lanes), sums(math.lanes), expected(math.lanes);
  for (int i = 0; i < math.lanes * math.lanes; ++i) {
    vectors[i] = static_cast<TestType>(i * i % 1021);  // sums are exact
    expected[i / math.lanes] += vectors[i];
  }
  math.sum_each(vectors.data(), sums.data());
  CHECK(sums == expected);
}

}  // namespace
}  // namespace mixture_of_mamba::testing
