// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <mixture_of_mamba/routing.h>
#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <string>

#include "failure.h"

// Batches that examples/python/export_stream.py wrote. The file is int32, little-endian:
//
//   header  [16]                                        magic, version, then the sizes below, then zeros
//   data    [batches + held_out, 4, batch, length]      tokens, slots, modality, labels, all in time order
//
// It is mapped into memory, so a batch is read from the disk when it is used.

namespace examples {

constexpr int64_t kNumModalities = 2;

/// Ready for the decoder: integers [batch, length] in sorted order, on the device that trains.
struct Batch {
  mixture_of_mamba::Routing routing;  ///< of the input tokens
  torch::Tensor tokens;
  torch::Tensor slots;   ///< 0 outside of pictures; 1 .. where the next token is that code of a picture
  torch::Tensor labels;  ///< the token that follows each; -100 where there is none
  int64_t num_tokens;    ///< that are not padding
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
    for (int64_t* size : {&batches, &held_out, &batch, &length, &vocabulary, &slots, &first_code})
      *size = *next++;
    const int64_t expected = kHeader + (batches + held_out) * 4 * batch * length;
    if (numbers != expected) {
      throw Failure(
          fmt::format("{} must have {} bytes by its header, got {}", path, 4 * expected, 4 * numbers));
    }
    data_ = file.slice(0, kHeader).view({batches + held_out, 4, batch, length});
  }

  /// The batch of a step; after the last batch the first comes again.
  Batch training(int64_t step, torch::Device device) const { return at(step % batches, device); }
  Batch validation(int64_t index, torch::Device device) const { return at(batches + index, device); }

  int64_t batches, held_out, batch, length;
  int64_t vocabulary, slots, first_code;

 private:
  static constexpr int32_t kMagic = 0x534d6f4d, kVersion = 1;  // "MoMS"
  static constexpr int64_t kHeader = 16;

  Batch at(int64_t index, torch::Device device) const {
    const torch::Tensor host = data_[index].to(torch::kInt64);
    const torch::Tensor modality = host[2];
    // Made of ids on the CPU, so the host knows each modality's rows and nothing waits for the device.
    const auto routing = mixture_of_mamba::Routing::from_ids(modality, kNumModalities, {.device = device});
    const torch::Tensor data = device.is_cuda() ? host.pin_memory().to(device, /*non_blocking=*/true) : host;
    return {routing, routing.sort(data[0]), routing.sort(data[1]), routing.sort(data[3]),
            modality.ge(0).sum().item<int64_t>()};
  }

  torch::Tensor data_;
};

}  // namespace examples
