// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <tuple>

#include "modality_argument.h"

// What a block computes with its children: one operator where possible, else one step after the other. Both
// give the same numbers. x and y have rows in the routing's sorted order.

namespace mixture_of_mamba::frontend {

using OptionalState = std::optional<nn::MambaState>;
using Mixed = std::tuple<torch::Tensor, nn::MambaState>;

Mixed mix(nn::MixtureOfMambaImpl& layer, const torch::Tensor& x, const OptionalRouting& routing,
          const std::optional<torch::Tensor>& cu_seqlens, const OptionalState& state);

Mixed mix_step_by_step(nn::MixtureOfMambaImpl& layer, const torch::Tensor& x, const OptionalRouting& routing,
                       const std::optional<torch::Tensor>& cu_seqlens, const OptionalState& state);

// mix_step_by_step() of a few tokens that updates the state in place.
torch::Tensor step(nn::MixtureOfMambaImpl& layer, const torch::Tensor& x, const OptionalRouting& routing,
                   nn::MambaState& state);

}  // namespace mixture_of_mamba::frontend
