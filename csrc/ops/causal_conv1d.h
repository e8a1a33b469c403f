// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tuple>

#include "kernels/causal_conv1d.h"
#include "ops/conversions.h"
#include "ops/token_order.h"

// causal_conv1d for any backend: checks, allocation, launch. The mathematics is in
// kernels/causal_conv1d.h.

namespace mixture_of_mamba::ops {

struct ConvInputs {
  ConvInputs(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const OptionalTensor& rows, const OptionalTensor& offsets, const OptionalTensor& cu_seqlens,
             const OptionalTensor& initial_state, bool silu, const char* state_name = "initial_state");

  void fill(CausalConv1dParams& params) const;
  int64_t sequences() const { return order.order().sequences; }

  Dtype io, acc;
  ScalarType type;
  int64_t batch, length, channels, width;
  bool silu;
  Order order;
  RowView x;
  Conversions conversions;  // to be run before the kernel
  Block weight, bias, initial_state;
};

template <typename Backend>
std::tuple<Tensor, Tensor> causal_conv1d(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor rows,
                                         OptionalTensor offsets, OptionalTensor cu_seqlens,
                                         OptionalTensor initial_state, bool silu) {
  ConvInputs in("causal_conv1d", x, weight, bias, rows, offsets, cu_seqlens, initial_state, silu);
  const Tensor y = empty_like_device(x, {in.batch, in.length, in.channels}, in.io);
  const Tensor final_state = empty_like_device(x, {in.sequences(), in.width - 1, in.channels}, in.io);
  CausalConv1dForwardParams params;
  in.fill(params);
  params.y = {y.mutable_data_ptr(), in.channels};
  params.final_state = final_state.mutable_data_ptr();
  const Backend backend(x);
  in.conversions.run(backend);
  backend.run(params);
  return {y, final_state};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(Tensor grad_y,
                                                                  OptionalTensor grad_final_state, Tensor x,
                                                                  Tensor weight, OptionalTensor bias,
                                                                  OptionalTensor rows, OptionalTensor offsets,
                                                                  OptionalTensor cu_seqlens,
                                                                  OptionalTensor initial_state, bool silu) {
  const char* op = "causal_conv1d_backward";
  ConvInputs in(op, x, weight, bias, rows, offsets, cu_seqlens, initial_state, silu);
  require_floating(op, "grad_y", grad_y);
  require_shape(op, "grad_y", grad_y, {in.batch, in.length, in.channels}, "[batch, length, channels]");
  require_device(op, "grad_y", grad_y, "x", x);
  const RowView grad_y_rows(grad_y, in.io);
  Block grad_final;
  if (grad_final_state) {
    require_shape(op, "grad_final_state", *grad_final_state, {in.sequences(), in.width - 1, in.channels},
                  "[sequences, width - 1, channels]");
    require_device(op, "grad_final_state", *grad_final_state, "x", x);
    grad_final = Block(*grad_final_state, in.io);
  }
  const Tensor grad_x = empty_like_device(x, {in.batch, in.length, in.channels}, in.io);
  const Tensor grad_weight = empty_like_device(x, {in.channels, in.width}, in.acc);
  const Tensor grad_bias =
      bias ? empty_like_device(x, {in.channels}, in.acc) : empty_like_device(x, {0}, in.acc);
  const Tensor grad_initial = initial_state
                                  ? empty_like_device(x, {in.sequences(), in.width - 1, in.channels}, in.io)
                                  : empty_like_device(x, {0}, in.io);
  CausalConv1dBackwardParams params;
  in.fill(params);
  params.grad_y = grad_y_rows.rows();
  params.grad_final_state = grad_final.data();
  params.grad_x = {grad_x.mutable_data_ptr(), in.channels};
  params.grad_weight = grad_weight.mutable_data_ptr();
  if (bias) params.grad_bias = grad_bias.mutable_data_ptr();
  if (initial_state) params.grad_initial_state = grad_initial.mutable_data_ptr();
  const Backend backend(x);
  in.conversions.run(backend);
  backend.run(params);
  return {grad_x, to_dtype(grad_weight, weight.scalar_type()),
          bias ? to_dtype(grad_bias, bias->scalar_type()) : grad_bias,
          initial_state ? to_dtype(grad_initial, initial_state->scalar_type()) : grad_initial};
}

template <typename Backend>
Tensor causal_conv1d_step(Tensor x, Tensor state, Tensor weight, OptionalTensor bias, OptionalTensor rows,
                          OptionalTensor offsets, bool silu) {
  const char* op = "causal_conv1d_step";
  ConvInputs in(op, x, weight, bias, rows, offsets, std::nullopt, state, silu, "state");
  require_in_place(op, "state", state, in.io);
  const Tensor y = empty_like_device(x, {in.batch, in.length, in.channels}, in.io);
  CausalConv1dForwardParams params;
  in.fill(params);
  params.y = {y.mutable_data_ptr(), in.channels};
  params.final_state = state.mutable_data_ptr();
  const Backend backend(x);
  in.conversions.run(backend);
  backend.run(params);
  return y;
}

}  // namespace mixture_of_mamba::ops
