// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/models.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <filesystem>
#include <memory>
#include <string>

#include "failure.h"
#include "state_dict.h"
#include "torch_file.h"

namespace examples {

/// A model that remembers what it has read: a C++ module, or a package that Python compiled.
class LanguageModel {
 public:
  virtual ~LanguageModel() = default;

  /// Reads on. \param tokens int64 [1, length] in time order, on the CPU.
  /// \return logits of the token after each, float32 [1, length, vocabulary], on the CPU.
  virtual torch::Tensor advance(const torch::Tensor& tokens) = 0;
};

/// The C++ model with the weights of a checkpoint.
class EagerModel : public LanguageModel {
 public:
  EagerModel(const std::string& path, const mixture_of_mamba::models::Vocabulary& vocabulary,
             torch::Device device)
      : device_(device) {
    const Dict weights = weights_of(load_dict(path));
    model_ = mixture_of_mamba::models::Chameleon(options_of(weights, vocabulary));
    load_state_dict(model_, weights);
    model_->to(device);
  }

  torch::Tensor advance(const torch::Tensor& tokens) override {
    const auto modality = model_->options.vocabulary().modality_of(tokens);
    auto [logits, state] = model_->forward_with_state(tokens.to(device_), modality, call_);
    call_.state = state;
    return logits.to(torch::kCPU, torch::kFloat32);
  }

 private:
  torch::Device device_;
  mixture_of_mamba::models::Chameleon model_{nullptr};
  mixture_of_mamba::models::DecoderCall call_;
};

/// A package of examples/python/export_model.py. It needs the operator libraries and nothing else of this
/// project.
class CompiledModel : public LanguageModel {
 public:
  CompiledModel(const std::string& path, const mixture_of_mamba::models::Vocabulary& vocabulary,
                torch::Device device)
      : device_(device), vocabulary_(vocabulary), package_(path) {
    const auto metadata = package_.get_metadata();
    if (metadata.at("AOTI_DEVICE_KEY") != torch::DeviceTypeName(device.type(), /*lower_case=*/true)) {
      throw Failure(fmt::format("{} is compiled for --device {}", path, metadata.at("AOTI_DEVICE_KEY")));
    }
    const auto size = [&metadata](const char* name) { return std::stoll(metadata.at(name)); };
    if (size("vocabulary") != vocabulary.size()) {
      throw Failure(fmt::format("{} has a vocabulary of {} tokens, and --vocabulary has {}", path,
                                size("vocabulary"), vocabulary.size()));
    }
    const auto options = torch::TensorOptions(device).dtype(torch::kFloat32);
    conv_ = torch::zeros({size("mixers"), 1, size("conv_steps"), size("d_inner")}, options);
    ssm_ = torch::zeros({size("mixers"), 1, size("d_inner"), size("d_state")}, options);
  }

  torch::Tensor advance(const torch::Tensor& tokens) override {
    const auto outputs = package_.run({tokens.to(device_), vocabulary_.modality_of(tokens), conv_, ssm_});
    conv_ = outputs[1];
    ssm_ = outputs[2];
    return outputs[0].cpu();
  }

 private:
  torch::Device device_;
  mixture_of_mamba::models::Vocabulary vocabulary_;
  torch::inductor::AOTIModelPackageLoader package_;
  torch::Tensor conv_, ssm_;
};

inline std::unique_ptr<LanguageModel> load_model(const std::string& path,
                                                 const mixture_of_mamba::models::Vocabulary& vocabulary,
                                                 torch::Device device) {
  if (!std::filesystem::is_regular_file(path)) throw Failure("--model must be a file, got " + path);
  if (path.ends_with(".pt2")) return std::make_unique<CompiledModel>(path, vocabulary, device);
  return std::make_unique<EagerModel>(path, vocabulary, device);
}

}  // namespace examples
