// SPDX-License-Identifier: Apache-2.0
#include "ops/causal_conv1d.h"

#include "ops/cuda/backend.h"

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CUDA, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d<CudaBackend>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward<CudaBackend>));
  m.impl("causal_conv1d_step", TORCH_BOX(&causal_conv1d_step<CudaBackend>));
}
