// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/mamba_block.h"

namespace mixture_of_mamba::ops {

// Which gradients are wanted, as bits.
enum BlockNeeds : int64_t { kNeedsX = 1, kNeedsIn = 2, kNeedsXProj = 4, kNeedsDtProj = 8, kNeedsOut = 16 };

using BlockGradients = std::tuple<Tensor, Tensors, Tensors, Tensor, Tensor, Tensors, Tensors, Tensors, Tensor,
                                  Tensor, Tensors, Tensors, Tensor, Tensor>;

template <typename Backend>
BlockGradients mamba_block_backward(
    Tensor grad_y, OptionalTensor grad_conv_state, OptionalTensor grad_ssm_state, Tensor x, Tensors in_weight,
    Tensors in_bias, Tensor conv_weight, OptionalTensor conv_bias, Tensors x_weight, Tensors dt_weight,
    Tensors dt_bias, Tensor A_log, Tensor D, Tensors out_weight, Tensors out_bias, OptionalTensor rows,
    OptionalTensor offsets, OptionalTensor host_offsets, OptionalTensor cu_seqlens, OptionalTensor conv_state,
    OptionalTensor ssm_state, Tensor xz, Tensor x_dbl, Tensor u, Tensor checkpoints, int64_t needs) {
  BlockInputs in("mamba_block_backward", Backend::products(), x, in_weight, in_bias, conv_weight, conv_bias,
                 x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias, rows, offsets, host_offsets,
                 cu_seqlens, conv_state, ssm_state);
  const Backend backend(x);
  in.conversions.run(backend);
  const MatrixView grad_rows = block_grad_y(in, grad_y);
  const Block grad_final_conv = block_grad_conv_state(in, grad_conv_state);
  const Block grad_final_ssm = block_grad_ssm_state(in, grad_ssm_state);
  check_kept(in, xz, x_dbl, u, checkpoints);
  const auto states = [&](int64_t middle, int64_t last, Dtype dtype, bool wanted) {
    return wanted ? empty_like_device(x, {in.sequences(), middle, last}, dtype)
                  : empty_like_device(x, {0}, dtype);
  };

  // A temporary goes as soon as it has been read: the next ones take its place.
  const Tensor nothing = empty_like_device(x, {0}, in.io);
  const auto release = [&nothing](auto&... read) { ((read = nothing), ...); };

  // What forward did not keep.
  Tensor dt = in.empty(in.tokens, in.inner), gated = in.empty(in.tokens, in.inner);
  in.dt_proj.forward(in.dt_of(x_dbl), MatrixView(dt));
  if (checkpoints.numel() == 0) {
    u = in.empty(in.tokens, in.inner);
    block_conv(in, backend, xz, u, {});
    checkpoints = empty_like_device(x, {in.slots(), in.inner, in.states}, in.acc);
    block_scan(in, backend, xz, x_dbl, u, dt, gated, [&](SelectiveScanForwardParams& params) {
      params.checkpoints = checkpoints.mutable_data_ptr();
      params.for_training = true;
      backend.run(params);
    });
  }

  Tensor grad_gated = in.empty(in.tokens, in.inner);
  in.out_proj.grad_input(grad_rows, MatrixView(grad_gated));
  Tensors grad_out_weight, grad_out_bias;
  if (!out_bias.empty()) grad_out_bias = in.out_proj.grad_bias(grad_rows);

  const Tensor grad_xz = in.empty(in.tokens, 2 * in.inner);
  Tensor grad_x_dbl = in.empty(in.tokens, in.rank + 2 * in.states);
  Tensor grad_u = in.empty(in.tokens, in.inner), grad_dt = in.empty(in.tokens, in.inner);
  const Tensor grad_A = empty_like_device(x, {in.inner, in.states}, in.acc);
  const Tensor grad_D = empty_like_device(x, {in.inner}, in.acc);
  const Tensor grad_dt_bias = empty_like_device(x, {static_cast<int64_t>(dt_bias.size()), in.inner}, in.acc);
  const Tensor grad_ssm = states(in.inner, in.states, in.acc, ssm_state.has_value());
  {
    ScanInputs scan = in.scan(xz, x_dbl, u, dt);
    scan.conversions.run(backend);
    SelectiveScanBackwardParams params;
    scan.fill(params);
    const RowView grad_out(MatrixView(grad_gated).as_activation(in.batch, in.length), in.io);
    params.grad_out = grad_out.rows();
    params.grad_final_state = grad_final_ssm.data();
    params.checkpoints = checkpoints.const_data_ptr();
    params.grad_u = MatrixView(grad_u).writable();
    params.grad_dt = MatrixView(grad_dt).writable();
    params.grad_B = in.B_of(grad_x_dbl).writable();
    params.grad_C = in.C_of(grad_x_dbl).writable();
    params.grad_z = in.z_of(grad_xz).writable();
    params.grad_A = grad_A.mutable_data_ptr();
    params.grad_D = grad_D.mutable_data_ptr();
    if (!dt_bias.empty()) params.grad_dt_bias = grad_dt_bias.mutable_data_ptr();
    if (ssm_state) params.grad_initial_state = grad_ssm.mutable_data_ptr();
    if (needs & kNeedsOut) params.out = MatrixView(gated).writable();
    backend.run(params);
  }
  release(dt, grad_gated, checkpoints);

  if (needs & kNeedsOut) grad_out_weight = in.out_proj.grad_weight(grad_rows, MatrixView(gated));
  release(gated);
  in.dt_proj.grad_input(MatrixView(grad_dt), in.dt_of(grad_x_dbl));
  Tensors grad_dt_weight, grad_x_weight;
  if (needs & kNeedsDtProj) grad_dt_weight = in.dt_proj.grad_weight(MatrixView(grad_dt), in.dt_of(x_dbl));
  release(grad_dt);
  in.x_proj.add_grad_input(MatrixView(grad_x_dbl), MatrixView(grad_u));
  if (needs & kNeedsXProj) grad_x_weight = in.x_proj.grad_weight(MatrixView(grad_x_dbl), MatrixView(u));
  release(grad_x_dbl, u);

  const Tensor grad_conv_weight = empty_like_device(x, {in.inner, in.taps() + 1}, in.acc);
  const Tensor grad_conv_bias = empty_like_device(x, {conv_bias ? in.inner : 0}, in.acc);
  const Tensor grad_conv = states(in.taps(), in.inner, in.io, conv_state.has_value());
  {
    ConvInputs conv = in.conv(xz);
    conv.conversions.run(backend);
    CausalConv1dBackwardParams params;
    conv.fill(params);
    const RowView grad_u_rows(MatrixView(grad_u).as_activation(in.batch, in.length), in.io);
    params.grad_y = grad_u_rows.rows();
    params.grad_final_state = grad_final_conv.data();
    params.grad_x = in.x_of(grad_xz).writable();
    params.grad_weight = grad_conv_weight.mutable_data_ptr();
    if (conv_bias) params.grad_bias = grad_conv_bias.mutable_data_ptr();
    if (conv_state) params.grad_initial_state = grad_conv.mutable_data_ptr();
    backend.run(params);
  }
  release(grad_u);

  Tensors grad_in_weight, grad_in_bias;
  if (needs & kNeedsIn) grad_in_weight = in.in_proj.grad_weight(MatrixView(grad_xz), in.x);
  if (!in_bias.empty()) grad_in_bias = in.in_proj.grad_bias(MatrixView(grad_xz));
  Tensor grad_x = nothing;
  if (needs & kNeedsX) {
    grad_x = empty_like_device(x, {in.batch, in.length, in.width}, in.io);
    in.in_proj.grad_input(MatrixView(grad_xz), MatrixView(grad_x, in.tokens, in.width, in.width));
  }
  Conversions conversions(in.op);
  const auto one_like = [&conversions](const Tensor& grad, const OptionalTensor& of) {
    return of ? conversions.contiguous(grad, of->scalar_type()) : grad;
  };
  const Tensor grad_A_log = grad_of_log(grad_A, in.A, A_log, conversions);
  const Tensors grad_dt_biases = rows_of(grad_dt_bias, dt_bias, conversions);
  const Tensor grad_conv_weight_like = one_like(grad_conv_weight, conv_weight);
  const Tensor grad_conv_bias_like = one_like(grad_conv_bias, conv_bias);
  const Tensor grad_D_like = one_like(grad_D, D);
  conversions.run(backend);
  return {grad_x,
          like(grad_in_weight, in_weight),
          like(grad_in_bias, in_bias),
          grad_conv_weight_like,
          grad_conv_bias_like,
          like(grad_x_weight, x_weight),
          like(grad_dt_weight, dt_weight),
          like(grad_dt_biases, dt_bias),
          to_dtype(grad_A_log, A_log.scalar_type()),
          grad_D_like,
          like(grad_out_weight, out_weight),
          like(grad_out_bias, out_bias),
          conv_state ? to_dtype(grad_conv, conv_state->scalar_type()) : grad_conv,
          ssm_state ? to_dtype(grad_ssm, ssm_state->scalar_type()) : grad_ssm};
}

}  // namespace mixture_of_mamba::ops
