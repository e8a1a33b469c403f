// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

namespace mixture_of_mamba::nn {

/// State of one layer after some tokens, per sequence. Its size does not grow with the tokens seen.
struct MambaState {
  torch::Tensor conv;  ///< [sequences, d_conv - 1, d_inner], the last inputs of the convolution, oldest first
  torch::Tensor ssm;   ///< [sequences, d_inner, d_state], float32 (float64 beside float64 activations)

  /// A copy to come back to, for example before a block of tokens that is drawn again.
  MambaState clone() const { return {conv.clone(), ssm.clone()}; }
  /// The same values without their history (truncated backpropagation through time).
  MambaState detach() const { return {conv.detach(), ssm.detach()}; }
};

}  // namespace mixture_of_mamba::nn
