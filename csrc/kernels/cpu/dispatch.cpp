// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace mixture_of_mamba {

bool isa_available(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             isa_available(Isa::kAvx2);
    case Isa::kAvx2:
      // Every processor with AVX2 that is not an early VIA part has F16C.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kBaseline:
      return true;
  }
#endif
  return isa == Isa::kBaseline;
}

namespace {

Isa detect() {
  const Isa best = isa_available(Isa::kAvx512) ? Isa::kAvx512
                   : isa_available(Isa::kAvx2) ? Isa::kAvx2
                                               : Isa::kBaseline;
  const char* wanted = std::getenv("MOM_CPU_ISA");
  if (wanted == nullptr) return best;
  const Isa named = std::strcmp(wanted, "avx512") == 0     ? Isa::kAvx512
                    : std::strcmp(wanted, "avx2") == 0     ? Isa::kAvx2
                    : std::strcmp(wanted, "baseline") == 0 ? Isa::kBaseline
                                                           : best;
  return isa_available(named) ? named : best;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{detect()};
  return isa;
}

}  // namespace

Isa chosen_isa() { return current().load(std::memory_order_relaxed); }
void force_isa(Isa isa) { current().store(isa, std::memory_order_relaxed); }

}  // namespace mixture_of_mamba
