// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <utility>
#include <vector>

#include "scan_problem.h"

// The scan and its gradients by scalar loops.

namespace mixture_of_mamba::testing {

struct ScanProblem::Gradients {
  Reals u, dt, B, C, z, A, D, dt_bias, initial;
};

void ScanProblem::reference_channel(int64_t sequence, int64_t channel, Reals& out, Reals& final_state,
                                    Gradients& grad) const {
  struct Step {
    int64_t row, at;       // at: of this channel in a row of activations
    int64_t bias_at;       // in dt_bias
    Real delta, slope, y;  // slope: d delta / d dt
    Reals before, decay;   // of the states
  };
  std::vector<Step> steps;
  const int64_t first = tokens.begin(sequence), length = tokens.lengths[sequence];
  const Real* const rate = &A[channel * states];
  const int64_t state_at = (sequence * channels + channel) * states;
  Reals h(states);
  for (int64_t n = 0; initial && n < states; ++n) h[n] = initial_values[state_at + n];
  for (int64_t i = 0; i < length; ++i) {
    Step step;
    step.decay.resize(states);
    step.row = tokens.rows[reverse ? first + length - 1 - i : first + i];
    const int modality = tokens.modality(step.row);
    if (modality < 0) continue;
    step.at = step.row * channels + channel;
    step.bias_at = (bias_modalities > 1 ? modality : 0) * channels + channel;
    const Real before = dt[step.at] + (bias_modalities > 0 ? dt_bias[step.bias_at] : 0);
    step.delta = softplus ? std::log1p(std::exp(before)) : before;
    step.slope = softplus ? 1 / (1 + std::exp(-before)) : 1;
    step.before = h;
    step.y = skip ? D[channel] * u[step.at] : 0;
    for (int64_t n = 0; n < states; ++n) {
      step.decay[n] = std::exp(step.delta * rate[n]);
      h[n] = step.decay[n] * h[n] + step.delta * u[step.at] * B[step.row * states + n];
      step.y += C[step.row * states + n] * h[n];
    }
    out[step.at] = gate ? step.y * z[step.at] / (1 + std::exp(-z[step.at])) : step.y;
    steps.push_back(std::move(step));
  }
  for (int64_t n = 0; n < states; ++n) final_state[state_at + n] = h[n];

  Reals g(states);  // gradient of the state after the step
  for (int64_t n = 0; grad_final && n < states; ++n) g[n] = grad_final_values[state_at + n];
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    const int64_t at = step->at, pair = step->row * states;
    Real grad_y = grad_out[at];
    if (gate) {
      const Real s = 1 / (1 + std::exp(-z[at]));
      grad.z[at] = grad_out[at] * step->y * s * (1 + z[at] * (1 - s));
      grad_y *= z[at] * s;
    }
    Real grad_delta = 0, grad_drive = 0;  // drive: delta u
    for (int64_t n = 0; n < states; ++n) {
      const Real decay = step->decay[n];
      const Real after = decay * step->before[n] + step->delta * u[at] * B[pair + n];
      grad.C[pair + n] += grad_y * after;
      g[n] += grad_y * C[pair + n];
      grad.B[pair + n] += g[n] * step->delta * u[at];
      grad_drive += g[n] * B[pair + n];
      grad_delta += g[n] * step->before[n] * decay * rate[n];
      grad.A[channel * states + n] += g[n] * step->before[n] * decay * step->delta;
      g[n] *= decay;
    }
    grad.u[at] = grad_drive * step->delta + (skip ? D[channel] * grad_y : 0);
    grad.D[channel] += grad_y * u[at];
    grad.dt[at] = (grad_delta + grad_drive * u[at]) * step->slope;
    if (bias_modalities > 0) grad.dt_bias[step->bias_at] += grad.dt[at];
  }
  for (int64_t n = 0; n < states; ++n) grad.initial[state_at + n] = g[n];
}

Outputs ScanProblem::reference() const {
  Reals out(u.size()), final_state(state_size());
  Gradients grad{Reals(u.size()), Reals(u.size()), Reals(B.size()),       Reals(B.size()),    Reals(u.size()),
                 Reals(A.size()), Reals(channels), Reals(dt_bias.size()), Reals(state_size())};
  for (int64_t s = 0; s < tokens.sequences(); ++s) {
    for (int64_t c = 0; c < channels; ++c) reference_channel(s, c, out, final_state, grad);
  }
  const ScalarType acc = acc_of(type);
  return {{"out", type, out, {}},
          {"final_state", acc, final_state, {}},
          {"grad_u", type, grad.u, {}},
          {"grad_dt", type, grad.dt, {}},
          {"grad_B", type, grad.B, {}},
          {"grad_C", type, grad.C, {}},
          {"grad_z", type, grad.z, {}},
          {"grad_A", acc, grad.A, {}},
          {"grad_D", acc, grad.D, {}},
          {"grad_dt_bias", acc, grad.dt_bias, {}},
          {"grad_initial_state", acc, grad.initial, {}}};
}

}  // namespace mixture_of_mamba::testing
