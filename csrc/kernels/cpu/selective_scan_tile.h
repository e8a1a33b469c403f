// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cpu/selective_scan_block.h"

// What forward and backward of the CPU scan share: a tile of kTile tokens, and what a block has of it,
// loaded, converted and activated.

namespace mixture_of_mamba::MOM_ISA {

constexpr int kTile = static_cast<int>(kCheckpointInterval);
struct TileTokens {
  int count = 0;
  int64_t row[kTile];       // where they lie
  int32_t modality[kTile];  // the number of modalities: padding
  bool padding[kTile];
};

// One block's part of a tile. Padding tokens have delta = 0 and B = C = 0, so that the state passes over
// them.
template <typename T>
struct Tile {
  Vec<T> delta[kTile], drive[kTile], u[kTile];  // drive = delta * u
  Vec<T> slope[kTile];                          // d delta / d dt; backward only
};

// Time of walk position i of a sequence.
inline int64_t time_of(const SelectiveScanParams& p, int64_t begin, int64_t end, int64_t position) {
  return p.reverse ? end - 1 - position : begin + position;
}

inline TileTokens tokens_of_tile(const SelectiveScanParams& p, int64_t begin, int64_t end, int64_t position) {
  TileTokens tokens;
  const int64_t left = end - begin - position;
  tokens.count = static_cast<int>(left < kTile ? left : kTile);
  for (int t = 0; t < tokens.count; ++t) {
    const int32_t row = p.order.row_of(time_of(p, begin, end, position + t));
    tokens.row[t] = row;
    tokens.modality[t] = p.order.modality_of_row(row);
    tokens.padding[t] = p.order.is_padding(row);
  }
  return tokens;
}

// Asks for a block's part of a tile's rows long before they are read: rows may lie anywhere, and more rows
// are walked at once than hardware follows. (Not inlined at once, a function that only prefetches counts as
// one without effects to GCC, and calls to it are dropped.)
template <typename Scalar>
[[gnu::always_inline]] inline void prefetch_rows(const ConstRows& rows, const TileTokens& tokens,
                                                 int64_t channel) {
  if (rows.data == nullptr) return;
  const Scalar* data = static_cast<const Scalar*>(rows.data) + channel;
  for (int t = 0; t < tokens.count; ++t) __builtin_prefetch(data + tokens.row[t] * rows.stride, 0, 2);
}

template <typename Scalar, bool kSlope, typename T = Acc<Scalar>>
inline void load_tile(const SelectiveScanParams& p, const Block<T>& block, const TileTokens& tokens,
                      Tile<T>& tile) {
  const Scalar* u = static_cast<const Scalar*>(p.u.data) + block.channel;
  const Scalar* dt = static_cast<const Scalar*>(p.dt.data) + block.channel;
  const T* bias = static_cast<const T*>(p.dt_bias);
  for (int t = 0; t < tokens.count; ++t) {
    if (tokens.padding[t]) {
      tile.delta[t] = tile.slope[t] = tile.drive[t] = tile.u[t] = Vec<T>{};
      continue;
    }
    Vec<T> x = load(dt + tokens.row[t] * p.dt.stride, block.lanes);
    if (bias != nullptr) {
      const int64_t modality = p.bias_modalities > 1 ? tokens.modality[t] : 0;
      x += load(bias + modality * p.channels + block.channel, block.lanes);
    }
    if (p.softplus) {
      tile.delta[t] = softplus<T>(x, kSlope ? &tile.slope[t] : nullptr);
    } else {
      tile.delta[t] = x;
      tile.slope[t] = splat<T>(1);
    }
    tile.u[t] = load(u + tokens.row[t] * p.u.stride, block.lanes);
    tile.drive[t] = tile.delta[t] * tile.u[t];
  }
}

// B or C of a tile as [kTile][rounded states]; zeros for padding tokens and missing states.
template <typename Scalar>
inline void load_matrix(const SelectiveScanParams& p, ConstRows matrix, const TileTokens& tokens,
                        Acc<Scalar>* out) {
  const Scalar* data = static_cast<const Scalar*>(matrix.data);
  const int64_t padded = rounded_states(p);
  for (int t = 0; t < tokens.count; ++t) {
    const Scalar* row = data + tokens.row[t] * matrix.stride;
    const int64_t states = tokens.padding[t] ? 0 : p.states;
    for (int64_t n = 0; n < states; ++n) out[t * padded + n] = to_float(row[n]);
    for (int64_t n = states; n < padded; ++n) out[t * padded + n] = 0;
  }
}

}  // namespace mixture_of_mamba::MOM_ISA
