// SPDX-License-Identifier: Apache-2.0
#pragma once

// The warp that fetches: a ring of stages, in whose slots it lays tiles and operands.

#include "kernels/cuda/common/bulk_tensor.cuh"
#include "kernels/cuda/grouped_gemm.cuh"

namespace mixture_of_mamba::grouped_gemm {

// Slots of stages. With a tile's first one comes the tile; one of no stages takes a slot too. The tiles of a
// pair have as many rows and stages, so that both blocks are at the same slot.
template <typename C>
struct Ring {
  const uint32_t memory, full, empty;  // addresses; of the barriers of slot 0
  Tile* const tiles;                   // of the slots, in shared memory
  const uint32_t rank;                 // in the pair
  int slot = 0;
  uint32_t parity = 0;

  __device__ uint32_t left() const { return memory + slot * kStageBytes; }
  __device__ uint32_t right() const { return left() + C::kPartsOfTile * kPartBytes; }
  __device__ void advance() {
    if (++slot == kStages) slot = 0, parity ^= 1;
  }

  __device__ void begin() const {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full + 8 * i, 1);
      init_barrier(empty + 8 * i, 4 * kWarpgroups * C::kPair);
    }
    end_init_barriers();
  }

  // By the thread that fetches: the barrier of a slot that nobody reads any more.
  __device__ uint32_t take() const {
    wait_for_phase(empty + 8 * slot, parity ^ 1);
    return full + 8 * slot;
  }
  // By a warp that multiplies.
  __device__ void wait() const { wait_for_phase(full + 8 * slot, parity); }
  __device__ void release(int slot_) const {
    const uint32_t barrier = empty + 8 * slot_, lane = threadIdx.x % 32;
    if constexpr (C::kPair == 1) {
      if (lane == 0) arrive(barrier);
    } else {
      if (lane < C::kPair) arrive_at_block(barrier, lane ^ rank);  // lane 0 here
    }
  }
};

// Rows of the left operand for a stage: all parts of a tile, or the first of them. The blocks of a pair take
// turns, each for both.
template <typename C>
__device__ __forceinline__ void fetch_left(const Params& params, const Tile& tile, int parts, int depth,
                                           const Ring<C>& ring, uint32_t full) {
  const auto fetch_rows = [&](const CUtensorMap& map, int part) {
    const int row = tile.row + part * kPart;
    const int x = C::kOverRows ? row : depth, y = C::kOverRows ? depth : row;
    const uint32_t to = ring.left() + part * kPartBytes;
    if constexpr (C::kPair == 1) {
      fetch_tile(to, map, x, y, full, Keep::kLong);
    } else {
      fetch_tile_for((1 << C::kPair) - 1, to, map, x, y, full, Keep::kLong);
    }
  };
  if (parts < C::kPartsOfTile) {
    for (int part = ring.rank; part < parts; part += C::kPair) fetch_rows(params.part_of_left, part);
  } else if constexpr (C::kOverRows) {
#pragma unroll
    for (int i = 0; i < C::kPartsOfTile; i += C::kPair) fetch_rows(params.part_of_left, i + ring.rank);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i += C::kPair) fetch_rows(params.half_of_left, (i + ring.rank) * C::kParts);
  }
}

template <typename C>
__device__ __forceinline__ void fetch_right(const CUtensorMap& map, int column, int depth, uint32_t to,
                                            uint32_t full) {
  if constexpr (C::kForm == Form::kAlong) {
    fetch_tile(to, map, depth, column, full, Keep::kLong);
  } else {
#pragma unroll
    for (int i = 0; i < C::kColumns / kSpan; ++i) {
      fetch_tile(to + i * kPartBytes, map, column + i * kSpan, depth, full, Keep::kLong);
    }
  }
}

// What the sums of a tile are added to, a span of columns in a slot.
template <typename C>
__device__ __forceinline__ void fetch_sums(const Params& params, const Tile& tile, int parts, Ring<C>& ring) {
  for (int column = 0; column < C::kColumns; column += kSpan, ring.advance()) {
    const uint32_t full = ring.take();
    arrive_and_expect(full, parts * kPartBytes);
    for (int part = 0; part < parts; ++part) {
      fetch_tile(ring.left() + part * kPartBytes, params.part_of_sum, tile.column + column,
                 tile.row + part * kPart, full, Keep::kShort);
    }
  }
}

// By one thread: a tile and all of its stages.
template <typename C>
__device__ __forceinline__ void fetch(const Params& params, const Tile& tile, Ring<C>& ring) {
  uint32_t full = ring.take();
  ring.tiles[ring.slot] = tile;
  if (tile.stages == 0) {
    arrive(full);
    return ring.advance();
  }
  const CUtensorMap& right = params.right[C::kOverRows ? 0 : tile.group];
  const int parts = C::parts(tile.rows);
  for (int stage = 0; stage < tile.stages; ++stage, ring.advance()) {
    const int depth = tile.depth + stage * kSpan;
    if (stage > 0) full = ring.take();
    arrive_and_expect(full, (parts + C::kColumns / kSpan) * kPartBytes);
    fetch_left<C>(params, tile, parts, depth, ring, full);
    fetch_right<C>(right, tile.column, depth, ring.right(), full);
  }
  if constexpr (C::kPair > 1 && !C::kOverRows) {
    if (params.problem.add) fetch_sums<C>(params, tile, parts, ring);
  }
}

// By a warp: all tiles of this block, found 32 at a time.
template <typename C>
__device__ __forceinline__ void fetch_all(const Params& params, const Walk<C>& walk, Tile (&found)[32],
                                          Ring<C>& ring) {
  const unsigned lane = threadIdx.x % 32, pairs = gridDim.x / C::kPair;
  for (unsigned first = blockIdx.x / C::kPair; first < walk.count(); first += 32 * pairs) {
    const unsigned index = first + lane * pairs;
    found[lane] = index < walk.count() ? walk.at(index) : Tile{-1};
    found[lane].column += ring.rank * C::kColumns;
    __syncwarp();
    for (int i = 0; lane == 0 && i < 32 && found[i].group >= 0; ++i) fetch<C>(params, found[i], ring);
    __syncwarp();
  }
  if (lane > 0) return;
  fetch<C>(params, Tile{-1}, ring);
  // The block stays until the pair's other one has given back all slots here.
  for (int i = 1; i < kStages; ++i, ring.advance()) ring.take();
}

// By a warp: the tile whose first stage comes next. One lane reads it, the one that gives the slot back.
template <typename C>
__device__ __forceinline__ Tile next_tile(const Ring<C>& ring) {
  ring.wait();
  Tile tile = {};
  if (threadIdx.x % 32 == 0) tile = ring.tiles[ring.slot];
  static_assert(sizeof(Tile) % sizeof(int) == 0, "a row of integers");
#pragma unroll
  for (size_t i = 0; i < sizeof(Tile) / sizeof(int); ++i) {
    int& field = reinterpret_cast<int*>(&tile)[i];
    field = __shfl_sync(~0u, field, 0);
  }
  return tile;
}

}  // namespace mixture_of_mamba::grouped_gemm
