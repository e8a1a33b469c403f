// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "mixture_of_mamba/nn/mixture_of_mamba.h"

namespace mixture_of_mamba::frontend {

using OptionalRouting = std::optional<Routing>;

// The routing that a call's modality says, checked; none when there is nothing to route.
OptionalRouting routing_of(const nn::MixtureOfMambaImpl& layer, const torch::Tensor& x,
                           const nn::Modality& modality);

}  // namespace mixture_of_mamba::frontend
