// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>

#include "kernels/causal_conv1d.h"
#include "tokens.h"

namespace mixture_of_mamba::testing {

// A way to run the convolution. Results of ways with the same name are equal bit by bit.
struct ConvBackend {
  std::string name;
  std::function<void(const CausalConv1dForwardParams&)> forward;
  std::function<void(const CausalConv1dBackwardParams&)> backward;
};

// One call of the convolution, forward and backward.
struct ConvProblem {
  std::string name = "random";
  ScalarType type = ScalarType::kFloat32;
  Tokens tokens;
  int64_t channels = 1, width = 4;
  bool silu = false, bias = false, initial = false, final = false, grad_final = false;
  bool in_place = false;  // final_state is initial_state
  bool garbage = false;   // padding rows of the inputs hold NaN
  bool want_grad_x = true, want_grad_bias = true, want_grad_initial = true;
  int gap = 0, offset = 0;
  Reals x, weight, bias_values, initial_values, grad_y, grad_final_values;

  static ConvProblem random(Random& random, bool with_float64, int longest);
  // Two sequences, three modalities, every option.
  static ConvProblem base(ScalarType type);
  // The base, then problems that vary one thing.
  static std::vector<ConvProblem> table(ScalarType type);
  // Random values, and modalities of the tokens, for the members above.
  void fill(Random& random);

  Real error_growth() const { return 1; }
  int64_t state_rows() const { return tokens.sequences() * (width - 1); }
  std::string describe() const;
  // By scalar loops.
  Outputs reference() const;
  Outputs run(Arena& arena, const ConvBackend& backend) const;
};

}  // namespace mixture_of_mamba::testing
