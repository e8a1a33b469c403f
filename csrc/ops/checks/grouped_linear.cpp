// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_linear.h"

namespace mixture_of_mamba::ops {

Tensor as_matrix(const Tensor& tensor) {
  const int64_t columns = tensor.size(tensor.dim() - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  bool regular = columns <= 1 || tensor.stride(tensor.dim() - 1) == 1;
  for (int64_t d = 0; d + 2 < tensor.dim(); ++d) {
    regular =
        regular && (tensor.size(d) <= 1 || tensor.stride(d) == tensor.size(d + 1) * tensor.stride(d + 1));
  }
  // GEMM libraries want a row stride of at least the row length.
  const int64_t row_dim = tensor.dim() - 2;
  regular = regular && (rows <= 1 || (row_dim >= 0 && tensor.stride(row_dim) >= columns));
  return torch::stable::view(regular ? tensor : torch::stable::contiguous(tensor),
                             std::vector<int64_t>{rows, columns});
}

std::vector<int64_t> with_last_size(const Tensor& tensor, int64_t size) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = size;
  return sizes;
}

namespace {

Tensor checked_matrix(const char* op, const Tensor& x) {
  require_floating(op, "x", x);
  require(x.dim() >= 2, op, "x must have shape [..., in_features] with at least two dimensions, got ",
          shape_of(x));
  kernel_type(op, x, x.scalar_type());
  return as_matrix(x);
}

// Boundaries as 64-bit host values; empty when they are on another device.
std::vector<int64_t> host_values(const char* op, const char* name, const OptionalTensor& tensor,
                                 int64_t modalities, int64_t rows) {
  if (!tensor || !tensor->is_cpu()) return {};
  require(tensor->numel() == modalities + 1, op, name, " must have num_modalities + 1 = ", modalities + 1,
          " elements, got ", shape_of(*tensor));
  const Dtype dtype = tensor->scalar_type();
  require(dtype == Dtype::Int || dtype == Dtype::Long, op, name, " must be int32 or int64, got ",
          name_of(dtype));
  const Tensor wide = torch::stable::contiguous(to_dtype(*tensor, Dtype::Long));
  const int64_t* data = wide.const_data_ptr<int64_t>();
  std::vector<int64_t> values(data, data + modalities + 1);
  require(values.front() == 0 && values.back() <= rows, op, name, " must begin with 0 and end at most at ",
          rows, " (the rows of x), got ", values.front(), " and ", values.back());
  for (int64_t m = 0; m < modalities; ++m) {
    require(values[m] <= values[m + 1], op, name, " must not decrease, got ", values[m], " before ",
            values[m + 1]);
  }
  return values;
}

}  // namespace

GroupedInputs::GroupedInputs(const char* op, const Tensor& x_, const Tensors& weight_, const Tensors& bias_,
                             const Tensor& offsets_, const OptionalTensor& host_offsets)
    : dtype(x_.scalar_type()), x(checked_matrix(op, x_)), offsets(offsets_) {
  rows = x.size(0);
  in_features = x.size(1);
  modalities = static_cast<int64_t>(weight_.size());
  require(modalities >= 1, op, "weight must hold one matrix per modality, got an empty list");
  require(bias_.empty() || bias_.size() == weight_.size(), op,
          "bias must be empty or hold one vector per weight (", weight_.size(), "), got ", bias_.size());
  require(weight_[0].dim() == 2, op, "weight[0] must have shape [out_features, in_features], got ",
          shape_of(weight_[0]));
  out_features = weight_[0].size(0);
  for (int64_t m = 0; m < modalities; ++m) {
    const std::string name = "weight[" + std::to_string(m) + "]";
    require_floating(op, name.c_str(), weight_[m]);
    require_shape(op, name.c_str(), weight_[m], {out_features, in_features}, "[out_features, in_features]");
    require_device(op, name.c_str(), weight_[m], "x", x_);
    weight.push_back(to_dtype(weight_[m], dtype));
    if (bias_.empty()) continue;
    const std::string bias_name = "bias[" + std::to_string(m) + "]";
    require_floating(op, bias_name.c_str(), bias_[m]);
    require_shape(op, bias_name.c_str(), bias_[m], {out_features}, "[out_features]");
    require_device(op, bias_name.c_str(), bias_[m], "x", x_);
    bias.push_back(to_dtype(bias_[m], dtype));
  }
  require(offsets_.dim() == 1 && offsets_.numel() == modalities + 1, op,
          "offsets must have num_modalities + 1 = ", modalities + 1, " elements, got ", shape_of(offsets_));
  require(offsets_.scalar_type() == Dtype::Int || offsets_.scalar_type() == Dtype::Long, op,
          "offsets must be int32 or int64, got ", name_of(offsets_.scalar_type()));
  require_device(op, "offsets", offsets_, "x", x_);
  require(!host_offsets || host_offsets->is_cpu(), op, "host_offsets must be on the CPU, got ",
          host_offsets ? device_of(*host_offsets) : "");
  offsets = to_dtype(offsets_, Dtype::Int);
  boundaries = host_offsets ? host_values(op, "host_offsets", host_offsets, modalities, rows)
                            : host_values(op, "offsets", offsets_, modalities, rows);
}

}  // namespace mixture_of_mamba::ops
