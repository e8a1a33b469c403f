// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_linear.h"

namespace mixture_of_mamba::ops {

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

// Empty when they are on another device.
Boundaries boundaries_if_on_host(const char* op, const char* name, const Tensor& tensor, int64_t modalities,
                                 int64_t rows) {
  if (!tensor.is_cpu()) return {};
  return host_boundaries(op, name, tensor, modalities + 1, rows, "the rows of x");
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
    const Name name("weight", m);
    require_floating(op, name, weight_[m]);
    require_shape(op, name, weight_[m], {out_features, in_features}, "[out_features, in_features]");
    require_device(op, name, weight_[m], "x", x_);
    weight.push_back(to_dtype(weight_[m], dtype));
    if (bias_.empty()) continue;
    const Name bias_name("bias", m);
    require_floating(op, bias_name, bias_[m]);
    require_shape(op, bias_name, bias_[m], {out_features}, "[out_features]");
    require_device(op, bias_name, bias_[m], "x", x_);
    bias.push_back(to_dtype(bias_[m], dtype));
  }
  require(offsets_.dim() == 1 && offsets_.numel() == modalities + 1, op,
          "offsets must have num_modalities + 1 = ", modalities + 1, " elements, got ", shape_of(offsets_));
  require(offsets_.scalar_type() == Dtype::Int || offsets_.scalar_type() == Dtype::Long, op,
          "offsets must be int32 or int64, got ", name_of(offsets_.scalar_type()));
  require_device(op, "offsets", offsets_, "x", x_);
  if (host_offsets) {
    require(host_offsets->is_cpu(), op, "host_offsets must be on the CPU, got ", device_of(*host_offsets));
  }
  offsets = packed(to_dtype(offsets_, Dtype::Int));
  boundaries = boundaries_if_on_host(op, host_offsets ? "host_offsets" : "offsets",
                                     host_offsets ? *host_offsets : offsets_, modalities, rows);
}

}  // namespace mixture_of_mamba::ops
