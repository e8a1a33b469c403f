// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <vector>

#include "kernels/few_rows.h"
#include "ops/common.h"

// Matrix products of torch's own libraries on parts of tensors. They are called below the dispatcher (C
// shims of the stable ABI): a projection per modality is many small calls, and a dispatched one costs the
// host several times as much.

namespace mixture_of_mamba::ops {

using Tensors = std::vector<Tensor>;

// Boundaries of the row ranges that a projection's weights own: one range per weight. Rows beyond the last
// are padding.
using Boundaries = std::vector<int64_t>;

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

// One backend's functions. The first two are torch's; the others may be null, and say whether they served.
struct Products {
  AOTITorchError (*mm)(AtenTensorHandle out, AtenTensorHandle left, AtenTensorHandle right);
  AOTITorchError (*addmm)(AtenTensorHandle out, AtenTensorHandle add, AtenTensorHandle left,
                          AtenTensorHandle right, double beta, double alpha);
  // out = left @ right, or out += it.
  bool (*direct)(const Factor& left, const Factor& right, const Factor& out, bool add) = nullptr;
  // A whole projection, padding rows included, where the rows are few. `settled`: see
  // kernels/few_rows.h.
  bool (*few_rows)(const MatrixView& input, const MatrixView& out, const Tensors& weight, const Tensors& bias,
                   const Boundaries& boundaries, Settled settled) = nullptr;

  void assign(const Part& out, const Part& left, const Part& right) const;
  void add(const Part& out, const Part& left, const Part& right) const;
  // out = left @ right + row, [columns]
  void assign_with_row(const Part& out, const Part& left, const Part& right, const Tensor& row) const;
};

// Those of a CPU tensor of `entries` elements, checked; none is above `end`, which is `end_meaning`.
Boundaries host_boundaries(const char* op, const char* name, const Tensor& tensor, int64_t entries,
                           int64_t end, const char* end_meaning);

// One projection: a weight for all rows, or one per modality.
class Projection {
 public:
  // `boundaries` are those of the modalities.
  Projection(const Products& products, Tensors weight, Tensors bias, const Boundaries& boundaries);

  int64_t in_features() const { return weight_[0].size(1); }
  int64_t out_features() const { return weight_[0].size(0); }
  // Padding rows of `out` become 0.
  void forward(const MatrixView& input, const MatrixView& out, Settled settled = Settled::kNothing) const;
  void grad_input(const MatrixView& grad, const MatrixView& out) const;
  void add_grad_input(const MatrixView& grad, const MatrixView& out) const;
  Tensors grad_weight(const MatrixView& grad, const MatrixView& input) const;
  Tensors grad_bias(const MatrixView& grad) const;

 private:
  template <typename Visit>
  void for_each_range(Visit&& visit) const;
  void clear_padding_rows(const MatrixView& out) const;

  const Products& products_;
  Tensors weight_, bias_;
  Boundaries boundaries_;
};

}  // namespace mixture_of_mamba::ops
