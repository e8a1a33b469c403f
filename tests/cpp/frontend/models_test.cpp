// SPDX-License-Identifier: Apache-2.0
#include <limits>
#include <sstream>
#include <thread>

#include "support.h"

namespace mixture_of_mamba::testing {

namespace {

using models::Chameleon;
using models::ChameleonOptions;
using models::DecoderOptions;

// 12 words and 8 image codes; tokens 3 and 4 begin and end a picture.
ChameleonOptions tiny(const std::vector<std::string>& decouple = {"in_proj", "x_proj", "dt_proj",
                                                                  "out_proj"}) {
  const models::Vocabulary vocabulary({{12}, {8, 3, 4, 5}});
  return {DecoderOptions(16, 2).mixers_per_layer(1).decouple(decouple), vocabulary};
}

Tensor random_tokens(int64_t batch, int64_t length) {
  return torch::randint(-1, 20, {batch, length}, torch::kInt64);
}

// Losses of a few steps of training on a fixed batch, from a given state of the weights.
std::vector<float> train(const Chameleon& start, uint64_t seed, int steps) {
  Chameleon model(std::dynamic_pointer_cast<models::ChameleonImpl>(start->clone()));
  auto generator = at::detail::createCPUGenerator(seed);
  const Tensor tokens = torch::randint(0, 20, {2, 13}, generator, torch::kInt64);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-2));
  std::vector<float> losses;
  for (int step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    const Tensor loss = model->loss(tokens).total();
    loss.backward();
    optimizer.step();
    losses.push_back(loss.item<float>());
  }
  return losses;
}

}  // namespace

TEST_CASE("A model learns a batch, in two threads at once as in one after the other", "[models]") {
  torch::manual_seed(10);
  const Chameleon start(tiny());
  const auto alone = train(start, 1, 40), other = train(start, 2, 8);
  REQUIRE(alone.back() < 0.3F * alone.front());
  std::vector<float> first, second;
  std::thread one([&] { first = train(start, 1, 8); });
  std::thread two([&] { second = train(start, 2, 8); });
  one.join();
  two.join();
  REQUIRE(first == std::vector<float>(alone.begin(), alone.begin() + 8));
  REQUIRE(second == other);
}

TEST_CASE("A model goes on from its states as in one pass", "[models]") {
  torch::manual_seed(11);
  torch::NoGradGuard no_grad;
  for (const auto& decouple : {std::vector<std::string>{}, {"in_proj", "out_proj"}}) {
    Chameleon model(tiny(decouple));
    const Tensor tokens = random_tokens(2, 6);
    const auto [whole, states] = model->forward_with_state(tokens);
    models::DecoderCall call;
    Tensors parts;
    for (int64_t t = 0; t < 6; t += 2) {
      auto [logits, next] = model->forward_with_state(tokens.slice(1, t, t + 2), {}, call);
      parts.push_back(logits);
      call.state = next;
    }
    const Tensor real = (tokens >= 0).unsqueeze(-1);
    require_close("in parts", torch::cat(parts, 1) * real, whole * real, 1e-5);
    require_close("state", call.state->mamba[1].ssm, states.mamba[1].ssm, 1e-5);

    // A snapshot stays what it was, and belongs to nobody else.
    const models::DecoderState kept = call.state->clone();
    model->forward(tokens, {}, call);
    REQUIRE(torch::equal(kept.mamba[0].conv, call.state->mamba[0].conv));
    kept.mamba[0].conv.zero_();
    REQUIRE_FALSE(torch::equal(kept.mamba[0].conv, call.state->mamba[0].conv));
    call.state->mamba.pop_back();
    REQUIRE(error_of([&] { model->forward(tokens, {}, call); }) ==
            "state must hold one state for each of the 2 mixers, got 1");
  }
}

TEST_CASE("Modality is what the tokens say, ids of it, or a routing of them", "[models]") {
  torch::manual_seed(12);
  Chameleon model(tiny());
  const Tensor tokens = random_tokens(2, 7), ids = model->options.vocabulary().modality_of(tokens);
  REQUIRE(torch::equal(ids, torch::where(tokens < 0, -1, (tokens >= 12).to(torch::kInt64))));
  const Tensor logits = model->forward(tokens);
  REQUIRE(torch::equal(model->forward(tokens, ids), logits));
  REQUIRE(torch::equal(model->forward(tokens, Routing::from_ids(ids, 2)), logits));
}

TEST_CASE("Labels are the next tokens of the same document", "[models]") {
  const Tensor tokens = torch::tensor({{5, 6, 7, -1}, {-1, 1, 2, 3}}, torch::kInt64);
  REQUIRE(torch::equal(models::next_tokens(tokens),
                       torch::tensor({{6, 7, -1, -1}, {-1, 2, 3, -1}}, torch::kInt64)));
  const Tensor cu_seqlens = torch::tensor({0, 2, 2, 6, 8}, torch::kInt32);
  REQUIRE(torch::equal(models::next_tokens(tokens, cu_seqlens),
                       torch::tensor({{6, -1, -1, -1}, {-1, -1, 3, -1}}, torch::kInt64)));
}

TEST_CASE("A batch of nothing has no labels and no loss", "[models]") {
  Chameleon model(tiny());
  for (const auto& sizes : {std::pair(0, 3), std::pair(2, 0)}) {
    const Tensor tokens = torch::zeros({sizes.first, sizes.second}, torch::kInt64);
    REQUIRE(models::next_tokens(tokens, {}).sizes() == tokens.sizes());
    const auto losses = model->loss(tokens);
    losses.total().backward();
    REQUIRE(losses.count.sum().item<double>() == 0);
  }
}

TEST_CASE("Losses are summed by the modality of the label", "[models]") {
  torch::manual_seed(13);
  const Tensor logits = torch::randn({1, 4, 5});
  const Tensor labels = torch::tensor({{0, 3, -1, 4}}, torch::kInt64);
  logits[0][2].fill_(std::numeric_limits<float>::infinity());  // of padding, which may hold anything
  const auto losses = models::modality_losses(logits, labels, torch::tensor({{0, 1, -1, 1}}), 3);
  const Tensor log_probabilities = torch::log_softmax(logits[0], -1),
               log_z = logits[0].logsumexp(-1).square();
  require_close("count", losses.count, torch::tensor({1.0F, 2.0F, 0.0F}));
  require_close("text", losses.cross_entropy[0], -log_probabilities[0][0], 1e-6);
  require_close("image", losses.cross_entropy[1], -log_probabilities[1][3] - log_probabilities[3][4], 1e-6);
  require_close("z", losses.z.slice(0, 0, 2), torch::stack({log_z[0], log_z[1] + log_z[3]}), 1e-6);
  require_close("means", losses.means(), losses.cross_entropy / torch::tensor({1.0F, 2.0F, 1.0F}), 1e-6);
  require_close("total", losses.total(0.5), (losses.cross_entropy + 0.5 * losses.z).sum() / 3, 1e-6);
}

TEST_CASE("Models are cloned, converted, saved, loaded and printed", "[models]") {
  torch::manual_seed(14);
  Chameleon model(tiny());
  const Tensor tokens = random_tokens(2, 6), real = (tokens >= 0).unsqueeze(-1);
  const Tensor logits = model->forward(tokens);
  Chameleon copy(std::dynamic_pointer_cast<models::ChameleonImpl>(model->clone()));
  REQUIRE(torch::equal(copy->forward(tokens), logits));
  {
    torch::NoGradGuard no_grad;
    for (const Tensor& parameter : copy->parameters()) parameter.mul_(2);
  }
  REQUIRE(torch::equal(model->forward(tokens), logits));
  REQUIRE_FALSE(torch::equal(copy->forward(tokens), logits));

  std::stringstream file;
  torch::save(model, file);
  Chameleon loaded(model->options);
  REQUIRE_FALSE(torch::equal(loaded->forward(tokens), logits));
  torch::load(loaded, file);
  REQUIRE(torch::equal(loaded->forward(tokens), logits));
  loaded->to(torch::kFloat64);
  const Tensor wide = loaded->forward(tokens);
  REQUIRE(wide.scalar_type() == torch::kFloat64);
  require_close("float64", wide.to(torch::kFloat32) * real, logits * real, 1e-4);

  std::ostringstream printed;
  printed << *model;
  REQUIRE_THAT(printed.str(),
               StartsWith("mixture_of_mamba::models::Chameleon(vocabulary=20, tied=false)") &&
                   ContainsSubstring("(decoder): mixture_of_mamba::models::Decoder(d_model=16, layers=2, "
                                     "num_modalities=2, decouple=[in_proj, x_proj, dt_proj, out_proj])"));
  const auto names = model->named_parameters().keys();
  REQUIRE(names.front() == "embedding.weight");
  REQUIRE(names.back() == "head.weight");
  REQUIRE_FALSE(Chameleon(tiny().tied(true))->named_parameters().contains("head.weight"));
}

TEST_CASE("Errors of models say what was required", "[errors]") {
  REQUIRE(error_of([] { models::Decoder(DecoderOptions(8, 0)); }) ==
          "layers must be an integer of at least 1, got 0");
  REQUIRE(error_of([] { models::Decoder(DecoderOptions(8, 1).decouple({"conv"})); }) ==
          "decouple must name projections among ('in_proj', 'x_proj', 'dt_proj', 'out_proj', 'A_log', 'D'), "
          "got ['conv']");
  const models::Vocabulary text(std::vector<models::TokenRange>{{5}});
  REQUIRE(error_of([&] { Chameleon(ChameleonOptions(DecoderOptions(8, 1), text)); }) ==
          "config.num_modalities must be the vocabulary's, 1, got 2");
  REQUIRE(error_of([] {
            models::Vocabulary({{5}, {3, 5, 1}});
          }) == "ranges[1].begin must be a text token, 0 .. 4, got 5");
  REQUIRE(error_of([] {
            models::Vocabulary({{5}, {3, 1, 1}});
          }) == "ranges must all have a begin and an end of their own, got tokens [1, 1]");
  Chameleon model(tiny());
  REQUIRE(error_of([&] {
            model->forward(torch::zeros({2, 3}));
          }) == "tokens must be integers [batch, length], got torch.float32 [2, 3]");
  REQUIRE(error_of([&] {
            model->loss(random_tokens(2, 3), torch::zeros({3, 2}, torch::kInt64));
          }) == "modality must have the shape of tokens, [2, 3], got [3, 2]");
  for (const auto& [wrong, message] : {std::pair(20, "got 20"), std::pair(-2, "got -2")}) {
    torch::Tensor tokens = random_tokens(2, 3);
    tokens[1][0] = wrong;
    REQUIRE_THAT(error_of([&] { model->forward(tokens); }),
                 StartsWith("tokens must lie in -1 .. size - 1 = 19 (-1 is padding), ") &&
                     ContainsSubstring(message) && ContainsSubstring("at flat position 3"));
  }
}

}  // namespace mixture_of_mamba::testing
