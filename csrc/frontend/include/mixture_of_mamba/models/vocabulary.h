// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace mixture_of_mamba::models {

/// Tokens of one modality.
struct TokenRange {
  int64_t size;                               ///< how many
  std::optional<int64_t> begin = {};          ///< text token that stands before a region (BOI); none for text
  std::optional<int64_t> end = {};            ///< text token that stands after it (EOI); none for text
  std::optional<int64_t> region_length = {};  ///< tokens of one region; none where regions differ
};

/// One numbering of all modalities' tokens (Chameleon, arXiv 2405.09818): ids 0 .. size - 1 of the first
/// range are modality 0, which is text, the next ones modality 1, and so on; -1 is padding.
class Vocabulary {
 public:
  /// \throws c10::ValueError no range, an empty one, or beginnings and ends that are no text tokens or not
  /// distinct.
  explicit Vocabulary(std::vector<TokenRange> ranges);

  const std::vector<TokenRange>& ranges() const { return ranges_; }
  int64_t num_modalities() const { return static_cast<int64_t>(ranges_.size()); }
  /// Of all modalities together.
  int64_t size() const { return first(num_modalities()); }
  /// The first token id of a modality.
  int64_t first(int64_t modality) const;
  /// \param tokens integers of any shape, on any device.
  /// \return modality ids, int64 of the same shape; -1 stays -1.
  torch::Tensor modality_of(const torch::Tensor& tokens) const;

 private:
  std::vector<TokenRange> ranges_;
};

}  // namespace mixture_of_mamba::models
