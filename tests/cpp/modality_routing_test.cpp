// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>

#include "catch.h"
#include "device.h"

namespace mixture_of_mamba::testing {
namespace {

void check_routing(const std::vector<int64_t>& ids, int32_t modalities) {
  INFO(ids.size() << " tokens, " << modalities << " modalities");
  const auto key = [&](int64_t id) { return id >= 0 && id < modalities ? id : modalities; };
  std::vector<int32_t> order(ids.size()), rows(ids.size()), offsets(modalities + 1);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return key(ids[a]) < key(ids[b]); });
  for (size_t row = 0; row < order.size(); ++row) rows[order[row]] = static_cast<int32_t>(row);
  for (int64_t id : ids) {
    if (key(id) < modalities) ++offsets[key(id) + 1];
  }
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());

  for (const auto& run : device().modality_routing) {
    const std::unique_ptr<Arena> arena = device().new_arena();
    ModalityRoutingParams p;
    p.ids = arena->place(ids);
    p.tokens = static_cast<int64_t>(ids.size());
    p.num_modalities = modalities;
    p.rows = arena->place(std::vector<int32_t>(ids.size(), -1));
    p.order = arena->place(std::vector<int32_t>(ids.size(), -1));
    p.offsets = arena->place(std::vector<int32_t>(modalities + 1, -1));
    run(p);
    CHECK((arena->fetch(p.rows, p.tokens) == rows));
    CHECK((arena->fetch(p.order, p.tokens) == order));
    CHECK((arena->fetch(p.offsets, modalities + 1) == offsets));
    CHECK(arena->intact());
  }
}

std::vector<int64_t> ids_of(int64_t tokens, const std::function<int64_t(int64_t)>& id) {
  std::vector<int64_t> ids(tokens);
  for (int64_t i = 0; i < tokens; ++i) ids[i] = id(i);
  return ids;
}

// Around the warps, blocks and tiles that a GPU counts in.
const int64_t kSizes[] = {0, 1, 2, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 5000};

TEST_CASE("the routing of the design's example is the one that the design gives", "[modality_routing]") {
  for (const auto& run : device().modality_routing) {
    const std::unique_ptr<Arena> arena = device().new_arena();
    ModalityRoutingParams p;
    p.ids = arena->place(std::vector<int64_t>{1, 0, 0, 0, -1, 1});
    p.tokens = 6;
    p.num_modalities = 2;
    p.rows = arena->place(std::vector<int32_t>(6));
    p.order = arena->place(std::vector<int32_t>(6));
    p.offsets = arena->place(std::vector<int32_t>(3));
    run(p);
    CHECK(arena->fetch(p.rows, 6) == std::vector<int32_t>{3, 0, 1, 2, 5, 4});
    CHECK(arena->fetch(p.order, 6) == std::vector<int32_t>{1, 2, 3, 0, 5, 4});
    CHECK(arena->fetch(p.offsets, 3) == std::vector<int32_t>{0, 3, 5});
  }
}

TEST_CASE("tokens are sorted by modality, stably and padding last, for all sizes", "[modality_routing]") {
  Random random(0);
  for (int64_t tokens : kSizes) {
    for (int modalities : {1, 2, 3, 31, 32, 33, static_cast<int>(kMaxModalities)}) {
      check_routing(ids_of(tokens, [&](int64_t) { return random.between(-1, modalities - 1); }), modalities);
    }
  }
}

TEST_CASE("any distribution over modalities is sorted", "[modality_routing]") {
  for (int64_t tokens : kSizes) {
    check_routing(ids_of(tokens, [](int64_t) { return 0; }), 4);
    check_routing(ids_of(tokens, [](int64_t) { return 3; }), 4);
    check_routing(ids_of(tokens, [](int64_t) { return -1; }), 4);
    check_routing(ids_of(tokens, [](int64_t i) { return i % 2 * 3; }), 4);
    check_routing(ids_of(tokens, [&](int64_t i) { return 4 - 5 * i / tokens; }), 5);
  }
}

TEST_CASE("ids that no modality has are padding", "[modality_routing]") {
  const int64_t strange[] = {INT64_MIN, INT64_MAX, -2, 3, 4, int64_t{1} << 32, -(int64_t{1} << 32), 0, 1, 2};
  Random random(1);
  for (int64_t tokens : kSizes) {
    check_routing(ids_of(tokens, [&](int64_t) { return strange[random.below(10)]; }), 3);
  }
}

TEST_CASE("more than a million tokens are sorted", "[modality_routing][large]") {
  Random random(2);
  check_routing(ids_of((1 << 20) + 1025, [&](int64_t) { return random.between(-1, 4); }), 5);
}

}  // namespace
}  // namespace mixture_of_mamba::testing
