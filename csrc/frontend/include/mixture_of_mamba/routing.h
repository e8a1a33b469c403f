// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <optional>

namespace mixture_of_mamba {

/// Of Routing::from_ids().
struct RoutingOptions {
  std::optional<torch::Device> device = {};  ///< where the layers run; by default the device of the ids
  bool checked = true;  ///< refuse ids out of range (on the CPU; on a GPU they are padding)
};

/// The tokens of one batch, sorted by modality; made once per batch and handed to every layer.
///
/// Tokens are counted in time order, batch * length of them. Sorted order puts modality 0 first and padding
/// (id -1) last, and keeps the order of time inside each modality.
struct Routing {
  torch::Tensor rows;     ///< int32 [tokens], time position -> sorted row
  torch::Tensor order;    ///< int32 [tokens], sorted row -> time position
  torch::Tensor offsets;  ///< int32 [modalities + 1]; modality m owns rows offsets[m] .. offsets[m + 1]
  /// The same as int64 on the CPU, or none. With it the host knows who owns which rows; without,
  /// everything stays on the device.
  std::optional<torch::Tensor> host_offsets;
  bool has_padding;  ///< false when it is known that no token is padding
  int64_t batch, length;

  /// \param ids integers [batch, length]; 0 .. num_modalities - 1, or -1 for padding. Ids on the CPU give
  /// host_offsets for free; ids on a GPU give a device-only routing and no synchronisation.
  /// \throws c10::ValueError ids that are not two-dimensional.
  /// \throws c10::Error ids out of range or of a wrong dtype, or num_modalities out of range.
  static Routing from_ids(const torch::Tensor& ids, int64_t num_modalities,
                          const RoutingOptions& options = {});

  int64_t num_modalities() const { return offsets.size(0) - 1; }
  int64_t num_tokens() const { return rows.size(0); }

  /// The same with host_offsets. On a GPU this waits for the device once.
  Routing with_host_offsets() const;

  /// All modalities as one, padding still last: for what the modalities share.
  Routing merged() const;

  /// x [batch, length, ...] in time order -> the same shape with rows in sorted order. Token ids and labels
  /// [batch, length] are accepted as well: permuting them keeps a whole model sorted at no cost.
  /// \throws c10::ValueError another batch or length.
  torch::Tensor sort(const torch::Tensor& x) const;

  /// The inverse of sort().
  torch::Tensor unsort(const torch::Tensor& x) const;
};

}  // namespace mixture_of_mamba
