// SPDX-License-Identifier: Apache-2.0
#include "ops/causal_conv1d.h"

namespace mixture_of_mamba::ops {

namespace {

// Members are initialised in the order of their declaration: the first one checks what the others read.
Dtype checked_dtype(const char* op, const Tensor& x, const Tensor& weight) {
  require_floating(op, "x", x);
  require(x.dim() == 3, op, "x must have shape [batch, length, channels], got ", shape_of(x));
  require(weight.dim() == 2 && weight.size(0) == x.size(2) && weight.size(1) >= 1, op,
          "weight must have shape [channels, width] = [", x.size(2), ", >= 1], got ", shape_of(weight));
  return x.scalar_type();
}

}  // namespace

ConvInputs::ConvInputs(const char* op, const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_,
                       const OptionalTensor& rows, const OptionalTensor& offsets,
                       const OptionalTensor& cu_seqlens, const OptionalTensor& initial_state_, bool silu_,
                       const char* state_name)
    : io(checked_dtype(op, x_, weight_)),
      acc(io == Dtype::Double ? Dtype::Double : Dtype::Float),
      type(kernel_type(op, x_, io)),
      batch(x_.size(0)),
      length(x_.size(1)),
      channels(x_.size(2)),
      width(weight_.size(1)),
      silu(silu_),
      order(op, x_, rows, offsets, cu_seqlens),
      x(x_, io),
      conversions(op) {
  const auto block = [&](const char* name, const Tensor& tensor, Dtype dtype) {
    require_floating(op, name, tensor);
    require_device(op, name, tensor, "x", x_);
    return Block(conversions.contiguous(tensor, dtype), dtype);
  };
  weight = block("weight", weight_, acc);
  if (bias_) {
    require_shape(op, "bias", *bias_, {channels}, "[channels]");
    bias = block("bias", *bias_, acc);
  }
  if (initial_state_) {
    require_shape(op, state_name, *initial_state_, {order.order().sequences, width - 1, channels},
                  "[sequences, width - 1, channels]");
    initial_state = block(state_name, *initial_state_, io);
  }
}

void ConvInputs::fill(CausalConv1dParams& params) const {
  params.type = type;
  params.channels = channels;
  params.width = width;
  params.order = order.order();
  params.silu = silu;
  params.x = x.rows();
  params.weight = weight.data();
  params.bias = bias.data();
  params.initial_state = initial_state.data();
}

}  // namespace mixture_of_mamba::ops
