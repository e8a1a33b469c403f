// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cpu/vector.h"
#include "kernels/selective_scan.h"

// A block is kLanes channels of the scan. Lanes are channels, so every formula is written as if for one
// channel. States run in groups of kStates; missing states of the last group have A = B = C = 0. Included by
// *_isa.cpp files only, as is selective_scan_tile.h.

namespace mixture_of_mamba::MOM_ISA {

// 16 states of AVX-512 fill half of its 32 registers; the 16 registers of the others hold 4 states.
constexpr int kStates = kVectorBytes == 64 ? 8 : 4;
// Up to so many blocks walk a sequence side by side, so that long pieces of a token's row are read together
// and B and C of a tile are converted once for all. Their A and states should stay in the second-level cache.
inline int64_t blocks_abreast(int64_t states) { return larger(4, smaller(32, 512 / larger(1, states))); }

template <typename T>
struct Block {
  int64_t channel;  // first channel
  int lanes;        // channels of the block
};

template <typename T>
inline int64_t block_count(const SelectiveScanParams& p) {
  return (p.channels + kLanes<T> - 1) / kLanes<T>;
}

template <typename T>
inline Block<T> block_at(const SelectiveScanParams& p, int64_t index) {
  const int64_t channel = index * kLanes<T>;
  const int64_t left = p.channels - channel;
  return {channel, static_cast<int>(left < kLanes<T> ? left : kLanes<T>)};
}

inline int64_t rounded_states(const SelectiveScanParams& p) {
  return (larger(1, p.states) + kStates - 1) / kStates * kStates;
}

// A of a block, scaled by log2(e), as [states rounded up to kStates] vectors.
template <typename T>
inline void load_A(const SelectiveScanParams& p, const Block<T>& block, Vec<T>* A2) {
  const T* A = static_cast<const T*>(p.A);
  for (int64_t n = 0; n < rounded_states(p); ++n) {
    Vec<T> value{};
    if (n < p.states) {
      for (int i = 0; i < block.lanes; ++i) value[i] = A[(block.channel + i) * p.states + n] * kLog2E<T>;
    }
    A2[n] = value;
  }
}

// A state [channels, states] of one sequence, to and from [rounded states] vectors.
template <typename T>
inline void load_state(const T* state, const SelectiveScanParams& p, const Block<T>& block, int64_t sequence,
                       Vec<T>* h) {
  for (int64_t n = 0; n < rounded_states(p); ++n) h[n] = Vec<T>{};
  if (state == nullptr) return;
  const T* from = state + (sequence * p.channels + block.channel) * p.states;
  for (int64_t n = 0; n < p.states; ++n) {
    for (int i = 0; i < block.lanes; ++i) h[n][i] = from[i * p.states + n];
  }
}

template <typename T>
inline void store_state(T* state, const SelectiveScanParams& p, const Block<T>& block, int64_t sequence,
                        const Vec<T>* h) {
  if (state == nullptr) return;
  T* to = state + (sequence * p.channels + block.channel) * p.states;
  for (int64_t n = 0; n < p.states; ++n) {
    for (int i = 0; i < block.lanes; ++i) to[i * p.states + n] = h[n][i];
  }
}

// Where a slot keeps the states of a block: state n is at offset + n * stride. Checkpoints are
// [slot][granule of 16 channels][state][channel of the granule], the last granule being narrower: a block's
// states lie together, and the layout is the same for all instruction sets.
struct Checkpoint {
  int64_t offset, stride;
};

template <typename T>
inline Checkpoint checkpoint_of(const SelectiveScanParams& p, const Block<T>& block) {
  constexpr int64_t kGranule = 16;
  const int64_t first = block.channel / kGranule * kGranule;
  return {first * p.states + block.channel - first, smaller(kGranule, p.channels - first)};
}

}  // namespace mixture_of_mamba::MOM_ISA
