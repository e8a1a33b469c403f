// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <vector>

#include "kernels/few_rows.h"
#include "ops/matrix_view.h"

// Matrix products: those of all modalities at once by kernels of our own, where they serve, else torch's own
// libraries on parts of tensors. These are called below the dispatcher (C shims of the stable ABI): a
// projection per modality is many small calls then, and a dispatched one costs the host several times as
// much.

namespace mixture_of_mamba::ops {

using Tensors = std::vector<Tensor>;

// Boundaries of the row ranges that a projection's weights own: one range per weight. Rows beyond the last
// are padding. Empty: the device alone knows them.
using Boundaries = std::vector<int64_t>;

// A projection with a weight per modality and boundaries, int32 [modalities + 1], on the device alone.
// Padding rows of `out` become 0.
struct DeviceProducts {
  void (*forward)(const MatrixView& input, const MatrixView& out, const Tensors& weight, const Tensors& bias,
                  const Tensor& offsets);
  void (*grad_input)(const MatrixView& grad, const MatrixView& out, const Tensors& weight,
                     const Tensor& offsets);
  Tensors (*grad_weight)(const MatrixView& grad, const MatrixView& input, const Tensor& offsets);
  Tensors (*grad_bias)(const MatrixView& grad, const Tensor& offsets);
};

// A product of rows x, rows y and a weight per modality, [y's columns, x's columns].
struct GroupedProduct {
  enum class Kind { kForward, kGradInput, kAddGradInput, kGradWeight };
  Kind kind;  // y = W x + bias; x = W^T y; x += W^T y; W = y x^T
  const MatrixView &x, &y;
  const Tensors &weight, &bias;
  const Boundaries& boundaries;
  const OptionalTensor& offsets;  // int32, read where the boundaries are empty
};

// One backend's functions. The first two are torch's; the next three may be null, and say whether they
// served; the last is there where boundaries may be on the device alone.
struct Products {
  AOTITorchError (*mm)(AtenTensorHandle out, AtenTensorHandle left, AtenTensorHandle right);
  AOTITorchError (*addmm)(AtenTensorHandle out, AtenTensorHandle add, AtenTensorHandle left,
                          AtenTensorHandle right, double beta, double alpha);
  // out = left @ right, or out += it.
  bool (*direct)(const Factor& left, const Factor& right, const Factor& out, bool add) = nullptr;
  // A whole projection, padding rows included, where kernels/few_rows.h serves. Boundaries are on the host,
  // or, when those are empty, in `offsets`, int32 on the device.
  bool (*few_rows)(const MatrixView& input, const MatrixView& out, const Tensors& weight, const Tensors& bias,
                   const Boundaries& boundaries, const OptionalTensor& offsets, Settled settled) = nullptr;
  // All modalities at once, padding rows included, where kernels/grouped_gemm.h serves.
  bool (*grouped)(const GroupedProduct&) = nullptr;
  const DeviceProducts* on_device = nullptr;

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
  // `boundaries` are those of the modalities; where they are empty, there is a weight for each of `offsets`.
  Projection(const Products& products, Tensors weight, Tensors bias, const Boundaries& boundaries,
             const OptionalTensor& offsets);

  int64_t in_features() const { return weight_[0].size(1); }
  int64_t out_features() const { return weight_[0].size(0); }
  // Padding rows of `out` become 0.
  void forward(const MatrixView& input, const MatrixView& out, Settled settled = Settled::kNothing) const;
  void grad_input(const MatrixView& grad, const MatrixView& out) const;
  void add_grad_input(const MatrixView& grad, const MatrixView& out) const;
  Tensors grad_weight(const MatrixView& grad, const MatrixView& input) const;
  Tensors grad_bias(const MatrixView& grad) const;

 private:
  bool on_device() const { return boundaries_.empty(); }
  bool grouped(GroupedProduct::Kind kind, const MatrixView& x, const MatrixView& y,
               const Tensors& weight) const;
  template <typename Visit>
  void for_each_range(Visit&& visit) const;
  void clear_padding_rows(const MatrixView& out) const;

  const Products& products_;
  Tensors weight_, bias_;
  Boundaries boundaries_;
  OptionalTensor offsets_;  // int32
};

}  // namespace mixture_of_mamba::ops
