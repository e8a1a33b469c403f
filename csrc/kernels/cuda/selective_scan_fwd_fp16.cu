// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/selective_scan_fwd_kernels.cuh"

namespace mixture_of_mamba::scan_forward {

template int launch_main<__half>(const ForwardArgs&, Tile, int, Access, CUstream_st*);
template int launch_prepass<__half>(const ForwardArgs&, int, Access, CUstream_st*);
template int launch_adjoint<__half>(const ForwardArgs&, CUstream_st*);

}  // namespace mixture_of_mamba::scan_forward
