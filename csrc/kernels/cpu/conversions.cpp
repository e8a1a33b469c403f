// SPDX-License-Identifier: Apache-2.0
#include "kernels/conversions.h"

#include <cmath>
#include <type_traits>

#include "kernels/cpu/scalar_types.h"

namespace mixture_of_mamba {

namespace {

using namespace MOM_ISA;  // the baseline

template <typename From, typename To>
void convert(const Conversion& c, int64_t begin, int64_t end) {
  using Value = std::conditional_t<std::is_same_v<To, double>, double, Acc<From>>;
  const From* const from = static_cast<const From*>(c.from);
  To* const to = static_cast<To*>(c.to);
  const auto read = [](From x) { return static_cast<Value>(to_float(x)); };
  const auto write = [](Value x) { return from_float<To>(static_cast<Acc<To>>(x)); };
  switch (c.rule) {
    case Conversion::Rule::kCopy:
      for (int64_t i = begin; i < end; ++i) to[i] = write(read(from[i]));
      break;
    case Conversion::Rule::kMinusExp:
      for (int64_t i = begin; i < end; ++i) to[i] = write(-std::exp(read(from[i])));
      break;
    case Conversion::Rule::kMultiply: {
      const From* const factor = static_cast<const From*>(c.factor);
      for (int64_t i = begin; i < end; ++i) to[i] = write(read(from[i]) * read(factor[i]));
      break;
    }
  }
}

// Calls visit(a value of the type).
template <typename Visit>
void with_type(ScalarType type, Visit&& visit) {
  switch (type) {
    case ScalarType::kFloat32:
      return visit(float{});
    case ScalarType::kBFloat16:
      return visit(BFloat16{});
    case ScalarType::kFloat16:
      return visit(Float16{});
    case ScalarType::kFloat64:
      return visit(double{});
  }
}

}  // namespace

void run_conversions_cpu(const ConversionsParams& p, ParallelFor parallel) {
  constexpr int64_t kPerTask = 4096;
  for (int k = 0; k < p.count; ++k) {
    const Conversion& c = p.items[k];
    with_type(c.from_type, [&](auto from) {
      with_type(c.to_type, [&](auto to) {
        parallel(0, c.count, kPerTask,
                 [&](int64_t begin, int64_t end) { convert<decltype(from), decltype(to)>(c, begin, end); });
      });
    });
  }
}

}  // namespace mixture_of_mamba
