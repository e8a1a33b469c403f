// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cpu/vector.h"
#include "kernels/selective_scan.h"

// What forward and backward of the CPU scan share: one tile of kTile tokens for one block of kLanes
// channels, loaded, converted and activated. Included by *_isa.cpp files only.
//
// Lanes are channels, so every formula is written as if for one channel. States run in groups of
// kStates, each group's states in registers for the whole tile; missing states of the last group have
// A = B = C = 0. The checkpoint buffer is [slot][state][channel].

namespace mixture_of_mamba::MOM_ISA {

constexpr int kTile = static_cast<int>(kCheckpointInterval);
// 16 states of AVX-512 fill half of its 32 registers; the 16 registers of the others hold 4 states.
constexpr int kStates = kVectorBytes == 64 ? 8 : 4;

template <typename T>
struct Block {
  int64_t channel;  // first channel
  int lanes;        // channels of the block
};

// One tile, activated. Padding tokens have delta = 0 and B = C = 0, so that the state passes over them.
template <typename Scalar>
struct Tile {
  using T = Acc<Scalar>;
  int count;           // tokens
  int64_t row[kTile];  // where they lie
  bool padding[kTile];
  Vec<T> delta[kTile], slope[kTile], drive[kTile], u[kTile];  // slope: d delta / d dt; drive = delta * u
};

// A of a block, scaled by log2(e), as [states rounded up to kStates] vectors.
template <typename T>
inline void load_A(const SelectiveScanParams& p, const Block<T>& block, Buffer<Vec<T>>& A2) {
  const T* A = static_cast<const T*>(p.A);
  for (int64_t n = 0; n < A2.size(); ++n) {
    Vec<T> value{};
    if (n < p.states) {
      for (int i = 0; i < block.lanes; ++i) value[i] = A[(block.channel + i) * p.states + n] * kLog2E<T>;
    }
    A2[n] = value;
  }
}

inline int64_t rounded_states(const SelectiveScanParams& p) {
  return (p.states + kStates - 1) / kStates * kStates;
}

// Time of walk position i of a sequence.
inline int64_t time_of(const SelectiveScanParams& p, int64_t begin, int64_t end, int64_t position) {
  return p.reverse ? end - 1 - position : begin + position;
}

template <typename Scalar>
inline void load_tile(const SelectiveScanParams& p, const Block<Acc<Scalar>>& block, int64_t begin,
                      int64_t end, int64_t position, Tile<Scalar>& tile) {
  using T = Acc<Scalar>;
  const Scalar* u = static_cast<const Scalar*>(p.u.data) + block.channel;
  const Scalar* dt = static_cast<const Scalar*>(p.dt.data) + block.channel;
  const T* bias = static_cast<const T*>(p.dt_bias);
  const int64_t left = end - begin - position;
  tile.count = static_cast<int>(left < kTile ? left : kTile);
  for (int t = 0; t < tile.count; ++t) {
    const int32_t row = p.order.row_of(time_of(p, begin, end, position + t));
    tile.row[t] = row;
    tile.padding[t] = p.order.is_padding(row);
    if (tile.padding[t]) {
      tile.delta[t] = tile.slope[t] = tile.drive[t] = tile.u[t] = Vec<T>{};
      continue;
    }
    Vec<T> x = load(dt + row * p.dt.stride, block.lanes);
    if (bias != nullptr) {
      const int64_t modality = p.bias_modalities > 1 ? p.order.modality_of_row(row) : 0;
      x += load(bias + modality * p.channels + block.channel, block.lanes);
    }
    if (p.softplus) {
      tile.delta[t] = softplus<T>(x, &tile.slope[t]);
    } else {
      tile.delta[t] = x;
      tile.slope[t] = splat<T>(1);
    }
    tile.u[t] = load(u + row * p.u.stride, block.lanes);
    tile.drive[t] = tile.delta[t] * tile.u[t];
  }
}

// B or C of a tile as [kTile][rounded states]; zeros for padding tokens and missing states.
template <typename Scalar>
inline void load_matrix(const SelectiveScanParams& p, ConstRows matrix, const Tile<Scalar>& tile,
                        Acc<Scalar>* out) {
  const Scalar* data = static_cast<const Scalar*>(matrix.data);
  const int64_t padded = rounded_states(p);
  for (int t = 0; t < tile.count; ++t) {
    const Scalar* row = data + tile.row[t] * matrix.stride;
    const int64_t states = tile.padding[t] ? 0 : p.states;
    for (int64_t n = 0; n < states; ++n) out[t * padded + n] = to_float(row[n]);
    for (int64_t n = states; n < padded; ++n) out[t * padded + n] = 0;
  }
}

// A state [channels, states] of one sequence, to and from [rounded states] vectors.
template <typename T>
inline void load_state(const T* state, const SelectiveScanParams& p, const Block<T>& block, int64_t sequence,
                       Buffer<Vec<T>>& h) {
  h.clear();
  if (state == nullptr) return;
  const T* from = state + (sequence * p.channels + block.channel) * p.states;
  for (int64_t n = 0; n < p.states; ++n) {
    for (int i = 0; i < block.lanes; ++i) h[n][i] = from[i * p.states + n];
  }
}

template <typename T>
inline void store_state(T* state, const SelectiveScanParams& p, const Block<T>& block, int64_t sequence,
                        const Buffer<Vec<T>>& h) {
  if (state == nullptr) return;
  T* to = state + (sequence * p.channels + block.channel) * p.states;
  for (int64_t n = 0; n < p.states; ++n) {
    for (int i = 0; i < block.lanes; ++i) to[i * p.states + n] = h[n][i];
  }
}

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

}  // namespace mixture_of_mamba::MOM_ISA
