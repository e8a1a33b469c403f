// SPDX-License-Identifier: Apache-2.0
#include "ops/products.h"

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

void Products::assign(const Part& out, const Part& left, const Part& right) const {
  if (direct && direct(left.factor(), right.factor(), out.factor(), false)) return;
  TORCH_ERROR_CODE_CHECK(mm(out.tensor().get(), left.tensor().get(), right.tensor().get()));
}

void Products::add(const Part& out, const Part& left, const Part& right) const {
  if (direct && direct(left.factor(), right.factor(), out.factor(), true)) return;
  const Tensor sum = out.tensor();
  TORCH_ERROR_CODE_CHECK(addmm(sum.get(), sum.get(), left.tensor().get(), right.tensor().get(), 1.0, 1.0));
}

void Products::assign_with_row(const Part& out, const Part& left, const Part& right,
                               const Tensor& row) const {
  TORCH_ERROR_CODE_CHECK(
      addmm(out.tensor().get(), row.get(), left.tensor().get(), right.tensor().get(), 1.0, 1.0));
}

ConstRows MatrixView::readable() const {
  return {static_cast<const char*>(base_.const_data_ptr()) + offset_ * element_size(base_.scalar_type()),
          row_stride_};
}

Rows MatrixView::writable() const {
  return {static_cast<char*>(base_.mutable_data_ptr()) + offset_ * element_size(base_.scalar_type()),
          row_stride_};
}

Boundaries host_boundaries(const char* op, const char* name, const Tensor& tensor, int64_t entries,
                           int64_t end, const char* end_meaning) {
  require(tensor.dim() == 1 && tensor.numel() == entries, op, name,
          " must have num_modalities + 1 = ", entries, " elements, got ", shape_of(tensor));
  const Dtype dtype = tensor.scalar_type();
  require(dtype == Dtype::Int || dtype == Dtype::Long, op, name, " must be int32 or int64, got ",
          name_of(dtype));
  const Tensor wide = packed(to_dtype(tensor, Dtype::Long));
  const int64_t* data = wide.const_data_ptr<int64_t>();
  Boundaries values(data, data + entries);
  require(values.front() == 0 && values.back() <= end, op, name, " must begin with 0 and end at most at ",
          end, " (", end_meaning, "), got ", values.front(), " and ", values.back());
  for (int64_t m = 1; m < entries; ++m) {
    require(values[m - 1] <= values[m], op, name, " must not decrease, got ", values[m - 1], " before ",
            values[m]);
  }
  return values;
}

Projection::Projection(const Products& products, Tensors weight, Tensors bias, const Boundaries& boundaries)
    : products_(products), weight_(std::move(weight)), bias_(std::move(bias)), boundaries_(boundaries) {
  if (weight_.size() == 1) boundaries_ = {0, boundaries.back()};
  for (Tensor& weight : weight_) {
    const bool by_rows = weight.stride(1) == 1 && weight.stride(0) >= weight.size(1);
    const bool by_columns = weight.stride(0) == 1 && weight.stride(1) >= weight.size(0);
    if (!by_rows && !by_columns) weight = packed(weight);
  }
}

template <typename Visit>
void Projection::for_each_range(Visit&& visit) const {
  for (size_t m = 0; m < weight_.size(); ++m) {
    const int64_t begin = boundaries_[m], count = boundaries_[m + 1] - begin;
    if (count > 0) visit(m, begin, count);
  }
}

void Projection::clear_padding_rows(const MatrixView& out) const {
  const int64_t begin = boundaries_.back(), count = out.rows() - begin;
  if (count == 0) return;
  Tensor padding = out.row_range(begin, count);
  torch::stable::zero_(padding);
}

void Projection::forward(const MatrixView& input, const MatrixView& out, Settled settled) const {
  if (products_.few_rows && products_.few_rows(input, out, weight_, bias_, boundaries_, settled)) return;
  for_each_range([&](size_t m, int64_t begin, int64_t count) {
    const Part right = Part::of(weight_[m], true);
    const Part rows(out, begin, count), left(input, begin, count);
    if (bias_.empty()) {
      products_.assign(rows, left, right);
    } else {
      products_.assign_with_row(rows, left, right, bias_[m]);
    }
  });
  clear_padding_rows(out);
}

void Projection::grad_input(const MatrixView& grad, const MatrixView& out) const {
  for_each_range([&](size_t m, int64_t begin, int64_t count) {
    products_.assign({out, begin, count}, {grad, begin, count}, Part::of(weight_[m]));
  });
  clear_padding_rows(out);
}

void Projection::add_grad_input(const MatrixView& grad, const MatrixView& out) const {
  for_each_range([&](size_t m, int64_t begin, int64_t count) {
    products_.add({out, begin, count}, {grad, begin, count}, Part::of(weight_[m]));
  });
}

Tensors Projection::grad_weight(const MatrixView& grad, const MatrixView& input) const {
  Tensors grads;
  for (const Tensor& weight : weight_) {
    grads.push_back(empty_like_device(weight, {out_features(), in_features()}, weight.scalar_type()));
  }
  std::vector<bool> written(grads.size(), false);
  for_each_range([&](size_t m, int64_t begin, int64_t count) {
    products_.assign(Part::of(grads[m]), {grad, begin, count, true}, {input, begin, count});
    written[m] = true;
  });
  for (size_t m = 0; m < grads.size(); ++m) {
    if (!written[m]) torch::stable::zero_(grads[m]);
  }
  return grads;
}

Tensors Projection::grad_bias(const MatrixView& grad) const {
  const Dtype acc = weight_[0].scalar_type() == Dtype::Double ? Dtype::Double : Dtype::Float;
  const std::vector<int64_t> over_rows{0};
  Tensors grads;
  for (size_t m = 0; m < weight_.size(); ++m) {
    const Tensor rows = grad.row_range(boundaries_[m], boundaries_[m + 1] - boundaries_[m]);
    grads.push_back(
        torch::stable::sum(rows, torch::headeronly::IntHeaderOnlyArrayRef(over_rows), false, acc));
  }
  return grads;
}

}  // namespace mixture_of_mamba::ops
