// SPDX-License-Identifier: Apache-2.0
//
// Second passes of the scan's backward: partial sums of blocks, added in the order of the blocks.
//
//   grad_B, grad_C   out[row][c] = sum over b of partials[b][row][c]; a thread owns one element, or four
//                    when states are a multiple of 4. Padding rows get 0.
//   column sums      out[i] = sum over k of partials[k][i]; a thread owns one element. Few columns would
//                    leave the machine idle behind long columns, so a block has 8 rows of threads; row r
//                    adds k = r, r + 8, ... and row 0 adds the rows' sums.
//
// Both read every partial once, coalesced: memory binds.

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/selective_scan_bwd.h"

namespace mixture_of_mamba {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32;  // of a block of column sums
constexpr int kSumRows = kThreads / kColumns;

template <int kWidth>
struct Sum {
  float values[kWidth] = {};

  __device__ void add(const float* from) {
    if constexpr (kWidth == 4) {
      const float4 v = __ldcs(reinterpret_cast<const float4*>(from));
      values[0] += v.x;
      values[1] += v.y;
      values[2] += v.z;
      values[3] += v.w;
    } else {
      values[0] += __ldcs(from);
    }
  }
};

struct StateGradients {
  TokenOrder order;
  const float* partials;
  int64_t blocks, states;
  Rows grad_B, grad_C;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    state_gradients_kernel(const __grid_constant__ StateGradients args) {
  follow_previous();
  const int64_t columns = 2 * args.states, size = args.order.tokens * columns;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (i >= size) return;
  const int32_t row = static_cast<int32_t>(i / columns);
  const int64_t column = i - row * columns;
  const bool is_B = column < args.states;
  const Rows& to = is_B ? args.grad_B : args.grad_C;
  if (to.data == nullptr) return;
  Sum<kWidth> sum;
  if (!args.order.is_padding(row)) {
#pragma unroll 8
    for (int64_t b = 0; b < args.blocks; ++b) sum.add(args.partials + b * size + i);
  }
  T* out = static_cast<T*>(to.data) + row * to.stride + (is_B ? column : column - args.states);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) out[k] = from_float<T>(sum.values[k]);
}

struct SeveralColumnSums {
  static constexpr int kMost = 3;
  ColumnSums items[kMost];
};

__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const __grid_constant__ SeveralColumnSums several) {
  __shared__ float sums[kSumRows][kColumns];
  follow_previous();
  const ColumnSums& s = several.items[blockIdx.y];
  const int64_t i = int64_t(blockIdx.x) * kColumns + threadIdx.x, size = s.size;
  if (i - threadIdx.x >= size) return;
  float sum = 0.0f;
  if (i < size) {
#pragma unroll 4
    for (int64_t k = threadIdx.y; k < s.count; k += kSumRows) sum += s.partials[k * size + i];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= size) return;
#pragma unroll
  for (int r = 1; r < kSumRows; ++r) sum += sums[r][threadIdx.x];
  static_cast<float*>(s.out)[i] = sum;
}

template <typename T>
int launch_typed(const StateGradients& args, cudaStream_t stream) {
  const int width = args.states % 4 == 0 ? 4 : 1;
  const int64_t threads = args.order.tokens * 2 * args.states / width;
  const unsigned blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  const auto kernel = width == 4 ? state_gradients_kernel<T, 4> : state_gradients_kernel<T, 1>;
  return launch_chained({blocks, kThreads, 0, stream}, kernel, args);
}

}  // namespace

int launch_reduce_state_gradients(const SelectiveScanBackwardParams& p, const float* partials, int64_t blocks,
                                  CUstream_st* stream) {
  if (p.order.tokens == 0 || p.states == 0) return cudaSuccess;
  if (p.grad_B.data == nullptr && p.grad_C.data == nullptr) return cudaSuccess;
  const StateGradients args{p.order, partials, blocks, p.states, p.grad_B, p.grad_C};
  switch (p.type) {
    case ScalarType::kFloat32:
      return launch_typed<float>(args, stream);
    case ScalarType::kBFloat16:
      return launch_typed<__nv_bfloat16>(args, stream);
    case ScalarType::kFloat16:
      return launch_typed<__half>(args, stream);
    case ScalarType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

int launch_column_sums(std::initializer_list<ColumnSums> all, CUstream_st* stream) {
  SeveralColumnSums several;
  unsigned count = 0;
  int64_t longest = 0;
  for (const ColumnSums& one : all) {
    if (one.out == nullptr || one.size == 0) continue;
    if (count == SeveralColumnSums::kMost) return cudaErrorInvalidValue;
    several.items[count++] = one;
    longest = std::max(longest, one.size);
  }
  if (count == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((longest + kColumns - 1) / kColumns), count);
  return launch_chained({grid, dim3(kColumns, kSumRows), 0, stream}, column_sums_kernel, several);
}

}  // namespace mixture_of_mamba
