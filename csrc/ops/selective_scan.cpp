// SPDX-License-Identifier: Apache-2.0
#include "ops/selective_scan.h"

#include "ops/cpu_backend.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mixture_of_mamba, m) {
  m.def(
      "selective_scan(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? "
      "dt_bias, "
      "Tensor? rows, Tensor? offsets, Tensor? cu_seqlens, Tensor? initial_state, bool softplus, bool "
      "reverse, "
      "bool checkpoint) -> (Tensor out, Tensor final_state, Tensor checkpoints)");
  m.def(
      "selective_scan_backward(Tensor grad_out, Tensor? grad_final_state, Tensor u, Tensor dt, Tensor A, "
      "Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? rows, Tensor? offsets, Tensor? cu_seqlens, "
      "Tensor? initial_state, Tensor? checkpoints, bool softplus, bool reverse) -> (Tensor grad_u, Tensor "
      "grad_dt, "
      "Tensor grad_A, Tensor grad_B, Tensor grad_C, Tensor grad_D, Tensor grad_z, Tensor grad_dt_bias, "
      "Tensor grad_initial_state)");
  m.def(
      "selective_scan_step(Tensor u, Tensor(a!) state, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? dt_bias, Tensor? rows, Tensor? offsets, bool softplus) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CPU, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("selective_scan", TORCH_BOX(&selective_scan<CpuBackend>));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward<CpuBackend>));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step<CpuBackend>));
}
