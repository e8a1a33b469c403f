// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tuple>

#include "kernels/selective_scan.h"
#include "ops/conversions.h"
#include "ops/step_state.h"
#include "ops/token_order.h"

// selective_scan for any backend: checks, allocation, launch. The mathematics is in
// kernels/selective_scan.h.

namespace mixture_of_mamba::ops {

// Inputs of one call, checked, in the form kernels take. Activations are promoted to one dtype;
// parameters and states to the accumulation dtype.
struct ScanInputs {
  ScanInputs(const char* op, const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B,
             const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
             const OptionalTensor& rows, const OptionalTensor& offsets, const OptionalTensor& cu_seqlens,
             const OptionalTensor& initial_state, bool softplus, bool reverse,
             const char* state_name = "initial_state");

  void fill(SelectiveScanParams& params) const;
  int64_t slots() const { return selective_scan_checkpoint_slots(tokens(), sequences()); }
  int64_t tokens() const { return order.order().tokens; }
  int64_t sequences() const { return order.order().sequences; }

  Dtype io, acc;
  ScalarType type;
  int64_t batch, length, channels, states;
  int64_t bias_modalities = 0;
  bool softplus, reverse;
  Order order;
  RowView u, dt, B, C, z;
  Conversions conversions;  // to be run before the kernel
  Block A, D, dt_bias, initial_state;
};

using ScanOutputs = std::tuple<Tensor, Tensor, Tensor>;

template <typename Backend>
ScanOutputs selective_scan(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                           OptionalTensor z, OptionalTensor dt_bias, OptionalTensor rows,
                           OptionalTensor offsets, OptionalTensor cu_seqlens, OptionalTensor initial_state,
                           bool softplus, bool reverse, bool checkpoint) {
  ScanInputs in("selective_scan", u, dt, A, B, C, D, z, dt_bias, rows, offsets, cu_seqlens, initial_state,
                softplus, reverse);
  const Tensor out = empty_like_device(u, {in.batch, in.length, in.channels}, in.io);
  const Tensor final_state = empty_like_device(u, {in.sequences(), in.channels, in.states}, in.acc);
  const Tensor checkpoints = checkpoint ? empty_like_device(u, {in.slots(), in.channels, in.states}, in.acc)
                                        : empty_like_device(u, {0}, in.acc);
  SelectiveScanForwardParams params;
  in.fill(params);
  params.out = {out.mutable_data_ptr(), in.channels};
  params.final_state = final_state.mutable_data_ptr();
  params.checkpoints = checkpoint ? checkpoints.mutable_data_ptr() : nullptr;
  const Backend backend(u);
  in.conversions.run(backend);
  backend.run(params);
  return {to_dtype(out, u.scalar_type()), final_state, checkpoints};
}

using ScanGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename Backend>
ScanGradients selective_scan_backward(Tensor grad_out, OptionalTensor grad_final_state, Tensor u, Tensor dt,
                                      Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                                      OptionalTensor dt_bias, OptionalTensor rows, OptionalTensor offsets,
                                      OptionalTensor cu_seqlens, OptionalTensor initial_state,
                                      OptionalTensor checkpoints, bool softplus, bool reverse) {
  const char* op = "selective_scan_backward";
  ScanInputs in(op, u, dt, A, B, C, D, z, dt_bias, rows, offsets, cu_seqlens, initial_state, softplus,
                reverse);
  require_shape(op, "grad_out", grad_out, {in.batch, in.length, in.channels}, "[batch, length, channels]");
  require_device(op, "grad_out", grad_out, "u", u);
  require_floating(op, "grad_out", grad_out);
  const Backend backend(u);
  in.conversions.run(backend);
  const auto empty = [&](std::initializer_list<int64_t> sizes, Dtype dtype) {
    return empty_like_device(u, sizes, dtype);
  };

  Tensor saved = checkpoints ? *checkpoints : empty({0}, in.acc);
  if (saved.numel() == 0 && in.slots() * in.channels * in.states > 0) {
    saved = empty({in.slots(), in.channels, in.states}, in.acc);
    const Tensor out = empty({in.batch, in.length, in.channels}, in.io);
    SelectiveScanForwardParams forward;
    in.fill(forward);
    forward.out = {out.mutable_data_ptr(), in.channels};
    forward.checkpoints = saved.mutable_data_ptr();
    backend.run(forward);
  }
  require(saved.numel() == in.slots() * in.channels * in.states && saved.scalar_type() == in.acc, op,
          "checkpoints must be what selective_scan returned: ", name_of(in.acc), " [", in.slots(), ", ",
          in.channels, ", ", in.states, "], got ", name_of(saved.scalar_type()), " ", shape_of(saved));
  require_device(op, "checkpoints", saved, "u", u);

  const RowView grad_out_rows(grad_out, in.io);
  Block grad_final;
  if (grad_final_state) {
    require_shape(op, "grad_final_state", *grad_final_state, {in.sequences(), in.channels, in.states},
                  "[sequences, channels, states]");
    require_device(op, "grad_final_state", *grad_final_state, "u", u);
    grad_final = Block(*grad_final_state, in.acc);
  }
  const Tensor grad_u = empty({in.batch, in.length, in.channels}, in.io);
  const Tensor grad_dt = empty({in.batch, in.length, in.channels}, in.io);
  const Tensor grad_z = z ? empty({in.batch, in.length, in.channels}, in.io) : empty({0}, in.io);
  const Tensor grad_B = empty({in.batch, in.length, in.states}, in.io);
  const Tensor grad_C = empty({in.batch, in.length, in.states}, in.io);
  const Tensor grad_A = empty({in.channels, in.states}, in.acc);
  const Tensor grad_D = D ? empty({in.channels}, in.acc) : empty({0}, in.acc);
  const Tensor grad_bias = !dt_bias              ? empty({0}, in.acc)
                           : dt_bias->dim() == 1 ? empty({in.channels}, in.acc)
                                                 : empty({in.bias_modalities, in.channels}, in.acc);
  const Tensor grad_initial =
      initial_state ? empty({in.sequences(), in.channels, in.states}, in.acc) : empty({0}, in.acc);

  SelectiveScanBackwardParams params;
  in.fill(params);
  params.grad_out = grad_out_rows.rows();
  params.grad_final_state = grad_final.data();
  params.checkpoints = saved.const_data_ptr();
  params.grad_u = {grad_u.mutable_data_ptr(), in.channels};
  params.grad_dt = {grad_dt.mutable_data_ptr(), in.channels};
  params.grad_B = {grad_B.mutable_data_ptr(), in.states};
  params.grad_C = {grad_C.mutable_data_ptr(), in.states};
  if (z) params.grad_z = {grad_z.mutable_data_ptr(), in.channels};
  params.grad_A = grad_A.mutable_data_ptr();
  if (D) params.grad_D = grad_D.mutable_data_ptr();
  if (dt_bias) params.grad_dt_bias = grad_bias.mutable_data_ptr();
  if (initial_state) params.grad_initial_state = grad_initial.mutable_data_ptr();
  backend.run(params);

  const auto like = [](const Tensor& grad, const OptionalTensor& input) {
    return input ? to_dtype(grad, input->scalar_type()) : grad;
  };
  return {like(grad_u, u), like(grad_dt, dt),        like(grad_A, A),
          like(grad_B, B), like(grad_C, C),          like(grad_D, D),
          like(grad_z, z), like(grad_bias, dt_bias), like(grad_initial, initial_state)};
}

template <typename Backend>
Tensor selective_scan_step(Tensor u, Tensor state, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                           OptionalTensor z, OptionalTensor dt_bias, OptionalTensor rows,
                           OptionalTensor offsets, bool softplus) {
  const char* op = "selective_scan_step";
  ScanInputs in(op, u, dt, A, B, C, D, z, dt_bias, rows, offsets, std::nullopt, std::nullopt, softplus,
                false);
  const StepState in_place(op, "state", state, {in.sequences(), in.channels, in.states}, "u", u, in.acc);
  const Tensor out = empty_like_device(u, {in.batch, in.length, in.channels}, in.io);
  SelectiveScanForwardParams params;
  in.fill(params);
  params.out = {out.mutable_data_ptr(), in.channels};
  const Backend backend(u);
  in.conversions.run(backend);
  in_place.run(backend, params, false);
  return to_dtype(out, u.scalar_type());
}

}  // namespace mixture_of_mamba::ops
