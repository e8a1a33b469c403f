// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/models/losses.h"

#include "intervals.h"

namespace mixture_of_mamba::models {

static constexpr int64_t kIgnored = -1;

torch::Tensor ModalityLosses::means() const { return cross_entropy / count.clamp_min(1); }

torch::Tensor ModalityLosses::total(double z_weight) const {
  return (cross_entropy + z_weight * z).sum() / count.sum().clamp_min(1);
}

torch::Tensor next_tokens(const torch::Tensor& tokens, const OptionalTensor& cu_seqlens) {
  const torch::Tensor after = torch::constant_pad_nd(tokens.flatten(), {0, 1}, kIgnored).slice(0, 1);
  torch::Tensor last;
  if (cu_seqlens) {
    const torch::Tensor time = torch::arange(tokens.numel(), tokens.options());
    const torch::Tensor ends =
        cu_seqlens->slice(0, 1).index_select(0, frontend::interval_of(time, *cu_seqlens));
    last = (ends == time + 1).view(tokens.sizes());
  } else {
    last = torch::arange(tokens.size(1), tokens.options()) == tokens.size(1) - 1;
  }
  return torch::where(last | (tokens < 0), kIgnored, after.view(tokens.sizes()));
}

ModalityLosses modality_losses(const torch::Tensor& logits, const torch::Tensor& labels,
                               const torch::Tensor& label_modality, int64_t num_modalities) {
  const torch::Tensor target = labels.flatten(), which = label_modality.flatten();
  const auto wide = torch::promote_types(logits.scalar_type(), torch::kFloat32);
  const torch::Tensor rows = logits.flatten(0, -2).to(wide);
  const torch::Tensor log_z = rows.logsumexp(-1), counted = target >= 0;
  const torch::Tensor chosen = rows.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1);
  // Logits of padding may be anything: they are taken out before they are multiplied with 0.
  const torch::Tensor entropy = torch::where(counted, log_z - chosen, 0);
  const torch::Tensor z = torch::where(counted, log_z.square(), 0);
  const torch::Tensor modalities = torch::arange(num_modalities, target.options()).unsqueeze(1);
  const torch::Tensor masks = ((modalities == which) & counted).to(wide);
  // Not a matrix product: autocast would round it to 16 bits.
  return {(masks * entropy).sum(1), (masks * z).sum(1), masks.sum(1)};
}

}  // namespace mixture_of_mamba::models
