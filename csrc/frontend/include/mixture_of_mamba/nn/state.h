// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

namespace mixture_of_mamba::nn {

/// State of one layer after some tokens, per sequence. Its size does not grow with the tokens seen.
struct MambaState {
  torch::Tensor conv;  ///< [sequences, d_conv - 1, d_inner], the last inputs of the convolution, oldest first
  torch::Tensor ssm;  ///< [sequences, d_inner, d_state], float32 (float64 beside float64 activations), or the
                      ///< dtype of `conv` where that has 16 bits: half of the bytes, but every step rounds

  /// The same values with the scan's state in another dtype: a prefill's, which is float32, for steps in 16
  /// bits. What needs no change is shared with this state, `conv` always.
  /// \throws c10::ValueError a dtype that allocate_state() would refuse.
  MambaState to(torch::Dtype ssm_dtype) const;
  /// A copy to come back to, for example before a block of tokens that is drawn again.
  MambaState clone() const { return {conv.clone(), ssm.clone()}; }
  /// The same values without their history (truncated backpropagation through time).
  MambaState detach() const { return {conv.detach(), ssm.detach()}; }
};

}  // namespace mixture_of_mamba::nn
