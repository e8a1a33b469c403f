// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdint>
#include <cstring>

#include "check.h"

namespace mixture_of_mamba::testing {

TEST_CASE("the scan and its gradients agree with scalar loops on random problems", "[selective_scan]") {
  for (int i = 0; i < random_cases(); ++i) {
    INFO("problem " << i);
    Random random(i);
    check_results(ScanProblem::random(random, device().has_float64, longest_of(i)), device().scan);
  }
}

TEST_CASE("the scan and its gradients agree with scalar loops for every option and unusual size",
          "[selective_scan]") {
  for (ScalarType type : device().types()) {
    for (const ScanProblem& problem : ScanProblem::table(type)) check_results(problem, device().scan);
  }
}

TEST_CASE("the scan and its gradients agree with scalar loops however sequences are cut",
          "[selective_scan][large]") {
  for (ScalarType type : device().types()) {
    for (const ScanProblem& problem : ScanProblem::large_table(type)) check_results(problem, device().scan);
  }
}

TEST_CASE("the scan touches nothing beyond its tensors when rows and boundaries are garbage",
          "[selective_scan]") {
  for (int i = 0; i < random_cases(); ++i) {
    INFO("problem " << i);
    Random random(i);
    const ScanProblem problem = ScanProblem::random(random, device().has_float64, longest_of(i));
    check_memory(problem, random, device().scan);
  }
}

// A token's place in its sequence, in walk order.
struct Place {
  int64_t sequence, step;
};

Place place_of(const ScanProblem& problem, int64_t row) {
  const Tokens& tokens = problem.tokens;
  for (int64_t s = 0; s < tokens.sequences(); ++s) {
    for (int64_t i = 0; i < tokens.lengths[s]; ++i) {
      if (tokens.rows[tokens.begin(s) + i] == row)
        return {s, problem.reverse ? tokens.lengths[s] - 1 - i : i};
    }
  }
  return {-1, -1};
}

// Not only the quiet NaN that arithmetic makes: every bit of the fraction is set, as in poisoned memory.
Real full_nan() {
  const uint64_t bits = UINT64_MAX;
  double nan;
  std::memcpy(&nan, &bits, sizeof(nan));
  return nan;
}

// Runs the problem and counts the elements of out and final_state that should be NaN and are not, or are and
// should not be.
template <typename OutIsNan, typename StateIsNan>
void check_nans(const ScanProblem& problem, const OutIsNan& out_is_nan, const StateIsNan& state_is_nan) {
  INFO(problem.describe());
  for (const ScanBackend& backend : device().scan) {
    INFO(backend.name);
    const std::unique_ptr<Arena> arena = device().new_arena();
    for (const Output& output : problem.run(*arena, backend)) {
      int wrong = 0;
      for (int64_t i = 0; i < static_cast<int64_t>(output.values.size()); ++i) {
        if (output.name == "out") wrong += std::isnan(output.values[i]) != out_is_nan(i);
        if (output.name == "final_state") wrong += std::isnan(output.values[i]) != state_is_nan(i);
      }
      INFO(output.name);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("a NaN stays in its channel and sequence, and reaches everything after it", "[selective_scan]") {
  for (ScalarType type : device().types()) {
    for (bool reverse : {false, true}) {
      Random random(reverse);
      ScanProblem problem = ScanProblem::base(type);
      problem.reverse = reverse;
      const int64_t row = random.below(static_cast<int>(problem.tokens.count()));
      const int64_t channel = random.below(static_cast<int>(problem.channels));
      const Place poisoned = place_of(problem, row);
      problem.u[row * problem.channels + channel] = full_nan();
      check_nans(
          problem,
          [&](int64_t i) {
            const Place place = place_of(problem, i / problem.channels);
            return i % problem.channels == channel && place.sequence == poisoned.sequence &&
                   place.step >= poisoned.step;
          },
          [&](int64_t i) { return i / problem.states == poisoned.sequence * problem.channels + channel; });
    }
  }
}

TEST_CASE("a NaN among the rates reaches all of its channel, and of the states its own", "[selective_scan]") {
  for (ScalarType type : device().types()) {
    ScanProblem problem = ScanProblem::base(type);
    const int64_t channel = 3, state = 5;
    problem.A[channel * problem.states + state] = full_nan();
    check_nans(
        problem, [&](int64_t i) { return i % problem.channels == channel; },
        [&](int64_t i) {
          return i % problem.states == state && i / problem.states % problem.channels == channel;
        });
  }
}

}  // namespace mixture_of_mamba::testing
