// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/selective_scan.h"

namespace mixture_of_mamba {
#define MOM_DECLARE(isa)                                                                \
  namespace isa {                                                                       \
  void selective_scan_forward(const SelectiveScanForwardParams&, const ParallelFor&);   \
  void selective_scan_backward(const SelectiveScanBackwardParams&, const ParallelFor&); \
  }
MOM_DECLARE(baseline)
MOM_DECLARE(avx2)
MOM_DECLARE(avx512)
#undef MOM_DECLARE
}  // namespace mixture_of_mamba
