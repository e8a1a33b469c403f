// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/causal_conv1d.h"

namespace mixture_of_mamba {
#define MOM_DECLARE(isa)                                                              \
  namespace isa {                                                                     \
  void causal_conv1d_forward(const CausalConv1dForwardParams&, const ParallelFor&);   \
  void causal_conv1d_backward(const CausalConv1dBackwardParams&, const ParallelFor&); \
  }
MOM_DECLARE(baseline)
MOM_DECLARE(avx2)
MOM_DECLARE(avx512)
#undef MOM_DECLARE
}  // namespace mixture_of_mamba
