// SPDX-License-Identifier: Apache-2.0
#include "ops/causal_conv1d.h"

#include "ops/cpu_backend.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mixture_of_mamba, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? rows, Tensor? offsets, Tensor? "
      "cu_seqlens, "
      "Tensor? initial_state, bool silu) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor grad_y, Tensor? grad_final_state, Tensor x, Tensor weight, Tensor? "
      "bias, "
      "Tensor? rows, Tensor? offsets, Tensor? cu_seqlens, Tensor? initial_state, bool silu) -> (Tensor "
      "grad_x, "
      "Tensor grad_weight, Tensor grad_bias, Tensor grad_initial_state)");
  m.def(
      "causal_conv1d_step(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? rows, "
      "Tensor? offsets, bool silu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CPU, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d<CpuBackend>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward<CpuBackend>));
  m.impl("causal_conv1d_step", TORCH_BOX(&causal_conv1d_step<CpuBackend>));
}
