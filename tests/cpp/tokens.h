// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "arena.h"
#include "kernels/common/packing.h"
#include "support.h"

namespace mixture_of_mamba::testing {

// Of a row, from the boundaries [modalities + 1] in order; `modalities` for padding.
int modality_of_row(const std::vector<int32_t>& offsets, int64_t row);

// Boundaries of groups of rows, where a kernel may have them from either side.
template <typename Params>
void place_boundaries(Params& params, Arena& arena, const std::vector<int32_t>& boundaries, bool on_device) {
  if (on_device) {
    params.offsets = arena.place(boundaries);
  } else {
    std::copy(boundaries.begin(), boundaries.end(), params.begin);
  }
}

// A batch's tokens: what a TokenOrder says, in host memory.
struct Tokens {
  std::vector<int> lengths;  // of the sequences
  bool packed = false;       // with cu_seqlens
  bool sorted = false;       // with rows
  bool routed = false;       // with offsets
  bool padding = false;      // some tokens are
  int modalities = 1;
  std::vector<int32_t> rows;     // [tokens]; the identity unless `sorted`
  std::vector<int32_t> offsets;  // [modalities + 1]
  std::vector<int32_t> cu_seqlens;

  // Up to `longest` tokens a sequence.
  static Tokens random(Random& random, int longest);
  // Gives tokens their modalities: fills rows, offsets and cu_seqlens.
  void assign(Random& random);
  // The same sizes with garbage for values.
  Tokens hostile(Random& random) const;

  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  int64_t sequences() const { return static_cast<int64_t>(lengths.size()); }
  int64_t begin(int64_t sequence) const;
  // Modality of a row, or -1 for padding.
  int modality(int64_t row) const;
  TokenOrder place(Arena& arena) const;
  std::string describe() const;
};

}  // namespace mixture_of_mamba::testing
