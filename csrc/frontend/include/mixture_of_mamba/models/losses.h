// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/ops/optional_tensor.h>
#include <torch/types.h>

#include <cstdint>

namespace mixture_of_mamba::models {

/// Next-token losses: sums over labels, float32 [modalities], by the modality of the label.
struct ModalityLosses {
  torch::Tensor cross_entropy;  ///< in nats
  torch::Tensor z;  ///< squared logarithm of the softmax's denominator (PaLM, arXiv 2204.02311, section 5)
  torch::Tensor count;  ///< labels

  /// Cross-entropy of each modality in nats a label, [modalities]; 0 where there is no label.
  torch::Tensor means() const;
  /// Mean over all labels of cross_entropy + z_weight * z, what is minimised; a scalar.
  torch::Tensor total(double z_weight = 1e-5) const;
};

/// Labels: the token after each, of the same document; -1 where there is none, before and on padding.
/// \param tokens int64 [batch, length] in time order, -1 is padding.
/// \param cu_seqlens int32 [sequences + 1], boundaries of packed documents; by default each row is one.
/// \return int64 [batch, length].
torch::Tensor next_tokens(const torch::Tensor& tokens, const OptionalTensor& cu_seqlens = {});

/// Losses in float32 at least, whatever the dtype of the logits.
/// \param logits [..., vocabulary].
/// \param labels int64 [...]; negative ones are left out.
/// \param label_modality int64 [...], modality of each label; -1 where there is none.
ModalityLosses modality_losses(const torch::Tensor& logits, const torch::Tensor& labels,
                               const torch::Tensor& label_modality, int64_t num_modalities);

}  // namespace mixture_of_mamba::models
