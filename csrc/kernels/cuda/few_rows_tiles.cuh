// SPDX-License-Identifier: Apache-2.0
#pragma once

// Projection of few rows, by tiles. The weights are the left operand, as in few_rows_direct.cuh, but both
// operands come through shared memory, brought by the copy engine, so that 64 out_features share the rows of
// x, and a block waits for bytes and not for instructions.
//
// Grid     (tiles of 64 out_features * parts of in_features, tiles of rows, and one for padding rows). The
//          parts of a tile are a cluster: all sections that the sums are made of, each with a block of its
//          own, or one block for all of them. Both add up in the same order.
// Warps    one fetches stages of kColumns in_features into a ring, weights before x; four multiply.
// Sums     of a section in the registers of the four; sections in order, over the cluster's blocks through
//          shared memory.
// Cost     the weights once from HBM, which binds; x once a tile from L2.
// Barriers of the ring: a slot is full when its bytes have come, empty when four warps have multiplied it.
//          Of the block: one before the ring, two after it (clusters for the last, and one more).

#include "kernels/cuda/common/bulk_tensor.cuh"
#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/cluster.cuh"
#include "kernels/cuda/common/shared_memory.cuh"
#include "kernels/cuda/common/warpgroup.cuh"
#include "kernels/cuda/few_rows_common.cuh"
#include "kernels/cuda/few_rows_kernels.h"

namespace mixture_of_mamba::few_rows::tiles {

constexpr int kMultiplying = 4;  // warps
constexpr int kThreads = 32 * (kMultiplying + 1);
constexpr int kOut = kTileOut;
static_assert(kOut == warpgroup::kRows, "out_features are the rows of the left operand");
constexpr int kSwizzled = warpgroup::kRowBytes / 2;  // elements of a tile's row
constexpr int kWord = 8;                             // elements that a thread stores at once
constexpr int kSumStride = kOut + 4;                 // floats: the lanes of a store meet no bank twice
constexpr int kAlignment = 1024;                     // of a swizzled tile

struct Params {
  FewRowsParams problem;
  CUtensorMap x, weight[FewRowsParams::kMostModalities];
  int32_t stages = 1;     // in the ring
  int32_t sections = 1;   // of in_features
  int32_t parts = 1;      // 1, or as many as sections
  bool in_words = false;  // y's rows, and out_features
};

template <int kRows_>
struct Shape {
  static constexpr int kRows = kRows_;
  static constexpr int kPieces = kRows <= 64 ? 2 : 1;  // of a stage, side by side
  static constexpr int kColumns = kPieces * kSwizzled;
  static constexpr int kWeightBytes = kOut * warpgroup::kRowBytes, kXBytes = kRows * warpgroup::kRowBytes;
  static constexpr int kStageBytes = kPieces * (kWeightBytes + kXBytes);
  static constexpr int kMostStages = kRows <= 64 ? 4 : 8;
  static constexpr int kSumBytes = kRows * kSumStride * 4;  // over the ring, when it is done
};

// A ring's slot and the parity of its phase.
struct Slot {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++index == stages) index = 0, parity ^= 1;
  }
};

template <typename T, typename S>
struct Block {
  const Params& params;
  const FewRowsParams& p;
  const uint32_t ring, full, empty;  // addresses; of the barriers of slot 0
  const int part, out;
  const int all_stages, first_stage, stages;  // of in_features, of this block
  int modality = 0;
  Range rows;  // none where there is no tile; padding behind the last modality

  __device__ Block(const Params& params_, uint32_t ring_, uint32_t barriers)
      : params(params_),
        p(params_.problem),
        ring(ring_),
        full(barriers),
        empty(barriers + 8 * S::kMostStages),
        part(cluster_rank()),
        out(blockIdx.x / params_.parts * kOut),
        all_stages((p.in_features + S::kColumns - 1) / S::kColumns),
        first_stage(all_stages * part / params_.parts),
        stages(all_stages * (part + 1) / params_.parts - first_stage) {}

  // The tiles of a modality's rows follow each other.
  __device__ void find_rows() {
    int tile = blockIdx.y;
    for (; modality < p.modalities; ++modality) {
      rows = rows_of(p, modality);
      const int tiles = (max(rows.last - rows.first, 0) + S::kRows - 1) / S::kRows;
      if (tile < tiles) break;
      tile -= tiles;
    }
    if (modality == p.modalities) {
      rows = rows_of(p, modality);
      if (tile > 0) rows.last = rows.first;
      return;
    }
    rows.first += tile * S::kRows;
    rows.last = min(rows.last, rows.first + S::kRows);
  }

  __device__ uint32_t weight_tile(int slot, int piece) const {
    return ring + slot * S::kStageBytes + piece * S::kWeightBytes;
  }
  __device__ uint32_t x_tile(int slot, int piece) const {
    return weight_tile(slot, S::kPieces) + piece * S::kXBytes;
  }

  __device__ void fetch_weights(int stage, int slot) const {
    arrive_and_expect(full + 8 * slot, S::kStageBytes);
    for (int i = 0; i < S::kPieces; ++i) {
      fetch_tile(weight_tile(slot, i), params.weight[modality],
                 (first_stage + stage) * S::kColumns + i * kSwizzled, out, full + 8 * slot, Keep::kShort);
    }
  }
  __device__ void fetch_x(int stage, int slot) const {
    for (int i = 0; i < S::kPieces; ++i) {
      fetch_tile(x_tile(slot, i), params.x, (first_stage + stage) * S::kColumns + i * kSwizzled, rows.first,
                 full + 8 * slot, Keep::kLong);
    }
  }

  // By one thread.
  __device__ void fetch(bool weights_early, bool x_early) const {
    prefetch_map(params.weight[modality]);
    prefetch_map(params.x);
    const int ahead = min(params.stages, stages);
    if (!weights_early) wait_for_previous();
    for (int stage = 0; stage < ahead; ++stage) fetch_weights(stage, stage);
    if (!x_early) wait_for_previous();
    for (int stage = 0; stage < ahead; ++stage) fetch_x(stage, stage);
    Slot slot;
    for (int stage = ahead; stage < stages; ++stage, slot.advance(params.stages)) {
      wait_for_phase(empty + 8 * slot.index, slot.parity);
      fetch_weights(stage, slot.index);
      fetch_x(stage, slot.index);
    }
  }

  // sums += a section's, whose first stage lies in `slot`.
  __device__ void multiply(int section_stages, Slot& slot, float (&sums)[S::kRows / 2]) const {
    float section[S::kRows / 2] = {};
    int previous = -1;
    for (int stage = 0; stage < section_stages; ++stage, slot.advance(params.stages)) {
      wait_for_phase(full + 8 * slot.index, slot.parity);
      warpgroup::begin();
#pragma unroll
      for (int i = 0; i < S::kPieces; ++i) {
#pragma unroll
        for (int bytes = 0; bytes < warpgroup::kRowBytes; bytes += 2 * warpgroup::kColumns) {
          warpgroup::multiply<T, S::kRows>(section, warpgroup::operand(weight_tile(slot.index, i) + bytes),
                                           warpgroup::operand(x_tile(slot.index, i) + bytes));
        }
      }
      warpgroup::commit();
      warpgroup::wait<1>();  // for the stage before
      release(previous);
      previous = slot.index;
    }
    warpgroup::wait<0>();
    release(previous);
#pragma unroll
    for (int i = 0; i < S::kRows / 2; ++i) {
      opaque(section[i]);
      sums[i] += section[i];
    }
  }
  __device__ void release(int slot) const {
    if (slot >= 0 && threadIdx.x % 32 == 0) arrive(empty + 8 * slot);
  }

  __device__ void multiply(float (&sums)[S::kRows / 2]) const {
    const int sections = params.sections / params.parts, first = part * sections;
    Slot slot;
    for (int section = first; section < first + sections; ++section) {
      const int begin = all_stages * section / params.sections,
                end = all_stages * (section + 1) / params.sections;
      multiply(end - begin, slot, sums);
    }
  }

  // To shared memory, as [row][out_feature].
  __device__ void lay_out(const float (&sums)[S::kRows / 2]) const {
    const int lane = threadIdx.x % 32, column = 16 * (threadIdx.x / 32) + lane / 4;
#pragma unroll
    for (int i = 0; i < S::kRows / 2; ++i) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      store_shared(ring + 4 * (row * kSumStride + column + i % 4 / 2 * 8), sums[i]);
    }
  }

  // Sums over the parts, of which every block has some words.
  __device__ void finish() const {
    const T* const bias = static_cast<const T*>(p.bias[modality]);
    constexpr int kWords = kOut / kWord;
    for (int i = threadIdx.x + part * kThreads; i < (rows.last - rows.first) * kWords;
         i += kThreads * params.parts) {
      const int row = i / kWords, column = i % kWords * kWord;
      const uint32_t at = ring + 4 * (row * kSumStride + column);
      float values[kWord] = {};
      for (int other = 0; other < params.parts; ++other) add_of_block(at, other, values);
#pragma unroll
      for (int k = 0; k < kWord; ++k) {
        if (bias != nullptr && out + column + k < p.out_features)
          values[k] += to_float(bias[out + column + k]);
      }
      store_word(rows.first + row, out + column, values);
    }
  }

  __device__ void store_word(int row, int column, const float (&values)[kWord]) const {
    if (!params.in_words) {
#pragma unroll
      for (int k = 0; k < kWord; ++k) store<T>(p, row, column + k, values[k]);
    } else if (column < p.out_features) {
      T* const to = static_cast<T*>(p.y.data) + row * p.y.stride + column;
      store_pack<T, kWord, true>(to, from_floats<T>(values));
    }
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) tiles_kernel(const __grid_constant__ Params params) {
  extern __shared__ uint8_t memory[];
  __shared__ uint64_t barriers[2 * S::kMostStages];
  let_next_begin();
  const FewRowsParams& p = params.problem;
  const bool on_host = p.offsets == nullptr;
  if (!on_host) wait_for_previous();
  Block<T, S> block(params, (shared_address(memory) + kAlignment - 1) / kAlignment * kAlignment,
                    shared_address(barriers));
  block.find_rows();
  if (block.modality == p.modalities || block.rows.first >= block.rows.last) {
    wait_for_previous();
    if (block.part == 0 && block.rows.first < block.rows.last) clear_padding<T, kThreads, kOut>(p, block.out);
    return;
  }
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < S::kMostStages; ++slot) {
      init_barrier(block.full + 8 * slot, 1);
      init_barrier(block.empty + 8 * slot, kMultiplying);
    }
    end_init_barriers();
  }
  __syncthreads();
  if (threadIdx.x / 32 == kMultiplying) {
    if (threadIdx.x % 32 == 0) {
      block.fetch(on_host && p.settled != Settled::kNothing, on_host && p.settled == Settled::kEverything);
    }
    __syncwarp();
    wait_for_previous();
    __syncthreads();
  } else {
    float sums[S::kRows / 2] = {};
    block.multiply(sums);
    wait_for_previous();
    __syncthreads();  // the four have done with the ring
    block.lay_out(sums);
  }
  cluster_barrier();
  block.finish();
  cluster_barrier();  // nobody leaves while others read
}

}  // namespace mixture_of_mamba::few_rows::tiles
