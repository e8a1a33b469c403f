// SPDX-License-Identifier: Apache-2.0
//
// What surrounds the GEMMs of a grouped linear layer whose row boundaries are on the device only.
//
//   select   a copy of one modality's rows, the others zero or left alone
//   finish   the modality's bias added and padding rows cleared, in place
//   sums     bias gradients: a modality's rows are split into equal parts, a block adds one part of kColumns
//            columns, and a second pass adds the parts in order, so that runs are equal bit by bit
//
// Grid, threads of select and finish: common/row_tiles.cuh. HBM is the bound of all three.

#include "kernels/grouped_linear.h"

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/row_tiles.cuh"
#include "kernels/cuda/selective_scan_bwd.h"

namespace mixture_of_mamba {
namespace {

constexpr int kRows = RowTiles::kRowsInFlight;

bool rows_in_vectors(const void* data, int64_t stride, int64_t columns, int64_t element_bytes) {
  return rows_in_words(data, stride, element_bytes, 16) && columns * element_bytes % 16 == 0;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(RowTiles::kThreads)
    select_kernel(const SelectRowsParams p, const RowTiles tiles) {
  const int64_t first = p.offsets[p.modality], last = p.offsets[p.modality + 1];
  tiles.for_each([&](const int64_t(&row)[kRows], int64_t vector) {
    Pack<T, kVector> values[kRows];
    bool selected[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      selected[i] = row[i] >= 0 && row[i] >= first && row[i] < last;
      if (selected[i]) {
        values[i] = load_pack<T, kVector, (kVector > 1)>(static_cast<const T*>(p.source.data) +
                                                         row[i] * p.source.stride + vector * kVector);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) values[i].values[v] = from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!selected[i] && !(p.zero_other_rows && row[i] >= 0)) continue;
      store_pack<T, kVector, (kVector > 1)>(
          static_cast<T*>(p.out.data) + row[i] * p.out.stride + vector * kVector, values[i]);
    }
  });
}

template <typename T, int kVector>
__global__ void __launch_bounds__(RowTiles::kThreads)
    finish_kernel(const FinishRowsParams p, const RowTiles tiles) {
  const int64_t padding = p.offsets[p.modalities];
  tiles.for_each([&](const int64_t(&row)[kRows], int64_t vector) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row[i] < 0 || (p.bias == nullptr && row[i] < padding)) continue;
      T* const at = static_cast<T*>(p.y.data) + row[i] * p.y.stride + vector * kVector;
      Pack<T, kVector> values;
      if (row[i] >= padding) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) values.values[v] = from_float<T>(0.0f);
      } else {
        int64_t modality = 0;
        for (int m = 1; m < p.modalities; ++m) modality += row[i] >= p.offsets[m];
        const Pack<T, kVector> bias = load_pack<T, kVector, (kVector > 1)>(
            static_cast<const T*>(p.bias) + modality * p.columns + vector * kVector);
        values = load_pack<T, kVector, (kVector > 1)>(at);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          values.values[v] = from_float<T>(to_float(values.values[v]) + to_float(bias.values[v]));
        }
      }
      store_pack<T, kVector, (kVector > 1)>(at, values);
    }
  });
}

template <typename P, typename Kernel>
int launch_tiles(const P& p, int64_t vector, Kernel kernel, CUstream_st* stream) {
  const RowTiles tiles = RowTiles::plan(p.rows, p.columns / vector);
  kernel<<<tiles.blocks(), RowTiles::kThreads, 0, stream>>>(p, tiles);
  return cudaGetLastError();
}

constexpr int kColumns = 32;  // of a block of sums
constexpr int kSumRows = 8;   // rows of threads
constexpr int64_t kWantedParts = 128;
constexpr int64_t kMaxParts = 32;

int64_t parts_of(const SumRowsParams& p) {
  return std::clamp<int64_t>(kWantedParts / p.modalities, 1, kMaxParts);
}

template <typename T>
__global__ void __launch_bounds__(kColumns* kSumRows) sums_kernel(const SumRowsParams p, float* partials) {
  __shared__ float sums[kSumRows][kColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const int64_t parts = gridDim.y, modality = blockIdx.z;
  // Boundaries come from device memory: clamped, they cannot lead outside the rows.
  const int64_t begin = min(max(static_cast<int64_t>(p.offsets[modality]), int64_t{0}), p.rows);
  const int64_t end = min(max(static_cast<int64_t>(p.offsets[modality + 1]), begin), p.rows);
  const int64_t part = (end - begin + parts - 1) / parts;
  const int64_t first = min(begin + blockIdx.y * part, end), last = min(first + part, end);
  float sum = 0.0f;
  if (column < p.columns) {
#pragma unroll 4
    for (int64_t row = first + threadIdx.y; row < last; row += kSumRows) {
      sum += to_float(static_cast<const T*>(p.source.data)[row * p.source.stride + column]);
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= p.columns) return;
#pragma unroll
  for (int r = 1; r < kSumRows; ++r) sum += sums[r][threadIdx.x];
  partials[(blockIdx.y * static_cast<int64_t>(p.modalities) + modality) * p.columns + column] = sum;
}

}  // namespace

int launch_select_rows_cuda(const SelectRowsParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.columns == 0) return cudaSuccess;
  return dispatch_type(p.type, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    constexpr int kVector = 16 / sizeof(T);
    const bool vectors = rows_in_vectors(p.source.data, p.source.stride, p.columns, sizeof(T)) &&
                         rows_in_vectors(p.out.data, p.out.stride, p.columns, sizeof(T));
    return vectors ? launch_tiles(p, kVector, select_kernel<T, kVector>, stream)
                   : launch_tiles(p, 1, select_kernel<T, 1>, stream);
  });
}

int launch_finish_rows_cuda(const FinishRowsParams& p, CUstream_st* stream) {
  if (p.rows == 0 || p.columns == 0) return cudaSuccess;
  return dispatch_type(p.type, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    constexpr int kVector = 16 / sizeof(T);
    const bool vectors = rows_in_vectors(p.y.data, p.y.stride, p.columns, sizeof(T)) &&
                         rows_in_vectors(p.bias, p.columns, p.columns, sizeof(T));
    return vectors ? launch_tiles(p, kVector, finish_kernel<T, kVector>, stream)
                   : launch_tiles(p, 1, finish_kernel<T, 1>, stream);
  });
}

size_t sum_rows_workspace_cuda(const SumRowsParams& p) {
  return parts_of(p) * p.modalities * p.columns * sizeof(float);
}

int launch_sum_rows_cuda(const SumRowsParams& p, void* workspace, CUstream_st* stream) {
  if (p.columns == 0) return cudaSuccess;
  float* const partials = static_cast<float*>(workspace);
  const int64_t parts = parts_of(p);
  const dim3 grid(grid_blocks(p.columns, kColumns), static_cast<unsigned>(parts), p.modalities);
  const int error = dispatch_type(p.type, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    sums_kernel<T><<<grid, dim3(kColumns, kSumRows), 0, stream>>>(p, partials);
    return cudaGetLastError();
  });
  if (error != 0) return error;
  return launch_column_sums({{partials, parts, p.modalities * p.columns, p.sums}}, stream);
}

}  // namespace mixture_of_mamba
