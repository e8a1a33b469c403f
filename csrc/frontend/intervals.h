// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>

// Which of the intervals between boundaries a position is in: a token's packed sequence, a sorted row's
// modality.

namespace mixture_of_mamba::frontend {

// The i with boundaries[i] <= position < boundaries[i + 1], int64; the first interval for positions before
// all boundaries, the last for those after. An interval may be empty.
inline at::Tensor interval_of(const at::Tensor& positions, const at::Tensor& boundaries) {
  const at::Tensor inner = boundaries.slice(0, 1, -1);
  return at::bucketize(positions.to(inner.scalar_type()), inner, /*out_int32=*/false, /*right=*/true);
}

}  // namespace mixture_of_mamba::frontend
