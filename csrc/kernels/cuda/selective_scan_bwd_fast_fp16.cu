// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/selective_scan_bwd_fast_kernel.cuh"

namespace mixture_of_mamba::fast_backward {

template int launch_main<__half>(const Args&, int, CUstream_st*);

}  // namespace mixture_of_mamba::fast_backward
