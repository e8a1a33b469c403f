// SPDX-License-Identifier: Apache-2.0
#include "ops/modality_routing.h"

#include "ops/cpu_backend.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mixture_of_mamba, m) {
  m.def(
      "modality_routing(Tensor ids, int num_modalities, bool checked) -> (Tensor rows, Tensor order, "
      "Tensor offsets)");
  m.def("permute_rows(Tensor x, Tensor index, Tensor inverse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CPU, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("modality_routing", TORCH_BOX(&modality_routing<CpuBackend>));
  m.impl("permute_rows", TORCH_BOX(&permute_rows<CpuBackend>));
}
