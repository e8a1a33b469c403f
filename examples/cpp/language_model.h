// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/models/decoder.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "failure.h"
#include "state_dict.h"
#include "torch_file.h"

namespace examples {

/// A decoder that remembers what it has read: a C++ module, or a package that Python compiled.
class LanguageModel {
 public:
  virtual ~LanguageModel() = default;

  /// Reads on. \param tokens, slots, modality int64 [1, length] in time order, on the CPU.
  /// \return logits of each token, float32 [1, length, vocabulary], on the CPU.
  virtual torch::Tensor advance(const torch::Tensor& tokens, const torch::Tensor& slots,
                                const torch::Tensor& modality) = 0;

  int64_t vocabulary = 0;  ///< words and image codes
  int64_t slots = 0;       ///< places in a picture, and one more
};

/// The C++ decoder with the weights of a checkpoint.
class EagerModel : public LanguageModel {
 public:
  EagerModel(const std::string& path, torch::Device device) : device_(device) {
    const Dict weights = weights_of(load_dict(path));
    model_ = mixture_of_mamba::models::Decoder(options_of(weights));
    load_state_dict(model_, weights);
    model_->to(device);
    vocabulary = model_->options.vocabulary();
    slots = model_->options.slots();
  }

  torch::Tensor advance(const torch::Tensor& tokens, const torch::Tensor& slot_ids,
                        const torch::Tensor& modality) override {
    auto [logits, states] = model_->advance(tokens.to(device_), slot_ids.to(device_), modality, states_);
    states_ = states;
    return logits.to(torch::kCPU, torch::kFloat32);
  }

 private:
  torch::Device device_;
  mixture_of_mamba::models::Decoder model_{nullptr};
  std::vector<mixture_of_mamba::nn::MambaState> states_;
};

/// A package of examples/python/export_model.py. It needs the operator libraries and nothing else of this
/// project.
class CompiledModel : public LanguageModel {
 public:
  CompiledModel(const std::string& path, torch::Device device) : device_(device), package_(path) {
    const auto metadata = package_.get_metadata();
    if (metadata.at("AOTI_DEVICE_KEY") != torch::DeviceTypeName(device.type(), /*lower_case=*/true)) {
      throw Failure(fmt::format("{} is compiled for --device {}", path, metadata.at("AOTI_DEVICE_KEY")));
    }
    const auto size = [&metadata](const char* name) { return std::stoll(metadata.at(name)); };
    const auto options = torch::TensorOptions(device).dtype(torch::kFloat32);
    vocabulary = size("vocabulary");
    slots = size("slots");
    conv_ = torch::zeros({size("layers"), 1, size("conv_steps"), size("d_inner")}, options);
    ssm_ = torch::zeros({size("layers"), 1, size("d_inner"), size("d_state")}, options);
  }

  torch::Tensor advance(const torch::Tensor& tokens, const torch::Tensor& slot_ids,
                        const torch::Tensor& modality) override {
    const auto outputs = package_.run({tokens.to(device_), slot_ids.to(device_), modality, conv_, ssm_});
    conv_ = outputs[1];
    ssm_ = outputs[2];
    return outputs[0].cpu();
  }

 private:
  torch::Device device_;
  torch::inductor::AOTIModelPackageLoader package_;
  torch::Tensor conv_, ssm_;
};

inline std::unique_ptr<LanguageModel> load_model(const std::string& path, torch::Device device) {
  if (!std::filesystem::is_regular_file(path)) throw Failure("--model must be a file, got " + path);
  if (path.ends_with(".pt2")) return std::make_unique<CompiledModel>(path, device);
  return std::make_unique<EagerModel>(path, device);
}

}  // namespace examples
