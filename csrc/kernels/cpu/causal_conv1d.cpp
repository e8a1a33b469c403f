// SPDX-License-Identifier: Apache-2.0
#include "kernels/causal_conv1d.h"

#include "kernels/cpu/causal_conv1d_isa.h"
#include "kernels/cpu/dispatch.h"

namespace mixture_of_mamba {

void run_causal_conv1d_forward_cpu(const CausalConv1dForwardParams& params, ParallelFor parallel) {
  MOM_CALL_CHOSEN_ISA(causal_conv1d_forward, params, parallel)
}

void run_causal_conv1d_backward_cpu(const CausalConv1dBackwardParams& params, ParallelFor parallel) {
  MOM_CALL_CHOSEN_ISA(causal_conv1d_backward, params, parallel)
}

}  // namespace mixture_of_mamba
