// SPDX-License-Identifier: Apache-2.0
#include "kernels/modality_routing.h"

#include <vector>

namespace mixture_of_mamba {

// A stable counting sort in two passes. It is read-bound and runs once a batch, so one thread does.
void run_modality_routing_cpu(const ModalityRoutingParams& p, ParallelFor) {
  const int64_t padding = p.num_modalities;
  const auto key = [&](int64_t t) {
    return p.ids[t] >= 0 && p.ids[t] < p.num_modalities ? p.ids[t] : padding;
  };
  std::vector<int32_t> next(p.num_modalities + 2, 0);
  for (int64_t t = 0; t < p.tokens; ++t) ++next[key(t) + 1];
  for (int64_t m = 0; m <= p.num_modalities; ++m) {
    next[m + 1] += next[m];
    p.offsets[m] = next[m];
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int32_t row = next[key(t)]++;
    p.rows[t] = row;
    p.order[row] = static_cast<int32_t>(t);
  }
}

}  // namespace mixture_of_mamba
