// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/selective_scan_isa.h"
#include "kernels/cpu/selective_scan_sweep.h"

// Backward of the scan (selective_scan_sweep.h has the formulas).
//
// Tiles run last to first; in each, the states are rebuilt from the checkpoint before it.
//
// Work is cut by channels alone, into groups of blocks that depend on the sizes and never on the threads.
// Each group walks all sequences, so it owns its rows of dA, dD and d dt_bias, and adds its dB and dC into a
// buffer of its own. The buffers are added in order at the end.

namespace mixture_of_mamba::MOM_ISA {

namespace {

// Blocks of a group are swept so many at a time; their dB and dC are added lane by lane first, then over
// lanes.
constexpr int kSwept = 8;

// The blocks from `first` on, side by side through every sequence.
template <typename Scalar>
class Walk {
 public:
  using T = Acc<Scalar>;

  // partial: this walk's first group in [tokens][groups][states / kRebuilt][dB, dC][kRebuilt]
  Walk(const SelectiveScanBackwardParams& params, int64_t first, int64_t count, int64_t group_size,
       T* partial, int64_t partial_stride)
      : p(params),
        padded(rounded_states(params)),
        first(first),
        count(count),
        group_size(group_size),
        partial(partial),
        partial_stride(partial_stride),
        A2(count * padded),
        G(count * padded),
        grad_A(count * padded),
        grad_bias(count * larger(1, params.bias_modalities)),
        grad_D(count),
        B(kTile * padded),
        C(kTile * padded),
        tiles(kSwept) {}

  void run() {
    for (int64_t i = 0; i < count; ++i) load_A<T>(p, block(i), &A2[i * padded]);
    for (int64_t sequence = 0; sequence < p.order.sequences; ++sequence) run_sequence(sequence);
    for (int64_t i = 0; i < count; ++i) store_sums(i);
  }

 private:
  Block<T> block(int64_t i) const { return block_at<T>(p, first + i); }

  void run_sequence(int64_t sequence) {
    const int64_t begin = p.order.sequence_begin(sequence), end = p.order.sequence_end(sequence);
    for (int64_t i = 0; i < count; ++i) {
      load_state<T>(static_cast<const T*>(p.grad_final_state), p, block(i), sequence, &G[i * padded]);
    }
    const int64_t walked = (end - begin + kTile - 1) / kTile;
    next = tokens_of_tile(p, begin, end, larger(0, walked - 1) * kTile);
    for (int64_t i = walked - 1; i >= 0; --i) {
      tokens = next;
      next = i > 0 ? tokens_of_tile(p, begin, end, (i - 1) * kTile) : TileTokens{};
      checkpoint =
          static_cast<const T*>(p.checkpoints) + (begin / kTile + sequence + i) * p.states * p.channels;
      load_matrix<Scalar>(p, p.B, tokens, B.data());
      load_matrix<Scalar>(p, p.C, tokens, C.data());
      T* sums = partial;
      for (int64_t group = 0; group < count; group += group_size) {
        const int64_t group_end = smaller(count, group + group_size);
        for (int64_t at = group; at < group_end; at += kSwept) {
          sweep_blocks(at, smaller(kSwept, group_end - at), sums);
        }
        sums += 2 * padded;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      store_state<T>(static_cast<T*>(p.grad_initial_state), p, block(i), sequence, &G[i * padded]);
    }
  }

  // Up to kSwept blocks through one tile.
  void sweep_blocks(int64_t from, int64_t swept, T* sums) {
    for (int64_t i = 0; i < swept; ++i) {
      load_tile<Scalar, true>(p, block(from + i), tokens, tiles[i]);
      load_gradients(block(from + i), tiles[i]);
    }
    for (int64_t i = 0; i < swept; ++i) prefetch(block(from + i));
    Vec<T> to_BC[kTile * 2 * kRebuilt];  // [token][dB, dC][state]
    for (int64_t n = 0; n < padded; n += kRebuilt) {
      sweep_states<true>(from, n, tiles[0], to_BC);
      for (int64_t i = 1; i < swept; ++i) sweep_states<false>(from + i, n, tiles[i], to_BC);
      add_over_lanes<T>(tokens, to_BC, sums + 2 * n, partial_stride);
    }
    for (int64_t i = 0; i < swept; ++i) store_gradients(from + i, tiles[i]);
  }

  [[gnu::always_inline]] void prefetch(const Block<T>& block) const {
    const Checkpoint at = checkpoint_of(p, block);
    for (int64_t n = 0; n < p.states; ++n) __builtin_prefetch(checkpoint + at.offset + n * at.stride);
    for (const ConstRows& rows : {p.u, p.dt, p.z, p.grad_out})
      prefetch_rows<Scalar>(rows, next, block.channel);
  }

  void load_gradients(const Block<T>& block, SweptTile<T>& tile) {
    const Scalar* grad_out = static_cast<const Scalar*>(p.grad_out.data) + block.channel;
    const Scalar* z = static_cast<const Scalar*>(p.z.data);
    for (int t = 0; t < tokens.count; ++t) {
      tile.y[t] = tile.sum_gB[t] = tile.sum_qA[t] = tile.dy[t] = tile.gate_slope[t] = tile.gate[t] = Vec<T>{};
      if (tokens.padding[t]) continue;
      const Vec<T> grad = load(grad_out + tokens.row[t] * p.grad_out.stride, block.lanes);
      tile.dy[t] = grad;
      if (z != nullptr) {
        const Vec<T> gate = load(z + tokens.row[t] * p.z.stride + block.channel, block.lanes);
        const Vec<T> s = sigmoid<T>(gate);
        tile.gate[t] = gate * s;
        tile.dy[t] = grad * gate * s;
        tile.gate_slope[t] = grad * s * (gate * (splat<T>(1) - s) + T(1));
      }
    }
  }

  template <bool kStart>
  void sweep_states(int64_t i, int64_t n, SweptTile<T>& tile, Vec<T>* to_BC) {
    const Block<T> at = block(i);
    const Checkpoint slot = checkpoint_of(p, at);
    const int64_t state = i * padded + n;
    sweep<kStart, T>(checkpoint + slot.offset + n * slot.stride, slot.stride, at.lanes,
                     static_cast<int>(p.states - n), tokens.count, &B[n], &C[n], padded, &A2[state],
                     &G[state], &grad_A[state], tile, to_BC);
  }

  void store_gradients(int64_t i, const SweptTile<T>& tile) {
    const Block<T> at = block(i);
    const Vec<T> D = p.D ? load(static_cast<const T*>(p.D) + at.channel, at.lanes) : Vec<T>{};
    const int64_t c = at.channel;
    Vec<T> to_D = grad_D[i];
    for (int t = 0; t < tokens.count; ++t) {
      const int64_t row = tokens.row[t];
      const Vec<T> grad_u = tile.sum_gB[t] * tile.delta[t] + D * tile.dy[t];
      // A2 carries log2(e), so q A does too.
      const Vec<T> grad_dt = (tile.sum_gB[t] * tile.u[t] + tile.sum_qA[t] * kLn2<T>)*tile.slope[t];
      if (p.grad_u.data) {
        store(static_cast<Scalar*>(p.grad_u.data) + row * p.grad_u.stride + c, grad_u, at.lanes);
      }
      if (p.grad_dt.data) {
        store(static_cast<Scalar*>(p.grad_dt.data) + row * p.grad_dt.stride + c, grad_dt, at.lanes);
      }
      if (p.grad_z.data) {
        const Vec<T> y = tile.y[t] + D * tile.u[t];
        store(static_cast<Scalar*>(p.grad_z.data) + row * p.grad_z.stride + c, tile.gate_slope[t] * y,
              at.lanes);
        if (p.out.data) {
          store(static_cast<Scalar*>(p.out.data) + row * p.out.stride + c, tile.gate[t] * y, at.lanes);
        }
      }
      to_D += tile.dy[t] * tile.u[t];
      if (p.bias_modalities > 0 && !tokens.padding[t]) {
        grad_bias[i * p.bias_modalities + (p.bias_modalities > 1 ? tokens.modality[t] : 0)] += grad_dt;
      }
    }
    grad_D[i] = to_D;
  }

  void store_sums(int64_t i) {
    const Block<T> at = block(i);
    store_state<T>(static_cast<T*>(p.grad_A), p, at, 0, &grad_A[i * padded]);
    if (p.grad_D) store(static_cast<T*>(p.grad_D) + at.channel, grad_D[i], at.lanes);
    for (int m = 0; p.grad_dt_bias && m < p.bias_modalities; ++m) {
      store(static_cast<T*>(p.grad_dt_bias) + m * p.channels + at.channel,
            grad_bias[i * p.bias_modalities + m], at.lanes);
    }
  }

  const SelectiveScanBackwardParams& p;
  const int64_t padded, first, count, group_size;
  T* const partial;
  const int64_t partial_stride;
  Buffer<Vec<T>> A2, G, grad_A, grad_bias, grad_D;
  Buffer<T> B, C;
  Buffer<SweptTile<T>> tiles;
  TileTokens tokens, next;  // the tile that is swept, and the one after it
  const T* checkpoint = nullptr;
};

// dB and dC in the I/O type: the groups' buffers added in order.
template <typename Scalar>
void reduce_partials(const SelectiveScanBackwardParams& p, const Buffer<Acc<Scalar>>& partials,
                     int64_t groups, const ParallelFor& parallel) {
  using T = Acc<Scalar>;
  const int64_t width = 2 * rounded_states(p);
  parallel(0, p.order.tokens, 64, [&](int64_t first, int64_t last) {
    Buffer<T> sum(width);
    for (int64_t row = first; row < last; ++row) {
      sum.clear();
      for (int64_t g = 0; g < groups; ++g) {
        const T* part = partials.data() + (row * groups + g) * width;
        for (int64_t i = 0; i < width; ++i) sum[i] += part[i];
      }
      for (int64_t n = 0; n < p.states; ++n) {
        const int64_t at = n / kRebuilt * 2 * kRebuilt + n % kRebuilt;
        if (p.grad_B.data) {
          static_cast<Scalar*>(p.grad_B.data)[row * p.grad_B.stride + n] = from_float<Scalar>(sum[at]);
        }
        if (p.grad_C.data) {
          static_cast<Scalar*>(p.grad_C.data)[row * p.grad_C.stride + n] =
              from_float<Scalar>(sum[at + kRebuilt]);
        }
      }
    }
  });
}

template <typename Scalar>
void run(const SelectiveScanBackwardParams& p, const ParallelFor& parallel) {
  using T = Acc<Scalar>;
  const int64_t blocks = block_count<T>(p);
  // Groups of 4 blocks; of more when there would be more than 32, or when their buffers would pass 64 MiB.
  const int64_t width = 2 * rounded_states(p);
  const int64_t bytes_of_group = larger(1, p.order.tokens * width * static_cast<int64_t>(sizeof(T)));
  const int64_t most = smaller(32, larger(4, (int64_t{64} << 20) / bytes_of_group));
  const int64_t group_size = larger(4, (blocks + most - 1) / most);
  const int64_t groups = (blocks + group_size - 1) / group_size, stride = groups * width;
  const int64_t abreast = larger(1, blocks_abreast(p.states) / group_size);  // groups
  Buffer<T> partials(p.order.tokens * stride, false);
  parallel(0, groups, 1, [&](int64_t from, int64_t to) {
    for (int64_t row = 0; row < p.order.tokens; ++row) {
      std::memset(partials.data() + row * stride + from * width, 0, (to - from) * width * sizeof(T));
    }
    for (; from < to; from += abreast) {
      const int64_t first = from * group_size;
      const int64_t last = smaller(blocks, smaller(to, from + abreast) * group_size);
      Walk<Scalar>(p, first, last - first, group_size, partials.data() + from * width, stride).run();
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
