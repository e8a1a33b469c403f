// SPDX-License-Identifier: Apache-2.0
#include "kernels/common/scan_math.h"

#include <cmath>
#include <limits>

#include "catch.h"
#include "support.h"

namespace mixture_of_mamba::testing {
namespace {

// Calls check(x) over the range where the formulas bend, and far outside.
template <typename T, typename Check>
void for_each_argument(const Check& check) {
  for (int i = -30000; i <= 30000; ++i) check(static_cast<T>(i * 0.001L));
  for (T magnitude : {T(50), T(88), T(104), T(700), T(1e30)}) check(magnitude), check(-magnitude);
  for (T x = 1; x > std::numeric_limits<T>::min(); x /= 7) check(x), check(-x);
  check(T(0));
}

template <typename T>
void check_close(const char* what, T x, T got, Real expected, Real ulps) {
  // Below the smallest normal number results may be flushed.
  const Real allowed =
      ulps * std::numeric_limits<T>::epsilon() * std::fabs(expected) + std::numeric_limits<T>::min();
  if (std::fabs(got - expected) <= allowed) return;
  FAIL_CHECK(what << "(" << x << ") is " << got << ", expected " << expected);
}

TEMPLATE_TEST_CASE("softplus is log(1 + e^x) at every size of x", "[scan_math]", float, double) {
  for_each_argument<TestType>([](TestType x) {
    const Real wide = x;
    // Beyond the linear threshold the difference is below the type's precision for float only.
    const Real linear = wide > Real(kSoftplusLinearAbove) ? std::exp(-wide) : 0;
    const Real expected = std::fmax(wide, Real(0)) + std::log1p(std::exp(-std::fabs(wide))) - linear;
    check_close("softplus", x, softplus(x), expected, 4);
  });
  CHECK(softplus(std::numeric_limits<TestType>::infinity()) == std::numeric_limits<TestType>::infinity());
  CHECK(std::isnan(softplus(std::numeric_limits<TestType>::quiet_NaN())));
}

TEST_CASE("softplus in float is continuous where it becomes linear", "[scan_math]") {
  const float threshold = static_cast<float>(kSoftplusLinearAbove), above = std::nextafter(threshold, 100.0f);
  CHECK(softplus(above) == above);
  CHECK(softplus(threshold) <= above);
  CHECK(softplus(threshold) >= threshold);
}

TEMPLATE_TEST_CASE("sigmoid and silu agree with their definitions at every size of x", "[scan_math]", float,
                   double) {
  for_each_argument<TestType>([](TestType x) {
    const Real wide = x, sigmoid_of_x = 1 / (1 + std::exp(-wide));
    check_close("sigmoid", x, sigmoid(x), sigmoid_of_x, 4);
    check_close("silu", x, silu(x), wide * sigmoid_of_x, 4);
  });
}

TEST_CASE("sigmoid and silu_slope are the derivatives of softplus and silu", "[scan_math]") {
  for (double x = -15; x <= 15; x += 0.037) {
    const double step = 1e-4;
    const auto slope = [&](auto&& f) { return (f(x + step) - f(x - step)) / (2 * step); };
    CHECK(std::fabs(sigmoid(x) - slope([](double v) { return softplus(v); })) < 2e-9);
    CHECK(std::fabs(silu_slope(x) - slope([](double v) { return silu(v); })) < 2e-8);
  }
}

}  // namespace
}  // namespace mixture_of_mamba::testing
