// SPDX-License-Identifier: Apache-2.0
#pragma once

// Which of the compiled instruction sets to run. Each *_isa.cpp is compiled once per set, into the
// namespace mixture_of_mamba::<set>; nothing outside that namespace may be defined there, or the
// linker could keep the AVX-512 copy of a shared function.

namespace mixture_of_mamba {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best that this machine runs, or the one that the environment variable MOM_CPU_ISA names
// (baseline, avx2 or avx512; one that the machine lacks is ignored).
Isa chosen_isa();
bool isa_available(Isa isa);

// For tests: overrides chosen_isa() from here on.
void force_isa(Isa isa);

}  // namespace mixture_of_mamba

// Calls `function(arguments)` of the chosen set.
#define MOM_CALL_CHOSEN_ISA(function, ...)    \
  switch (::mixture_of_mamba::chosen_isa()) { \
    case ::mixture_of_mamba::Isa::kAvx512:    \
      return avx512::function(__VA_ARGS__);   \
    case ::mixture_of_mamba::Isa::kAvx2:      \
      return avx2::function(__VA_ARGS__);     \
    case ::mixture_of_mamba::Isa::kBaseline:  \
      return baseline::function(__VA_ARGS__); \
  }
