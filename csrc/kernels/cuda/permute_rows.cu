// SPDX-License-Identifier: Apache-2.0
//
// out[i] = x[index[i]]: a gather of whole rows in the widest words that addresses and sizes allow.
//
// Grid, threads  common/row_tiles.cuh
// Cost           every byte read once and written once: HBM is the bound.

#include "kernels/permute_rows.h"

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/row_tiles.cuh"

namespace mixture_of_mamba {
namespace {

template <typename Word>
__global__ void __launch_bounds__(RowTiles::kThreads)
    gather_kernel(const PermuteRowsParams p, const RowTiles tiles) {
  tiles.for_each([&](const int64_t(&row)[RowTiles::kRowsInFlight], int64_t vector) {
    Word words[RowTiles::kRowsInFlight] = {};
#pragma unroll
    for (int i = 0; i < RowTiles::kRowsInFlight; ++i) {
      const int64_t source = row[i] < 0 ? -1 : p.index[row[i]];
      if (source < 0 || source >= p.rows) continue;
      words[i] = reinterpret_cast<const Word*>(static_cast<const char*>(p.x) + source * p.x_stride)[vector];
    }
#pragma unroll
    for (int i = 0; i < RowTiles::kRowsInFlight; ++i) {
      if (row[i] < 0) continue;
      reinterpret_cast<Word*>(static_cast<char*>(p.out) + row[i] * p.row_bytes)[vector] = words[i];
    }
  });
}

template <typename Word>
int launch(const PermuteRowsParams& p, CUstream_st* stream) {
  const RowTiles tiles = RowTiles::plan(p.rows, p.row_bytes / static_cast<int64_t>(sizeof(Word)));
  gather_kernel<Word><<<tiles.blocks(), RowTiles::kThreads, 0, stream>>>(p, tiles);
  return cudaGetLastError();
}

}  // namespace

int launch_permute_rows_cuda(const PermuteRowsParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.row_bytes == 0) return cudaSuccess;
  const auto in_words_of = [&](int64_t bytes) {
    return p.row_bytes % bytes == 0 && p.x_stride % bytes == 0 && is_aligned_to(p.x, bytes) &&
           is_aligned_to(p.out, bytes);
  };
  if (in_words_of(16)) return launch<uint4>(p, stream);
  if (in_words_of(4)) return launch<uint32_t>(p, stream);
  return launch<uint8_t>(p, stream);
}

}  // namespace mixture_of_mamba
