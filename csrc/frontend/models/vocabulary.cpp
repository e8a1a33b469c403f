// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/models/vocabulary.h"

#include <set>

#include "text.h"

namespace mixture_of_mamba::models {

using frontend::require_value;

Vocabulary::Vocabulary(std::vector<TokenRange> ranges) : ranges_(std::move(ranges)) {
  require_value(!ranges_.empty(), "ranges must hold one TokenRange per modality, text first, got none");
  const int64_t words = ranges_[0].size;
  std::vector<int64_t> special;
  for (size_t m = 0; m < ranges_.size(); ++m) {
    const TokenRange& one = ranges_[m];
    require_value(one.size >= 1, "ranges[{}] must have a size of at least 1, got {}", m, one.size);
    if (m == 0) {
      require_value(!one.begin && !one.end && !one.region_length,
                    "ranges[0] is text and must have no begin, end and length, got some");
      continue;
    }
    for (const auto& [name, token] : {std::pair("begin", one.begin), std::pair("end", one.end)}) {
      require_value(token && *token >= 0 && *token < words,
                    "ranges[{}].{} must be a text token, 0 .. {}, got {}", m, name, words - 1,
                    token ? fmt::to_string(*token) : "None");
      special.push_back(*token);
    }
    require_value(!one.region_length || *one.region_length >= 1,
                  "ranges[{}].length must be at least 1, got {}", m, one.region_length.value_or(0));
  }
  require_value(std::set(special.begin(), special.end()).size() == special.size(),
                "ranges must all have a begin and an end of their own, got tokens [{}]",
                fmt::join(special, ", "));
}

int64_t Vocabulary::first(int64_t modality) const {
  int64_t sum = 0;
  for (int64_t m = 0; m < modality; ++m) sum += ranges_[static_cast<size_t>(m)].size;
  return sum;
}

torch::Tensor Vocabulary::modality_of(const torch::Tensor& tokens) const {
  if (tokens.is_cpu()) {  // where they can be read without waiting
    const torch::Tensor outside = ((tokens < -1) | (tokens >= size())).flatten();
    if (outside.any().item<bool>()) {
      const auto at = outside.to(torch::kUInt8).argmax().item<int64_t>();
      require_value(false,
                    "tokens must lie in -1 .. size - 1 = {} (-1 is padding), got {} at flat position {}",
                    size() - 1, tokens.flatten()[at].item<int64_t>(), at);
    }
  }
  torch::Tensor modality = -(tokens < 0).to(torch::kInt64);
  for (int64_t m = 1; m < num_modalities(); ++m) modality = modality + (tokens >= first(m));
  return modality;
}

}  // namespace mixture_of_mamba::models
