// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/routing.h"

#include <ATen/ATen.h>

#include "mixture_of_mamba/ops.h"
#include "text.h"

namespace mixture_of_mamba {

namespace {

torch::Tensor permute(const Routing& routing, const torch::Tensor& x, const torch::Tensor& index,
                      const torch::Tensor& inverse) {
  const bool fits = x.dim() >= 2 && x.size(0) == routing.batch && x.size(1) == routing.length;
  frontend::require_value(fits, "x must have shape [batch, length, ...] = [{}, {}], got {}", routing.batch,
                          routing.length, frontend::shape_of(x));
  if (x.dim() == 2) return permute_rows(x.unsqueeze(-1), index, inverse).squeeze(-1);
  return permute_rows(x, index, inverse);
}

}  // namespace

Routing Routing::from_ids(const torch::Tensor& ids, int64_t num_modalities, const RoutingOptions& options) {
  frontend::require_value(ids.dim() == 2, "ids must be a tensor of shape [batch, length], got {} {}",
                          frontend::dtype_of(ids), frontend::shape_of(ids));
  auto [rows, order, offsets] = modality_routing(ids, num_modalities, options.checked);
  std::optional<torch::Tensor> host_offsets;
  bool has_padding = true;
  if (ids.is_cpu()) {
    host_offsets = offsets.to(torch::kInt64);
    has_padding = host_offsets->const_data_ptr<int64_t>()[num_modalities] != ids.numel();
  }
  if (options.device) {
    for (torch::Tensor* tensor : {&rows, &order, &offsets}) *tensor = tensor->to(*options.device, true);
  }
  return {rows, order, offsets, host_offsets, has_padding, ids.size(0), ids.size(1)};
}

Routing Routing::with_host_offsets() const {
  if (host_offsets) return *this;
  Routing routing = *this;
  routing.host_offsets = offsets.to(torch::kCPU, torch::kInt64);
  routing.has_padding = routing.host_offsets->const_data_ptr<int64_t>()[num_modalities()] != num_tokens();
  return routing;
}

Routing Routing::merged() const {
  const auto ends = [](const torch::Tensor& values) { return torch::stack({values[0], values[-1]}); };
  Routing routing = *this;
  routing.offsets = ends(offsets);
  if (host_offsets) routing.host_offsets = ends(*host_offsets);
  return routing;
}

torch::Tensor Routing::sort(const torch::Tensor& x) const { return permute(*this, x, order, rows); }

torch::Tensor Routing::unsort(const torch::Tensor& x) const { return permute(*this, x, rows, order); }

}  // namespace mixture_of_mamba
