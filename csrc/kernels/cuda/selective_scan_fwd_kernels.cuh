// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cuda/selective_scan_fwd.cuh"

// The variants that are compiled for each element type, chosen where they were measured:
//   16 states, 64 channels a block, 2 blocks an SM, one exponential of eight on the FMA pipe: enough blocks
//     for 2 on every SM (4 x 4096 tokens x 4096 channels)
//   the same with 3 blocks an SM and no polynomial: enough blocks for 3 (8 x 2048)
//   32 channels a block: fewer; also the pre-pass, which has no output to share the block with
//   32, 64, 128 states: more lanes a channel, so fewer channels a block

namespace mixture_of_mamba::scan_forward {

template <typename T>
int launch_main(const ForwardArgs& args, Tile tile, int group, bool aligned, CUstream_st* stream) {
  if (group == 4 && aligned) {
    switch (tile) {
      case Tile::kWide:
        return launch<Config<T, 4, 2, 2, 1, true, false>>(args, stream);
      case Tile::kWideThree:
        return launch<Config<T, 4, 2, 3, 0, true, false>>(args, stream);
      case Tile::kNarrow:
        return launch<Config<T, 4, 1, 2, 0, true, false>>(args, stream);
    }
  }
  if (group == 4) return launch<Config<T, 4, 1, 2, 0, false, false>>(args, stream);
  if (group == 8) {
    return aligned ? launch<Config<T, 8, 2, 2, 0, true, false>>(args, stream)
                   : launch<Config<T, 8, 2, 2, 0, false, false>>(args, stream);
  }
  if (group == 16) {
    return aligned ? launch<Config<T, 16, 2, 2, 0, true, false>>(args, stream)
                   : launch<Config<T, 16, 2, 2, 0, false, false>>(args, stream);
  }
  return aligned ? launch<Config<T, 32, 4, 2, 0, true, false>>(args, stream)
                 : launch<Config<T, 32, 4, 2, 0, false, false>>(args, stream);
}

template <typename T>
int launch_prepass(const ForwardArgs& args, int group, bool aligned, CUstream_st* stream) {
  if (group == 4) {
    return aligned ? launch<Config<T, 4, 1, 4, 1, true, true>>(args, stream)
                   : launch<Config<T, 4, 1, 4, 1, false, true>>(args, stream);
  }
  if (group == 8) return launch<Config<T, 8, 2, 2, 0, false, true>>(args, stream);
  if (group == 16) return launch<Config<T, 16, 2, 2, 0, false, true>>(args, stream);
  return launch<Config<T, 32, 4, 2, 0, false, true>>(args, stream);
}

}  // namespace mixture_of_mamba::scan_forward
