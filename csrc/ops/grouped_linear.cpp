// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_linear.h"

#include "ops/cpu_backend.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mixture_of_mamba, m) {
  m.def(
      "grouped_linear(Tensor x, Tensor[] weight, Tensor[] bias, Tensor offsets, Tensor? host_offsets) -> "
      "Tensor");
  m.def(
      "grouped_linear_backward(Tensor grad, Tensor x, Tensor[] weight, Tensor offsets, Tensor? host_offsets, "
      "bool needs_x, bool needs_weight, bool needs_bias) -> (Tensor grad_x, Tensor[] grad_weight, "
      "Tensor[] grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CPU, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear<CpuBackend>));
  m.impl("grouped_linear_backward", TORCH_BOX(&grouped_linear_backward<CpuBackend>));
}
