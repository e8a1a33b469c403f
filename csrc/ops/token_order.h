// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/common/packing.h"
#include "ops/common.h"

// The order of a batch's tokens, as operators get it.

namespace mixture_of_mamba::ops {

// Row, offset and boundary tensors, checked and kept alive for the kernel. Values are checked where
// reading them costs nothing (CPU tensors); on CUDA the kernels clamp them.
class Order {
 public:
  Order(const char* op, const Tensor& activation, const OptionalTensor& rows, const OptionalTensor& offsets,
        const OptionalTensor& cu_seqlens);
  const TokenOrder& order() const { return order_; }
  // int32 and contiguous.
  const OptionalTensor& rows() const { return rows_; }
  const OptionalTensor& offsets() const { return offsets_; }
  const OptionalTensor& cu_seqlens() const { return cu_seqlens_; }

 private:
  TokenOrder order_;
  OptionalTensor rows_, offsets_, cu_seqlens_;
};

}  // namespace mixture_of_mamba::ops
