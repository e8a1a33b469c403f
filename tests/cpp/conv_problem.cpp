// SPDX-License-Identifier: Apache-2.0
#include "conv_problem.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace mixture_of_mamba::testing {

ConvProblem ConvProblem::random(Random& random, bool with_float64, int longest) {
  ConvProblem p;
  p.type = random.type(with_float64);
  p.tokens = Tokens::random(random, longest);
  p.channels = random.chance(3) ? 8 * random.between(1, 12) : random.below(71);
  p.width = random.chance(2) ? 4 : random.between(1, 9);
  p.silu = random.chance(2);
  p.bias = random.chance(2);
  p.initial = random.chance(2);
  p.final = !random.chance(4);
  p.grad_final = random.chance(2);
  p.in_place = p.initial && p.final && random.chance(2);
  p.want_grad_x = !random.chance(8);
  p.want_grad_bias = p.bias && !random.chance(4);
  p.want_grad_initial = p.initial && !random.chance(4);
  p.gap = random.chance(2) ? 0 : random.chance(2) ? 8 * random.below(4) : random.below(9);
  p.offset = random.chance(3) ? random.below(9) : 0;
  p.garbage = p.tokens.padding && random.chance(2);
  p.fill(random);
  return p;
}

void ConvProblem::fill(Random& random) {
  tokens.assign(random);
  const ScalarType acc = acc_of(type);
  const int64_t size = tokens.count() * channels;
  x = random.normal(size, 0, 1, type);
  grad_y = random.normal(size, 0, 1, type);
  weight = random.normal(channels * width, 0, 0.5L, acc);
  bias_values = random.normal(channels, 0, 0.5L, acc);
  initial_values = random.normal(state_rows() * channels, 0, 1, type);
  grad_final_values = random.normal(state_rows() * channels, 0, 1, type);
  for (int64_t row = 0; garbage && row < tokens.count(); ++row) {
    if (tokens.modality(row) >= 0) continue;
    for (Reals* values : {&x, &grad_y}) {
      std::fill_n(values->begin() + row * channels, channels, Real(NAN));
    }
  }
}

std::string ConvProblem::describe() const {
  std::ostringstream text;
  text << name << ": " << name_of(type) << ", " << channels << " channels, width " << width
       << (silu ? ", silu" : "") << (bias ? ", bias" : "") << (initial ? ", initial state" : "")
       << (final ? ", final state" : "") << (in_place ? " in place" : "")
       << (grad_final ? ", its gradient" : "") << (garbage ? ", NaN in padding" : "") << ", gap " << gap
       << ", offset " << offset << ", " << tokens.describe();
  return text.str();
}

// A sequence's inputs in a line, entries of the state before tokens: the convolution is then a plain sum.
Outputs ConvProblem::reference() const {
  const int64_t taps = width - 1, size = tokens.count() * channels, state_size = state_rows() * channels;
  Reals y(size), grad_x(size), final_state(state_size), grad_initial(state_size);
  Reals grad_weight(channels * width), grad_bias(channels);
  for (int64_t s = 0; s < tokens.sequences(); ++s) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto state_at = [&](int64_t j) { return (s * taps + j) * channels + c; };
      Reals line;
      std::vector<int64_t> at;  // where each token's elements lie
      for (int64_t j = 0; j < taps; ++j) line.push_back(initial ? initial_values[state_at(j)] : 0);
      for (int64_t time = tokens.begin(s); time < tokens.begin(s + 1); ++time) {
        const int64_t row = tokens.rows[time];
        if (tokens.modality(row) < 0) continue;
        at.push_back(row * channels + c);
        line.push_back(x[at.back()]);
      }
      Reals grad_line(line.size());
      for (size_t i = 0; i < at.size(); ++i) {
        Real pre = bias ? bias_values[c] : 0;
        for (int64_t k = 0; k < width; ++k) pre += weight[c * width + k] * line[i + k];
        const Real sigmoid = 1 / (1 + std::exp(-pre));
        y[at[i]] = silu ? pre * sigmoid : pre;
        const Real grad = grad_y[at[i]] * (silu ? sigmoid * (1 + pre * (1 - sigmoid)) : 1);
        for (int64_t k = 0; k < width; ++k) {
          grad_line[i + k] += weight[c * width + k] * grad;
          grad_weight[c * width + k] += line[i + k] * grad;
        }
        grad_bias[c] += grad;
      }
      for (int64_t j = 0; j < taps; ++j) {
        final_state[state_at(j)] = line[at.size() + j];
        if (grad_final) grad_line[at.size() + j] += grad_final_values[state_at(j)];
      }
      for (size_t i = 0; i < at.size(); ++i) grad_x[at[i]] = grad_line[taps + i];
      for (int64_t j = 0; j < taps; ++j) grad_initial[state_at(j)] = grad_line[j];
    }
  }
  const ScalarType acc = acc_of(type);
  return {{"y", type, y, {}},
          {"final_state", type, final_state, {}},
          {"grad_x", type, grad_x, {}},
          {"grad_weight", acc, grad_weight, {}},
          {"grad_bias", acc, grad_bias, {}},
          {"grad_initial_state", type, grad_initial, {}}};
}

Outputs ConvProblem::run(Arena& arena, const ConvBackend& backend) const {
  const ScalarType acc = acc_of(type);
  const int64_t count = tokens.count();
  const auto rows = [&] { return Matrix(arena, type, count, channels, gap, offset); };
  const auto state = [&] { return Matrix(arena, type, state_rows(), channels); };
  const auto input = [&](Matrix matrix, const Reals& values) {
    matrix.write(values);
    return matrix;
  };

  CausalConv1dParams p;
  p.type = type;
  p.channels = channels;
  p.width = width;
  p.order = tokens.place(arena);
  p.silu = silu;
  p.x = input(rows(), x).const_rows();
  p.weight = input(Matrix(arena, acc, channels, width), weight).data();
  if (bias) p.bias = input(Matrix(arena, acc, 1, channels), bias_values).data();
  if (initial) p.initial_state = input(state(), initial_values).data();

  // Backward first: in place, forward overwrites the initial state.
  CausalConv1dBackwardParams b;
  static_cast<CausalConv1dParams&>(b) = p;
  b.grad_y = input(rows(), grad_y).const_rows();
  if (grad_final) b.grad_final_state = input(state(), grad_final_values).data();
  const Matrix grad_x = rows(), grad_initial = state();
  const Matrix grad_weight(arena, acc, channels, width), grad_bias(arena, acc, 1, channels);
  if (want_grad_x) b.grad_x = grad_x.writable();
  b.grad_weight = grad_weight.data();
  if (want_grad_bias) b.grad_bias = grad_bias.data();
  if (want_grad_initial) b.grad_initial_state = grad_initial.data();
  backend.backward(b);

  CausalConv1dForwardParams f;
  static_cast<CausalConv1dParams&>(f) = p;
  const Matrix y = rows(), own_state = in_place ? input(state(), initial_values) : state();
  f.y = y.writable();
  if (in_place) f.initial_state = own_state.data();
  if (final) f.final_state = own_state.data();
  backend.forward(f);

  Outputs outputs = {output_of("y", y), output_of("grad_weight", grad_weight)};
  if (final) outputs.push_back(output_of("final_state", own_state));
  if (want_grad_x) outputs.push_back(output_of("grad_x", grad_x));
  if (want_grad_bias) outputs.push_back(output_of("grad_bias", grad_bias));
  if (want_grad_initial) outputs.push_back(output_of("grad_initial_state", grad_initial));
  return outputs;
}

}  // namespace mixture_of_mamba::testing
