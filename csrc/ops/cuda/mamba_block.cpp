// SPDX-License-Identifier: Apache-2.0
#include "ops/mamba_block_backward.h"

#include "ops/cuda/backend.h"

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CUDA, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("mamba_block", TORCH_BOX(&mamba_block<CudaBackend>));
  m.impl("mamba_block_step", TORCH_BOX(&mamba_block_step<CudaBackend>));
  m.impl("mamba_block_backward", TORCH_BOX(&mamba_block_backward<CudaBackend>));
}
