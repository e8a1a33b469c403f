// SPDX-License-Identifier: Apache-2.0
#include "ops/selective_scan.h"

#include "ops/cuda/backend.h"

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CUDA, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("selective_scan", TORCH_BOX(&selective_scan<CudaBackend>));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward<CudaBackend>));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step<CudaBackend>));
}
