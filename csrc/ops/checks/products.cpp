// SPDX-License-Identifier: Apache-2.0
#include "ops/products.h"

#include <algorithm>

namespace mixture_of_mamba::ops {

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

Boundaries host_boundaries(const char* op, const char* name, const Tensor& tensor, int64_t entries,
                           int64_t end, const char* end_meaning) {
  require(tensor.dim() == 1 && tensor.numel() == entries, op, name,
          " must have num_modalities + 1 = ", entries, " elements, got ", shape_of(tensor));
  const Dtype dtype = tensor.scalar_type();
  require(dtype == Dtype::Int || dtype == Dtype::Long, op, name, " must be int32 or int64, got ",
          name_of(dtype));
  const Tensor whole = packed(tensor);
  Boundaries values(entries);
  const auto copy = [&](const auto* data) { std::copy(data, data + entries, values.begin()); };
  dtype == Dtype::Int ? copy(whole.const_data_ptr<int32_t>()) : copy(whole.const_data_ptr<int64_t>());
  require(values.front() == 0 && values.back() <= end, op, name, " must begin with 0 and end at most at ",
          end, " (", end_meaning, "), got ", values.front(), " and ", values.back());
  for (int64_t m = 1; m < entries; ++m) {
    require(values[m - 1] <= values[m], op, name, " must not decrease, got ", values[m - 1], " before ",
            values[m]);
  }
  return values;
}

Projection::Projection(const Products& products, Tensors weight, Tensors bias, const Boundaries& boundaries,
                       const OptionalTensor& offsets)
    : products_(products),
      weight_(std::move(weight)),
      bias_(std::move(bias)),
      boundaries_(boundaries),
      offsets_(offsets) {
  if (!on_device() && weight_.size() == 1) boundaries_ = {0, boundaries.back()};
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

// One weight for all rows is left to the backend's library, which is a little faster at that.
bool Projection::grouped(GroupedProduct::Kind kind, const MatrixView& x, const MatrixView& y,
                         const Tensors& weight) const {
  return products_.grouped && (on_device() || weight.size() > 1) &&
         products_.grouped({kind, x, y, weight, bias_, boundaries_, offsets_});
}

void Projection::forward(const MatrixView& input, const MatrixView& out, Settled settled) const {
  if (products_.few_rows && products_.few_rows(input, out, weight_, bias_, boundaries_, offsets_, settled)) {
    return;
  }
  if (grouped(GroupedProduct::Kind::kForward, input, out, weight_)) return;
  if (on_device()) return products_.on_device->forward(input, out, weight_, bias_, *offsets_);
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
  if (grouped(GroupedProduct::Kind::kGradInput, out, grad, weight_)) return;
  if (on_device()) return products_.on_device->grad_input(grad, out, weight_, *offsets_);
  for_each_range([&](size_t m, int64_t begin, int64_t count) {
    products_.assign({out, begin, count}, {grad, begin, count}, Part::of(weight_[m]));
  });
  clear_padding_rows(out);
}

void Projection::add_grad_input(const MatrixView& grad, const MatrixView& out) const {
  if (grouped(GroupedProduct::Kind::kAddGradInput, out, grad, weight_)) return;
  if (on_device()) {
    const Tensor part = empty_like_device(weight_[0], {out.rows(), out.columns()}, out.dtype());
    grad_input(grad, MatrixView(part));
    Tensor sum = out.tensor();
    torch::stable::copy_(sum, torch::stable::subtract(sum, part, -1.0));
    return;
  }
  for_each_range([&](size_t m, int64_t begin, int64_t count) {
    products_.add({out, begin, count}, {grad, begin, count}, Part::of(weight_[m]));
  });
}

Tensors Projection::grad_weight(const MatrixView& grad, const MatrixView& input) const {
  Tensors grads;
  for (const Tensor& weight : weight_) {
    grads.push_back(empty_like_device(weight, {out_features(), in_features()}, weight.scalar_type()));
  }
  if (grouped(GroupedProduct::Kind::kGradWeight, input, grad, grads)) return grads;
  if (on_device()) {
    grads.clear();
    return products_.on_device->grad_weight(grad, input, *offsets_);
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
  if (on_device()) return products_.on_device->grad_bias(grad, *offsets_);
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
