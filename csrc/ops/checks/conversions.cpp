// SPDX-License-Identifier: Apache-2.0
#include "ops/conversions.h"

namespace mixture_of_mamba::ops {

namespace {

// Kernels on a GPU know no float64; torch converts it.
bool known(const Tensor& reference, Dtype dtype) { return dtype != Dtype::Double || reference.is_cpu(); }

}  // namespace

void Conversions::add(Conversion::Rule rule, const Slice& from, const Slice& to,
                      const OptionalTensor& factor) {
  const Tensor source = packed(
      known(from.tensor, from.tensor.scalar_type()) ? from.tensor : to_dtype(from.tensor, Dtype::Float));
  const Dtype from_dtype = source.scalar_type(), to_dtype = to.tensor.scalar_type();
  Conversion item;
  item.rule = rule;
  item.from_type = kernel_type(op_, source, from_dtype);
  item.to_type = kernel_type(op_, to.tensor, to_dtype);
  item.from = static_cast<const char*>(source.const_data_ptr()) + from.first * element_size(from_dtype);
  item.to = static_cast<char*>(to.tensor.mutable_data_ptr()) + to.first * element_size(to_dtype);
  item.factor = factor ? factor->const_data_ptr() : nullptr;
  item.count = from.count;
  items_.push_back(item);
  sources_.push_back(source);
}

Tensor Conversions::contiguous(const Tensor& tensor, Dtype dtype) {
  if (tensor.scalar_type() == dtype) return packed(tensor);
  if (!known(tensor, dtype)) return packed(to_dtype(tensor, dtype));
  const Tensor converted = empty_of_shape(tensor, dtype);
  add(Conversion::Rule::kCopy, all_of(tensor), all_of(converted));
  return converted;
}

}  // namespace mixture_of_mamba::ops
