// SPDX-License-Identifier: Apache-2.0
#include "ops/modality_routing.h"

#include "ops/cuda/backend.h"

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CUDA, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("modality_routing", TORCH_BOX(&modality_routing<CudaBackend>));
  m.impl("permute_rows", TORCH_BOX(&permute_rows<CudaBackend>));
}
