// SPDX-License-Identifier: Apache-2.0
#pragma once

// The warps that multiply and store.

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/shared_memory.cuh"
#include "kernels/cuda/grouped_gemm_fetch.cuh"

namespace mixture_of_mamba::grouped_gemm {

// Where sums go: rows of the result, from the tile's first on.
template <typename T>
struct Result {
  T* data;
  int64_t stride;
  int columns;  // that there are, from the tile's first on

  template <Form kForm>
  static __device__ Result of(const GroupedGemmParams& p, const Tile& tile) {
    constexpr bool kOverRows = kForm == Form::kOverRows;
    const int64_t stride = kOverRows ? p.matrix_stride[tile.group] : p.right.stride;
    T* const data = static_cast<T*>(kOverRows ? p.matrix[tile.group] : p.right.data);
    return {data + tile.row * stride + tile.column, stride,
            (kOverRows ? p.left_columns : p.right_columns) - tile.column};
  }
  __device__ T* at(int row, int column) const { return data + row * stride + column; }

  // What a row's sums are added to, a bias or what is there; null: nothing.
  __device__ const T* addend(const GroupedGemmParams& p, const Tile& tile, int row) const {
    if (p.add) return row < tile.rows ? at(row, 0) : nullptr;
    const void* const bias = tile.group < p.groups ? p.bias[tile.group] : nullptr;
    return bias != nullptr ? static_cast<const T*>(bias) + tile.column : nullptr;
  }
};

// A warp of those that multiply. kMore: there may be a bias, or something that the result is added to.
template <typename T, Form kForm, bool kMore>
struct Multiplier {
  static constexpr bool kOverRows = kForm == Form::kOverRows, kRightAcross = kForm != Form::kAlong;
  static constexpr int kSums = kTileColumns / 2;
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
  __device__ void release(const Ring& ring, int slot) const {
    if (slot >= 0 && lane() == 0) arrive(ring.empty + 8 * slot);
  }

  // Rows of the last stage that belong to others, of what this warpgroup reads; of the right operand that is
  // what the other one reads too, and clears as well.
  __device__ void clear_rows(const Ring& ring, int first) const {
    constexpr int kWord = 16, kTiles = kParts + kTileColumns / kSpan;
    const int words = (kSpan - first) * warpgroup::kRowBytes / kWord;
    for (int i = thread(); i < kTiles * words; i += 128) {
      const int tile = i / words;
      const uint32_t at = tile < kParts ? ring.left() + (index * kParts + tile) * kPartBytes
                                        : ring.right() + (tile - kParts) * kPartBytes;
      store_shared(at + first * warpgroup::kRowBytes + i % words * kWord, make_float4(0, 0, 0, 0));
    }
    show_shared();
    warpgroup::barrier(index + 1);
  }

  template <int kMultiplied>
  __device__ void multiply_stage(const Ring& ring, bool add) {
    const uint32_t left = ring.left() + index * kParts * kPartBytes;
    const auto columns_from = [](bool across, int k) { return across ? k * warpgroup::kRowBytes : 2 * k; };
    warpgroup::begin();
#pragma unroll
    for (int k = 0; k < kSpan; k += warpgroup::kColumns) {
      const uint64_t right = warpgroup::operand(ring.right() + columns_from(kRightAcross, k), kPartBytes);
#pragma unroll
      for (int part = 0; part < kMultiplied; ++part) {
        const uint32_t at = left + part * kPartBytes + columns_from(kOverRows, k);
        warpgroup::multiply<T, kTileColumns, kOverRows, kRightAcross>(
            sums[part], warpgroup::operand(at, kPartBytes), right, add || k > 0);
      }
    }
    warpgroup::commit();
  }

  // The first kMultiplied of the parts.
  template <int kMultiplied>
  __device__ void multiply(const Tile& tile, Ring& ring) {
    int previous = -1;
    for (int stage = 0; stage < tile.stages; ++stage, ring.advance()) {
      wait_for_phase(ring.full + 8 * ring.slot, ring.parity);
      if constexpr (kMultiplied == 0) {
        __syncwarp();  // nobody is left behind
        release(ring, ring.slot);
      } else {
        if constexpr (kOverRows) {
          const int there = tile.depth_end - tile.depth - stage * kSpan;
          if (there < kSpan) clear_rows(ring, there);
        }
        multiply_stage<kMultiplied>(ring, stage > 0);
        warpgroup::wait<1>();  // for the stage before
        release(ring, previous);
        previous = ring.slot;
      }
    }
    if constexpr (kMultiplied > 0) {
      warpgroup::wait<0>();
      release(ring, previous);
#pragma unroll
      for (int part = 0; part < kMultiplied; ++part) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) opaque(sums[part][i]);
      }
    }
  }

  // Takes this warpgroup's part of a tile; whether there is something to store.
  __device__ bool multiply(const Tile& tile, Ring& ring) {
    const int parts = tile.parts() - index * kParts;
    if (tile.stages == 0) {
      release(ring, ring.slot);
      ring.advance();
    } else if (parts >= kParts) {
      multiply<kParts>(tile, ring);
    } else if (parts == 1) {
      multiply<1>(tile, ring);
    } else {
      multiply<0>(tile, ring);
    }
    return parts > 0;
  }

  // Two neighbouring sums, of row first_row(part) + 8 half + lane / 4.
  __device__ float2 pair(int part, int half, int column) const {
    const float* const two = sums[part] + column / 2 + 2 * half;
    return make_float2(two[0], two[1]);
  }

  // Sums of kOutColumns columns, rounded, to shared memory as the copy engine would lay them.
  __device__ void lay_out(const Tile& tile, const Result<T>& result, int part, int first,
                          uint32_t buffer) const {
    const int in_quad = lane() % 4 * 2;
    uint32_t words[kOutColumns / 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* const more =
          kMore ? result.addend(params.problem, tile, first_row(part) + 8 * half + lane() / 4) : nullptr;
#pragma unroll
      for (int i = 0; i < kOutColumns / 8; ++i) {
        const int column = first + 8 * i;
        float2 two = pair(part, half, column);
        if (kMore && more != nullptr && column + in_quad < result.columns) {
          const float2 other = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(more + column + in_quad));
          two.x += other.x, two.y += other.y;
        }
        const uint32_t word = pack_pair<T>(two.x, two.y);
        words[2 * i + half] = tile.stages > 0 ? word : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kOutColumns / 8; i += 2) {
      const uint32_t* const w = words + 2 * i;
      store_matrices(word_at(buffer, lane() % 16, i + lane() / 16), w[0], w[1], w[2], w[3]);
    }
  }
  static __device__ uint32_t word_at(uint32_t buffer, int row, int word) {
    return buffer + row * warpgroup::kRowBytes + (word ^ row % 8) * 16;
  }

  __device__ void store(const Tile& tile) const {
    constexpr int kWord = 8, kWords = kOutColumns / kWord, kRowsAtOnce = 32 / kWords;
    const auto result = Result<T>::template of<kForm>(params.problem, tile);
    const int word = lane() % kWords, row = lane() / kWords;
    T* to = result.at(first_row(0) + row, word * kWord);
    const int columns = result.columns - word * kWord;
#pragma unroll
    for (int part = 0; part < kParts; ++part, to += kPart * result.stride) {
      const int rows = tile.rows - first_row(part);
      if (rows <= 0) break;
#pragma unroll
      for (int column = 0; column < kTileColumns; column += kOutColumns) {
        const uint32_t buffer = out + column / kOutColumns % kOutBuffers * kOutBytes;
        lay_out(tile, result, part, column, buffer);
        __syncwarp();
        T* at = to + column;
#pragma unroll
        for (int i = 0; i < kOutRows; i += kRowsAtOnce, at += kRowsAtOnce * result.stride) {
          const uint4 got = load_word(word_at(buffer, i + row, word));
          if (i + row < rows && column < columns) store_word(at, got);
        }
      }
    }
    __syncwarp();  // the next tile's come into the same buffers
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
        for (int column = 0; column < kTileColumns; column += 8) {
          const float2 two = pair(part, half, column);
          const float values[] = {two.x, two.y};
          store_shared(to + 4 * (row * kSumStride + column + lane() % 4 * 2), values);
        }
      }
    }
  }
};

}  // namespace mixture_of_mamba::grouped_gemm
