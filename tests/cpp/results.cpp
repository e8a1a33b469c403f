// SPDX-License-Identifier: Apache-2.0
#include "support.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <utility>

// Results, and their comparison.

namespace mixture_of_mamba::testing {

Output output_of(const std::string& name, const Matrix& matrix) {
  return {name, matrix.type(), matrix.values(), matrix.bytes(), matrix.gaps_untouched()};
}

namespace {

// The largest errors so far, in tolerances: {mean, worst} by output and type of activations.
using Largest = std::map<std::string, std::pair<Real, Real>>;

void record(const std::string& what, Real mean, Real worst) {
  static Largest* const largest = [] {
    if (std::getenv("MOM_TEST_REPORT") == nullptr) return static_cast<Largest*>(nullptr);
    static Largest kept;
    std::atexit([] {
      for (const auto& [name, error] : kept) {
        std::printf("%-32s mean %.2Lf, worst %.2Lf of what is allowed\n", name.c_str(), error.first,
                    error.second);
      }
    });
    return &kept;
  }();
  if (largest == nullptr) return;
  auto& [largest_mean, largest_worst] = (*largest)[what];
  largest_mean = std::max(largest_mean, mean);
  largest_worst = std::max(largest_worst, worst);
}

// Of one output, whose size is that of `expected`. Only what exceeds the rounding of the result counts.
std::string mismatch(const Output& got, const Reals& expected, const std::string& what, Tolerance tolerance) {
  const Real count = std::max<size_t>(1, expected.size());
  // Inputs are of size 1, so the single element that sums cancelled to may be smaller than what made it.
  Real squares = 1, lost_squares = 0, worst = 0;
  for (Real value : expected) squares += value * value;
  const Real rms = std::sqrt(squares / count);
  size_t worst_at = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (got.values[i] == expected[i]) continue;
    const Real error = std::fabs(got.values[i] - expected[i]);
    const Real lost =
        error <= half_unit(got.type, expected[i]) ? 0 : error - half_unit(got.type, expected[i]);
    if (lost == 0) continue;
    lost_squares += lost * lost;
    const Real ratio =
        std::isfinite(lost) ? lost / (tolerance.worst * (std::fabs(expected[i]) + rms)) : Real(INFINITY);
    if (!(ratio <= worst)) worst = ratio, worst_at = i;
  }
  const Real mean = lost_squares == 0 ? 0 : std::sqrt(lost_squares / count) / (tolerance.mean * rms);
  record(what, mean, worst);
  std::ostringstream message;
  if (worst > 1) {
    message << what << "[" << worst_at << "] of " << count << " is " << got.values[worst_at] << ", expected "
            << expected[worst_at] << ", " << worst << " times the allowed error; ";
  }
  if (!(mean <= 1)) message << what << ": in the mean " << mean << " times the allowed error; ";
  return message.str();
}

}  // namespace

std::string mismatch(const Outputs& got, const Outputs& expected, ScalarType type, Tolerance tolerance) {
  std::string sentences;
  for (const Output& output : got) {
    const auto wanted = std::find_if(expected.begin(), expected.end(),
                                     [&](const Output& candidate) { return candidate.name == output.name; });
    const std::string what = output.name + " of " + name_of(type);
    if (wanted == expected.end()) return "no reference for " + output.name;
    if (wanted->values.size() != output.values.size()) return "wrong size of " + output.name;
    if (!output.clean) sentences += output.name + " was written between its rows; ";
    sentences += mismatch(output, wanted->values, what, tolerance);
  }
  return sentences;
}

std::string bitwise_mismatch(const Outputs& a, const Outputs& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].bytes != b[i].bytes) return a[i].name + " differs";
  }
  return a.size() == b.size() ? "" : "not the same outputs";
}

}  // namespace mixture_of_mamba::testing
