// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>

#include "kernels/selective_scan.h"
#include "tokens.h"

namespace mixture_of_mamba::testing {

// A way to run the scan. Results of ways with the same name are equal bit by bit.
struct ScanBackend {
  std::string name;
  std::function<void(const SelectiveScanForwardParams&)> forward;
  std::function<void(const SelectiveScanBackwardParams&)> backward;
};

// One call of the scan: forward, then backward from the checkpoints that it left.
struct ScanProblem {
  std::string name = "random";
  ScalarType type = ScalarType::kFloat32;
  Tokens tokens;
  int64_t channels = 1, states = 16;
  int bias_modalities = 0;  // 0: no dt_bias
  bool softplus = false, reverse = false, skip = false, gate = false;
  bool initial = false, final = false, grad_final = false;
  bool in_place = false;        // final_state is initial_state, which only forward may do
  bool growing = false;         // some rates are positive
  bool garbage = false;         // padding rows of the inputs hold NaN
  unsigned absent_outputs = 0;  // bit i: gradient i of u, dt, B, C, A, initial_state is not wanted
  int gap = 0, offset = 0;
  Reals u, dt, A, B, C, D, z, dt_bias, initial_values, grad_out, grad_final_values;

  static ScanProblem random(Random& random, bool with_float64, int longest);
  // Two sequences, three modalities, every option.
  static ScanProblem base(ScalarType type);
  // The base, then problems that vary one thing.
  static std::vector<ScanProblem> table(ScalarType type);
  // The same for sizes that fill a GPU, or leave most of one idle.
  static std::vector<ScanProblem> large_table(ScalarType type);
  // Random values, and modalities of the tokens, for the members above.
  void fill(Random& random);

  // A state that grows remembers the rounding of every decay since the sequence began.
  Real error_growth() const { return growing ? 4 : 1; }
  int64_t state_size() const { return tokens.sequences() * channels * states; }
  std::string describe() const;
  // By scalar loops.
  Outputs reference() const;
  Outputs run(Arena& arena, const ScanBackend& backend) const;
  // Forward alone, in place from the initial values; the state is `narrow_state`, `offset` into its memory.
  Outputs run_step(Arena& arena, const std::function<void(const SelectiveScanForwardParams&)>& forward,
                   bool narrow_state) const;

 private:
  struct Gradients;
  Matrix rows(Arena& arena, int64_t columns) const;  // of every token
  // All but states in and out.
  SelectiveScanParams place(Arena& arena) const;
  void reference_channel(int64_t sequence, int64_t channel, Reals& out, Reals& final_state,
                         Gradients& grad) const;
};

}  // namespace mixture_of_mamba::testing
