// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tuple>

#include "ops/mamba_block_inputs.h"

// mamba_block: the whole block of plain projections as one op, with rows in sorted order.
//
//   x, z     = in_proj(input)
//   u        = silu(causal_conv1d(x))
//   dt, B, C = x_proj(u)
//   y        = selective_scan(u, dt_proj(dt), -exp(A_log), B, C, D, z, dt_bias)
//   output   = out_proj(y)
//
// It is what the ops compute one after the other, less what lies between them: halves and slices are written
// where the next step reads them, the two gradients of u meet in a GEMM, and the host makes one call.
//
// Kept for backward: xz, x_dbl, and, unless `lean`, u and the checkpoints of the scan. dt is made again by a
// narrow GEMM; y falls off where backward walks the scan.

namespace mixture_of_mamba::ops {

using BlockOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The convolution, and the steps up to the scan's inputs.
template <typename Backend>
void block_conv(const BlockInputs& in, const Backend& backend, const Tensor& xz, const Tensor& u,
                const OptionalTensor& final_state) {
  ConvInputs conv = in.conv(xz);
  conv.conversions.run(backend);
  CausalConv1dForwardParams params;
  conv.fill(params);
  params.y = MatrixView(u).writable();
  params.final_state = final_state ? final_state->mutable_data_ptr() : nullptr;
  params.settled_state =
      in.settled() && in.conv_state && params.initial_state == in.conv_state->const_data_ptr();
  backend.run(params);
}

// run(params), whose inputs and y are there, adds states and checkpoints and runs the scan.
template <typename Backend, typename Run>
void block_scan(const BlockInputs& in, const Backend& backend, const Tensor& xz, const Tensor& x_dbl,
                const Tensor& u, const Tensor& dt, const Tensor& y, const Run& run) {
  ScanInputs scan = in.scan(xz, x_dbl, u, dt);
  scan.conversions.run(backend);
  SelectiveScanForwardParams params;
  scan.fill(params);
  params.out = MatrixView(y).writable();
  run(params);
}

// What forward makes on its way.
struct BlockForward {
  Tensor xz, x_dbl, u, y;
};

// The whole of forward; the convolution's state after the last token goes to `conv_state`. Of the scan as in
// block_scan().
template <typename Backend, typename Run>
BlockForward run_block(const BlockInputs& in, const Backend& backend, const Tensor& conv_state,
                       const Run& run_scan) {
  const Tensor xz = in.empty(in.tokens, 2 * in.inner), u = in.empty(in.tokens, in.inner);
  const Settled weights = in.settled() ? Settled::kWeights : Settled::kNothing;  // nothing here writes one
  in.in_proj.forward(in.x, MatrixView(xz), in.settled() ? Settled::kEverything : Settled::kNothing);
  block_conv(in, backend, xz, u, conv_state);
  const Tensor x_dbl = in.empty(in.tokens, in.rank + 2 * in.states), dt = in.empty(in.tokens, in.inner);
  in.x_proj.forward(MatrixView(u), MatrixView(x_dbl), weights);
  in.dt_proj.forward(in.dt_of(x_dbl), MatrixView(dt), weights);
  const Tensor gated = in.empty(in.tokens, in.inner);
  block_scan(in, backend, xz, x_dbl, u, dt, gated, run_scan);
  const Tensor y = empty_like_device(in.input, {in.batch, in.length, in.out_proj.out_features()}, in.io);
  in.out_proj.forward(MatrixView(gated), MatrixView(y, in.tokens, y.size(2), y.size(2)), weights);
  return {xz, x_dbl, u, y};
}

template <typename Backend>
BlockOutputs mamba_block(Tensor x, Tensors in_weight, Tensors in_bias, Tensor conv_weight,
                         OptionalTensor conv_bias, Tensors x_weight, Tensors dt_weight, Tensors dt_bias,
                         Tensor A_log, Tensor D, Tensors out_weight, Tensors out_bias, OptionalTensor rows,
                         OptionalTensor offsets, OptionalTensor host_offsets, OptionalTensor cu_seqlens,
                         OptionalTensor conv_state, OptionalTensor ssm_state, bool lean, bool keep) {
  BlockInputs in("mamba_block", Backend::products(), x, in_weight, in_bias, conv_weight, conv_bias, x_weight,
                 dt_weight, dt_bias, A_log, D, out_weight, out_bias, rows, offsets, host_offsets, cu_seqlens,
                 conv_state, ssm_state);
  const Backend backend(x);
  in.conversions.run(backend);
  const Tensor new_conv_state = empty_like_device(x, {in.sequences(), in.taps(), in.inner}, in.io);
  const Tensor new_ssm_state = empty_like_device(x, {in.sequences(), in.inner, in.states}, in.acc);
  const auto nothing = [&](Dtype dtype) { return empty_like_device(x, {0}, dtype); };
  const bool checkpoint = keep && !lean;
  const Tensor checkpoints =
      checkpoint ? empty_like_device(x, {in.slots(), in.inner, in.states}, in.acc) : nothing(in.acc);
  const BlockForward made = run_block(in, backend, new_conv_state, [&](SelectiveScanForwardParams& params) {
    params.final_state = new_ssm_state.mutable_data_ptr();
    params.checkpoints = checkpoint ? checkpoints.mutable_data_ptr() : nullptr;
    params.for_training = keep;
    backend.run(params);
  });
  return {made.y,
          new_conv_state,
          new_ssm_state,
          keep ? made.xz : nothing(in.io),
          keep ? made.x_dbl : nothing(in.io),
          checkpoint ? made.u : nothing(in.io),
          checkpoints};
}

// Forward of one or a few tokens that updates both states in place.
template <typename Backend>
Tensor mamba_block_step(Tensor x, Tensors in_weight, Tensors in_bias, Tensor conv_weight,
                        OptionalTensor conv_bias, Tensors x_weight, Tensors dt_weight, Tensors dt_bias,
                        Tensor A_log, Tensor D, Tensors out_weight, Tensors out_bias, OptionalTensor rows,
                        OptionalTensor offsets, OptionalTensor host_offsets, Tensor conv_state,
                        Tensor ssm_state) {
  BlockInputs in("mamba_block_step", Backend::products(), x, in_weight, in_bias, conv_weight, conv_bias,
                 x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias, rows, offsets, host_offsets,
                 std::nullopt, conv_state, std::nullopt);
  // Both before the first of them is written.
  require_shape(in.op, "conv_state", conv_state, {in.sequences(), in.taps(), in.inner},
                "[sequences, width - 1, channels]");
  require_in_place(in.op, "conv_state", conv_state, in.io);
  const StepState in_place(in.op, "ssm_state", ssm_state, {in.sequences(), in.inner, in.states}, "x", x,
                           in.acc);
  const Backend backend(x);
  in.conversions.run(backend);
  return run_block(in, backend, conv_state,
                   [&](SelectiveScanForwardParams& params) { in_place.run(backend, params, in.settled()); })
      .y;
}

}  // namespace mixture_of_mamba::ops
