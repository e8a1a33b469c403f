// SPDX-License-Identifier: Apache-2.0
#pragma once

// Projection of few rows. The weights are the left operand of the matrix instruction, 16 of their rows by 8
// rows of x, so that a single row of x wastes arithmetic and no bytes.
//
// Grid     (tiles of out_features * parts of in_features, modalities, and one for padding rows). The parts of
//          a tile are a cluster.
// Warp     all out_features of the tile and a contiguous range of in_features. Operands come from global
//          memory in 16-byte words, straight into the registers of the matrix instruction: a sum does not
//          mind the order of its terms, so a lane's word counts as the columns that the instruction wants of
//          it.
// Sums     over a block's warps in shared memory, then over the cluster's blocks, both in order.
// Cost     the weights once from HBM, which binds; x once a tile from L2.
// Barriers one of the block and two of the cluster, which all threads of a modality with rows reach.

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/cluster.cuh"
#include "kernels/cuda/common/shared_memory.cuh"
#include "kernels/cuda/few_rows_common.cuh"

namespace mixture_of_mamba::few_rows {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocks = 2;  // of a multiprocessor, so that those of the next kernel can come early
constexpr int kWord = 8;    // elements that a lane loads at once
constexpr int kChunk = 32;  // in_features of a chunk: the words of four lanes
constexpr int kNarrow = 16, kWide = 32;  // out_features of a block

// kGroups: of 8 rows of x; kDepth: chunks on their way.
template <int kOut_, int kGroups_, int kDepth_>
struct Shape {
  static constexpr int kOut = kOut_, kTiles = kOut / 16, kGroups = kGroups_, kDepth = kDepth_;
  static constexpr int kRows = 8 * kGroups;
  static constexpr int kStride = kOut + 4;  // floats: the lanes of a store meet no bank twice
  static constexpr int kWarpFloats = kRows * kStride;
};

template <typename T>
__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// What a block computes: y[rows, out .. out + kOut - 1], from one part of in_features.
template <typename T, typename S>
struct Block {
  const FewRowsParams& p;
  const int out, part, parts, modality;

  __device__ explicit Block(const FewRowsParams& p_)
      : p(p_),
        out(blockIdx.x / parts_of_grid(p_) * S::kOut),
        part(cluster_rank()),
        parts(parts_of_grid(p_)),
        modality(blockIdx.y) {}

  static __device__ int parts_of_grid(const FewRowsParams& p) {
    return gridDim.x / ((p.out_features + S::kOut - 1) / S::kOut);
  }

  // `sums` holds [warp][row][column] of this block.
  __device__ void add_up(float* sums, const Range& rows) const {
    const T* const bias = static_cast<const T*>(p.bias[modality]);
    const auto finish = [&](int row, int column, float value) {
      if (bias != nullptr && out + column < p.out_features) value += to_float(bias[out + column]);
      store<T>(p, rows.first + row, out + column, value);
    };
    const int count = (rows.last - rows.first) * S::kOut;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int row = i / S::kOut, column = i % S::kOut, at = row * S::kStride + column;
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) value += sums[w * S::kWarpFloats + at];
      if (parts == 1) {
        finish(row, column, value);
      } else {
        sums[at] = value;  // read and written by this thread alone
      }
    }
    if (parts == 1) return;
    cluster_barrier();
    for (int i = threadIdx.x + part * kThreads; i < count; i += kThreads * parts) {
      const int row = i / S::kOut, column = i % S::kOut;
      const uint32_t at = shared_address(sums + row * S::kStride + column);
      float value = 0.0f;
      for (int other = 0; other < parts; ++other) value += load_of_block(at, other);
      finish(row, column, value);
    }
    cluster_barrier();  // nobody leaves while others read
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) direct_kernel(const __grid_constant__ FewRowsParams p) {
  __shared__ float sums[kWarps * S::kWarpFloats];
  let_next_begin();
  const Block<T, S> block(p);
  if (block.modality == p.modalities) {
    wait_for_previous();
    if (block.part == 0) clear_padding<T, kThreads, S::kOut>(p, block.out);
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_of_lane = lane / 4, column_of_lane = lane % 4 * kWord;
  const int chunks = (p.in_features + kChunk - 1) / kChunk;
  const int slice = block.part * kWarps + warp, slices = block.parts * kWarps;
  const int first_chunk = chunks * slice / slices, last_chunk = chunks * (slice + 1) / slices;
  // Chunks that another warp has, or nobody, count as zero.
  const auto exists = [&](int chunk) {
    return chunk < last_chunk && chunk * kChunk + column_of_lane < p.in_features;
  };

  const T* weight[S::kTiles][2];
#pragma unroll
  for (int i = 0; i < S::kTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(block.out + 16 * i + 8 * half + row_of_lane, p.out_features - 1);
      weight[i][half] = static_cast<const T*>(p.weight[block.modality]) +
                        row * p.weight_stride[block.modality] + column_of_lane;
    }
  }
  uint4 a[S::kDepth][S::kTiles][2];
  const auto load_weights = [&](int slot, int chunk) {
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[slot][i][half] = exists(chunk)
                               ? __ldcs(reinterpret_cast<const uint4*>(weight[i][half] + chunk * kChunk))
                               : make_uint4(0, 0, 0, 0);
      }
    }
  };
  const bool on_host = p.offsets == nullptr, all_early = on_host && p.settled == Settled::kEverything;
  const bool early =
      on_host && p.settled != Settled::kNothing && p.begin[block.modality] < p.begin[block.modality + 1];
  if (early) {
#pragma unroll
    for (int d = 0; d < S::kDepth; ++d) load_weights(d, first_chunk + d);
  }
  if (!all_early) wait_for_previous();
  const Range rows = rows_of(p, block.modality);
  if (rows.first >= rows.last) return wait_for_previous();

  const T* x[S::kGroups];
#pragma unroll
  for (int j = 0; j < S::kGroups; ++j) {
    const int row = min(rows.first + 8 * j + row_of_lane, rows.last - 1);
    x[j] = static_cast<const T*>(p.x.data) + row * p.x.stride + column_of_lane;
  }
  uint4 b[S::kDepth][S::kGroups];
  const auto load_x = [&](int slot, int chunk) {
#pragma unroll
    for (int j = 0; j < S::kGroups; ++j) {
      b[slot][j] =
          exists(chunk) ? *reinterpret_cast<const uint4*>(x[j] + chunk * kChunk) : make_uint4(0, 0, 0, 0);
    }
  };
#pragma unroll
  for (int d = 0; d < S::kDepth; ++d) {
    if (!early) load_weights(d, first_chunk + d);
    load_x(d, first_chunk + d);
  }
  float sum[S::kTiles][S::kGroups][4] = {};
#pragma unroll 1
  for (int chunk = first_chunk; chunk < last_chunk; chunk += S::kDepth) {
#pragma unroll
    for (int d = 0; d < S::kDepth; ++d) {
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < S::kGroups; ++j) {
          const uint4 &low = a[d][i][0], &high = a[d][i][1], &right = b[d][j];
          multiply<T>(sum[i][j], low.x, high.x, low.y, high.y, right.x, right.y);
          multiply<T>(sum[i][j], low.z, high.z, low.w, high.w, right.z, right.w);
        }
      }
      load_weights(d, chunk + d + S::kDepth);
      load_x(d, chunk + d + S::kDepth);
    }
  }
  wait_for_previous();  // for a second time unless all was early

#pragma unroll
  for (int i = 0; i < S::kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < S::kGroups; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * j + lane % 4 * 2 + e % 2, column = 16 * i + 8 * (e / 2) + row_of_lane;
        sums[warp * S::kWarpFloats + row * S::kStride + column] = sum[i][j][e];
      }
    }
  }
  __syncthreads();
  block.add_up(sums, rows);
}

}  // namespace mixture_of_mamba::few_rows
