// SPDX-License-Identifier: Apache-2.0
// Continues a prompt in C++, without Python: with a checkpoint's weights in the C++ decoder, or with a
// package that torch.export and AOTInductor compiled from the Python one.
#include <torch/types.h>
#include <torch/utils.h>

#include "arguments.h"
#include "language_model.h"
#include "regions.h"
#include "torch_file.h"
#include "vocabulary.h"

namespace {

using examples::Failure;

constexpr const char* kUsage = R"(generate --model FILE --vocabulary FILE --prompt TEXT [options]

  --model FILE         checkpoint.pt of train or chameleon.py, or a .pt2 package of export_model.py
  --vocabulary FILE    vocabulary.txt of examples/python/export_stream.py
  --prompt TEXT        words and image codes: "<bos> ant on rose <boi>", "<bos> <boi> [17] [3] ..."
  --new N              most tokens to add (100); <eos> ends earlier
  --temperature X      of sampling (0: the likeliest token)
  --seed N             of sampling (0)
  --device cpu|cuda    (cpu)
  --logits FILE        also save the prompt's logits and the ids drawn, for torch.load
)";
const std::set<std::string> kNames = {"--model",       "--vocabulary", "--prompt", "--new",
                                      "--temperature", "--seed",       "--device", "--logits"};

int64_t choose(const torch::Tensor& logits, double temperature, at::Generator& random) {
  if (temperature == 0) return logits.argmax().item<int64_t>();
  return torch::multinomial((logits / temperature).softmax(-1), 1, /*replacement=*/false, random)
      .item<int64_t>();
}

int generate(int argc, char** argv) {
  const examples::Arguments args(argc, argv, kNames);
  const torch::Device device = args.device();
  const examples::Words words(args.required("--vocabulary"));
  const std::vector<int64_t> prompt = words.encode(args.required("--prompt"));
  if (prompt.empty()) throw Failure("--prompt must hold at least one token");
  const auto model = examples::load_model(args.required("--model"), words.vocabulary(), device);
  const double temperature = args.number("--temperature", 0);
  at::Generator random = at::make_generator<at::CPUGeneratorImpl>(args.integer("--seed", 0, 0));

  const torch::InferenceMode inference;
  const auto row = [](const std::vector<int64_t>& values) {
    return torch::tensor(values, torch::kInt64).unsqueeze(0);
  };
  torch::Tensor logits = model->advance(row(prompt));
  examples::Dict results = examples::make_dict();
  results.insert("logits", logits);

  examples::Regions regions(words);
  for (const int64_t token : prompt) regions.read(token);
  std::vector<int64_t> drawn;
  for (int64_t left = args.integer("--new", 100, 0); left > 0; --left) {
    const int64_t token = choose(regions.mask(logits[0][-1]), temperature, random);
    fmt::print("{} ", words.decode(token));
    std::fflush(stdout);
    drawn.push_back(token);
    if (token == words.id("<eos>")) break;
    regions.read(token);
    if (left > 1) logits = model->advance(row({token}));
  }
  fmt::print("\n");
  if (args.has("--logits")) {
    results.insert("drawn", row(drawn)[0]);
    examples::save_dict(results, args.required("--logits"));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return examples::run(argc, argv, "generate", kUsage, generate); }
