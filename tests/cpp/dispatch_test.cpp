// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/dispatch.h"

#include <cstdlib>
#include <string>

#include "check.h"

namespace mixture_of_mamba::testing {
namespace {

const Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};
const Isa kAtStart = chosen_isa();

Isa best() {
  return isa_available(Isa::kAvx512) ? Isa::kAvx512 : isa_available(Isa::kAvx2) ? Isa::kAvx2 : Isa::kBaseline;
}

// Channels that fill no instruction set's vectors.
template <typename Problem>
Problem small(ScalarType type) {
  Problem problem = Problem::base(type);
  problem.channels = 19;
  Random random(0);
  problem.fill(random);
  return problem;
}

TEST_CASE("a processor runs the instruction sets below its best one", "[dispatch]") {
  CHECK(isa_available(Isa::kBaseline));
  if (isa_available(Isa::kAvx512)) CHECK(isa_available(Isa::kAvx2));
}

TEST_CASE("the best instruction set runs, unless MOM_CPU_ISA names another", "[dispatch]") {
  const char* variable = std::getenv("MOM_CPU_ISA");
  const std::string wanted = variable != nullptr ? variable : "";
  INFO("MOM_CPU_ISA " << wanted);
  const Isa expected = wanted == "baseline" ? Isa::kBaseline
                       : wanted == "avx2"   ? Isa::kAvx2
                       : wanted == "avx512" ? Isa::kAvx512
                                            : best();
  CHECK(kAtStart == (isa_available(expected) ? expected : best()));
}

TEST_CASE("a forced instruction set is the one that runs, and all compute the same", "[dispatch]") {
  const Isa before = chosen_isa();
  for (Isa isa : kAll) {
    if (!isa_available(isa)) continue;
    force_isa(isa);
    CHECK(chosen_isa() == isa);
    for (ScalarType type : device().types()) {
      check_results(small<ScanProblem>(type), device().scan);
      check_results(small<ConvProblem>(type), device().conv);
    }
  }
  force_isa(before);
}

// Backward may run where forward did not: the layout of checkpoints is the same for all.
TEST_CASE("backward reads checkpoints that another instruction set left", "[dispatch]") {
  const Isa before = chosen_isa();
  for (Isa forward : kAll) {
    for (Isa backward : kAll) {
      if (!isa_available(forward) || !isa_available(backward)) continue;
      INFO("forward " << static_cast<int>(forward) << ", backward " << static_cast<int>(backward));
      const ScanBackend cpu = device().scan[0];
      const ScanBackend mixed = {"mixed", [&](const auto& p) { force_isa(forward), cpu.forward(p); },
                                 [&](const auto& p) { force_isa(backward), cpu.backward(p); }};
      for (ScalarType type : device().types()) check_results(small<ScanProblem>(type), std::vector{mixed});
    }
  }
  force_isa(before);
}

}  // namespace
}  // namespace mixture_of_mamba::testing
