// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

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
    DYNAMIC_SECTION(name_of(type)) {
      for (const ScanProblem& problem : ScanProblem::table(type)) check_results(problem, device().scan);
    }
  }
}

TEST_CASE("the scan and its gradients agree with scalar loops however sequences are cut",
          "[selective_scan][large]") {
  for (ScalarType type : device().types()) {
    DYNAMIC_SECTION(name_of(type)) {
      for (const ScanProblem& problem : ScanProblem::large_table(type)) check_results(problem, device().scan);
    }
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

// Which elements of the outputs a NaN in some input must reach; it must reach no others.
struct Reach {
  std::function<bool(int64_t row, int64_t channel)> out;
  std::function<bool(int64_t sequence, int64_t channel, int64_t state)> final_state;
};

// Not only the quiet NaN that arithmetic makes: every bit of the fraction is set, as in poisoned memory.
Real full_nan() {
  const uint64_t bits = UINT64_MAX;
  double nan;
  std::memcpy(&nan, &bits, sizeof(nan));
  return nan;
}

void check_reach(const std::string& name, const ScanProblem& problem, const Reach& reach) {
  INFO("NaN in " << name << "; " << problem.describe());
  const int64_t channels = problem.channels, states = problem.states;
  for (const ScanBackend& backend : device().scan) {
    INFO(backend.name);
    const std::unique_ptr<Arena> arena = device().new_arena();
    for (const Output& output : problem.run(*arena, backend)) {
      int wrong = 0;
      for (int64_t i = 0; i < static_cast<int64_t>(output.values.size()); ++i) {
        const bool is_nan = std::isnan(output.values[i]);
        if (output.name == "out") wrong += is_nan != reach.out(i / channels, i % channels);
        if (output.name == "final_state") {
          wrong += is_nan != reach.final_state(i / (channels * states), i / states % channels, i % states);
        }
      }
      INFO(output.name);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("a NaN in any input reaches what depends on it and nothing else", "[selective_scan]") {
  for (ScalarType type : device().types()) {
    for (bool reverse : {false, true}) {
      ScanProblem clean = ScanProblem::base(type);
      clean.reverse = reverse;
      const Tokens& tokens = clean.tokens;
      const int64_t sequence = 1, time = tokens.begin(sequence) + 11, channel = 5, state = 9;
      const int64_t row = tokens.rows[time];
      const int modality = tokens.modality(row);
      std::vector<int64_t> time_of(tokens.count());
      for (int64_t t = 0; t < tokens.count(); ++t) time_of[tokens.rows[t]] = t;
      const auto is_ours = [&](int64_t s) { return s == sequence; };
      // Whether the token of row r is the poisoned one or walked after it.
      const auto after = [&](int64_t r) {
        return time_of[r] >= tokens.begin(sequence) && time_of[r] < tokens.begin(sequence + 1) &&
               (reverse ? time_of[r] <= time : time_of[r] >= time);
      };
      const auto in_sequence = [&](int64_t r) {
        return time_of[r] >= tokens.begin(sequence) && time_of[r] < tokens.begin(sequence + 1);
      };
      const auto check = [&](const std::string& name, Reals ScanProblem::*input, int64_t at,
                             const Reach& reach) {
        ScanProblem problem = clean;
        (problem.*input)[at] = full_nan();
        check_reach(name, problem, reach);
      };
      const auto nowhere = [](int64_t, int64_t, int64_t) { return false; };
      const Reach drive = {[&](int64_t r, int64_t c) { return c == channel && after(r); },
                           [&](int64_t s, int64_t c, int64_t) { return c == channel && is_ours(s); }};
      check("u", &ScanProblem::u, row * clean.channels + channel, drive);
      check("dt", &ScanProblem::dt, row * clean.channels + channel, drive);
      check("B", &ScanProblem::B, row * clean.states + state,
            {[&](int64_t r, int64_t) { return after(r); },
             [&](int64_t s, int64_t, int64_t n) { return n == state && is_ours(s); }});
      check("C", &ScanProblem::C, row * clean.states + state,
            {[&](int64_t r, int64_t) { return r == row; }, nowhere});
      check("z", &ScanProblem::z, row * clean.channels + channel,
            {[&](int64_t r, int64_t c) { return r == row && c == channel; }, nowhere});
      check("A", &ScanProblem::A, channel * clean.states + state,
            {[&](int64_t, int64_t c) { return c == channel; },
             [&](int64_t, int64_t c, int64_t n) { return c == channel && n == state; }});
      check("D", &ScanProblem::D, channel, {[&](int64_t, int64_t c) { return c == channel; }, nowhere});
      check("initial_state", &ScanProblem::initial_values,
            (sequence * clean.channels + channel) * clean.states + state,
            {[&](int64_t r, int64_t c) { return c == channel && in_sequence(r); },
             [&](int64_t s, int64_t c, int64_t n) { return is_ours(s) && c == channel && n == state; }});
      // Every token of the modality is a first one.
      std::vector<bool> reached(tokens.count());
      for (int64_t s = 0; s < tokens.sequences(); ++s) {
        bool seen = false;
        for (int64_t i = 0; i < tokens.lengths[s]; ++i) {
          const int64_t r = tokens.rows[tokens.begin(s) + (reverse ? tokens.lengths[s] - 1 - i : i)];
          seen = seen || tokens.modality(r) == modality;
          reached[r] = seen;
        }
        REQUIRE(seen);
      }
      check("dt_bias", &ScanProblem::dt_bias, modality * clean.channels + channel,
            {[&](int64_t r, int64_t c) { return c == channel && reached[r]; },
             [&](int64_t, int64_t c, int64_t) { return c == channel; }});
    }
  }
}

}  // namespace mixture_of_mamba::testing
