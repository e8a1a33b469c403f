// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <mixture_of_mamba/models.h>
#include <torch/types.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>

#include "failure.h"

// Batches that examples/python/export_stream.py wrote. The file is int32, little-endian:
//
//   header   [16]                      magic, version, then the sizes below, then zeros
//   tokens   [steps * batch, length]   of every step's batch, in time order; -1 is padding
//   tokens   [held_out, length]        of the samples to validate on
//
// It is mapped into memory, so a batch is read from the disk when it is used.

namespace examples {

struct Batch {
  torch::Tensor tokens;               ///< int64 [batch, length], on the device that trains
  mixture_of_mamba::Routing routing;  ///< of them, made on the CPU: the host knows each modality's rows
  int64_t num_tokens;                 ///< that are no padding
};

class TokenStream {
 public:
  explicit TokenStream(const std::string& path) {
    if (!std::filesystem::is_regular_file(path)) {
      throw Failure(path + " does not exist; examples/python/export_stream.py writes it");
    }
    const auto numbers = static_cast<int64_t>(std::filesystem::file_size(path) / sizeof(int32_t));
    const torch::Tensor file = torch::from_file(path, /*shared=*/false, numbers, torch::kInt32);
    const auto* header = file.const_data_ptr<int32_t>();
    if (numbers < kHeader || header[0] != kMagic || header[1] != kVersion) {
      throw Failure(path + " is not a stream that this version's export_stream.py wrote");
    }
    const int32_t* next = header + 2;
    for (int64_t* size : {&steps, &batch, &held_out, &length}) *size = *next++;
    for (int64_t& size : vocabulary_) size = *next++;
    const int64_t expected = kHeader + (steps * batch + held_out) * length;
    if (numbers != expected) {
      throw Failure(
          fmt::format("{} must have {} bytes by its header, got {}", path, 4 * expected, 4 * numbers));
    }
    rows_ = file.slice(0, kHeader).view({steps * batch + held_out, length});
  }

  mixture_of_mamba::models::Vocabulary vocabulary() const {
    const auto [words, codes, begin, end, patches] = vocabulary_;
    return mixture_of_mamba::models::Vocabulary({{words}, {codes, begin, end, patches}});
  }

  /// The batch of a step; after the last batch the first comes again.
  Batch training(int64_t step, torch::Device device) const {
    const int64_t first = step % steps * batch;
    return rows(first, first + batch, device);
  }

  /// Held-out samples [first, last).
  Batch validation(int64_t first, int64_t last, torch::Device device) const {
    return rows(steps * batch + first, steps * batch + last, device);
  }

  int64_t steps, batch, held_out, length;

 private:
  static constexpr int32_t kMagic = 0x534d6f4d, kVersion = 2;  // "MoMS"
  static constexpr int64_t kHeader = 16;

  Batch rows(int64_t first, int64_t last, torch::Device device) const {
    const torch::Tensor host = rows_.slice(0, first, last).to(torch::kInt64);
    const auto vocabulary = this->vocabulary();
    const auto routing = mixture_of_mamba::Routing::from_ids(vocabulary.modality_of(host),
                                                             vocabulary.num_modalities(), {.device = device});
    const torch::Tensor tokens =
        device.is_cuda() ? host.pin_memory().to(device, /*non_blocking=*/true) : host;
    return {tokens, routing, routing.host_offsets->const_data_ptr<int64_t>()[vocabulary.num_modalities()]};
  }

  torch::Tensor rows_;
  std::array<int64_t, 5> vocabulary_;  // words, codes, begin and end of a picture, codes of one
};

}  // namespace examples
