// SPDX-License-Identifier: Apache-2.0
#include "modality_argument.h"

#include "text.h"

namespace mixture_of_mamba::frontend {

using torch::Tensor;

OptionalRouting routing_of(const nn::MixtureOfMambaImpl& layer, const Tensor& x,
                           const nn::Modality& modality) {
  const int64_t modalities = layer.options.num_modalities(), d_model = layer.options.d_model();
  require_value(x.is_floating_point(), "x must be a tensor of a floating type, got {} {}", dtype_of(x),
                shape_of(x));
  require_value(x.dim() == 3 && x.size(2) == d_model,
                "x must have shape [batch, length, d_model = {}], got {}", d_model, shape_of(x));
  if (const Routing* given = std::get_if<Routing>(&modality)) {
    const Routing routing = modalities == 1 && given->num_modalities() > 1 ? given->merged() : *given;
    require_value(routing.num_modalities() == modalities,
                  "modality must be a Routing of {} modalities, got {}", modalities,
                  routing.num_modalities());
    require_value(routing.batch == x.size(0) && routing.length == x.size(1),
                  "modality must have the batch and length of x, [{}, {}], got [{}, {}]", x.size(0),
                  x.size(1), routing.batch, routing.length);
    return routing;
  }
  if (const Tensor* ids = std::get_if<Tensor>(&modality)) {
    const Tensor known = modalities == 1 ? ids->clamp_max(0) : *ids;
    return routing_of(layer, x, Routing::from_ids(known, modalities, {.device = x.device()}));
  }
  require_value(
      modalities == 1 || !std::holds_alternative<std::monostate>(modality),
      "modality must be ids [batch, length] or a Routing (or one int for all tokens, or modality_masks in "
      "its place), since the layer has {} modalities, got None",
      modalities);
  const int64_t* one = std::get_if<int64_t>(&modality);
  const int64_t id = one == nullptr ? 0 : *one;
  require_value(id >= 0 && (modalities == 1 || id < modalities),
                "modality must lie in 0 .. num_modalities - 1 = {} when it is an int, got {}", modalities - 1,
                id);
  const bool all_alike = modalities == 1 && layer.A_log.dim() == 2 && layer.D.dim() == 1;
  if (all_alike || layer.options.decouple().empty()) return std::nullopt;
  return routing_of(layer, x, torch::full({x.size(0), x.size(1)}, modalities == 1 ? 0 : id, torch::kInt64));
}

}  // namespace mixture_of_mamba::frontend
