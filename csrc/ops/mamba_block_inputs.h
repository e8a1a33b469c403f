// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/causal_conv1d.h"
#include "ops/conversions.h"
#include "ops/products.h"
#include "ops/selective_scan.h"
#include "ops/token_order.h"

// The arguments of mamba_block and its backward, checked, and in the form that each step takes.

namespace mixture_of_mamba::ops {

// The arguments that forward and backward share, checked.
struct BlockInputs {
  BlockInputs(const char* op, const Products& products, const Tensor& x, const Tensors& in_weight,
              const Tensors& in_bias, const Tensor& conv_weight, const OptionalTensor& conv_bias,
              const Tensors& x_weight, const Tensors& dt_weight, const Tensors& dt_bias, const Tensor& A_log,
              const Tensor& D, const Tensors& out_weight, const Tensors& out_bias, const OptionalTensor& rows,
              const OptionalTensor& offsets, const OptionalTensor& host_offsets,
              const OptionalTensor& cu_seqlens, const OptionalTensor& conv_state,
              const OptionalTensor& ssm_state);

  int64_t sequences() const { return order.order().sequences; }
  int64_t taps() const { return conv_weight.size(1) - 1; }  // of the convolution into the past
  // Whether the conversions, once run, have waited for all work before this op (Settled in few_rows.h). What
  // rows, offsets and cu_seqlens needed is part of that.
  bool settled() const { return A.numel() > 0; }
  int64_t slots() const { return selective_scan_checkpoint_slots(tokens, sequences()); }
  Tensor empty(int64_t rows, int64_t columns) const { return empty_like_device(input, {rows, columns}, io); }
  // The parts of xz [tokens, 2 * inner] and of x_dbl [tokens, rank + 2 * states].
  MatrixView x_of(const Tensor& xz) const { return MatrixView(xz).column_range(0, inner); }
  MatrixView z_of(const Tensor& xz) const { return MatrixView(xz).column_range(inner, inner); }
  MatrixView dt_of(const Tensor& x_dbl) const { return MatrixView(x_dbl).column_range(0, rank); }
  MatrixView B_of(const Tensor& x_dbl) const { return MatrixView(x_dbl).column_range(rank, states); }
  MatrixView C_of(const Tensor& x_dbl) const { return MatrixView(x_dbl).column_range(rank + states, states); }

  ConvInputs conv(const Tensor& xz) const;
  ScanInputs scan(const Tensor& xz, const Tensor& x_dbl, const Tensor& u, const Tensor& dt) const;

  const char* op;
  Dtype io, acc;
  int64_t batch, length, tokens, width, inner, states, rank;
  Tensor input;
  Order order;
  MatrixView x;           // [tokens, width]
  Boundaries boundaries;  // empty where only the device knows them
  Projection in_proj, x_proj, dt_proj, out_proj;
  Conversions conversions;  // to be run before any kernel: they make some of the parameters below
  Tensor conv_weight, A, D;
  OptionalTensor conv_bias, dt_bias, rows, offsets, cu_seqlens, conv_state, ssm_state;
};

// Gradients of the outputs, checked, in the form kernels take; and the conversions of what the kernels leave.
MatrixView block_grad_y(const BlockInputs& in, const Tensor& grad_y);
Block block_grad_conv_state(const BlockInputs& in, const OptionalTensor& grad);
Block block_grad_ssm_state(const BlockInputs& in, const OptionalTensor& grad);
Tensors like(Tensors grads, const Tensors& inputs);
Tensors rows_of(const Tensor& matrix, const Tensors& inputs, Conversions& conversions);
// grad_A * A, the gradient of A_log.
Tensor grad_of_log(const Tensor& grad_A, const Tensor& A, const Tensor& A_log, Conversions& conversions);
void check_kept(const BlockInputs& in, const Tensor& xz, const Tensor& x_dbl, const Tensor& u,
                const Tensor& checkpoints);

}  // namespace mixture_of_mamba::ops
