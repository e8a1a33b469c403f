// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "catch.h"
#include "device.h"

// Conversions of parameters and their gradients, many in one launch.

namespace mixture_of_mamba::testing {
namespace {

using Rule = Conversion::Rule;

// One vector on its way: its memory, and what must come out.
struct Problem {
  Rule rule;
  Matrix from, factor, to;
  Reals values, factors;
  bool in_place;

  Problem(Arena& arena, Random& random, int64_t count, Rule rule_, ScalarType from_type, ScalarType to_type,
          int64_t offset)
      : rule(rule_),
        from(arena, from_type, 1, count, 0, offset),
        factor(arena, from_type, 1, count),
        to(arena, to_type, 1, count, 0, offset),
        values(random.normal(count, 0, 1, from_type)),
        factors(random.normal(count, 0, 1, from_type)),
        in_place(from_type == to_type && random.chance(3)) {
    from.write(values);
    factor.write(factors);
  }

  const Matrix& result() const { return in_place ? from : to; }
  Conversion conversion() const {
    const bool multiply = rule == Rule::kMultiply;
    return {rule,
            from.type(),
            to.type(),
            from.data(),
            multiply ? factor.data() : nullptr,
            result().data(),
            static_cast<int64_t>(values.size())};
  }

  void check() const {
    const Reals got = result().values();
    for (size_t i = 0; i < values.size(); ++i) {
      Real expected = values[i];
      if (rule == Rule::kMinusExp) expected = -std::exp(expected);
      if (rule == Rule::kMultiply) expected *= factors[i];
      // A copy to a wider type is exact; the rest is rounded once in the arithmetic and once on storing.
      const bool wide = from.type() == ScalarType::kFloat64 || to.type() == ScalarType::kFloat64;
      const Real arithmetic = rule == Rule::kCopy ? 0 : (wide ? 1e-15L : 4e-7L) * std::fabs(expected);
      const Real storing = to.type() == ScalarType::kFloat32 ? 6e-8L * std::fabs(expected) : 0;
      const Real bound = arithmetic + storing + half_unit(to.type(), expected) * 1.001L;
      if (!(std::fabs(got[i] - expected) <= bound)) {
        FAIL_CHECK("element " << i << " of " << values.size() << ", rule " << static_cast<int>(rule) << ", "
                              << name_of(from.type()) << " to " << name_of(to.type()) << ": got "
                              << static_cast<double>(got[i]) << ", expected "
                              << static_cast<double>(expected));
        return;
      }
    }
    CHECK(result().gaps_untouched());
  }
};

void check_together(Random& random, int count, int most_elements) {
  for (const auto& run : device().conversions) {
    const std::unique_ptr<Arena> arena = device().new_arena();
    std::vector<Problem> problems;
    ConversionsParams params;
    for (int k = 0; k < count; ++k) {
      problems.emplace_back(*arena, random, random.below(most_elements + 1),
                            static_cast<Rule>(random.below(3)), random.type(device().has_float64),
                            random.type(device().has_float64), random.below(3));
      params.items[params.count++] = problems.back().conversion();
    }
    run(params);
    for (const Problem& problem : problems) problem.check();
    CHECK(arena->intact());
  }
}

TEST_CASE("vectors are converted between all types, by every rule", "[conversions]") {
  Random random(0);
  for (ScalarType from : device().types()) {
    for (ScalarType to : device().types()) {
      for (Rule rule : {Rule::kCopy, Rule::kMinusExp, Rule::kMultiply}) {
        for (const auto& run : device().conversions) {
          const std::unique_ptr<Arena> arena = device().new_arena();
          const Problem problem(*arena, random, 777, rule, from, to, 1);
          ConversionsParams params;
          params.items[params.count++] = problem.conversion();
          run(params);
          problem.check();
          CHECK(arena->intact());
        }
      }
    }
  }
}

TEST_CASE("many vectors of any sizes go together", "[conversions]") {
  for (int i = 0; i < random_cases(); ++i) {
    INFO("problem " << i);
    Random random(i);
    check_together(random, random.below(ConversionsParams::kMost + 1), random.chance(10) ? 70000 : 300);
  }
}

}  // namespace
}  // namespace mixture_of_mamba::testing
