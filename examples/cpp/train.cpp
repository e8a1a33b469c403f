// SPDX-License-Identifier: Apache-2.0
// Trains a Chameleon in C++, without Python, on the batches of
// examples/python/export_stream.py.
#include <ATen/Context.h>
#include <mixture_of_mamba/models.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <optional>

#include "adamw.h"
#include "arguments.h"
#include "autocast.h"
#include "clip.h"
#include "metrics.h"
#include "progress.h"
#include "schedule.h"
#include "state_dict.h"
#include "stream.h"
#include "torch_file.h"
#include "train_arguments.h"

namespace {

using examples::Arguments;
using examples::Failure;
using mixture_of_mamba::models::Chameleon;
using mixture_of_mamba::models::ChameleonOptions;
using mixture_of_mamba::models::DecoderOptions;

constexpr int64_t kReadLossesEvery = 10;  // steps; reading them waits for the device
constexpr int64_t kEvaluationBatch = 32;

volatile std::sig_atomic_t stop_requested = 0;

void request_stop(int number) {
  stop_requested = 1;
  std::signal(number, SIG_DFL);  // a second one ends at once
}

class Run {
 public:
  explicit Run(const Arguments& args)
      : device_(args.device()),
        amp_(args.has("--amp")),
        stream_(args.required("--data")),
        folder_(args.required("--output")),
        steps_(args.integer("--steps", stream_.steps)),
        peak_(args.number("--lr", 4e-3)),
        clip_(args.number("--clip", 1)),
        save_every_(args.integer("--save-every", 100)),
        eval_every_(args.integer("--eval-every", 200)),
        model_(make_model(args)),
        optimizer_(*model_, args.number("--weight-decay", 0.1)),
        settings_(settings(args)) {
    std::filesystem::create_directories(folder_);
    if (args.has("--fresh")) std::filesystem::remove(checkpoint_path());
    const Lengths lengths = std::filesystem::exists(checkpoint_path()) ? restore() : Lengths{};
    metrics_.emplace(folder_ + "/metrics.jsonl", lengths.metrics);
    timing_.emplace(folder_ + "/timing.jsonl", lengths.timing);
  }

  int go() {
    int64_t parameters = 0;
    for (const torch::Tensor& parameter : model_->parameters()) parameters += parameter.numel();
    fmt::print("{} parameters on {}\n", parameters, device_.str());
    if (step_ > 0) fmt::print("going on from step {} in {} (--fresh starts over)\n", step_, folder_);
    examples::Progress progress(step_, steps_, seconds_, tokens_);
    while (step_ < steps_ && !stop_requested) {
      one_step();
      const auto due = [this](int64_t every) { return step_ % every == 0 || step_ == steps_; };
      if (due(kReadLossesEvery)) read_losses(progress);
      if (due(eval_every_) && stream_.held_out > 0) evaluate(progress);
      if (due(save_every_)) save(progress);
    }
    if (saved_step_ != step_) save(progress);
    if (step_ == steps_) return 0;
    progress.print(fmt::format("stopped and saved in {}; the same command goes on", folder_));
    return 130;
  }

 private:
  struct Lengths {
    int64_t metrics = 0, timing = 0;
  };

  struct Pending {
    int64_t step;
    double rate;
    int64_t tokens;
    torch::Tensor numbers;  // loss, text, image, gradient norm
  };

  Chameleon make_model(const Arguments& args) const {
    torch::manual_seed(static_cast<uint64_t>(args.integer("--seed", 0, 0)));
    auto options = DecoderOptions(args.integer("--d-model", 128), args.integer("--layers", 4))
                       .decouple(examples::decoupled(args.text("--mixer", "mom")))
                       .mixers_per_layer(1);
    Chameleon model(ChameleonOptions(options, stream_.vocabulary()).tied(true));
    if (args.has("--weights")) {
      examples::load_state_dict(model, examples::weights_of(examples::load_dict(args.required("--weights"))));
    }
    model->to(device_);
    return model;
  }

  /// What a run and its continuation must agree on.
  std::string settings(const Arguments& args) const {
    const DecoderOptions& model = model_->options.decoder();
    return fmt::format(
        "{} {} x {}, {} steps over {} batches of {} x {}, lr {}, weight decay {}, clip {}, seed {}{}",
        args.text("--mixer", "mom"), model.layers(), model.d_model(), steps_, stream_.steps, stream_.batch,
        stream_.length, peak_, args.number("--weight-decay", 0.1), clip_, args.integer("--seed", 0, 0),
        amp_ ? ", amp" : "");
  }

  std::string checkpoint_path() const { return folder_ + "/checkpoint.pt"; }

  mixture_of_mamba::models::ModalityLosses losses_of(const examples::Batch& batch) {
    const examples::Autocast autocast(device_.type(), amp_);
    return model_->loss(batch.tokens, batch.routing);
  }

  void one_step() {
    const double rate = examples::learning_rate(step_, steps_, peak_);
    const examples::Batch batch = stream_.training(step_, device_);
    const auto losses = losses_of(batch);
    const torch::Tensor loss = losses.total();
    loss.backward();
    const torch::Tensor norm = examples::clip_gradients(model_->parameters(), clip_);
    optimizer_.step(rate);
    model_->zero_grad();
    const torch::Tensor means = losses.means().detach();
    pending_.push_back(
        {++step_, rate, batch.num_tokens, torch::stack({loss.detach(), means[0], means[1], norm})});
  }

  /// Writes the steps since the last call.
  void read_losses(examples::Progress& progress) {
    if (pending_.empty()) return;
    double text = 0, image = 0;
    int64_t tokens = 0;
    for (const Pending& one : pending_) {
      const torch::Tensor host = one.numbers.to(torch::kCPU, torch::kFloat64);
      const auto* numbers = host.const_data_ptr<double>();
      if (!std::isfinite(numbers[0])) {
        throw Failure(
            fmt::format("the loss is {} at step {}; a smaller --lr may help", numbers[0], one.step));
      }
      constexpr const char* kLine =
          R"({{"step": {}, "kind": "train", "loss": {}, "text": {}, "image": {}, "lr": {}, "grad_norm": {}}})";
      metrics_->write(fmt::format(kLine, one.step, numbers[0], numbers[1], numbers[2], one.rate, numbers[3]));
      text += numbers[1];
      image += numbers[2];
      tokens += one.tokens;
    }
    const auto count = static_cast<double>(pending_.size());
    pending_.clear();
    progress.show(step_, text / count, image / count, tokens);
  }

  void evaluate(examples::Progress& progress) {
    read_losses(progress);
    const torch::NoGradGuard no_grad;
    torch::Tensor sums = torch::zeros({2}, torch::kFloat64), counts = sums.clone();
    for (int64_t first = 0; first < stream_.held_out; first += kEvaluationBatch) {
      const int64_t last = std::min(first + kEvaluationBatch, stream_.held_out);
      const auto losses = losses_of(stream_.validation(first, last, device_));
      sums += losses.cross_entropy.cpu();
      counts += losses.count.cpu();
    }
    const double text = (sums / counts)[0].item<double>(), image = (sums / counts)[1].item<double>();
    constexpr const char* kLine = R"({{"step": {}, "kind": "validation", "text": {}, "image": {}}})";
    metrics_->write(fmt::format(kLine, step_, text, image));
    constexpr const char* kTiming =
        R"({{"step": {}, "tokens": {}, "training_seconds": {:.3f}, "tokens_per_second": {:.0f}}})";
    timing_->write(fmt::format(kTiming, step_, progress.tokens(), progress.seconds(), progress.rate()));
    progress.print(fmt::format("step {}: held-out text {:.3f}, image {:.3f}", step_, text, image));
    progress.resume();
  }

  void save(examples::Progress& progress) {
    read_losses(progress);
    examples::Dict content = examples::make_dict();
    content.insert("settings", settings_);
    content.insert("step", step_);
    content.insert("seconds", progress.seconds());
    content.insert("tokens", progress.tokens());
    content.insert("metrics_length", metrics_->sync());
    content.insert("timing_length", timing_->sync());
    content.insert("model", examples::state_dict(model_));
    content.insert("optimizer", optimizer_.state_dict(examples::learning_rate(step_, steps_, peak_)));
    examples::save_dict(content, checkpoint_path());
    saved_step_ = step_;
    progress.resume();
  }

  /// \return what the files of numbers had when the checkpoint was made.
  Lengths restore() {
    const examples::Dict content = examples::load_dict(checkpoint_path());
    if (!content.contains("settings")) throw Failure(folder_ + " holds a run of another program");
    const std::string saved = content.at("settings").toStringRef();
    if (saved != settings_) {
      constexpr const char* kText =
          "{} holds a run of {}, not {}; choose another --output, or --fresh to start over";
      throw Failure(fmt::format(kText, folder_, saved, settings_));
    }
    examples::load_state_dict(model_, examples::weights_of(content));
    optimizer_.load_state_dict(content.at("optimizer"));
    step_ = saved_step_ = content.at("step").toInt();
    seconds_ = content.at("seconds").toDouble();
    tokens_ = content.at("tokens").toInt();
    return {content.at("metrics_length").toInt(), content.at("timing_length").toInt()};
  }

  torch::Device device_;
  bool amp_;
  examples::TokenStream stream_;
  std::string folder_;
  int64_t steps_;
  double peak_, clip_;
  int64_t save_every_, eval_every_;
  Chameleon model_;
  examples::AdamW optimizer_;
  std::string settings_;
  std::optional<examples::Metrics> metrics_, timing_;
  std::vector<Pending> pending_;
  int64_t step_ = 0, saved_step_ = 0;
  double seconds_ = 0;  // of training before this process, and tokens
  int64_t tokens_ = 0;
};

// A run is a function of its settings alone, on a GPU too.
void make_deterministic() {
  ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*replace=*/0);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  at::globalContext().setDeterministicFillUninitializedMemory(false);  // a debugging aid, and not for free
}

int train(int argc, char** argv) {
  const Arguments args(argc, argv, examples::kTrainNames, {"--fresh", "--amp"});
  make_deterministic();
  std::signal(SIGINT, request_stop);
  std::signal(SIGTERM, request_stop);
  return Run(args).go();
}

}  // namespace

int main(int argc, char** argv) { return examples::run(argc, argv, "train", examples::kTrainUsage, train); }
