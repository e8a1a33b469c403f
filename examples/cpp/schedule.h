// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace examples {

/// Of step 0 .. steps - 1: a linear warm-up over 5 % of the steps, then a cosine down to 5 % of the peak.
inline double learning_rate(int64_t step, int64_t steps, double peak) {
  constexpr double kWarmupShare = 0.05, kFinalShare = 0.05;
  // nearbyint rounds halves to even, as Python's round does.
  const auto warmup =
      std::max<int64_t>(1, std::llrint(std::nearbyint(kWarmupShare * static_cast<double>(steps))));
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double progress =
      static_cast<double>(step - warmup) / static_cast<double>(std::max<int64_t>(1, steps - warmup));
  return peak * (kFinalShare + (1 - kFinalShare) * 0.5 * (1 + std::cos(std::numbers::pi * progress)));
}

}  // namespace examples
