// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/shared_memory.cuh"

// How the convolution's activations come in. A block looks up the rows of up to kPiece tokens at once.
// Aligned rows then stream through a ring in shared memory, one group of tokens ahead of the arithmetic:
// asynchronous copies hold no registers. A thread reads only what it copied itself, so the ring needs no
// barrier.

namespace mixture_of_mamba::conv {

constexpr int kThreads = 128;
constexpr int kPiece = 128;        // tokens whose rows a block looks up together
constexpr int kBytesOfThread = 8;  // of a row
constexpr int kStages = 2;         // groups in the ring; more lost where they were measured

// The rows of a piece of a unit.
struct alignas(16) Piece {
  int32_t row[kPiece];
  uint32_t absent[kPiece / 32];  // bit: padding, or past the unit's end

  __device__ __forceinline__ bool is_absent(int token) const { return absent[token / 32] >> token % 32 & 1; }
  // Whether the group from `token` on is kGroup tokens, none of them padding.
  template <int kGroup>
  __device__ __forceinline__ bool is_full(int token) const {
    static_assert(32 % kGroup == 0, "a group's bits lie in one word");
    return (absent[token / 32] >> token % 32 & ((1u << kGroup) - 1)) == 0;
  }
  template <int kGroup>
  __device__ __forceinline__ void get_group(int token, int32_t (&to)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; i += 4) {
      static_assert(kGroup % 4 == 0, "whole words of rows");
      const int4 four = *reinterpret_cast<const int4*>(row + token + i);
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  }
};
static_assert(kPiece % 32 == 0 && kPiece <= kThreads, "a thread looks up one row, whole warps do");

// Groups of kGroup tokens of kStreams matrices on their way from global memory.
template <int kStreams, int kGroup>
struct Ring {
  Words<kBytesOfThread>::type slots[kStages][kStreams][kGroup][kThreads];

  __device__ __forceinline__ void fetch(int group, int stream, int i, const void* from) {
    const uint32_t to = shared_address(&slots[group % kStages][stream][i][threadIdx.x]);
    // The slot was read by this thread a group ago, and its loads and copies are carried out in order.
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytesOfThread)
                 : "memory");
  }
  template <typename Channels>
  __device__ __forceinline__ Channels take(int group, int stream, int i) const {
    return reinterpret_cast<const Channels&>(slots[group % kStages][stream][i][threadIdx.x]);
  }
};
__device__ __forceinline__ void end_fetches() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All fetches but those that the last kStages - 1 ends closed have arrived.
__device__ __forceinline__ void await_fetches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
}

}  // namespace mixture_of_mamba::conv
