// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/group_boundary.cuh"
#include "kernels/few_rows.h"

// Which rows a block of the projections of few rows has.

namespace mixture_of_mamba::few_rows {

// Rows first .. last - 1 of x. Behind the last modality comes padding.
struct Range {
  int32_t first, last;
};

__device__ __forceinline__ Range rows_of(const FewRowsParams& p, int modality) {
  return {boundary_of(p, modality), modality < p.modalities ? boundary_of(p, modality + 1) : p.rows};
}

template <typename T>
__device__ __forceinline__ void store(const FewRowsParams& p, int row, int column, float value) {
  if (column < p.out_features) static_cast<T*>(p.y.data)[row * p.y.stride + column] = from_float<T>(value);
}

// By a block of kThreads, for the columns out .. out + kOut - 1.
template <typename T, int kThreads, int kOut>
__device__ __forceinline__ void clear_padding(const FewRowsParams& p, int out) {
  const Range rows = rows_of(p, p.modalities);
  for (int i = threadIdx.x; i < (rows.last - rows.first) * kOut; i += kThreads) {
    store<T>(p, rows.first + i / kOut, out + i % kOut, 0.0f);
  }
}

}  // namespace mixture_of_mamba::few_rows
