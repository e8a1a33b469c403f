// SPDX-License-Identifier: Apache-2.0
//
// Writes the table of scan units of packed sequences.
//
// Grid    one block: sequences are few, and the count of units before a sequence is a prefix sum.
// Block   kThreads threads. In each round thread i counts the chunks of one sequence, the block sums the
//         counts before it, and the thread writes that sequence's units.
// Barriers  two a round, around the warps' totals.

#include <cuda_runtime.h>

#include "kernels/cuda/common/block_sum.cuh"
#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/scan_units.cuh"

namespace mixture_of_mamba {

namespace {

constexpr int kThreads = 1024;
constexpr size_t kAlignment = 256;

__global__ void __launch_bounds__(kThreads)
    units_kernel(ScanUnits units, ScanUnit* table, int32_t* first_unit) {
  __shared__ int32_t warp_totals[kThreads / kWarp];
  follow_previous();
  const TokenOrder& order = units.order;
  int32_t done = 0;
  for (int64_t round = 0; round < order.sequences; round += kThreads) {
    const int64_t sequence = round + threadIdx.x;
    const bool exists = sequence < order.sequences;
    const int64_t begin = exists ? order.sequence_begin(sequence) : 0;
    const int64_t end = exists ? order.sequence_end(sequence) : 0;
    const int32_t chunks = exists ? chunks_of(end - begin, units.chunk_length) : 0;
    int32_t total = 0;
    const int32_t first = done + exclusive_sum<kThreads>(chunks, warp_totals, &total);
    if (exists) first_unit[sequence] = first;
    // Hostile boundaries could add up to more units than the table holds.
    for (int32_t chunk = 0; chunk < chunks && first + chunk < units.max_units; ++chunk) {
      table[first + chunk] = make_unit(units, static_cast<int32_t>(sequence), chunk, begin, end);
    }
    done += total;
  }
  if (threadIdx.x == 0) first_unit[order.sequences] = min(done, units.max_units);
}

size_t table_bytes(const ScanUnits& units) {
  return (units.max_units * sizeof(ScanUnit) + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

ScanUnits plan_scan_units(const TokenOrder& order, bool reverse, int64_t chunk_length) {
  constexpr int64_t kLongest = int64_t{1} << 30;
  ScanUnits units;
  units.order = order;
  units.reverse = reverse;
  const int64_t clamped = chunk_length < 1 ? 1 : chunk_length > kLongest ? kLongest : chunk_length;
  units.chunk_length =
      static_cast<int32_t>((clamped + kCheckpointInterval - 1) / kCheckpointInterval * kCheckpointInterval);
  const int64_t count = order.cu_seqlens == nullptr
                            ? order.sequences * chunks_of(order.length, units.chunk_length)
                            : order.sequences + order.tokens / units.chunk_length;
  units.max_units = static_cast<int32_t>(count);
  return units;
}

size_t scan_units_workspace(const ScanUnits& units) {
  if (units.order.cu_seqlens == nullptr) return 0;
  const size_t first_unit_bytes = (units.order.sequences + 1) * sizeof(int32_t);
  return table_bytes(units) + (first_unit_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int build_scan_units(ScanUnits& units, void* workspace, CUstream_st* stream) {
  if (units.order.cu_seqlens == nullptr) return cudaSuccess;
  ScanUnit* table = static_cast<ScanUnit*>(workspace);
  int32_t* first_unit = reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + table_bytes(units));
  const int error = launch_chained({1, kThreads, 0, stream}, units_kernel, units, table, first_unit);
  units.table = table;
  units.first_unit = first_unit;
  return error;
}

}  // namespace mixture_of_mamba
