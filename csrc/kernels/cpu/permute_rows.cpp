// SPDX-License-Identifier: Apache-2.0
#include "kernels/permute_rows.h"

#include <cstring>

namespace mixture_of_mamba {

void run_permute_rows_cpu(const PermuteRowsParams& p, ParallelFor parallel) {
  if (p.row_bytes == 0) return;
  constexpr int64_t kBytesPerTask = 64 * 1024;
  parallel(0, p.rows, kBytesPerTask / p.row_bytes + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* out = static_cast<char*>(p.out) + i * p.row_bytes;
      const int64_t source = p.index[i];
      if (source >= 0 && source < p.rows) {
        std::memcpy(out, static_cast<const char*>(p.x) + source * p.x_stride, p.row_bytes);
      } else {
        std::memset(out, 0, p.row_bytes);
      }
    }
  });
}

}  // namespace mixture_of_mamba
