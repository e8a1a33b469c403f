// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <limits>

#include "vocabulary.h"

namespace examples {

/// Follows a sequence and says which tokens may come next: text but no end of a picture; in a picture codes,
/// and its end alone when it is complete.
class Regions {
 public:
  explicit Regions(const Words& words)
      : begin_(words.id("<boi>")),
        end_(words.id("<eoi>")),
        first_code_(words.first_code()),
        patches_(words.patches()) {}

  void read(int64_t token) {
    if (token == begin_ || token == end_) {
      inside_ = token == begin_;
      codes_ = 0;
    } else {
      ++codes_;
    }
  }

  /// \param logits [vocabulary]. \return a copy with -inf where a token may not follow.
  torch::Tensor mask(const torch::Tensor& logits) const {
    constexpr double kNever = -std::numeric_limits<double>::infinity();
    torch::Tensor masked = logits.clone();
    if (!inside_) {
      masked.slice(0, first_code_).fill_(kNever);
      masked[end_] = kNever;
    } else if (codes_ < patches_) {
      masked.slice(0, 0, first_code_).fill_(kNever);
    } else {
      masked.fill_(kNever);
      masked[end_] = 0;
    }
    return masked;
  }

 private:
  int64_t begin_, end_, first_code_, patches_;
  bool inside_ = false;
  int64_t codes_ = 0;
};

}  // namespace examples
