// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "kernels/conversions.h"
#include "ops/common.h"

namespace mixture_of_mamba::ops {

// Parameters on their way to the kernels, and gradients on their way back: collected, then converted at once.
class Conversions {
 public:
  explicit Conversions(const char* op) : op_(op) {}

  // `count` elements of `to`, contiguous, from an element on.
  struct Slice {
    const Tensor& tensor;
    int64_t first, count;
  };
  static Slice all_of(const Tensor& tensor) { return {tensor, 0, tensor.numel()}; }

  void add(Conversion::Rule rule, const Slice& from, const Slice& to, const OptionalTensor& factor = {});
  // `tensor` as it is where it is contiguous and of the dtype; else what will be that once it has run.
  Tensor contiguous(const Tensor& tensor, Dtype dtype);

  template <typename Backend>
  void run(const Backend& backend) {
    for (size_t begin = 0; begin < items_.size(); begin += ConversionsParams::kMost) {
      ConversionsParams params;
      for (size_t i = begin; i < items_.size() && params.count < ConversionsParams::kMost; ++i) {
        params.items[params.count++] = items_[i];
      }
      backend.run(params);
    }
    items_.clear();
    sources_.clear();
  }

 private:
  const char* op_;
  std::vector<Conversion> items_;
  std::vector<Tensor> sources_;  // until they have been read
};

}  // namespace mixture_of_mamba::ops
