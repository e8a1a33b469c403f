// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "ops/mamba_block_inputs.h"

namespace mixture_of_mamba::ops {

namespace {

void require_gradient(const BlockInputs& in, const char* name, const Tensor& grad,
                      std::initializer_list<int64_t> sizes, const char* rule) {
  require_floating(in.op, name, grad);
  require_shape(in.op, name, grad, sizes, rule);
  require_device(in.op, name, grad, "x", in.input);
}

Block grad_state(const BlockInputs& in, const char* name, const OptionalTensor& grad, int64_t middle,
                 int64_t last, const char* rule, Dtype dtype) {
  if (!grad) return {};
  require_gradient(in, name, *grad, {in.sequences(), middle, last}, rule);
  return {*grad, dtype};
}

bool is(const Tensor& tensor, std::initializer_list<int64_t> sizes, Dtype dtype) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t d = 0;
  for (const int64_t size : sizes) {
    if (tensor.size(d++) != size) return false;
  }
  return tensor.scalar_type() == dtype && tensor.is_contiguous();
}

}  // namespace

MatrixView block_grad_y(const BlockInputs& in, const Tensor& grad_y) {
  require_gradient(in, "grad_y", grad_y, {in.batch, in.length, in.out_proj.out_features()},
                   "[batch, length, d_model]");
  return MatrixView(as_matrix(to_dtype(grad_y, in.io)));
}

Block block_grad_conv_state(const BlockInputs& in, const OptionalTensor& grad) {
  return grad_state(in, "grad_conv_state", grad, in.taps(), in.inner, "[sequences, width - 1, d_inner]",
                    in.io);
}

Block block_grad_ssm_state(const BlockInputs& in, const OptionalTensor& grad) {
  return grad_state(in, "grad_ssm_state", grad, in.inner, in.states, "[sequences, d_inner, d_state]", in.acc);
}

void check_kept(const BlockInputs& in, const Tensor& xz, const Tensor& x_dbl, const Tensor& gated,
                const Tensor& checkpoints) {
  const bool right =
      is(xz, {in.tokens, 2 * in.inner}, in.io) && is(x_dbl, {in.tokens, in.rank + 2 * in.states}, in.io) &&
      (checkpoints.numel() == 0 || (is(checkpoints, {in.slots(), in.inner, in.states}, in.acc) &&
                                    is(gated, {in.tokens, in.inner}, in.io)));
  require(right, in.op, "xz, x_dbl, gated and checkpoints must be what mamba_block returned with keep, got ",
          shape_of(xz), ", ", shape_of(x_dbl), ", ", shape_of(gated), " and ", shape_of(checkpoints));
  for (const Tensor* tensor : {&xz, &x_dbl, &gated, &checkpoints}) {
    require_device(in.op, "what mamba_block returned", *tensor, "x", in.input);
  }
}

Tensors like(Tensors grads, const Tensors& inputs) {
  for (size_t i = 0; i < grads.size(); ++i) grads[i] = to_dtype(grads[i], inputs[i].scalar_type());
  return grads;
}

Tensors rows_of(const Tensor& matrix, const Tensors& inputs) {
  Tensors parts;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor row = torch::stable::select(matrix, 0, static_cast<int64_t>(i));
    parts.push_back(inputs[i].scalar_type() == matrix.scalar_type()
                        ? torch::stable::clone(row)
                        : torch::stable::to(row, inputs[i].scalar_type()));
  }
  return parts;
}

Tensor multiply(const Tensor& left, const Tensor& right) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 2> stack{from(left), from(right)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

}  // namespace mixture_of_mamba::ops
