// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>
#include <tuple>

#include "kernels/modality_routing.h"
#include "kernels/permute_rows.h"
#include "ops/common.h"

// Sorting tokens by modality, and moving rows between time order and sorted order, for any backend.

namespace mixture_of_mamba::ops {

// `checked` refuses ids outside -1 .. num_modalities - 1. CUDA ids are never read on the host, so
// there they are padding, checked or not.
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> modality_routing(Tensor ids, int64_t num_modalities, bool checked) {
  const char* op = "modality_routing";
  const Dtype dtype = ids.scalar_type();
  const bool integer = dtype == Dtype::Long || dtype == Dtype::Int || dtype == Dtype::Short ||
                       dtype == Dtype::Char || dtype == Dtype::Byte;
  require(integer, op, "ids must be an integer tensor, got ", name_of(dtype));
  require(num_modalities >= 1 && num_modalities <= kMaxModalities, op, "num_modalities must be in 1 .. ",
          kMaxModalities, ", got ", num_modalities);
  const int64_t tokens = ids.numel();
  require(tokens <= std::numeric_limits<int32_t>::max(), op, "ids must have fewer than 2^31 elements, got ",
          tokens);
  const Tensor wide = torch::stable::contiguous(to_dtype(ids, Dtype::Long));
  const int64_t* values = wide.const_data_ptr<int64_t>();
  if (checked && ids.is_cpu()) {
    for (int64_t t = 0; t < tokens; ++t) {
      require(values[t] >= -1 && values[t] < num_modalities, op,
              "ids must lie in -1 .. num_modalities - 1 = ", num_modalities - 1, " (-1 is padding), got ",
              values[t], " at flat position ", t);
    }
  }
  const Tensor rows = empty_like_device(ids, {tokens}, Dtype::Int);
  const Tensor order = empty_like_device(ids, {tokens}, Dtype::Int);
  const Tensor offsets = empty_like_device(ids, {num_modalities + 1}, Dtype::Int);
  ModalityRoutingParams params;
  params.ids = values;
  params.tokens = tokens;
  params.num_modalities = static_cast<int32_t>(num_modalities);
  params.rows = rows.mutable_data_ptr<int32_t>();
  params.order = order.mutable_data_ptr<int32_t>();
  params.offsets = offsets.mutable_data_ptr<int32_t>();
  Backend(ids).run(params);
  return {rows, order, offsets};
}

template <typename Backend>
Tensor permute_rows(Tensor x, Tensor index, Tensor inverse) {
  const char* op = "permute_rows";
  require(x.dim() >= 2, op, "x must have shape [..., channels] with at least two dimensions, got ",
          shape_of(x));
  const int64_t channels = x.size(x.dim() - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  const auto require_index = [&](const char* name, const Tensor& tensor) {
    require(tensor.scalar_type() == Dtype::Int && tensor.dim() == 1 && tensor.numel() == rows, op, name,
            " must be int32 with one element per row of x ([", rows, "]), got ",
            name_of(tensor.scalar_type()), " ", shape_of(tensor));
    require_device(op, name, tensor, "x", x);
  };
  require_index("index", index);
  require_index("inverse", inverse);
  const Tensor source = torch::stable::contiguous(x);
  const Tensor positions = torch::stable::contiguous(index);
  const Tensor out = torch::stable::new_empty(source, x.sizes(), x.scalar_type());
  PermuteRowsParams params;
  params.x = source.const_data_ptr();
  params.row_bytes = rows * channels == 0 ? 0 : channels * element_size(x.scalar_type());
  params.x_stride = params.row_bytes;
  params.out = out.mutable_data_ptr();
  params.index = positions.const_data_ptr<int32_t>();
  params.rows = rows;
  Backend(x).run(params);
  return out;
}

}  // namespace mixture_of_mamba::ops
