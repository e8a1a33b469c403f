// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/selective_scan_isa.h"
#include "kernels/cpu/selective_scan_tile.h"

namespace mixture_of_mamba::MOM_ISA {

namespace {

// kStates states over one tile: h stays in registers, y collects C.h.
template <typename Scalar, typename T = Acc<Scalar>>
inline void scan_states(const Tile<Scalar>& tile, const Vec<T>* A2, const T* B, const T* C, int64_t padded,
                        Vec<T>* h_memory, Vec<T>* y) {
  Vec<T> h[kStates], A[kStates];
  for (int n = 0; n < kStates; ++n) {
    h[n] = h_memory[n];
    A[n] = A2[n];
  }
  for (int t = 0; t < tile.count; ++t) {
    const Vec<T> delta = tile.delta[t], drive = tile.drive[t];
    Vec<T> sum{};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) {
      h[n] = exp2<T>(delta * A[n]) * h[n] + drive * B[t * padded + n];
      sum += h[n] * C[t * padded + n];
    }
    y[t] += sum;
  }
  for (int n = 0; n < kStates; ++n) h_memory[n] = h[n];
}

// out = (y + D u) silu(z); padding rows are 0.
template <typename Scalar, typename T = Acc<Scalar>>
inline void finish_tile(const SelectiveScanForwardParams& p, const Block<T>& block, const Tile<Scalar>& tile,
                        const Vec<T>& D, const Vec<T>* y) {
  const Scalar* z = static_cast<const Scalar*>(p.z.data);
  Scalar* out = static_cast<Scalar*>(p.out.data) + block.channel;
  for (int t = 0; t < tile.count; ++t) {
    Vec<T> value{};
    if (!tile.padding[t]) {
      value = y[t] + D * tile.u[t];
      if (z != nullptr) {
        const Vec<T> gate = load(z + tile.row[t] * p.z.stride + block.channel, block.lanes);
        value *= gate * sigmoid<T>(gate);
      }
    }
    store(out + tile.row[t] * p.out.stride, value, block.lanes);
  }
}

template <typename Scalar>
void scan_sequence(const SelectiveScanForwardParams& p, int64_t sequence, int64_t block_index) {
  using T = Acc<Scalar>;
  const Block<T> block = block_at<T>(p, block_index);
  const int64_t padded = rounded_states(p);
  const int64_t begin = p.order.sequence_begin(sequence), end = p.order.sequence_end(sequence);
  Buffer<Vec<T>> A2(padded), h(padded);
  Buffer<T> B(kTile * padded), C(kTile * padded);
  load_A<T>(p, block, A2);
  load_state<T>(static_cast<const T*>(p.initial_state), p, block, sequence, h);
  const Vec<T> D = p.D ? load(static_cast<const T*>(p.D) + block.channel, block.lanes) : Vec<T>{};
  T* checkpoint = static_cast<T*>(p.checkpoints);
  if (checkpoint) checkpoint += (begin / kTile + sequence) * p.states * p.channels + block.channel;
  for (int64_t position = 0; position < end - begin; position += kTile) {
    if (checkpoint) {
      for (int64_t n = 0; n < p.states; ++n) store(checkpoint + n * p.channels, h[n], block.lanes);
      checkpoint += p.states * p.channels;
    }
    Tile<Scalar> tile;
    Vec<T> y[kTile] = {};
    load_tile(p, block, begin, end, position, tile);
    load_matrix(p, p.B, tile, B.data());
    load_matrix(p, p.C, tile, C.data());
    for (int64_t n = 0; n < padded; n += kStates) {
      scan_states<Scalar>(tile, &A2[n], &B[n], &C[n], padded, &h[n], y);
    }
    finish_tile<Scalar>(p, block, tile, D, y);
  }
  store_state<T>(static_cast<T*>(p.final_state), p, block, sequence, h);
}

template <typename Scalar>
void run(const SelectiveScanForwardParams& p, const ParallelFor& parallel) {
  const int64_t blocks = block_count<Acc<Scalar>>(p);
  parallel(0, p.order.sequences * blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) scan_sequence<Scalar>(p, i / blocks, i % blocks);
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
