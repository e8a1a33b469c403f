// SPDX-License-Identifier: Apache-2.0
#include "ops/matrix_view.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace mixture_of_mamba::ops {

Tensor view_of(const Tensor& base, std::initializer_list<int64_t> sizes,
               std::initializer_list<int64_t> strides, int64_t offset) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(base.get(), static_cast<int64_t>(sizes.size()),
                                                        sizes.begin(), strides.begin(), offset, &view));
  return Tensor(view);
}

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
  return torch::stable::view(regular ? tensor : packed(tensor), std::vector<int64_t>{rows, columns});
}

Part Part::of(const Tensor& matrix, bool transposed) {
  if (matrix.stride(1) == 1) {
    return {MatrixView(matrix), 0, matrix.size(0), transposed};
  }
  return {MatrixView(matrix, matrix.size(1), matrix.size(0), matrix.stride(1)), 0, matrix.size(1),
          !transposed};
}

Tensor Part::tensor() const {
  const Tensor rows = matrix_.row_range(begin_, count_);
  return transposed_ ? view_of(rows, {matrix_.columns(), count_}, {1, matrix_.row_stride()}, 0) : rows;
}

Factor Part::factor() const {
  const ConstRows rows = matrix_.readable();
  const char* const memory =
      static_cast<const char*>(rows.data) + begin_ * rows.stride * element_size(matrix_.dtype());
  Factor factor{const_cast<char*>(memory), matrix_.dtype(), matrix_.device(), count_,
                matrix_.columns(),         rows.stride,     transposed_};
  // The stride of a single row may be anything; GEMM libraries want at least its length.
  if (count_ == 1) factor.stride = matrix_.columns();
  if (transposed_) std::swap(factor.rows, factor.columns);
  return factor;
}

ConstRows MatrixView::readable() const {
  return {static_cast<const char*>(base_.const_data_ptr()) + offset_ * element_size(base_.scalar_type()),
          row_stride_};
}

Rows MatrixView::writable() const {
  return {static_cast<char*>(base_.mutable_data_ptr()) + offset_ * element_size(base_.scalar_type()),
          row_stride_};
}

}  // namespace mixture_of_mamba::ops
