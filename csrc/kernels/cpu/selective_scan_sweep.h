// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cpu/selective_scan_tile.h"

// Backward of the scan. With g the gradient of h after a token and G what later tokens pass back:
//
//   g = C dy + G              dB = sum_channels g delta u        dC = sum_channels h dy
//   q = g exp(delta A) h_prev dA += q delta                      d delta += q A + u sum_n g B
//   du = delta sum_n g B + D dy                                  G = exp(delta A) g

namespace mixture_of_mamba::MOM_ISA {

// States rebuilt at a time: kept exp(delta A) and exp(delta A) h_prev must stay in the first-level cache.
constexpr int kRebuilt = 4;

// What a block keeps of a tile.
template <typename T>
struct SweptTile : Tile<T> {
  Vec<T> dy[kTile], y[kTile], sum_gB[kTile], sum_qA[kTile];
  Vec<T> gate_slope[kTile];  // grad_out silu'(z)
  Vec<T> gate[kTile];        // silu(z)
};

// States n .. n + kRebuilt - 1 of a block over one tile: rebuild h from the checkpoint, then sweep back.
// A2, G and grad_A are those of state n; to_BC is [token][dB, dC][state], added to, or started by kStart.
template <bool kStart, typename T>
inline void sweep(const T* checkpoint, int64_t checkpoint_stride, int lanes, int states, int count,
                  const T* B, const T* C, int64_t padded, const Vec<T>* A2, Vec<T>* G, Vec<T>* grad_A,
                  SweptTile<T>& tile, Vec<T>* to_BC) {
  Vec<T> decay[kTile][kRebuilt], decayed[kTile][kRebuilt], h[kRebuilt], A[kRebuilt];
  for (int s = 0; s < kRebuilt; ++s) {
    A[s] = A2[s];
    h[s] = s < states ? load(checkpoint + s * checkpoint_stride, lanes) : Vec<T>{};
  }
  for (int t = 0; t < count; ++t) {
    const Vec<T> delta = tile.delta[t], drive = tile.drive[t];
    Vec<T> y = tile.y[t];
#pragma GCC unroll 4
    for (int s = 0; s < kRebuilt; ++s) {
      decay[t][s] = exp2<T>(delta * A[s]);
      decayed[t][s] = decay[t][s] * h[s];
      h[s] = decayed[t][s] + drive * B[t * padded + s];
      y += h[s] * C[t * padded + s];
    }
    tile.y[t] = y;
  }
  Vec<T> carry[kRebuilt], dA[kRebuilt];
  for (int s = 0; s < kRebuilt; ++s) {
    carry[s] = G[s];
    dA[s] = grad_A[s];
  }
  for (int t = count - 1; t >= 0; --t) {
    const Vec<T> delta = tile.delta[t], drive = tile.drive[t], dy = tile.dy[t];
    Vec<T> gB = tile.sum_gB[t], qA = tile.sum_qA[t];
    Vec<T>* to_B = to_BC + t * 2 * kRebuilt;
    Vec<T>* to_C = to_B + kRebuilt;
#pragma GCC unroll 4
    for (int s = 0; s < kRebuilt; ++s) {
      const T b = B[t * padded + s];
      const Vec<T> g = dy * C[t * padded + s] + carry[s];
      const Vec<T> h_t = decayed[t][s] + drive * b;
      to_B[s] = kStart ? g * drive : to_B[s] + g * drive;
      to_C[s] = kStart ? h_t * dy : to_C[s] + h_t * dy;
      gB += g * b;
      const Vec<T> q = g * decayed[t][s];
      qA += q * A[s];
      dA[s] += q * delta;
      carry[s] = decay[t][s] * g;
    }
    tile.sum_gB[t] = gB;
    tile.sum_qA[t] = qA;
  }
  for (int s = 0; s < kRebuilt; ++s) {
    G[s] = carry[s];
    grad_A[s] = dA[s];
  }
}

// Sums to_BC over lanes, kLanes vectors at a time, into the rows of `sums` that the tile's tokens own.
template <typename T>
inline void add_over_lanes(const TileTokens& tokens, const Vec<T>* to_BC, T* sums, int64_t stride) {
  constexpr int kOfToken = 2 * kRebuilt;
  constexpr int kPiece = kLanes<T> < kOfToken ? kLanes<T> : kOfToken;
  typedef T Piece __attribute__((vector_size(kPiece * sizeof(T))));
  for (int i = 0; i < tokens.count * kOfToken; i += kLanes<T>) {
    T lanes[kLanes<T>];
    store(lanes, sum_each<T>(to_BC + i));
    for (int lane = 0; lane < kLanes<T>; lane += kPiece) {
      const int t = (i + lane) / kOfToken;
      if (t >= tokens.count || tokens.padding[t]) continue;
      T* to = sums + tokens.row[t] * stride + (i + lane) % kOfToken;
      Piece total, piece;
      std::memcpy(&total, to, sizeof(total));
      std::memcpy(&piece, lanes + lane, sizeof(piece));
      total += piece;
      std::memcpy(to, &total, sizeof(total));
    }
  }
}

}  // namespace mixture_of_mamba::MOM_ISA
