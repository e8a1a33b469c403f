// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"

// How a kernel walks the tokens of a batch. Concepts, each with a number:
//
//   time       flat position b * length + t of a token in the order it was said;
//              batch 2, length 3: times 0 1 2 | 3 4 5
//   row        where the token's channels lie in memory. Rows are sorted by modality (stable),
//              padding last, so that every per-modality projection is a plain GEMM on a row range.
//              ids 1 0 0 | 0 -1 1 with two modalities: rows[] = 3 0 1 | 2 5 4
//   offsets    modalities + 1 row boundaries; here 0 3 5. Modality m owns rows
//              offsets[m] .. offsets[m + 1]; rows from offsets[modalities] on are padding.
//   sequence   a run of times whose first token starts from `initial_state` (or zero) and whose last
//              leaves `final_state`. Equal lengths: sequence s owns times [s * length, (s + 1) * length).
//              Packed documents: cu_seqlens, sequences + 1 boundaries in flat time; 0 2 6 is one
//              document of two tokens and one of four. Empty sequences are legal.
//
// `offsets` and `cu_seqlens` are the same idea (a prefix sum of counts) over rows and over times;
// the second keeps the name that the field gave it.
//
// Values that come from device tensors are never trusted: a row is clamped into [0, tokens) and a
// boundary into [0, tokens], so that hostile values cannot touch memory outside the tensors.

namespace mixture_of_mamba {

struct TokenOrder {
  const int32_t* rows = nullptr;        // [tokens], or null: row == time
  const int32_t* offsets = nullptr;     // [modalities + 1], or null: one modality and no padding
  const int32_t* cu_seqlens = nullptr;  // [sequences + 1], or null: equal lengths
  int64_t tokens = 0;                   // < 2^31
  int64_t sequences = 0;
  int64_t length = 0;  // tokens of a sequence when cu_seqlens is null
  int32_t modalities = 1;

  MOM_HOST_DEVICE int32_t row_of(int64_t time) const {
    return rows == nullptr ? static_cast<int32_t>(time) : clamp_row(rows[time]);
  }

  MOM_HOST_DEVICE int32_t clamp_row(int32_t raw) const {
    const uint32_t row = static_cast<uint32_t>(raw), last = static_cast<uint32_t>(tokens - 1);
    return static_cast<int32_t>(row < last ? row : last);
  }

  // Modality of a row; `modalities` itself means padding.
  MOM_HOST_DEVICE int32_t modality_of_row(int32_t row) const {
    if (offsets == nullptr) return 0;
    int32_t modality = 0;
    for (int32_t m = 1; m <= modalities; ++m) modality += row >= offsets[m];
    return modality;
  }

  MOM_HOST_DEVICE bool is_padding(int32_t row) const {
    return offsets != nullptr && row >= offsets[modalities];
  }

  // The first sequence begins at 0 and the last ends at `tokens`, whatever cu_seqlens says, so that
  // every token belongs to some sequence.
  MOM_HOST_DEVICE int64_t sequence_begin(int64_t sequence) const {
    if (cu_seqlens == nullptr) return sequence * length;
    return sequence == 0 ? 0 : clamp_time(cu_seqlens[sequence]);
  }

  MOM_HOST_DEVICE int64_t sequence_end(int64_t sequence) const {
    if (cu_seqlens == nullptr) return (sequence + 1) * length;
    if (sequence == sequences - 1) return tokens;
    const int64_t begin = sequence_begin(sequence);
    const int64_t end = clamp_time(cu_seqlens[sequence + 1]);
    return end < begin ? begin : end;
  }

 private:
  MOM_HOST_DEVICE int64_t clamp_time(int64_t time) const {
    return time < 0 ? 0 : (time > tokens ? tokens : time);
  }
};

}  // namespace mixture_of_mamba
