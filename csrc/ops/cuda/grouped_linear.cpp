// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_linear.h"

#include "ops/cuda/backend.h"

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CUDA, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear<CudaBackend>));
  m.impl("grouped_linear_backward", TORCH_BOX(&grouped_linear_backward<CudaBackend>));
}
