// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/selective_scan_isa.h"
#include "kernels/cpu/selective_scan_tile.h"

namespace mixture_of_mamba::MOM_ISA {

namespace {

// kStates states over one tile: h stays in registers, y collects C.h. kDecays: no decay exceeds 1.
template <bool kDecays, typename T>
inline void scan_states(int count, const Tile<T>& tile, const Vec<T>* A2, const T* B, const T* C,
                        int64_t padded, Vec<T>* h_memory, Vec<T>* y) {
  Vec<T> h[kStates], A[kStates];
  for (int n = 0; n < kStates; ++n) {
    h[n] = h_memory[n];
    A[n] = A2[n];
  }
  for (int t = 0; t < count; ++t) {
    const Vec<T> delta = tile.delta[t], drive = tile.drive[t];
    Vec<T> sum = y[t];
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) {
      h[n] = exp2<T, kDecays>(delta * A[n]) * h[n] + drive * B[t * padded + n];
      sum += h[n] * C[t * padded + n];
    }
    y[t] = sum;
  }
  for (int n = 0; n < kStates; ++n) h_memory[n] = h[n];
}

// Whether softplus and A <= 0 keep all exponents of a block from being positive.
template <typename T>
inline bool only_decays(const SelectiveScanParams& p, const Block<T>& block) {
  const T* A = static_cast<const T*>(p.A) + block.channel * p.states;
  bool decays = p.softplus;
  for (int64_t i = 0; i < block.lanes * p.states; ++i) decays &= A[i] <= T(0);
  return decays;
}

// out = (y + D u) silu(z); padding rows are 0.
template <typename Scalar, typename T = Acc<Scalar>>
inline void finish_tile(const SelectiveScanForwardParams& p, const Block<T>& block, const TileTokens& tokens,
                        const Tile<T>& tile, const Vec<T>* y) {
  const Vec<T> D = p.D ? load(static_cast<const T*>(p.D) + block.channel, block.lanes) : Vec<T>{};
  const Scalar* z = static_cast<const Scalar*>(p.z.data);
  Scalar* out = static_cast<Scalar*>(p.out.data) + block.channel;
  for (int t = 0; t < tokens.count; ++t) {
    Vec<T> value{};
    if (!tokens.padding[t]) {
      value = y[t] + D * tile.u[t];
      if (z != nullptr) {
        const Vec<T> gate = load(z + tokens.row[t] * p.z.stride + block.channel, block.lanes);
        value *= gate * sigmoid<T>(gate);
      }
    }
    store(out + tokens.row[t] * p.out.stride, value, block.lanes);
  }
}

// `count` blocks from `first` on, side by side through one sequence.
template <typename Scalar>
void scan_sequence(const SelectiveScanForwardParams& p, int64_t sequence, int64_t first, int count) {
  using T = Acc<Scalar>;
  const int64_t padded = rounded_states(p);
  const int64_t begin = p.order.sequence_begin(sequence), end = p.order.sequence_end(sequence);
  Buffer<Vec<T>> A2(count * padded), h(count * padded);
  Buffer<T> B(kTile * padded), C(kTile * padded);
  Buffer<bool> decays(count);
  for (int i = 0; i < count; ++i) {
    const Block<T> block = block_at<T>(p, first + i);
    load_A<T>(p, block, &A2[i * padded]);
    decays[i] = only_decays<T>(p, block);
    load_state<T>(static_cast<const T*>(p.initial_state), p, block, sequence, &h[i * padded]);
  }
  T* checkpoint = static_cast<T*>(p.checkpoints);
  if (checkpoint) checkpoint += (begin / kTile + sequence) * p.states * p.channels;
  TileTokens tokens = tokens_of_tile(p, begin, end, 0);
  for (int64_t position = 0; position < end - begin; position += kTile) {
    const TileTokens next = tokens_of_tile(p, begin, end, smaller(position + kTile, end - begin));
    load_matrix<Scalar>(p, p.B, tokens, B.data());
    load_matrix<Scalar>(p, p.C, tokens, C.data());
    for (int i = 0; i < count; ++i) {
      const Block<T> block = block_at<T>(p, first + i);
      Vec<T>* state = &h[i * padded];
      for (const ConstRows& rows : {p.u, p.dt, p.z}) prefetch_rows<Scalar>(rows, next, block.channel);
      if (checkpoint) {
        const Checkpoint at = checkpoint_of(p, block);
        for (int64_t n = 0; n < p.states; ++n) {
          store(checkpoint + at.offset + n * at.stride, state[n], block.lanes);
        }
      }
      Tile<T> tile;
      Vec<T> y[kTile];
      for (int t = 0; t < tokens.count; ++t) y[t] = Vec<T>{};
      load_tile<Scalar, false>(p, block, tokens, tile);
      for (int64_t n = 0; n < padded; n += kStates) {
        const Vec<T>* A = &A2[i * padded + n];
        if (decays[i]) {
          scan_states<true>(tokens.count, tile, A, &B[n], &C[n], padded, &state[n], y);
        } else {
          scan_states<false>(tokens.count, tile, A, &B[n], &C[n], padded, &state[n], y);
        }
      }
      finish_tile<Scalar>(p, block, tokens, tile, y);
    }
    if (checkpoint) checkpoint += p.states * p.channels;
    tokens = next;
  }
  for (int i = 0; i < count; ++i) {
    store_state<T>(static_cast<T*>(p.final_state), p, block_at<T>(p, first + i), sequence, &h[i * padded]);
  }
}

template <typename Scalar>
void run(const SelectiveScanForwardParams& p, const ParallelFor& parallel) {
  const int64_t blocks = block_count<Acc<Scalar>>(p), abreast = blocks_abreast(p.states);
  parallel(0, p.order.sequences * blocks, 1, [&](int64_t from, int64_t to) {
    while (from < to) {
      const int64_t left_of_sequence = blocks - from % blocks;
      const int64_t count = smaller(abreast, smaller(left_of_sequence, to - from));
      scan_sequence<Scalar>(p, from / blocks, from % blocks, static_cast<int>(count));
      from += count;
    }
  });
}

}  // namespace

void selective_scan_forward(const SelectiveScanForwardParams& p, const ParallelFor& parallel) {
  switch (p.type) {
    case ScalarType::kFloat32:
      return run<float>(p, parallel);
    case ScalarType::kBFloat16:
      return run<BFloat16>(p, parallel);
    case ScalarType::kFloat16:
      return run<Float16>(p, parallel);
    case ScalarType::kFloat64:
      return run<double>(p, parallel);
  }
}

}  // namespace mixture_of_mamba::MOM_ISA
