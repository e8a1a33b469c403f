// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/common.h"

// Matrices that lie in tensors, in whole or in part: as tensors, as rows for a kernel, as factors for a GEMM.

namespace mixture_of_mamba::ops {

// A view that begins `offset` elements behind the first one of `base`.
Tensor view_of(const Tensor& base, std::initializer_list<int64_t> sizes,
               std::initializer_list<int64_t> strides, int64_t offset);

// [..., columns] as [rows, columns] with contiguous columns; a view where the strides allow it.
Tensor as_matrix(const Tensor& tensor);

// [rows, columns] with contiguous columns, lying anywhere in a tensor.
class MatrixView {
 public:
  MatrixView(const Tensor& base, int64_t rows, int64_t columns, int64_t row_stride, int64_t offset = 0)
      : base_(base), rows_(rows), columns_(columns), row_stride_(row_stride), offset_(offset) {}
  // `matrix` has contiguous columns.
  explicit MatrixView(const Tensor& matrix)
      : MatrixView(matrix, matrix.size(0), matrix.size(1), matrix.stride(0)) {}

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  MatrixView column_range(int64_t begin, int64_t count) const {
    return {base_, rows_, count, row_stride_, offset_ + begin};
  }
  Tensor row_range(int64_t begin, int64_t count) const {
    return view_of(base_, {count, columns_}, {row_stride_, 1}, offset_ + begin * row_stride_);
  }
  Tensor tensor() const { return row_range(0, rows_); }
  // The same as [batch, length, columns].
  Tensor as_activation(int64_t batch, int64_t length) const {
    return view_of(base_, {batch, length, columns_}, {length * row_stride_, row_stride_, 1}, offset_);
  }
  int64_t row_stride() const { return row_stride_; }
  Dtype dtype() const { return base_.scalar_type(); }
  int32_t device() const { return base_.get_device_index(); }
  ConstRows readable() const;
  Rows writable() const;

 private:
  Tensor base_;
  int64_t rows_, columns_, row_stride_, offset_;
};

// A factor of a product, or its result, as it lies in memory: [rows, columns] with contiguous columns, or the
// transpose of that.
struct Factor {
  void* memory;
  Dtype dtype;
  int32_t device;
  int64_t rows, columns, stride;
  bool transposed;
};

// Rows of a matrix, or their transpose.
class Part {
 public:
  Part(const MatrixView& matrix, int64_t begin, int64_t count, bool transposed = false)
      : matrix_(matrix), begin_(begin), count_(count), transposed_(transposed) {}
  // The whole of a tensor whose rows or columns are contiguous.
  static Part of(const Tensor& matrix, bool transposed = false);
  Tensor tensor() const;
  Factor factor() const;

 private:
  MatrixView matrix_;
  int64_t begin_, count_;
  bool transposed_;
};

}  // namespace mixture_of_mamba::ops
