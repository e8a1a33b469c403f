// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/selective_scan_isa.h"
#include "kernels/cpu/selective_scan_tile.h"

// Backward of the scan. With g the gradient of h after a token and G what later tokens pass back:
//
//   g = C dy + G              dB = sum_channels g delta u        dC = sum_channels h dy
//   q = g exp(delta A) h_prev dA += q delta                      d delta += q A + u sum_n g B
//   du = delta sum_n g B + D dy                                  G = exp(delta A) g
//
// Tiles run last to first; in each, the states are rebuilt from the checkpoint before it.
//
// Work is cut by channels alone, into groups of blocks that depend on the sizes and never on the
// threads: a group walks all sequences, so it owns its rows of dA, dD and d dt_bias, and adds its dB
// and dC into a buffer of its own. The buffers are added in order at the end.

namespace mixture_of_mamba::MOM_ISA {

namespace {

// States rebuilt at a time: kept exp(delta A) and exp(delta A) h_prev must stay in the first-level cache.
template <typename T>
constexpr int kRebuilt = kLanes<T> < 4 ? kLanes<T> : 4;
// Tokens whose dB and dC of kRebuilt states fill kLanes vectors, summed over channels together.
template <typename T>
constexpr int kSummed = kLanes<T> / kRebuilt<T>;

template <typename Scalar>
struct Worker {
  using T = Acc<Scalar>;
  static constexpr int kS = kRebuilt<T>;

  const SelectiveScanBackwardParams& p;
  int64_t padded;
  T* partial;  // [tokens][2][states] of this group
  Buffer<Vec<T>> A2, G, grad_A, grad_bias;
  Buffer<T> B, C;
  Vec<T> grad_D;

  // Of one tile.
  Tile<Scalar> tile;
  Vec<T> dy[kTile], y[kTile], sum_gB[kTile], sum_qA[kTile];
  Vec<T> gate_slope[kTile];  // d out / d z over y

  Worker(const SelectiveScanBackwardParams& params, T* group_partial)
      : p(params),
        padded(rounded_states(params)),
        partial(group_partial),
        A2(padded),
        G(padded),
        grad_A(padded),
        grad_bias(larger(1, params.bias_modalities)),
        B(kTile * padded),
        C(kTile * padded) {}

  void load_gradients(const Block<T>& block) {
    const Scalar* grad_out = static_cast<const Scalar*>(p.grad_out.data) + block.channel;
    const Scalar* z = static_cast<const Scalar*>(p.z.data);
    for (int t = 0; t < tile.count; ++t) {
      y[t] = sum_gB[t] = sum_qA[t] = dy[t] = gate_slope[t] = Vec<T>{};
      if (tile.padding[t]) continue;
      const Vec<T> grad = load(grad_out + tile.row[t] * p.grad_out.stride, block.lanes);
      dy[t] = grad;
      if (z != nullptr) {
        const Vec<T> gate = load(z + tile.row[t] * p.z.stride + block.channel, block.lanes);
        const Vec<T> s = sigmoid<T>(gate);
        dy[t] = grad * gate * s;
        gate_slope[t] = grad * s * (gate * (splat<T>(1) - s) + T(1));
      }
    }
  }

  // States n .. n + kS - 1: rebuild, then sweep back.
  void sweep(const Block<T>& block, const T* checkpoint, int64_t n) {
    Vec<T> decay[kTile][kS], decayed[kTile][kS], h[kS];
    for (int s = 0; s < kS; ++s) {
      h[s] = n + s < p.states ? load(checkpoint + (n + s) * p.channels, block.lanes) : Vec<T>{};
    }
    for (int t = 0; t < tile.count; ++t) {
#pragma GCC unroll 4
      for (int s = 0; s < kS; ++s) {
        decay[t][s] = exp2<T>(tile.delta[t] * A2[n + s]);
        decayed[t][s] = decay[t][s] * h[s];
        h[s] = decayed[t][s] + tile.drive[t] * B[t * padded + n + s];
        y[t] += h[s] * C[t * padded + n + s];
      }
    }
    Vec<T> carry[kS], dA[kS], A[kS];
    for (int s = 0; s < kS; ++s) {
      carry[s] = G[n + s];
      dA[s] = grad_A[n + s];
      A[s] = A2[n + s];
    }
    for (int last = tile.count - 1; last >= 0; last -= kSummed<T>) {
      Vec<T> to_B[kLanes<T>] = {}, to_C[kLanes<T>] = {};
      for (int i = 0; i < kSummed<T> && i <= last; ++i) {
        const int t = last - i;
        const Vec<T> drive = tile.drive[t], delta = tile.delta[t], out_grad = dy[t];
        Vec<T> gB = sum_gB[t], qA = sum_qA[t];
#pragma GCC unroll 4
        for (int s = 0; s < kS; ++s) {
          const T b = B[t * padded + n + s];
          const Vec<T> g = out_grad * C[t * padded + n + s] + carry[s];
          to_B[i * kS + s] = g * drive;
          to_C[i * kS + s] = (decayed[t][s] + drive * b) * out_grad;
          gB += g * b;
          const Vec<T> q = g * decayed[t][s];
          qA += q * A[s];
          dA[s] += q * delta;
          carry[s] = decay[t][s] * g;
        }
        sum_gB[t] = gB;
        sum_qA[t] = qA;
      }
      add_to_partial(last, n, sum_each<T>(to_B), sum_each<T>(to_C));
    }
    for (int s = 0; s < kS; ++s) {
      G[n + s] = carry[s];
      grad_A[n + s] = dA[s];
    }
  }

  // Lane i * kS + s of the sums belongs to token last - i and state n + s.
  void add_to_partial(int last, int64_t n, Vec<T> to_B, Vec<T> to_C) {
    for (int i = 0; i < kSummed<T> && i <= last; ++i) {
      if (tile.padding[last - i]) continue;
      T* row = partial + tile.row[last - i] * 2 * p.states;
      for (int s = 0; s < kS && n + s < p.states; ++s) {
        row[n + s] += to_B[i * kS + s];
        row[p.states + n + s] += to_C[i * kS + s];
      }
    }
  }

  void store_gradients(const Block<T>& block, const Vec<T>& D) {
    const int64_t c = block.channel;
    for (int t = 0; t < tile.count; ++t) {
      const int64_t row = tile.row[t];
      const Vec<T> grad_u = sum_gB[t] * tile.delta[t] + D * dy[t];
      // A2 carries log2(e), so q A does too.
      const Vec<T> grad_dt = (sum_gB[t] * tile.u[t] + sum_qA[t] * kLn2<T>)*tile.slope[t];
      if (p.grad_u.data)
        store(static_cast<Scalar*>(p.grad_u.data) + row * p.grad_u.stride + c, grad_u, block.lanes);
      if (p.grad_dt.data) {
        store(static_cast<Scalar*>(p.grad_dt.data) + row * p.grad_dt.stride + c, grad_dt, block.lanes);
      }
      if (p.grad_z.data) {
        const Vec<T> grad_z = gate_slope[t] * (y[t] + D * tile.u[t]);
        store(static_cast<Scalar*>(p.grad_z.data) + row * p.grad_z.stride + c, grad_z, block.lanes);
      }
      grad_D += dy[t] * tile.u[t];
      if (!tile.padding[t])
        grad_bias[p.bias_modalities > 1 ? p.order.modality_of_row(tile.row[t]) : 0] += grad_dt;
    }
  }

  void run_sequence(const Block<T>& block, const Vec<T>& D, int64_t sequence) {
    const int64_t begin = p.order.sequence_begin(sequence), end = p.order.sequence_end(sequence);
    load_state<T>(static_cast<const T*>(p.grad_final_state), p, block, sequence, G);
    const int64_t tiles = (end - begin + kTile - 1) / kTile;
    for (int64_t i = tiles - 1; i >= 0; --i) {
      const T* checkpoint = static_cast<const T*>(p.checkpoints) +
                            (begin / kTile + sequence + i) * p.states * p.channels + block.channel;
      load_tile(p, block, begin, end, i * kTile, tile);
      load_matrix(p, p.B, tile, B.data());
      load_matrix(p, p.C, tile, C.data());
      load_gradients(block);
      for (int64_t n = 0; n < padded; n += kS) sweep(block, checkpoint, n);
      store_gradients(block, D);
    }
    store_state<T>(static_cast<T*>(p.grad_initial_state), p, block, sequence, G);
  }

  void run_block(int64_t index) {
    const Block<T> block = block_at<T>(p, index);
    const Vec<T> D = p.D ? load(static_cast<const T*>(p.D) + block.channel, block.lanes) : Vec<T>{};
    load_A<T>(p, block, A2);
    grad_A.clear();
    grad_bias.clear();
    grad_D = Vec<T>{};
    for (int64_t sequence = 0; sequence < p.order.sequences; ++sequence) run_sequence(block, D, sequence);
    store_state<T>(static_cast<T*>(p.grad_A), p, block, 0, grad_A);
    if (p.grad_D) store(static_cast<T*>(p.grad_D) + block.channel, grad_D, block.lanes);
    if (p.grad_dt_bias) {
      for (int m = 0; m < p.bias_modalities; ++m) {
        store(static_cast<T*>(p.grad_dt_bias) + m * p.channels + block.channel, grad_bias[m], block.lanes);
      }
    }
  }
};

// dB and dC in the I/O type: the groups' buffers added in order.
template <typename Scalar>
void reduce_partials(const SelectiveScanBackwardParams& p, const Buffer<Acc<Scalar>>& partials,
                     int64_t groups, const ParallelFor& parallel) {
  using T = Acc<Scalar>;
  const int64_t width = 2 * p.states;
  parallel(0, p.order.tokens, 64, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      for (int64_t n = 0; n < width; ++n) {
        T sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += partials[(g * p.order.tokens + row) * width + n];
        const Rows& out = n < p.states ? p.grad_B : p.grad_C;
        if (out.data == nullptr) continue;
        static_cast<Scalar*>(out.data)[row * out.stride + n % p.states] = from_float<Scalar>(sum);
      }
    }
  });
}

template <typename Scalar>
void run(const SelectiveScanBackwardParams& p, const ParallelFor& parallel) {
  using T = Acc<Scalar>;
  const int64_t blocks = block_count<T>(p);
  // Up to 32 groups, fewer when their buffers would pass 64 MiB.
  const int64_t bytes_of_group = larger(1, p.order.tokens * 2 * p.states * sizeof(T));
  const int64_t affordable = larger(4, (int64_t{64} << 20) / bytes_of_group);
  const int64_t groups = larger(1, smaller(smaller(blocks, 32), affordable));
  Buffer<T> partials(groups * p.order.tokens * 2 * p.states);
  parallel(0, groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      Worker<Scalar> worker(p, partials.data() + g * p.order.tokens * 2 * p.states);
      for (int64_t b = blocks * g / groups; b < blocks * (g + 1) / groups; ++b) worker.run_block(b);
    }
  });
  if (p.states > 0) reduce_partials<Scalar>(p, partials, groups, parallel);
}

}  // namespace

void selective_scan_backward(const SelectiveScanBackwardParams& p, const ParallelFor& parallel) {
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
