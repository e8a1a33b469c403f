// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/nn/mixture_of_mamba.h>

#include <cstdint>
#include <memory>
#include <utility>

namespace mixture_of_mamba::nn {

/// Options of Mamba: those of the mixture, with one modality and nothing decoupled.
struct MambaOptions : MixtureOfMambaOptions {
  MambaOptions(int64_t d_model)  // NOLINT(google-explicit-constructor): as torch's own options of one number
      : MixtureOfMambaOptions(d_model, 1) {}
};

/// The dense Mamba block (arXiv 2312.00752): a MixtureOfMambaImpl of one modality with no projection
/// decoupled, with the parameter names of mamba_ssm.Mamba. `modality` may be given to mark padding (-1); all
/// other ids count as one.
class Mamba : public torch::nn::ModuleHolder<MixtureOfMambaImpl> {
 public:
  using Impl = MixtureOfMambaImpl;

  Mamba(std::nullptr_t) : ModuleHolder(nullptr) {}  // NOLINT(google-explicit-constructor): as in torch
  explicit Mamba(std::shared_ptr<Impl> module) : ModuleHolder(std::move(module)) {}
  explicit Mamba(int64_t d_model) : Mamba(MambaOptions(d_model)) {}
  explicit Mamba(MixtureOfMambaOptions options)
      : ModuleHolder(std::make_shared<Impl>(options.num_modalities(1).decouple({}).shared_expert({}))) {}
};

}  // namespace mixture_of_mamba::nn
