// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "catch.h"
#include "device.h"

// What the tests of the scan and of the convolution demand of a problem.

namespace mixture_of_mamba::testing {

// Every backend's results are right, nothing else is written, and ways of one name agree bit by bit.
template <typename Problem, typename Backend>
void check_results(const Problem& problem, const std::vector<Backend>& backends) {
  INFO(problem.describe());
  const Outputs expected = problem.reference();
  const Tolerance tolerance = device().tolerance(problem.type) * problem.error_growth();
  std::map<std::string, Outputs> first;
  for (const Backend& backend : backends) {
    INFO(backend.name);
    const std::unique_ptr<Arena> arena = device().new_arena();
    const Outputs got = problem.run(*arena, backend);
    CHECK(mismatch(got, expected, problem.type, tolerance) == "");
    CHECK(arena->intact());
    const auto [same, is_first] = first.emplace(backend.name, got);
    if (!is_first) CHECK(bitwise_mismatch(got, same->second) == "");
  }
}

// With garbage in rows, offsets and boundaries, results are unspecified, but nothing else is touched.
template <typename Problem, typename Backend>
void check_memory(Problem problem, Random& random, const std::vector<Backend>& backends) {
  problem.tokens = problem.tokens.hostile(random);
  INFO(problem.describe());
  for (const Backend& backend : backends) {
    INFO(backend.name);
    const std::unique_ptr<Arena> arena = device().new_arena();
    for (const Output& output : problem.run(*arena, backend)) {
      INFO(output.name);
      CHECK(output.clean);
    }
    CHECK(arena->intact());
  }
}

// Lengths of most random problems fit into a few tiles; every eighth problem may have several chunks.
inline int longest_of(int index) { return index % 8 == 7 ? 400 : 70; }

}  // namespace mixture_of_mamba::testing
