// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/selective_scan_bwd.h"

namespace mixture_of_mamba {

size_t selective_scan_backward_workspace_cuda(const SelectiveScanBackwardParams& params) {
  return fast_backward_supports(params) ? fast_backward_workspace(params)
                                        : general_backward_workspace(params);
}

int launch_selective_scan_backward_cuda(const SelectiveScanBackwardParams& params, void* workspace,
                                        CUstream_st* stream) {
  return fast_backward_supports(params) ? launch_fast_backward(params, workspace, stream)
                                        : launch_general_backward(params, workspace, stream);
}

}  // namespace mixture_of_mamba
