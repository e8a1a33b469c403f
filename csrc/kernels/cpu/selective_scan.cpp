// SPDX-License-Identifier: Apache-2.0
#include "kernels/selective_scan.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/selective_scan_isa.h"

namespace mixture_of_mamba {

void run_selective_scan_forward_cpu(const SelectiveScanForwardParams& params, ParallelFor parallel) {
  MOM_CALL_CHOSEN_ISA(selective_scan_forward, params, parallel)
}

void run_selective_scan_backward_cpu(const SelectiveScanBackwardParams& params, ParallelFor parallel) {
  MOM_CALL_CHOSEN_ISA(selective_scan_backward, params, parallel)
}

}  // namespace mixture_of_mamba
