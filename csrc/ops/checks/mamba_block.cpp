// SPDX-License-Identifier: Apache-2.0
#include "ops/mamba_block_inputs.h"

namespace mixture_of_mamba::ops {

namespace {

// Members are initialised in the order of their declaration: the first one checks what the others read.
// Braces keep the order of the checks inside of one, weights before their biases.
Dtype checked_dtype(const char* op, const Tensor& x, const Tensor& conv_weight, const Tensor& A_log,
                    const Tensors& dt_weight) {
  require_floating(op, "x", x);
  require(x.dim() == 3, op, "x must have shape [batch, length, d_model], got ", shape_of(x));
  require(conv_weight.dim() == 2 && conv_weight.size(1) >= 1, op,
          "conv_weight must have shape [d_inner, width >= 1], got ", shape_of(conv_weight));
  require(A_log.dim() == 2, op, "A_log must have shape [d_inner, d_state], got ", shape_of(A_log));
  require(!dt_weight.empty(), op, "dt_weight must hold matrices [d_inner, dt_rank], got an empty list");
  require(dt_weight[0].dim() == 2, op, "dt_weight must hold matrices [d_inner, dt_rank], got ",
          shape_of(dt_weight[0]));
  kernel_type(op, x, x.scalar_type());
  return x.scalar_type();
}

// Of the modalities, from the host, or empty. The values of offsets on the CPU are checked by Order.
Boundaries checked_boundaries(const char* op, const OptionalTensor& offsets,
                              const OptionalTensor& host_offsets, int64_t tokens) {
  if (!offsets) {
    require(!host_offsets, op, "offsets must be given beside host_offsets, got None");
    return {0, tokens};
  }
  if (!host_offsets && !offsets->is_cpu()) return {};
  const Tensor& source = host_offsets ? *host_offsets : *offsets;
  require(source.is_cpu(), op, "host_offsets must be on the CPU, got ", device_of(source));
  return host_boundaries(op, "host_offsets", source, offsets->numel(), tokens, "batch * length");
}

void require_parameter(const char* op, const Name& name, const Tensor& tensor,
                       std::initializer_list<int64_t> sizes, const char* rule, const Tensor& x) {
  require_floating(op, name, tensor);
  require_shape(op, name, tensor, sizes, rule);
  require_device(op, name, tensor, "x", x);
}

int64_t rows_of_first(const Tensors& weight) {
  return weight.empty() || weight[0].dim() != 2 ? -1 : weight[0].size(0);
}

// Checked, in the dtype of x, with contiguous columns.
Tensors matrices(const char* op, const char* name, const Tensors& weight, int64_t out_features,
                 int64_t in_features, const char* rule, const Boundaries& boundaries,
                 const OptionalTensor& offsets, const Tensor& x) {
  const size_t modalities = offsets ? offsets->numel() - 1 : 1;
  const bool on_host = !boundaries.empty();
  require((on_host && weight.size() == 1) || weight.size() == modalities, op, name, " must hold ",
          on_host ? "1 or " : "", "num_modalities = ", modalities, " tensors",
          on_host ? "" : " where host_offsets are not given", ", got ", weight.size());
  Tensors checked;
  for (size_t m = 0; m < weight.size(); ++m) {
    require_parameter(op, {name, static_cast<int64_t>(m)}, weight[m], {out_features, in_features}, rule, x);
    const Tensor same = to_dtype(weight[m], x.scalar_type());
    const bool regular = same.stride(1) == 1 && same.stride(0) >= in_features;
    checked.push_back(regular ? same : packed(same));
  }
  return checked;
}

const Tensors& vectors(const char* op, const char* name, const Tensors& bias, int64_t size, const char* rule,
                       const char* weight_name, size_t weights, const Tensor& x) {
  require(bias.empty() || bias.size() == weights, op, name, " must be empty or hold as many tensors as ",
          weight_name, " (", weights, "), got ", bias.size());
  for (size_t m = 0; m < bias.size(); ++m) {
    require_parameter(op, {name, static_cast<int64_t>(m)}, bias[m], {size}, rule, x);
  }
  return bias;
}

Tensors in_dtype(Tensors tensors, Dtype dtype) {
  for (Tensor& tensor : tensors) tensor = packed(to_dtype(tensor, dtype));
  return tensors;
}

// -exp(A_log)
Tensor decay_rates(const char* op, const Tensor& A_log, int64_t inner, const Tensor& x, Dtype acc,
                   Conversions& conversions) {
  require_parameter(op, "A_log", A_log, {inner, A_log.size(1)}, "[d_inner, d_state]", x);
  const Tensor rates = empty_of_shape(A_log, acc);
  conversions.add(Conversion::Rule::kMinusExp, Conversions::all_of(A_log), Conversions::all_of(rates));
  return rates;
}

// [modalities, d_inner], or [d_inner] when shared.
OptionalTensor stacked(const Tensors& biases, int64_t inner, const Tensor& x, Dtype acc,
                       Conversions& conversions) {
  if (biases.empty()) return {};
  if (biases.size() == 1) return conversions.contiguous(biases[0], acc);
  const int64_t rows = static_cast<int64_t>(biases.size());
  const Tensor matrix = empty_like_device(x, {rows, inner}, acc);
  for (int64_t m = 0; m < rows; ++m) {
    conversions.add(Conversion::Rule::kCopy, Conversions::all_of(biases[m]), {matrix, m * inner, inner});
  }
  return matrix;
}

}  // namespace

BlockInputs::BlockInputs(const char* op_, const Products& products, const Tensor& x_,
                         const Tensors& in_weight, const Tensors& in_bias, const Tensor& conv_weight_,
                         const OptionalTensor& conv_bias_, const Tensors& x_weight, const Tensors& dt_weight,
                         const Tensors& dt_bias_, const Tensor& A_log, const Tensor& D_,
                         const Tensors& out_weight, const Tensors& out_bias, const OptionalTensor& rows_,
                         const OptionalTensor& offsets_, const OptionalTensor& host_offsets,
                         const OptionalTensor& cu_seqlens_, const OptionalTensor& conv_state_,
                         const OptionalTensor& ssm_state_)
    : op(op_),
      io(checked_dtype(op, x_, conv_weight_, A_log, dt_weight)),
      acc(io == Dtype::Double ? Dtype::Double : Dtype::Float),
      batch(x_.size(0)),
      length(x_.size(1)),
      tokens(batch * length),
      width(x_.size(2)),
      inner(conv_weight_.size(0)),
      states(A_log.size(1)),
      rank(dt_weight[0].size(1)),
      input(x_),
      order(op, x_, rows_, offsets_, cu_seqlens_),
      x(as_matrix(x_)),
      boundaries(checked_boundaries(op, offsets_, host_offsets, tokens)),
      in_proj{products,
              matrices(op, "in_weight", in_weight, 2 * inner, width, "[2 * d_inner, d_model]", boundaries,
                       offsets_, x_),
              in_dtype(vectors(op, "in_bias", in_bias, 2 * inner, "[2 * d_inner]", "in_weight",
                               in_weight.size(), x_),
                       io),
              boundaries, order.offsets()},
      x_proj{products,
             matrices(op, "x_weight", x_weight, rank + 2 * states, inner, "[dt_rank + 2 * d_state, d_inner]",
                      boundaries, offsets_, x_),
             {},
             boundaries,
             order.offsets()},
      dt_proj{
          products,
          matrices(op, "dt_weight", dt_weight, inner, rank, "[d_inner, dt_rank]", boundaries, offsets_, x_),
          {},
          boundaries,
          order.offsets()},
      out_proj{products,
               matrices(op, "out_weight", out_weight, rows_of_first(out_weight), inner, "[d_model, d_inner]",
                        boundaries, offsets_, x_),
               in_dtype(vectors(op, "out_bias", out_bias, rows_of_first(out_weight), "[d_model]",
                                "out_weight", out_weight.size(), x_),
                        io),
               boundaries, order.offsets()},
      conversions(op),
      conv_weight(conv_weight_),
      A(decay_rates(op, A_log, inner, x_, acc, conversions)),
      D(D_),
      conv_bias(conv_bias_),
      dt_bias(stacked(vectors(op, "dt_bias", dt_bias_, inner, "[d_inner]", "dt_weight", dt_weight.size(), x_),
                      inner, x_, acc, conversions)),
      rows(order.rows()),
      offsets(order.offsets()),
      cu_seqlens(order.cu_seqlens()),
      conv_state(conv_state_),
      ssm_state(ssm_state_) {
  require_parameter(op, "conv_weight", conv_weight, {inner, -1}, "[d_inner, width]", x_);
  if (conv_bias) require_parameter(op, "conv_bias", *conv_bias, {inner}, "[d_inner]", x_);
  require_parameter(op, "D", D, {inner}, "[d_inner]", x_);
  if (ssm_state) require_device(op, "ssm_state", *ssm_state, "x", x_);
  conv_weight = conversions.contiguous(conv_weight, acc);
  D = conversions.contiguous(D, acc);
  if (conv_bias) conv_bias = conversions.contiguous(*conv_bias, acc);
}

ConvInputs BlockInputs::conv(const Tensor& xz) const {
  return {op,          x_of(xz).as_activation(batch, length),
          conv_weight, conv_bias,
          rows,        offsets,
          cu_seqlens,  conv_state,
          true,        "conv_state"};
}

ScanInputs BlockInputs::scan(const Tensor& xz, const Tensor& x_dbl, const Tensor& u, const Tensor& dt) const {
  const auto activation = [&](const MatrixView& view) { return view.as_activation(batch, length); };
  return {op,
          activation(MatrixView(u)),
          activation(MatrixView(dt)),
          A,
          activation(B_of(x_dbl)),
          activation(C_of(x_dbl)),
          D,
          activation(z_of(xz)),
          dt_bias,
          rows,
          offsets,
          cu_seqlens,
          ssm_state,
          true,
          false,
          "ssm_state"};
}

}  // namespace mixture_of_mamba::ops
