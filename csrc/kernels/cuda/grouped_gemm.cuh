// SPDX-License-Identifier: Apache-2.0
#pragma once

// Products of groups of rows. Tiles of 128 x 256 sums, or 256 x 128, whose operands the copy engine brings.
//
// Grid     a block a multiprocessor, in pairs that go from tile to tile. Where there are few tiles, a cluster
//          of blocks for each, which share what is summed over.
// Pairs    two blocks have tiles beside each other, so the same left operand; each fetches half of it for
//          both.
// Warps    one fetches stages of 64 columns into a ring; two warpgroups multiply, each half of the rows.
// Sums     in registers; rounded and through shared memory to the result, by each warp for itself. What they
//          are added to comes through the ring, behind the operands. Those of a cluster meet in shared memory
//          and are added up in the order of the blocks.
// Edges    a tile begins with its group and ends with it: rows beyond are computed with and not stored, and
//          64 rows that lie beyond as a whole are not multiplied. Where sums run over rows, those rows of the
//          last stage that are another group's become zeros in shared memory.
// Barriers of the ring: a slot is full when its bytes have come, empty when eight warps have multiplied it,
//          and eight of the pair's other block.
//
// Here: sizes, and who computes which tile. grouped_gemm_kernel.cuh has the kernels.

#include <cuda.h>

#include "kernels/cuda/common/group_boundary.cuh"
#include "kernels/cuda/common/warpgroup.cuh"
#include "kernels/grouped_gemm.h"

namespace mixture_of_mamba::grouped_gemm {

constexpr int kWarpgroups = 2;  // that multiply
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kSpan = warpgroup::kRowBytes / 2;           // columns of a stage
constexpr int kPart = warpgroup::kRows;                   // rows that are multiplied or not
constexpr int kPartBytes = kPart * warpgroup::kRowBytes;  // of a stage; as many as of a span that lies across
static_assert(kPart == kSpan, "they are squares");
constexpr int kSquares = 6;  // of a stage, left and right
constexpr int kStageBytes = kSquares * kPartBytes, kStages = 4;
constexpr int kOutRows = 16, kOutColumns = kSpan;                            // that a warp stores at once
constexpr int kOutBytes = kOutRows * warpgroup::kRowBytes, kOutBuffers = 2;  // of a warp, taken in turn
constexpr int kAlignment = 1024;
constexpr int kRingBytes = kStages * kStageBytes;
constexpr int kSharedBytes = kRingBytes + 4 * kWarpgroups * kOutBuffers * kOutBytes + kAlignment;
constexpr int kMostBlocks = 8;  // of a cluster that shares a tile

// What lies how.
enum class Form {
  kAlong,       // rows lie along what is summed over: y = x W^T
  kTransposed,  // the matrix lies across: y = x W
  kOverRows,    // both do: W = y^T x
};

// kShared: a tile is shared by a cluster; otherwise blocks are in pairs.
template <typename T_, Form kForm_, int kRows_, bool kShared>
struct Config {
  using T = T_;
  static constexpr Form kForm = kForm_;
  static constexpr bool kOverRows = kForm == Form::kOverRows;
  static constexpr int kRows = kRows_, kColumns = (kSquares - kRows / kPart) * kSpan;  // of a tile
  static constexpr int kPartsOfTile = kRows / kPart, kParts = kPartsOfTile / kWarpgroups;
  static constexpr int kSumStride = kColumns + 8;  // floats: the lanes of a store meet no bank twice
  static_assert(kRows * kSumStride * 4 <= kRingBytes, "sums of a cluster lie where the ring was");
  static constexpr uint32_t kPair = kShared ? 1 : 2;
  static constexpr unsigned kBand = 2048 / kRows;  // tiles of rows that are walked together, for L2

  // Of a tile with so many rows, what is multiplied.
  static __device__ int parts(int rows) { return (min(rows, kRows) + kPart - 1) / kPart; }
};

// The operands of the tiles: left those of their rows, right those of their columns. Where sums run over rows
// that is y and x, otherwise x and the matrices.
struct Params {
  GroupedGemmParams problem;
  CUtensorMap part_of_left, half_of_left;             // by a part, by half of the rows of a tile
  CUtensorMap part_of_sum;                            // what is added to
  CUtensorMap right[GroupedGemmParams::kMostGroups];  // kOverRows: one for all groups
  int32_t blocks = 1;                                 // that share a tile
};

// Of groups, and of padding behind them; in shared memory, by all threads.
struct Groups {
  int begin[GroupedGemmParams::kMostGroups + 2];
  int by_size[GroupedGemmParams::kMostGroups];

  __device__ int rows(int group) const { return max(begin[group + 1] - begin[group], 0); }

  __device__ void find(const GroupedGemmParams& p, bool sort) {
    for (int g = threadIdx.x; g < p.groups + 2; g += kThreads) {
      begin[g] = g > p.groups ? p.rows : boundary_of(p, g);
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
};

// The tiles, of a pair: its first one. Whole ones come first, or those that sum over most rows.
template <typename C>
class Walk {
  static constexpr bool kOverRows = C::kOverRows;
  static constexpr unsigned kWidth = C::kPair * C::kColumns;

 public:
  __device__ Walk(const GroupedGemmParams& p, const Groups& groups) : p_(p), groups_(groups) {
    columns_ = ceil(kOverRows ? p.left_columns : p.right_columns, kWidth);
    if constexpr (kOverRows) {
      rows_ = ceil(p.right_columns, C::kRows);
      whole_ = count_ = rows_ * columns_ * p.groups;
    } else {
      rows_ = 0;
      unsigned rests = ceil(p.add ? 0 : groups.rows(p.groups), C::kRows);  // and padding
#pragma unroll 1
      for (int g = 0; g < p.groups; ++g) rows_ += whole(g), rests += has_rest(g);
      whole_ = rows_ * columns_;
      count_ = whole_ + rests * columns_;
    }
  }

  __device__ unsigned count() const { return count_; }

  __device__ Tile at(unsigned index) const {
    if constexpr (kOverRows) {
      const unsigned of_group = rows_ * columns_;
      const int group = groups_.by_size[index / of_group];
      const Place at = place(index % of_group);
      const int first = groups_.begin[group], end = first + groups_.rows(group), row = at.row * C::kRows;
      const int stages = ceil(end - first, kSpan), column = at.column * kWidth;
      return {group, row, column, p_.right_columns - row, stages, first, end};
    }
    int group = 0;
    if (index < whole_) {
      Place at = place(index);
#pragma unroll 1
      for (unsigned tiles; at.row >= (tiles = whole(group)); ++group) at.row -= tiles;
      return tile(group, at.row, at.column);
    }
    unsigned row = (index - whole_) / columns_;
    const unsigned column = (index - whole_) % columns_;
#pragma unroll 1
    for (; group < p_.groups; ++group) {
      if (!has_rest(group)) continue;
      if (row == 0) return tile(group, whole(group), column);
      --row;
    }
    return tile(group, row, column);
  }

 private:
  static __device__ unsigned ceil(unsigned a, unsigned b) { return (a + b - 1) / b; }

  // Of a group: tiles all of whose parts are multiplied, and whether there are more rows.
  __device__ unsigned whole(int group) const { return ceil(groups_.rows(group), kPart) / C::kPartsOfTile; }
  __device__ bool has_rest(int group) const { return ceil(groups_.rows(group), kPart) % C::kPartsOfTile > 0; }

  // Bands of rows, in each of them column by column.
  struct Place {
    unsigned row, column;
  };
  __device__ Place place(unsigned index) const {
    const unsigned band = index / (C::kBand * columns_), in_band = index % (C::kBand * columns_);
    const unsigned height = min(C::kBand, rows_ - band * C::kBand);
    return {band * C::kBand + in_band % height, in_band / height};
  }

  __device__ Tile tile(int group, unsigned row, unsigned column) const {
    const int depth = group < p_.groups ? p_.left_columns : 0, first = row * C::kRows;
    return {group,
            groups_.begin[group] + first,
            static_cast<int>(column * kWidth),
            groups_.rows(group) - first,
            static_cast<int>(ceil(depth, kSpan)),
            0,
            depth};
  }

  const GroupedGemmParams& p_;
  const Groups& groups_;
  // Tiles beside and above each other; of a group where sums run over rows, else whole ones of all.
  unsigned columns_, rows_;
  unsigned whole_, count_;
};

}  // namespace mixture_of_mamba::grouped_gemm
