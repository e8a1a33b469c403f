// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <set>
#include <string>

// The command line of train.

namespace examples {

inline constexpr const char* kTrainUsage = R"(train --data FILE --output FOLDER [options]

  --data FILE           stream.bin of examples/python/export_stream.py
  --output FOLDER       for metrics.jsonl and checkpoint.pt; a run that is there goes on
  --fresh               start over instead
  --weights FILE        begin with the weights of a checkpoint, of this program or of chameleon.py
  --mixer NAMES         mom, mamba (dense), or projections per modality, as in in_proj,out_proj (mom)
  --d-model N           width (128)
  --layers N            depth (4)
  --steps N             optimiser steps (one for each batch; more begin again)
  --lr X                peak learning rate (4e-3)
  --weight-decay X      of matrices (0.1)
  --clip X              gradient norm limit (1)
  --seed N              of the weights (0)
  --device cpu|cuda     (cpu)
  --amp                 bfloat16 autocast
  --save-every N        steps between checkpoints (100)
  --eval-every N        steps between validations (200)
)";
inline const std::set<std::string> kTrainNames = {
    "--data", "--output",       "--weights", "--mixer", "--d-model", "--layers",     "--steps",
    "--lr",   "--weight-decay", "--clip",    "--seed",  "--device",  "--save-every", "--eval-every",
};

}  // namespace examples
