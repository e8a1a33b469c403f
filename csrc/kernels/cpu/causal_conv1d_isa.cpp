// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/causal_conv1d_isa.h"

#include "kernels/cpu/vector.h"

// Lanes are channels. A walk over the tokens of a sequence carries the last width - 1 inputs in a window.
//
// Backward is the same walk: with the pre-activation's gradient dpre of a token, every input in its window
// gets weight[k] * dpre. An input's gradient is complete when it leaves the window, and is written then.

namespace mixture_of_mamba::MOM_ISA {

namespace {

// Widths up to 4 (the usual ones) are unrolled; kWidth 0 is any width, known at run time.
template <typename Scalar, int kWidth>
struct Walk {
  using T = Acc<Scalar>;

  const CausalConv1dParams& p;
  const int64_t width;
  const int64_t channel;
  const int lanes;
  Buffer<Vec<T>> weight;  // [width]
  Buffer<Vec<T>> window;  // [width - 1], oldest first
  Vec<T> bias;

  Walk(const CausalConv1dParams& params, int64_t block)
      : p(params),
        width(kWidth ? kWidth : params.width),
        channel(block * kLanes<T>),
        lanes(static_cast<int>(smaller(kLanes<T>, params.channels - channel))),
        weight(width),
        window(width) {
    const T* from = static_cast<const T*>(p.weight) + channel * width;
    for (int64_t k = 0; k < width; ++k) {
      for (int i = 0; i < lanes; ++i) weight[k][i] = from[i * width + k];
    }
    bias = p.bias ? load(static_cast<const T*>(p.bias) + channel, lanes) : Vec<T>{};
  }

  int64_t taps() const { return (kWidth ? kWidth : width) - 1; }

  // Offset of entry j of a sequence's state for this block.
  int64_t state_offset(int64_t sequence, int64_t j) const {
    return (sequence * taps() + j) * p.channels + channel;
  }

  void start(int64_t sequence) {
    const Scalar* state = static_cast<const Scalar*>(p.initial_state);
    for (int64_t j = 0; j < taps(); ++j) {
      window[j] = state ? load(state + state_offset(sequence, j), lanes) : Vec<T>{};
    }
  }

  Vec<T> load_x(int64_t row) const {
    return load(static_cast<const Scalar*>(p.x.data) + row * p.x.stride + channel, lanes);
  }

  Vec<T> pre_activation(Vec<T> x) const {
    Vec<T> sum = bias + weight[taps()] * x;
    for (int64_t k = 0; k < taps(); ++k) sum += weight[k] * window[k];
    return sum;
  }

  void push(Vec<T> x) {
    for (int64_t k = 0; k + 1 < taps(); ++k) window[k] = window[k + 1];
    if (taps() > 0) window[taps() - 1] = x;
  }
};

template <typename Scalar, int kWidth>
void forward_sequence(const CausalConv1dForwardParams& p, int64_t sequence, Walk<Scalar, kWidth>& walk) {
  using T = Acc<Scalar>;
  walk.start(sequence);
  const int64_t end = p.order.sequence_end(sequence);
  for (int64_t time = p.order.sequence_begin(sequence); time < end; ++time) {
    const int32_t row = p.order.row_of(time);
    Vec<T> y{};
    if (!p.order.is_padding(row)) {
      const Vec<T> x = walk.load_x(row);
      y = walk.pre_activation(x);
      if (p.silu) y *= sigmoid<T>(y);
      walk.push(x);
    }
    store(static_cast<Scalar*>(p.y.data) + row * p.y.stride + walk.channel, y, walk.lanes);
  }
  Scalar* state = static_cast<Scalar*>(p.final_state);
  for (int64_t j = 0; state && j < walk.taps(); ++j) {
    store(state + walk.state_offset(sequence, j), walk.window[j], walk.lanes);
  }
}

template <typename Scalar, int kWidth>
struct BackwardWalk : Walk<Scalar, kWidth> {
  using T = Acc<Scalar>;
  using Walk<Scalar, kWidth>::taps;
  using Walk<Scalar, kWidth>::weight;
  using Walk<Scalar, kWidth>::window;
  using Walk<Scalar, kWidth>::channel;
  using Walk<Scalar, kWidth>::lanes;

  const CausalConv1dBackwardParams& p;
  Buffer<Vec<T>> grad_weight;  // [width]
  Buffer<Vec<T>> grad_window;  // [width - 1], so far
  Buffer<int64_t> source;      // [width - 1]: a row, or -1 - j for entry j of the initial state
  Vec<T> grad_bias{};

  BackwardWalk(const CausalConv1dBackwardParams& params, int64_t block)
      : Walk<Scalar, kWidth>(params, block),
        p(params),
        grad_weight(this->width),
        grad_window(this->width),
        source(this->width) {}

  // The gradient of an input that leaves the window.
  void retire(int64_t sequence, int64_t from, Vec<T> grad) {
    if (from >= 0) {
      if (p.grad_x.data)
        store(static_cast<Scalar*>(p.grad_x.data) + from * p.grad_x.stride + channel, grad, lanes);
    } else if (p.grad_initial_state) {
      store(static_cast<Scalar*>(p.grad_initial_state) + this->state_offset(sequence, -1 - from), grad,
            lanes);
    }
  }

  void token(int64_t sequence, int32_t row) {
    const Vec<T> x = this->load_x(row);
    Vec<T> grad = load(static_cast<const Scalar*>(p.grad_y.data) + row * p.grad_y.stride + channel, lanes);
    if (p.silu) {
      const Vec<T> pre = this->pre_activation(x), s = sigmoid<T>(pre);
      grad *= s * (pre * (splat<T>(1) - s) + T(1));
    }
    for (int64_t k = 0; k < taps(); ++k) {
      grad_window[k] += weight[k] * grad;
      grad_weight[k] += window[k] * grad;
    }
    grad_weight[taps()] += x * grad;
    grad_bias += grad;
    const Vec<T> own = weight[taps()] * grad;
    if (taps() == 0) return retire(sequence, row, own);
    retire(sequence, source[0], grad_window[0]);
    for (int64_t k = 0; k + 1 < taps(); ++k) {
      grad_window[k] = grad_window[k + 1];
      source[k] = source[k + 1];
    }
    grad_window[taps() - 1] = own;
    source[taps() - 1] = row;
    this->push(x);
  }

  void run_sequence(int64_t sequence) {
    this->start(sequence);
    for (int64_t j = 0; j < taps(); ++j) {
      grad_window[j] = Vec<T>{};
      source[j] = -1 - j;
    }
    const int64_t end = p.order.sequence_end(sequence);
    for (int64_t time = p.order.sequence_begin(sequence); time < end; ++time) {
      const int32_t row = p.order.row_of(time);
      p.order.is_padding(row) ? retire(sequence, row, Vec<T>{}) : token(sequence, row);
    }
    const Scalar* grad_final = static_cast<const Scalar*>(p.grad_final_state);
    for (int64_t j = 0; j < taps(); ++j) {
      if (grad_final) grad_window[j] += load(grad_final + this->state_offset(sequence, j), lanes);
      retire(sequence, source[j], grad_window[j]);
    }
  }

  void finish() {
    T* to = static_cast<T*>(p.grad_weight) + channel * this->width;
    for (int64_t k = 0; p.grad_weight && k < this->width; ++k) {
      for (int i = 0; i < lanes; ++i) to[i * this->width + k] = grad_weight[k][i];
    }
    if (p.grad_bias) store(static_cast<T*>(p.grad_bias) + channel, grad_bias, lanes);
  }
};

template <typename Scalar, int kWidth>
void run(const CausalConv1dForwardParams& p, const ParallelFor& parallel) {
  const int64_t blocks = (p.channels + kLanes<Acc<Scalar>> - 1) / kLanes<Acc<Scalar>>;
  parallel(0, p.order.sequences * blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Walk<Scalar, kWidth> walk(p, i % blocks);
      forward_sequence(p, i / blocks, walk);
    }
  });
}

// A block of channels walks all sequences, so its sums over tokens never depend on the threads.
template <typename Scalar, int kWidth>
void run(const CausalConv1dBackwardParams& p, const ParallelFor& parallel) {
  const int64_t blocks = (p.channels + kLanes<Acc<Scalar>> - 1) / kLanes<Acc<Scalar>>;
  parallel(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      BackwardWalk<Scalar, kWidth> walk(p, i);
      for (int64_t s = 0; s < p.order.sequences; ++s) walk.run_sequence(s);
      walk.finish();
    }
  });
}

template <typename Scalar, typename Params>
void run_width(const Params& p, const ParallelFor& parallel) {
  switch (p.width) {
    case 2:
      return run<Scalar, 2>(p, parallel);
    case 3:
      return run<Scalar, 3>(p, parallel);
    case 4:
      return run<Scalar, 4>(p, parallel);
    default:
      return run<Scalar, 0>(p, parallel);
  }
}

template <typename Params>
void run_type(const Params& p, const ParallelFor& parallel) {
  switch (p.type) {
    case ScalarType::kFloat32:
      return run_width<float>(p, parallel);
    case ScalarType::kBFloat16:
      return run_width<BFloat16>(p, parallel);
    case ScalarType::kFloat16:
      return run_width<Float16>(p, parallel);
    case ScalarType::kFloat64:
      return run_width<double>(p, parallel);
  }
}

}  // namespace

void causal_conv1d_forward(const CausalConv1dForwardParams& p, const ParallelFor& parallel) {
  run_type(p, parallel);
}

void causal_conv1d_backward(const CausalConv1dBackwardParams& p, const ParallelFor& parallel) {
  run_type(p, parallel);
}

}  // namespace mixture_of_mamba::MOM_ISA
