// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/common/launch.h"

// The walk of kernels that treat every row of a matrix alike: a block owns a few rows, its threads lie over
// a row's vectors, as many as the row needs up to all of them, and a thread takes kRowsInFlight rows at
// once, so that their loads are under way together.

namespace mixture_of_mamba {

struct RowTiles {
  static constexpr int kThreads = 256;
  static constexpr int kRowsInFlight = 4;
  int64_t rows = 0;
  int64_t vectors = 0;   // of a row
  int log2_columns = 0;  // threads over a row's vectors

  static RowTiles plan(int64_t rows, int64_t vectors) {
    RowTiles tiles{rows, vectors, 0};
    while ((1 << tiles.log2_columns) < kThreads && (int64_t{1} << tiles.log2_columns) < vectors) {
      ++tiles.log2_columns;
    }
    return tiles;
  }
  int64_t rows_of_block() const { return static_cast<int64_t>(kThreads >> log2_columns) * kRowsInFlight; }
  unsigned blocks() const { return grid_blocks(rows, rows_of_block()); }

#ifdef __CUDACC__
  // Calls visit(row[kRowsInFlight], vector) for this thread's share; rows past the end are -1.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit&& visit) const {
    const int columns = 1 << log2_columns, row_threads = kThreads >> log2_columns;
    const int64_t per_block = static_cast<int64_t>(row_threads) * kRowsInFlight;
    for (int64_t base = blockIdx.x * per_block; base < rows; base += gridDim.x * per_block) {
      int64_t row[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int64_t candidate = base + i * row_threads + (threadIdx.x >> log2_columns);
        row[i] = candidate < rows ? candidate : -1;
      }
      for (int64_t vector = threadIdx.x & (columns - 1); vector < vectors; vector += columns) {
        visit(row, vector);
      }
    }
  }
#endif
};

}  // namespace mixture_of_mamba
