// SPDX-License-Identifier: Apache-2.0
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

void check_kept(const BlockInputs& in, const Tensor& xz, const Tensor& x_dbl, const Tensor& u,
                const Tensor& checkpoints) {
  const bool right =
      is(xz, {in.tokens, 2 * in.inner}, in.io) && is(x_dbl, {in.tokens, in.rank + 2 * in.states}, in.io) &&
      (checkpoints.numel() == 0 ||
       (is(checkpoints, {in.slots(), in.inner, in.states}, in.acc) && is(u, {in.tokens, in.inner}, in.io)));
  require(right, in.op, "xz, x_dbl, u and checkpoints must be what mamba_block returned with keep, got ",
          shape_of(xz), ", ", shape_of(x_dbl), ", ", shape_of(u), " and ", shape_of(checkpoints));
  for (const Tensor* tensor : {&xz, &x_dbl, &u, &checkpoints}) {
    require_device(in.op, "what mamba_block returned", *tensor, "x", in.input);
  }
}

Tensors like(Tensors grads, const Tensors& inputs) {
  for (size_t i = 0; i < grads.size(); ++i) grads[i] = to_dtype(grads[i], inputs[i].scalar_type());
  return grads;
}

Tensors rows_of(const Tensor& matrix, const Tensors& inputs, Conversions& conversions) {
  Tensors parts;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const int64_t columns = matrix.size(1), first = static_cast<int64_t>(i) * columns;
    const Dtype dtype = inputs[i].scalar_type();
    const bool wide = dtype == Dtype::Double;  // not for the kernel on a GPU
    const Tensor part = empty_like_device(matrix, {columns}, wide ? matrix.scalar_type() : dtype);
    conversions.add(Conversion::Rule::kCopy, {matrix, first, columns}, Conversions::all_of(part));
    parts.push_back(part);
  }
  return parts;
}

Tensor grad_of_log(const Tensor& grad_A, const Tensor& A, const Tensor& A_log, Conversions& conversions) {
  const bool wide = A_log.scalar_type() == Dtype::Double;
  const Tensor grad = empty_of_shape(A, wide ? A.scalar_type() : A_log.scalar_type());
  conversions.add(Conversion::Rule::kMultiply, Conversions::all_of(grad_A), Conversions::all_of(grad), A);
  return grad;
}

}  // namespace mixture_of_mamba::ops
