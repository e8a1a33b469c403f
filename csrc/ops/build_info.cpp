// SPDX-License-Identifier: Apache-2.0
#include "ops/build_info.h"

#include "kernels/cpu/dispatch.h"

const char* mixture_of_mamba_built_with_torch() { return MOM_BUILT_WITH_TORCH; }

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
