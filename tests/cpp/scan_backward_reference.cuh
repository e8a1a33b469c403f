// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/selective_scan.h"

// Random inputs of the scan's backward, its gradients by float64 loops on the host, and device memory
// that shows what was written.

namespace mixture_of_mamba {

using Doubles = std::vector<double>;
using Bytes = std::vector<unsigned char>;
inline std::mt19937_64 generator(1);

inline void check(int status, const char* what) {
  if (status == 0) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(status)));
  std::exit(1);
}

struct Case {
  std::string name;
  ScalarType type = ScalarType::kFloat32;
  std::vector<int> lengths = {37, 37};
  int64_t channels = 70, states = 16;
  int modalities = 3, bias_modalities = 3;  // 0 bias_modalities: no dt_bias
  bool packed = false, rows = true, padding = false, softplus = true, reverse = false;
  bool D = true, z = true, initial = true, grad_final = true;
  int gap = 0;           // elements between rows that belong to nobody
  int offset = 0;        // elements before the first row
  int skip_outputs = 0;  // bit i: output i is null
  double rate = -1.0;    // scale of A
  bool random_rate_sign = false;
  bool hostile = false;  // rows, offsets and cu_seqlens are garbage: only memory must stay whole
};

inline int64_t total(const Case& c) {
  int64_t n = 0;
  for (int length : c.lengths) n += length;
  return n;
}

inline double round_to(ScalarType type, double x) {
  if (type == ScalarType::kBFloat16) return __bfloat162float(__float2bfloat16(static_cast<float>(x)));
  if (type == ScalarType::kFloat16) return __half2float(__float2half(static_cast<float>(x)));
  return static_cast<float>(x);
}

inline void encode(ScalarType type, double x, unsigned char* to) {
  const float value = static_cast<float>(x);
  const __nv_bfloat16 bfloat = __float2bfloat16(value);
  const __half half = __float2half(value);
  const void* from = &value;
  if (type == ScalarType::kBFloat16) from = &bfloat;
  if (type == ScalarType::kFloat16) from = &half;
  std::memcpy(to, from, size_of(type));
}

inline double decode(ScalarType type, const unsigned char* from) {
  float value;
  __nv_bfloat16 bfloat;
  __half half;
  if (type == ScalarType::kBFloat16) return std::memcpy(&bfloat, from, 2), __bfloat162float(bfloat);
  if (type == ScalarType::kFloat16) return std::memcpy(&half, from, 2), __half2float(half);
  return std::memcpy(&value, from, 4), value;
}

struct Device {
  std::vector<void*> owned;
  ~Device() {
    for (void* p : owned) check(cudaFree(p), "cudaFree");
  }
  void* allocate(size_t bytes) {
    void* p = nullptr;
    check(cudaMalloc(&p, bytes + 1), "cudaMalloc");
    check(cudaMemset(p, 0xff, bytes + 1), "cudaMemset");
    owned.push_back(p);
    return p;
  }
  template <typename T>
  T* upload(const std::vector<T>& host) {
    T* p = static_cast<T*>(allocate(host.size() * sizeof(T)));
    check(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
    return p;
  }
};

// [rows, columns] with strides; outputs start poisoned with NaN bytes, gaps must keep them.
struct Matrix {
  ScalarType type;
  int64_t rows, columns, stride, offset;
  unsigned char* memory = nullptr;

  Matrix(Device& device, const Case& c, ScalarType t, int64_t r, int64_t n)
      : type(t), rows(r), columns(n), stride(n + c.gap), offset(c.offset) {
    memory = static_cast<unsigned char*>(device.allocate(bytes()));
  }
  size_t bytes() const { return (offset + rows * stride) * size_of(type); }
  void* data() const { return memory + offset * size_of(type); }
  void write(const Doubles& values) {
    Bytes host(bytes(), 0xff);
    for (int64_t i = 0; i < rows * columns; ++i) {
      encode(type, values[i], &host[(offset + i / columns * stride + i % columns) * size_of(type)]);
    }
    check(cudaMemcpy(memory, host.data(), host.size(), cudaMemcpyHostToDevice), "upload");
  }
  void poison() { check(cudaMemset(memory, 0xff, bytes()), "poison"); }
  Bytes raw() const {
    Bytes host(bytes());
    check(cudaMemcpy(host.data(), memory, host.size(), cudaMemcpyDeviceToHost), "download");
    return host;
  }
  bool gaps_untouched(const Bytes& host) const {
    for (int64_t i = 0; i < offset + rows * stride; ++i) {
      if (i >= offset && (i - offset) % stride < columns) continue;
      for (int b = 0; b < size_of(type); ++b) {
        if (host[i * size_of(type) + b] != 0xff) return false;
      }
    }
    return true;
  }
  Doubles values(const Bytes& host) const {
    Doubles v(rows * columns);
    for (int64_t i = 0; i < rows * columns; ++i) {
      v[i] = decode(type, &host[(offset + i / columns * stride + i % columns) * size_of(type)]);
    }
    return v;
  }
};

enum Output { kU, kDt, kB, kC, kZ, kA, kD, kBias, kInitial, kOutputs };
const char* const kNames[kOutputs] = {"u", "dt", "B", "C", "z", "A", "D", "dt_bias", "initial_state"};

struct Problem {
  Case c;
  int64_t tokens, sequences;
  std::vector<int32_t> rows, offsets, cu_seqlens;
  Doubles u, dt, B, C, z, grad_out, A, D, bias, initial, grad_final;
  std::vector<float> checkpoints;
  Doubles expected[kOutputs];

  Doubles normal(int64_t n, double scale, double mean, ScalarType type) {
    std::normal_distribution<double> distribution;
    Doubles v(n);
    for (double& x : v) x = round_to(type, mean + scale * distribution(generator));
    return v;
  }

  explicit Problem(const Case& from) : c(from), tokens(total(from)), sequences(from.lengths.size()) {
    const int64_t inner = tokens * c.channels, pairs = tokens * c.states, size = c.channels * c.states;
    const ScalarType f32 = ScalarType::kFloat32;
    u = normal(inner, 1, 0, c.type);
    dt = normal(inner, 1, c.softplus ? -1 : 0.1, c.type);
    if (!c.softplus) {
      for (double& x : dt) x = round_to(c.type, 0.3 * std::fabs(x));
    }
    B = normal(pairs, 1, 0, c.type);
    C = normal(pairs, 1, 0, c.type);
    z = normal(inner, 1, 0, c.type);
    grad_out = normal(inner, 1, 0, c.type);
    D = normal(c.channels, 0.3, 1, f32);
    bias = normal(c.bias_modalities * c.channels, 0.5, c.softplus ? -1 : 0, f32);
    if (!c.softplus) {
      for (double& x : bias) x = std::fabs(x) * 0.1f;
    }
    A = normal(size, 0.1, 0, f32);
    for (int64_t i = 0; i < size; ++i) {
      A[i] = static_cast<float>(c.rate * (1 + i % c.states % 16) * std::exp(A[i]));
      if (c.random_rate_sign && generator() % 2 == 0) A[i] = static_cast<float>(-0.01 * A[i]);
    }
    initial = normal(sequences * size, c.initial ? 1 : 0, 0, f32);
    grad_final = normal(sequences * size, c.grad_final ? 1 : 0, 0, f32);
    cu_seqlens = {0};
    for (int length : c.lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
    std::vector<std::vector<int>> members(c.modalities + 1);
    for (int t = 0; t < tokens; ++t) {
      members[c.rows ? generator() % (c.modalities + (c.padding ? 1 : 0)) : 0].push_back(t);
    }
    rows.resize(tokens);
    offsets = {0};
    int32_t row = 0;
    for (int m = 0; m <= c.modalities; ++m) {
      for (int t : members[m]) rows[t] = row++;
      if (m < c.modalities) offsets.push_back(row);
    }
    reference();
    if (!c.hostile) return;
    for (std::vector<int32_t>* values : {&rows, &offsets, &cu_seqlens}) {
      for (int32_t& x : *values) x = static_cast<int32_t>(generator());
    }
  }

  int modality(int row) const {
    return static_cast<int>(std::upper_bound(offsets.begin() + 1, offsets.end(), row) - offsets.begin() - 1);
  }

  void reference();
};

inline void Problem::reference() {
  const int64_t states = c.states, channels = c.channels, size = channels * states;
  checkpoints.assign((tokens / kCheckpointInterval + sequences) * size, NAN);
  const int64_t sizes[kOutputs] = {tokens * channels, tokens * channels,
                                   tokens * states,   tokens * states,
                                   tokens * channels, size,
                                   channels,          c.bias_modalities * channels,
                                   sequences * size};
  for (int i = 0; i < kOutputs; ++i) expected[i].assign(sizes[i], 0.0);
  for (int64_t s = 0; s < sequences; ++s) {
    const int begin = cu_seqlens[s], length = c.lengths[s];
    for (int64_t e = 0; e < channels; ++e) {
      Doubles h(initial.begin() + s * size + e * states, initial.begin() + s * size + (e + 1) * states);
      Doubles history((length + 1) * states), delta(length), x(length);
      const auto row_of = [&](int i) { return rows[c.reverse ? begin + length - 1 - i : begin + i]; };
      for (int i = 0; i < length; ++i) {
        std::copy(h.begin(), h.end(), history.begin() + i * states);
        const int64_t slot = begin / kCheckpointInterval + s + i / kCheckpointInterval;
        if (i % kCheckpointInterval == 0)
          std::copy(h.begin(), h.end(), &checkpoints[slot * size + e * states]);
        const int64_t row = row_of(i);
        const int m = modality(row);
        if (m == c.modalities) continue;
        x[i] = dt[row * channels + e];
        if (c.bias_modalities > 0) x[i] += bias[(c.bias_modalities == 1 ? 0 : m) * channels + e];
        delta[i] = !c.softplus ? x[i] : x[i] > 20 ? x[i] : std::log1p(std::exp(x[i]));
        for (int64_t n = 0; n < states; ++n) {
          h[n] = std::exp(delta[i] * A[e * states + n]) * h[n] +
                 delta[i] * u[row * channels + e] * B[row * states + n];
        }
      }
      std::copy(h.begin(), h.end(), history.begin() + length * states);
      Doubles g(grad_final.begin() + s * size + e * states, grad_final.begin() + s * size + (e + 1) * states);
      for (int i = length - 1; i >= 0; --i) {
        const int64_t row = row_of(i), at = row * channels + e;
        const int m = modality(row);
        if (m == c.modalities) continue;
        const double gate = 1 / (1 + std::exp(-z[at])), skip = c.D ? D[e] : 0.0;
        const double dy = c.z ? grad_out[at] * z[at] * gate : grad_out[at];
        double y = skip * u[at], sum_B = 0, sum_A = 0;
        for (int64_t n = 0; n < states; ++n) {
          const double a = std::exp(delta[i] * A[e * states + n]), before = history[i * states + n];
          g[n] += C[row * states + n] * dy;
          y += C[row * states + n] * history[(i + 1) * states + n];
          sum_B += g[n] * B[row * states + n];
          expected[kB][row * states + n] += g[n] * delta[i] * u[at];
          expected[kC][row * states + n] += dy * history[(i + 1) * states + n];
          const double q = g[n] * a * before;
          sum_A += q * A[e * states + n];
          expected[kA][e * states + n] += q * delta[i];
          g[n] *= a;
        }
        expected[kU][at] = sum_B * delta[i] + skip * dy;
        expected[kDt][at] = (sum_B * u[at] + sum_A) * (c.softplus ? 1 / (1 + std::exp(-x[i])) : 1.0);
        expected[kZ][at] = grad_out[at] * gate * (1 + z[at] * (1 - gate)) * y;
        expected[kD][e] += dy * u[at];
        if (c.bias_modalities > 0) {
          expected[kBias][(c.bias_modalities == 1 ? 0 : m) * channels + e] += expected[kDt][at];
        }
      }
      std::copy(g.begin(), g.end(), expected[kInitial].begin() + s * size + e * states);
    }
  }
}

}  // namespace mixture_of_mamba
