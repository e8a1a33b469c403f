// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/common/scan_units.h"
#include "kernels/selective_scan.h"

namespace mixture_of_mamba {

// Chunks of a sequence of `length` tokens: one even when it is empty.
MOM_HOST_DEVICE int32_t chunks_of(int64_t length, int32_t chunk_length) {
  return length <= chunk_length ? 1 : static_cast<int32_t>((length + chunk_length - 1) / chunk_length);
}

__device__ __forceinline__ ScanUnit make_unit(const ScanUnits& units, int32_t sequence, int32_t chunk,
                                              int64_t begin, int64_t end) {
  const int32_t offset = chunk * units.chunk_length;
  const int32_t length = static_cast<int32_t>(end - begin);
  ScanUnit unit;
  unit.base = static_cast<int32_t>(units.reverse ? end - 1 - offset : begin + offset);
  unit.length = min(units.chunk_length, length - offset);
  unit.sequence = sequence;
  unit.chunk = chunk;
  unit.chunks = chunks_of(length, units.chunk_length);
  unit.slot = static_cast<int32_t>(begin / kCheckpointInterval) + sequence +
              offset / static_cast<int32_t>(kCheckpointInterval);
  return unit;
}

// Index of a sequence's first unit.
__device__ __forceinline__ int32_t first_unit_of(const ScanUnits& units, int32_t sequence) {
  if (units.first_unit != nullptr) return units.first_unit[sequence];
  return sequence * chunks_of(units.order.length, units.chunk_length);
}

// False when there is no unit of this index; the same for all threads that ask for it.
__device__ __forceinline__ bool get_unit(const ScanUnits& units, int32_t index, ScanUnit* unit) {
  if (units.table != nullptr) {
    if (index >= units.first_unit[units.order.sequences]) return false;
    *unit = units.table[index];
    return true;
  }
  if (index >= units.max_units) return false;
  const int32_t chunks = chunks_of(units.order.length, units.chunk_length);
  const int32_t sequence = index / chunks;
  const int64_t begin = sequence * units.order.length;
  *unit = make_unit(units, sequence, index - sequence * chunks, begin, begin + units.order.length);
  return true;
}

}  // namespace mixture_of_mamba
