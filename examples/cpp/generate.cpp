// SPDX-License-Identifier: Apache-2.0
// Continues a prompt in C++, without Python: with a checkpoint's weights in the C++ decoder, or with a
// package that torch.export and AOTInductor compiled from the Python one.
#include <torch/types.h>
#include <torch/utils.h>

#include "arguments.h"
#include "language_model.h"
#include "torch_file.h"
#include "vocabulary.h"

namespace {

using examples::Failure;

constexpr const char* kUsage = R"(generate --model FILE --words FILE --prompt TEXT [options]

  --model FILE         checkpoint.pt of train or chameleon.py, or a .pt2 package of export_model.py
  --words FILE         words.txt of examples/python/export_stream.py
  --prompt TEXT        words and image codes: "<bos> ant on rose <boi>", "<bos> <boi> [17] [3] ..."
  --new N              most tokens to add (100); <eos> ends earlier
  --temperature X      of sampling (0: the likeliest token)
  --seed N             of sampling (0)
  --device cpu|cuda    (cpu)
  --logits FILE        also save the prompt's logits and all token ids, for torch.load
)";
const std::set<std::string> kNames = {"--model",       "--words", "--prompt", "--new",
                                      "--temperature", "--seed",  "--device", "--logits"};

int64_t choose(const torch::Tensor& logits, double temperature, at::Generator& random) {
  if (temperature == 0) return logits.argmax().item<int64_t>();
  return torch::multinomial((logits / temperature).softmax(-1), 1, /*replacement=*/false, random)
      .item<int64_t>();
}

int generate(int argc, char** argv) {
  const examples::Arguments args(argc, argv, kNames);
  const torch::Device device = args.device();
  const examples::Vocabulary vocabulary(args.required("--words"));
  const auto model = examples::load_model(args.required("--model"), device);
  const int64_t codes = model->vocabulary - vocabulary.first_code();
  if (codes < 1) throw Failure("--words has more lines than the model has tokens");
  std::vector<int64_t> tokens = vocabulary.encode(args.required("--prompt"), codes);
  if (tokens.empty()) throw Failure("--prompt must hold at least one token");
  const double temperature = args.number("--temperature", 0);
  at::Generator random = at::make_generator<at::CPUGeneratorImpl>(args.integer("--seed", 0, 0));

  const torch::InferenceMode inference;
  examples::Position position(vocabulary, model->slots);
  std::vector<int64_t> slots, modality;
  for (const int64_t token : tokens) {
    modality.push_back(position.read(token));
    slots.push_back(position.slot());
  }
  const auto row = [](const std::vector<int64_t>& values) {
    return torch::tensor(values, torch::kInt64).unsqueeze(0);
  };
  torch::Tensor logits = model->advance(row(tokens), row(slots), row(modality));
  examples::Dict results = examples::make_dict();
  results.insert("logits", logits);

  const int64_t first_code = vocabulary.first_code(), end = vocabulary.id("<eos>");
  for (int64_t left = args.integer("--new", 100, 0); left > 0 && tokens.back() != end; --left) {
    // Inside of a picture codes follow, outside of it words.
    const torch::Tensor next = logits[0][-1];
    const int64_t token = position.slot() > 0
                              ? first_code + choose(next.slice(0, first_code), temperature, random)
                              : choose(next.slice(0, 0, first_code), temperature, random);
    fmt::print("{} ", vocabulary.decode(token));
    std::fflush(stdout);
    tokens.push_back(token);
    const int64_t image = position.read(token);
    logits = model->advance(row({token}), row({position.slot()}), row({image}));
  }
  fmt::print("\n");
  if (args.has("--logits")) {
    results.insert("tokens", row(tokens)[0]);
    examples::save_dict(results, args.required("--logits"));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return examples::run(argc, argv, "generate", kUsage, generate); }
