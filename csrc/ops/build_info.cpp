// SPDX-License-Identifier: Apache-2.0
#include "ops/build_info.h"

#include "kernels/cpu/dispatch.h"

// With its prefix, the doctor finds it in a library that does not load.
#define MOM_BUILT_PREFIX "mixture_of_mamba built with torch "
static const char kBuiltWithTorch[] = MOM_BUILT_PREFIX MOM_BUILT_WITH_TORCH;

const char* mixture_of_mamba_built_with_torch() { return kBuiltWithTorch + sizeof(MOM_BUILT_PREFIX) - 1; }

const char* mixture_of_mamba_cpu_isa() {
  switch (mixture_of_mamba::chosen_isa()) {
    case mixture_of_mamba::Isa::kAvx512:
      return "avx512";
    case mixture_of_mamba::Isa::kAvx2:
      return "avx2";
    case mixture_of_mamba::Isa::kBaseline:
      break;
  }
  return "baseline";
}
