// SPDX-License-Identifier: Apache-2.0
#include "ops/token_order.h"

#include <limits>

namespace mixture_of_mamba::ops {

namespace {

Tensor index_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& activation) {
  const Dtype dtype = tensor.scalar_type();
  require(dtype == Dtype::Int || dtype == Dtype::Long, op, name, " must be int32 or int64, got ",
          name_of(dtype));
  require(tensor.dim() == 1, op, name, " must have one dimension, got shape ", shape_of(tensor));
  require_device(op, name, tensor, "the activations", activation);
  if (dtype == Dtype::Int || !tensor.is_cpu()) return packed(to_dtype(tensor, Dtype::Int));
  const Tensor wide = packed(tensor);
  const int64_t* values = wide.const_data_ptr<int64_t>();
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  for (int64_t i = 0; i < wide.numel(); ++i) {
    require(values[i] >= -kMost && values[i] <= kMost, op, name, " must hold values below 2^31, got ",
            values[i], " at position ", i);
  }
  return to_dtype(wide, Dtype::Int);
}

// 0 and what follows it, up to `end`; as many as `count_name` and one.
Tensor boundary_tensor(const char* op, const char* name, const char* count_name, const Tensor& given,
                       const Tensor& activation, int64_t end, bool exact_end) {
  const Tensor tensor = index_tensor(op, name, given, activation);
  const int64_t count = tensor.numel();
  require(count >= 2, op, name, " must have ", count_name, " + 1 >= 2 elements, got ", count);
  if (!tensor.is_cpu()) return tensor;
  const int32_t* values = tensor.const_data_ptr<int32_t>();
  require(values[0] == 0, op, name, " must begin with 0, got ", values[0]);
  for (int64_t i = 1; i < count; ++i) {
    require(values[i] >= values[i - 1], op, name, " must not decrease, got ", values[i - 1], " before ",
            values[i], " at position ", i);
  }
  const int32_t last = values[count - 1];
  require(exact_end ? last == end : last <= end, op, name, " must end ", exact_end ? "with " : "at most at ",
          end, " (batch * length), got ", last);
  return tensor;
}

}  // namespace

Order::Order(const char* op, const Tensor& activation, const OptionalTensor& rows,
             const OptionalTensor& offsets, const OptionalTensor& cu_seqlens) {
  const int64_t batch = activation.size(0), length = activation.size(1);
  order_.tokens = batch * length;
  require(order_.tokens <= std::numeric_limits<int32_t>::max(), op,
          "batch * length must be below 2^31 tokens, got ", order_.tokens);
  order_.sequences = batch;
  order_.length = length;
  if (rows) {
    rows_ = index_tensor(op, "rows", *rows, activation);
    require(rows_->numel() == order_.tokens, op, "rows must have batch * length = ", order_.tokens,
            " elements, got ", rows_->numel());
    order_.rows = rows_->const_data_ptr<int32_t>();
    if (rows_->is_cpu()) {
      for (int64_t t = 0; t < order_.tokens; ++t) {
        require(order_.rows[t] >= 0 && order_.rows[t] < order_.tokens, op, "rows must lie in 0 .. ",
                order_.tokens - 1, ", got ", order_.rows[t], " at position ", t);
      }
    }
  }
  if (offsets) {
    offsets_ = boundary_tensor(op, "offsets", "num_modalities", *offsets, activation, order_.tokens, false);
    order_.offsets = offsets_->const_data_ptr<int32_t>();
    order_.modalities = static_cast<int32_t>(offsets_->numel() - 1);
  }
  if (cu_seqlens) {
    cu_seqlens_ =
        boundary_tensor(op, "cu_seqlens", "sequences", *cu_seqlens, activation, order_.tokens, true);
    order_.cu_seqlens = cu_seqlens_->const_data_ptr<int32_t>();
    order_.sequences = cu_seqlens_->numel() - 1;
  }
}

}  // namespace mixture_of_mamba::ops
