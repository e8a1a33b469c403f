// SPDX-License-Identifier: Apache-2.0
#pragma once

// The warp that fetches: a ring of stages, in whose slots it lays tiles and operands.

#include "kernels/cuda/common/bulk_tensor.cuh"
#include "kernels/cuda/grouped_gemm.cuh"

namespace mixture_of_mamba::grouped_gemm {

// Slots of stages. With a tile's first one comes the tile; one of no stages takes a slot too.
struct Ring {
  const uint32_t memory, full, empty;  // addresses; of the barriers of slot 0
  Tile* const tiles;                   // of the slots, in shared memory
  int slot = 0;
  uint32_t parity = 0;

  __device__ uint32_t left() const { return memory + slot * kStageBytes; }
  __device__ uint32_t right() const { return left() + kLeftBytes; }
  __device__ void advance() {
    if (++slot == kStages) slot = 0, parity ^= 1;
  }
};

// Rows of the left operand for a stage: all parts of a tile, or the first of them.
template <Form kForm>
__device__ __forceinline__ void fetch_left(const Params& params, const Tile& tile, int parts, int depth,
                                           uint32_t to, uint32_t full) {
  const auto fetch_part = [&](int part) {
    const int row = tile.row + part * kPart;
    const bool across = kForm == Form::kOverRows;
    fetch_tile(to + part * kPartBytes, params.part_of_left, across ? row : depth, across ? depth : row, full,
               Keep::kLong);
  };
  if (parts < kPartsOfTile) {
    for (int part = 0; part < parts; ++part) fetch_part(part);
  } else if constexpr (kForm == Form::kOverRows) {
#pragma unroll
    for (int part = 0; part < kPartsOfTile; ++part) fetch_part(part);
  } else {
    fetch_tile(to, params.left, depth, tile.row, full, Keep::kLong);
  }
}

template <Form kForm>
__device__ __forceinline__ void fetch_right(const CUtensorMap& map, int column, int depth, uint32_t to,
                                            uint32_t full) {
  if constexpr (kForm == Form::kAlong) {
    fetch_tile(to, map, depth, column, full, Keep::kLong);
  } else {
#pragma unroll
    for (int i = 0; i < kTileColumns / kSpan; ++i) {
      fetch_tile(to + i * kPartBytes, map, column + i * kSpan, depth, full, Keep::kLong);
    }
  }
}

// By one thread: a tile and all of its stages.
template <Form kForm>
__device__ __forceinline__ void fetch(const Params& params, const Tile& tile, Ring& ring) {
  wait_for_phase(ring.empty + 8 * ring.slot, ring.parity ^ 1);
  ring.tiles[ring.slot] = tile;
  if (tile.stages == 0) {
    arrive(ring.full + 8 * ring.slot);
    return ring.advance();
  }
  const CUtensorMap& right = params.right[kForm == Form::kOverRows ? 0 : tile.group];
  const int parts = tile.parts();
  for (int stage = 0; stage < tile.stages; ++stage, ring.advance()) {
    const int depth = tile.depth + stage * kSpan;
    const uint32_t full = ring.full + 8 * ring.slot;
    if (stage > 0) wait_for_phase(ring.empty + 8 * ring.slot, ring.parity ^ 1);
    arrive_and_expect(full, parts * kPartBytes + kRightBytes);
    fetch_left<kForm>(params, tile, parts, depth, ring.left(), full);
    fetch_right<kForm>(right, tile.column, depth, ring.right(), full);
  }
}

// By a warp: all tiles of this block, found 32 at a time.
template <Form kForm>
__device__ __forceinline__ void fetch_all(const Params& params, const Walk<kForm>& walk, Tile (&found)[32],
                                          Ring& ring) {
  const unsigned lane = threadIdx.x % 32;
  for (unsigned first = blockIdx.x; first < walk.units(); first += 32 * gridDim.x) {
    const unsigned unit = first + lane * gridDim.x;
    found[lane] = unit < walk.units() ? walk.at(unit) : Tile{-1};
    __syncwarp();
    for (int i = 0; lane == 0 && i < 32 && found[i].group >= 0; ++i) {
      Tile tile = found[i];
      for (int j = 0; j < tile.count; ++j, tile.column += kTileColumns) fetch<kForm>(params, tile, ring);
    }
    __syncwarp();
  }
  if (lane == 0) fetch<kForm>(params, Tile{-1}, ring);
}

// By a warp: the tile whose first stage comes next. One lane reads it, the one that gives the slot back.
__device__ __forceinline__ Tile next_tile(const Ring& ring) {
  wait_for_phase(ring.full + 8 * ring.slot, ring.parity);
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
