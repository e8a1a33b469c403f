// SPDX-License-Identifier: Apache-2.0
#pragma once

// Products of groups of rows. Tiles of 256 x 128 sums, whose operands the copy engine brings.
//
// Grid     a block a multiprocessor, each of which goes from tile to tile. Where there are few tiles, a
//          cluster of blocks for each, which share what is summed over.
// Warps    one fetches stages of 64 columns into a ring; two warpgroups multiply, each 128 rows of the tile.
// Sums     in registers; rounded and through shared memory to the result, by each warp for itself. Those of a
//          cluster meet in shared memory and are added up in the order of the blocks.
// Edges    a tile begins with its group and ends with it: rows beyond are computed with and not stored, and
//          64 rows that lie beyond as a whole are not multiplied. Where sums run over rows, those rows of the
//          last stage that are another group's become zeros in shared memory.
// Barriers of the ring: a slot is full when its bytes have come, empty when eight warps have multiplied it.
//
// Here: sizes, and who computes which tile. grouped_gemm_kernel.cuh has the kernels.

#include <cuda.h>

#include "kernels/cuda/common/warpgroup.cuh"
#include "kernels/grouped_gemm.h"

namespace mixture_of_mamba::grouped_gemm {

constexpr int kWarpgroups = 2;  // that multiply
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kSpan = warpgroup::kRowBytes / 2;  // columns of a stage
constexpr int kTileRows = 256, kTileColumns = 128;
constexpr int kPart = warpgroup::kRows;  // rows that are multiplied or not
constexpr int kPartsOfTile = kTileRows / kPart, kParts = kPartsOfTile / kWarpgroups;
constexpr int kPartBytes = kPart * warpgroup::kRowBytes;  // of a stage; as many as of a span that lies across
static_assert(kPart == kSpan, "they are squares");
constexpr int kLeftBytes = kTileRows * warpgroup::kRowBytes,
              kRightBytes = kTileColumns * warpgroup::kRowBytes;
constexpr int kStageBytes = kLeftBytes + kRightBytes, kStages = 4;
constexpr int kOutRows = 16, kOutColumns = kSpan;                            // that a warp stores at once
constexpr int kOutBytes = kOutRows * warpgroup::kRowBytes, kOutBuffers = 2;  // of a warp, taken in turn
constexpr int kAlignment = 1024;
constexpr int kRingBytes = kStages * kStageBytes;
constexpr int kSharedBytes = kRingBytes + 4 * kWarpgroups * kOutBuffers * kOutBytes + kAlignment;
constexpr int kSumStride = kTileColumns + 4;  // floats: the lanes of a store meet no bank twice
static_assert(kTileRows * kSumStride * 4 <= kRingBytes, "sums of a cluster lie where the ring was");
constexpr int kMostBlocks = 8;  // of a cluster
constexpr unsigned kBand = 8;   // tiles of rows that are walked beside each other, for the L2 cache

// What lies how.
enum class Form {
  kAlong,       // rows lie along what is summed over: y = x W^T
  kTransposed,  // the matrix lies across: y = x W
  kOverRows,    // both do: W = y^T x
};

// The operands of the tiles: left those of their rows, right those of their columns. Where sums run over rows
// that is y and x, otherwise x and the matrices.
struct Params {
  GroupedGemmParams problem;
  CUtensorMap left, part_of_left;                     // by the rows of a tile, of a part
  CUtensorMap right[GroupedGemmParams::kMostGroups];  // kOverRows: one for all groups
  int32_t blocks = 1;                                 // of a cluster
};

// Of groups, and of padding behind them; in shared memory, by all threads.
struct Groups {
  int begin[GroupedGemmParams::kMostGroups + 2];
  int by_size[GroupedGemmParams::kMostGroups];

  __device__ int rows(int group) const { return max(begin[group + 1] - begin[group], 0); }

  __device__ void find(const GroupedGemmParams& p, bool sort) {
    for (int g = threadIdx.x; g < p.groups + 2; g += kThreads) {
      begin[g] = g > p.groups           ? p.rows
                 : p.offsets == nullptr ? p.begin[g]
                                        : min(max(p.offsets[g], 0), p.rows);
    }
    __syncthreads();
    if (!sort) return;
    for (int g = threadIdx.x; g < p.groups; g += kThreads) {
      int larger = 0;
      for (int i = 0; i < p.groups; ++i) larger += rows(i) > rows(g) || (rows(i) == rows(g) && i < g);
      by_size[larger] = g;
    }
    __syncthreads();
  }
};

// Sums of rows x columns, over `stages`.
struct Tile {
  int group;        // negative: no tile, the end
  int row, column;  // of the sums
  int rows;         // that there are
  int stages;
  int depth, depth_end;  // kOverRows: rows that are summed over; else columns, of which all are there
  int count;             // of such tiles, one beside the other

  // What is multiplied.
  __device__ int parts() const { return (min(rows, kTileRows) + kPart - 1) / kPart; }
};

// Units of work: a tile, whole ones first, or those that sum over most rows. Of tiles that are not whole two
// or three are a unit where all find room like that in the last round of whole ones.
template <Form kForm>
class Walk {
  static constexpr bool kOverRows = kForm == Form::kOverRows;

 public:
  // blocks: of a round; 0: every tile is a unit
  __device__ Walk(const GroupedGemmParams& p, const Groups& groups, unsigned blocks)
      : p_(p), groups_(groups) {
    columns_ = ceil(kOverRows ? p.left_columns : p.right_columns, kTileColumns);
    if constexpr (kOverRows) {
      rows_ = ceil(p.right_columns, kTileRows);
      whole_ = units_ = rows_ * columns_ * p.groups;
    } else {
      rows_ = 0;
#pragma unroll 1
      for (int g = 0; g < p.groups; ++g) rows_ += whole(g);
      whole_ = rows_ * columns_;
      const unsigned space = blocks > 0 ? (blocks - whole_ % blocks) % blocks : ~0u;
      most_tiles_ = 1;
      while (most_tiles_ <= kMostTilesOfUnit && units_of_rest() > space) ++most_tiles_;
      if (most_tiles_ > kMostTilesOfUnit) most_tiles_ = 1;
      units_ = whole_ + units_of_rest() + (p.add ? 0 : ceil(groups.rows(p.groups), kTileRows)) * columns_;
    }
  }

  __device__ unsigned units() const { return units_; }

  // A unit's first tile.
  __device__ Tile at(unsigned unit) const {
    if constexpr (kOverRows) {
      const unsigned of_group = rows_ * columns_;
      const int group = groups_.by_size[unit / of_group];
      const Place at = place(unit % of_group);
      const int first = groups_.begin[group], end = first + groups_.rows(group), row = at.row * kTileRows;
      const int stages = ceil(end - first, kSpan), column = at.column * kTileColumns;
      return {group, row, column, p_.right_columns - row, stages, first, end, 1};
    }
    int group = 0;
    if (unit < whole_) {
      Place at = place(unit);
#pragma unroll 1
      for (unsigned tiles; at.row >= (tiles = whole(group)); ++group) at.row -= tiles;
      return tile(group, at.row, at.column, 1);
    }
    unit -= whole_;
#pragma unroll 1
    for (unsigned units; group < p_.groups; ++group, unit -= units) {
      units = units_of_rest(group);
      if (unit >= units) continue;
      const unsigned column = unit * tiles_of_unit(group);
      return tile(group, whole(group), column, min(tiles_of_unit(group), columns_ - column));
    }
    return tile(group, unit / columns_, unit % columns_, 1);
  }

 private:
  static __device__ unsigned ceil(unsigned a, unsigned b) { return (a + b - 1) / b; }

  // Of a group: tiles all of whose parts are multiplied, and the parts of what remains.
  __device__ unsigned whole(int group) const { return ceil(groups_.rows(group), kPart) / kPartsOfTile; }
  __device__ unsigned rest(int group) const { return ceil(groups_.rows(group), kPart) % kPartsOfTile; }
  // At most so many that they take no longer than a whole one and one of them.
  static constexpr unsigned kMostTilesOfUnit = 3;
  __device__ unsigned tiles_of_unit(int group) const {
    return min(most_tiles_, rest(group) == 1 ? kMostTilesOfUnit : 2);
  }
  __device__ unsigned units_of_rest(int group) const {
    return rest(group) > 0 ? ceil(columns_, tiles_of_unit(group)) : 0;
  }
  __device__ unsigned units_of_rest() const {
    unsigned all = 0;
#pragma unroll 1
    for (int g = 0; g < p_.groups; ++g) all += units_of_rest(g);
    return all;
  }

  // Bands of rows, in each of them column by column.
  struct Place {
    unsigned row, column;
  };
  __device__ Place place(unsigned index) const {
    const unsigned band = index / (kBand * columns_), in_band = index % (kBand * columns_);
    const unsigned height = min(kBand, rows_ - band * kBand);
    return {band * kBand + in_band % height, in_band / height};
  }

  __device__ Tile tile(int group, unsigned row, unsigned column, unsigned count) const {
    const int depth = group < p_.groups ? p_.left_columns : 0, first = row * kTileRows;
    return {group,
            groups_.begin[group] + first,
            static_cast<int>(column * kTileColumns),
            groups_.rows(group) - first,
            static_cast<int>(ceil(depth, kSpan)),
            0,
            depth,
            static_cast<int>(count)};
  }

  const GroupedGemmParams& p_;
  const Groups& groups_;
  // Tiles beside and above each other; of a group where sums run over rows, else whole ones of all.
  unsigned columns_, rows_;
  unsigned whole_, units_;
  unsigned most_tiles_;  // of a unit
};

}  // namespace mixture_of_mamba::grouped_gemm
