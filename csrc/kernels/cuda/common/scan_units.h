// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/packing.h"

// A unit is a piece of one sequence that one block walks: sequences are cut into chunks of at most
// chunk_length tokens, so that few long sequences fill the GPU and one long document does not keep the
// others waiting. No unit crosses a sequence, so no kernel knows about resets. Every sequence has at
// least one unit, also an empty one: somebody must hand its initial state on.
//
// Equal lengths: units are computed by arithmetic. cu_seqlens: its values are on the device only, so a
// small kernel writes a table; the host knows an upper bound of the count, and blocks beyond the true
// count leave at once.

struct CUstream_st;

namespace mixture_of_mamba {

struct ScanUnit {
  int32_t base;    // time of walk position 0; position i is at base + i, or base - i in reverse
  int32_t length;  // tokens
  int32_t sequence;
  int32_t chunk;   // of its sequence, in walk order
  int32_t chunks;  // of its sequence
  int32_t slot;    // of its first checkpoint; tile i of kCheckpointInterval tokens has slot + i
};

struct ScanUnits {
  TokenOrder order;
  bool reverse = false;
  int32_t chunk_length = 0;  // a multiple of kCheckpointInterval
  int32_t max_units = 0;
  const ScanUnit* table = nullptr;      // [max_units], with cu_seqlens only
  const int32_t* first_unit = nullptr;  // [sequences + 1], with cu_seqlens only; the last is the count
};

// Units without their table. chunk_length is rounded up to a multiple of the checkpoint interval.
ScanUnits plan_scan_units(const TokenOrder& order, bool reverse, int64_t chunk_length);
size_t scan_units_workspace(const ScanUnits& units);  // bytes; 0 for equal lengths
// Places the table in `workspace` and launches the kernel that writes it. Returns a cudaError_t.
int build_scan_units(ScanUnits& units, void* workspace, CUstream_st* stream);

}  // namespace mixture_of_mamba
