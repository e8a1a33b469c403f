// SPDX-License-Identifier: Apache-2.0
#include "ops/mamba_block_backward.h"

#include "ops/cpu_backend.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mixture_of_mamba, m) {
  m.def(
      "mamba_block(Tensor x, Tensor[] in_weight, Tensor[] in_bias, Tensor conv_weight, Tensor? conv_bias, "
      "Tensor[] x_weight, Tensor[] dt_weight, Tensor[] dt_bias, Tensor A_log, Tensor D, Tensor[] out_weight, "
      "Tensor[] out_bias, Tensor? rows, Tensor? offsets, Tensor? host_offsets, Tensor? cu_seqlens, "
      "Tensor? conv_state, Tensor? ssm_state, bool lean, bool keep) -> (Tensor y, Tensor new_conv_state, "
      "Tensor new_ssm_state, Tensor xz, Tensor x_dbl, Tensor u, Tensor checkpoints)");
  m.def(
      "mamba_block_step(Tensor x, Tensor[] in_weight, Tensor[] in_bias, Tensor conv_weight, "
      "Tensor? conv_bias, Tensor[] x_weight, Tensor[] dt_weight, Tensor[] dt_bias, Tensor A_log, Tensor D, "
      "Tensor[] out_weight, Tensor[] out_bias, Tensor? rows, Tensor? offsets, Tensor? host_offsets, "
      "Tensor(a!) conv_state, Tensor(b!) ssm_state) -> Tensor");
  m.def(
      "mamba_block_backward(Tensor grad_y, Tensor? grad_conv_state, Tensor? grad_ssm_state, Tensor x, "
      "Tensor[] in_weight, Tensor[] in_bias, Tensor conv_weight, Tensor? conv_bias, Tensor[] x_weight, "
      "Tensor[] dt_weight, Tensor[] dt_bias, Tensor A_log, Tensor D, Tensor[] out_weight, Tensor[] out_bias, "
      "Tensor? rows, Tensor? offsets, Tensor? host_offsets, Tensor? cu_seqlens, Tensor? conv_state, "
      "Tensor? ssm_state, Tensor xz, Tensor x_dbl, Tensor u, Tensor checkpoints, int needs) -> "
      "(Tensor grad_x, Tensor[] grad_in_weight, Tensor[] grad_in_bias, Tensor grad_conv_weight, "
      "Tensor grad_conv_bias, Tensor[] grad_x_weight, Tensor[] grad_dt_weight, Tensor[] grad_dt_bias, "
      "Tensor grad_A_log, Tensor grad_D, Tensor[] grad_out_weight, Tensor[] grad_out_bias, "
      "Tensor grad_old_conv_state, Tensor grad_old_ssm_state)");
}

STABLE_TORCH_LIBRARY_IMPL(mixture_of_mamba, CPU, m) {
  using namespace mixture_of_mamba::ops;
  m.impl("mamba_block", TORCH_BOX(&mamba_block<CpuBackend>));
  m.impl("mamba_block_step", TORCH_BOX(&mamba_block_step<CpuBackend>));
  m.impl("mamba_block_backward", TORCH_BOX(&mamba_block_backward<CpuBackend>));
}
