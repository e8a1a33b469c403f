// SPDX-License-Identifier: Apache-2.0
#pragma once

// The warps that multiply and store.

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/shared_memory.cuh"
#include "kernels/cuda/grouped_gemm_fetch.cuh"

namespace mixture_of_mamba::grouped_gemm {

// Where sums go: rows of the result, from the tile's first on.
template <typename C>
struct Result {
  using T = typename C::T;
  T* data;
  int64_t stride;
  int columns;  // that there are, from the tile's first on

  static __device__ Result of(const GroupedGemmParams& p, const Tile& tile) {
    const int64_t stride = C::kOverRows ? p.matrix_stride[tile.group] : p.right.stride;
    T* const data = static_cast<T*>(C::kOverRows ? p.matrix[tile.group] : p.right.data);
    return {data + tile.row * stride + tile.column, stride,
            (C::kOverRows ? p.left_columns : p.right_columns) - tile.column};
  }
  __device__ T* at(int row, int column) const { return data + row * stride + column; }

  // By columns, from the tile's first on; or null.
  static __device__ const T* bias(const GroupedGemmParams& p, const Tile& tile) {
    const void* const bias = tile.group < p.groups ? p.bias[tile.group] : nullptr;
    return bias != nullptr ? static_cast<const T*>(bias) + tile.column : nullptr;
  }
};

// A warp of those that multiply. kMore: there may be a bias, or something that the result is added to.
template <typename C, bool kMore>
struct Multiplier {
  using T = typename C::T;
  static constexpr bool kOverRows = C::kOverRows, kRightAcross = C::kForm != Form::kAlong;
  static constexpr int kParts = C::kParts, kColumns = C::kColumns, kSums = kColumns / 2;
  const Params& params;
  const int index;     // of the warpgroup
  const uint32_t out;  // address of what this warp stores
  float sums[kParts][kSums];

  __device__ Multiplier(const Params& params_, int index_, uint32_t out_)
      : params(params_), index(index_), out(out_) {
#pragma unroll
    for (int i = 0; i < kParts * kSums; ++i) {
      float& sum = sums[i / kSums][i % kSums];
      sum = 0.0f;
      opaque(sum);  // constants would come in between the products
    }
  }

  static __device__ int thread() { return threadIdx.x % 128; }
  static __device__ int lane() { return threadIdx.x % 32; }
  __device__ int first_row(int part) const {
    return (index * kParts + part) * kPart + thread() / 32 * kOutRows;
  }
  // Of this warpgroup's parts, in a slot.
  __device__ uint32_t left(const Ring<C>& ring, int part) const {
    return ring.left() + (index * kParts + part) * kPartBytes;
  }

  // Rows of the last stage that belong to others, of what this warpgroup reads; of the right operand that is
  // what the other one reads too, and clears as well.
  __device__ void clear_rows(const Ring<C>& ring, int first) const {
    constexpr int kWord = 16, kTiles = kParts + kColumns / kSpan;
    const int words = (kSpan - first) * warpgroup::kRowBytes / kWord;
    for (int i = thread(); i < kTiles * words; i += 128) {
      const int tile = i / words;
      const uint32_t at = tile < kParts ? left(ring, tile) : ring.right() + (tile - kParts) * kPartBytes;
      store_shared(at + first * warpgroup::kRowBytes + i % words * kWord, make_float4(0, 0, 0, 0));
    }
    show_shared();
    warpgroup::barrier(index + 1);
  }

  template <int kMultiplied>
  __device__ void multiply_stage(const Ring<C>& ring, bool add) {
    const auto columns_from = [](bool across, int k) { return across ? k * warpgroup::kRowBytes : 2 * k; };
    warpgroup::begin();
#pragma unroll
    for (int k = 0; k < kSpan; k += warpgroup::kColumns) {
      const uint64_t right = warpgroup::operand(ring.right() + columns_from(kRightAcross, k), kPartBytes);
#pragma unroll
      for (int part = 0; part < kMultiplied; ++part) {
        const uint32_t at = left(ring, part) + columns_from(kOverRows, k);
        warpgroup::multiply<T, kColumns, kOverRows, kRightAcross>(
            sums[part], warpgroup::operand(at, kPartBytes), right, add || k > 0);
      }
    }
    warpgroup::commit();
  }

  // Gives slots back that this warp does not use.
  static __device__ void pass(Ring<C>& ring, int slots) {
    for (int i = 0; i < slots; ++i, ring.advance()) {
      ring.wait();
      __syncwarp();  // nobody is left behind
      ring.release(ring.slot);
    }
  }

  // The first kMultiplied of the parts.
  template <int kMultiplied>
  __device__ void multiply(const Tile& tile, Ring<C>& ring) {
    int previous = ring.slot;
    for (int stage = 0; stage < tile.stages; ++stage, ring.advance()) {
      ring.wait();
      if constexpr (kOverRows) {
        const int there = tile.depth_end - tile.depth - stage * kSpan;
        if (there < kSpan) clear_rows(ring, there);
      }
      multiply_stage<kMultiplied>(ring, stage > 0);
      warpgroup::wait<1>();  // for the stage before
      if (stage > 0) ring.release(previous);
      previous = ring.slot;
    }
    warpgroup::wait<0>();
    ring.release(previous);
#pragma unroll
    for (int part = 0; part < kMultiplied; ++part) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) opaque(sums[part][i]);
    }
  }

  // Takes this warpgroup's part of a tile; whether there is something to store.
  __device__ bool multiply(const Tile& tile, Ring<C>& ring) {
    const int parts = C::parts(tile.rows) - index * kParts;
    if (tile.stages == 0) {
      pass(ring, 1);
    } else if (parts >= kParts) {
      multiply<kParts>(tile, ring);
    } else if (parts > 0) {
      multiply<1>(tile, ring);
    } else {
      pass(ring, tile.stages + (kMore && params.problem.add ? kColumns / kSpan : 0));
    }
    return parts > 0;
  }

  // Two neighbouring sums, of row first_row(part) + 8 half + lane / 4.
  __device__ float2 pair(int part, int half, int column) const {
    const float* const two = sums[part] + column / 2 + 2 * half;
    return make_float2(two[0], two[1]);
  }

  // Words of kOutRows rows as the copy engine lays them.
  static __device__ uint32_t word_at(uint32_t rows, int row, int word) {
    return rows + row * warpgroup::kRowBytes + (word ^ row % 8) * 16;
  }

  // Sums of kOutColumns columns, rounded, to shared memory. `more` is null or what they are added to by
  // column, `others` 0 or the address of what they are added to.
  __device__ void lay_out(const Tile& tile, const T* more, int columns, uint32_t others, int part, int first,
                          uint32_t buffer) const {
    constexpr int kPairs = kOutColumns / 4;
    const int in_quad = lane() % 4 * 2;
    uint32_t words[kPairs], other[kPairs] = {};
    if (kMore && others != 0) {
#pragma unroll
      for (int i = 0; i < kPairs; i += 4) {
        load_matrices(word_at(others, lane() % 16, i / 2 + lane() / 16), other[i], other[i + 1], other[i + 2],
                      other[i + 3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = first + i / 2 * 8;
      float2 two = pair(part, i % 2, column);
      if (kMore && more != nullptr && column + in_quad < columns) {
        other[i] = *reinterpret_cast<const uint32_t*>(more + column + in_quad);
      }
      if constexpr (kMore) {
        const float2 added = unpack_pair<T>(other[i]);
        two.x += added.x, two.y += added.y;
      }
      const uint32_t word = pack_pair<T>(two.x, two.y);
      words[i] = tile.stages > 0 ? word : 0;
    }
#pragma unroll
    for (int i = 0; i < kPairs; i += 4) {
      store_matrices(word_at(buffer, lane() % 16, i / 2 + lane() / 16), words[i], words[i + 1], words[i + 2],
                     words[i + 3]);
    }
  }

  __device__ void store(const Tile& tile, Ring<C>& ring) const {
    constexpr int kWord = 8, kWords = kOutColumns / kWord, kRowsAtOnce = 32 / kWords;
    const auto result = Result<C>::of(params.problem, tile);
    const int word = lane() % kWords, row = lane() / kWords;
    T* const to = result.at(first_row(0) + row, word * kWord);
    const int columns = result.columns - word * kWord;
    const bool add = kMore && params.problem.add;
    const T* const bias = kMore && !add ? result.bias(params.problem, tile) : nullptr;
#pragma unroll
    for (int column = 0; column < kColumns; column += kOutColumns) {
      if (add) ring.wait();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int rows = tile.rows - first_row(part);
        if (rows <= 0) break;
        const uint32_t buffer = out + (column / kOutColumns * kParts + part) % kOutBuffers * kOutBytes;
        const uint32_t others = add ? left(ring, part) + thread() / 32 * kOutBytes : 0;
        lay_out(tile, bias, result.columns, others, part, column, buffer);
        __syncwarp();
        T* at = to + part * kPart * result.stride + column;
#pragma unroll
        for (int i = 0; i < kOutRows; i += kRowsAtOnce, at += kRowsAtOnce * result.stride) {
          const uint4 got = load_word(word_at(buffer, i + row, word));
          if (i + row < rows && column < columns) store_word(at, got);
        }
      }
      if (add) show_shared();  // it has been read, before the copy engine writes there again
      __syncwarp();            // and the next columns, or the next tile's, come into the same buffers
      if (add) {
        ring.release(ring.slot);
        ring.advance();
      }
    }
  }

  // As they are, to shared memory, [row][column].
  __device__ void lay_out_sums(const Tile& tile, uint32_t to) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (first_row(part) >= tile.rows) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row(part) + 8 * half + lane() / 4;
#pragma unroll
        for (int column = 0; column < kColumns; column += 8) {
          const float2 two = pair(part, half, column);
          const float values[] = {two.x, two.y};
          store_shared(to + 4 * (row * C::kSumStride + column + lane() % 4 * 2), values);
        }
      }
    }
  }
};

}  // namespace mixture_of_mamba::grouped_gemm
