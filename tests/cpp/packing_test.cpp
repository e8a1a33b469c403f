// SPDX-License-Identifier: Apache-2.0
#include "kernels/common/packing.h"

#include <cstdint>
#include <set>
#include <vector>

#include "catch.h"
#include "kernels/selective_scan.h"
#include "tokens.h"

namespace mixture_of_mamba::testing {
namespace {

// The example of packing.h: ids 1 0 0 | 0 -1 1.
const std::vector<int32_t> kRows = {3, 0, 1, 2, 5, 4}, kOffsets = {0, 3, 5}, kBoundaries = {0, 2, 6};

TokenOrder example() {
  TokenOrder order;
  order.rows = kRows.data();
  order.offsets = kOffsets.data();
  order.tokens = 6;
  order.sequences = 2;
  order.length = 3;
  order.modalities = 2;
  return order;
}

TEST_CASE("tokens of the worked example have the rows and modalities that the comment gives", "[packing]") {
  const TokenOrder order = example();
  const int32_t modalities[] = {1, 0, 0, 0, 2, 1};  // 2: padding
  for (int64_t time = 0; time < order.tokens; ++time) {
    const int32_t row = order.row_of(time);
    CHECK(row == kRows[time]);
    CHECK(order.modality_of_row(row) == modalities[time]);
    CHECK(order.is_padding(row) == (time == 4));
  }
}

TEST_CASE("equal lengths divide time evenly", "[packing]") {
  const TokenOrder order = example();
  CHECK(order.sequence_begin(0) == 0);
  CHECK(order.sequence_end(0) == 3);
  CHECK(order.sequence_begin(1) == 3);
  CHECK(order.sequence_end(1) == 6);
}

TEST_CASE("boundaries 0 2 6 are a document of two tokens and one of four", "[packing]") {
  TokenOrder order = example();
  order.cu_seqlens = kBoundaries.data();
  CHECK(order.sequence_begin(0) == 0);
  CHECK(order.sequence_end(0) == 2);
  CHECK(order.sequence_begin(1) == 2);
  CHECK(order.sequence_end(1) == 6);
}

TEST_CASE("without rows a row is its time, and without offsets there is one modality and no padding",
          "[packing]") {
  TokenOrder order = example();
  order.rows = order.offsets = nullptr;
  for (int64_t time = 0; time < order.tokens; ++time) {
    CHECK(order.row_of(time) == time);
    CHECK(order.modality_of_row(order.row_of(time)) == 0);
    CHECK(!order.is_padding(order.row_of(time)));
  }
}

TEST_CASE("empty modalities own no row, also first and last", "[packing]") {
  const std::vector<int32_t> offsets = {0, 0, 2, 2, 6, 6};
  TokenOrder order = example();
  order.offsets = offsets.data();
  order.modalities = 5;
  const int32_t modalities[] = {1, 1, 3, 3, 3, 3};
  for (int32_t row = 0; row < 6; ++row) CHECK(order.modality_of_row(row) == modalities[row]);
}

TEST_CASE("garbage in rows and boundaries is clamped into the tokens", "[packing]") {
  for (int i = 0; i < random_cases(); ++i) {
    INFO("problem " << i);
    Random random(i);
    const Tokens tokens = Tokens::random(random, 70).hostile(random);
    HostArena arena;
    const TokenOrder order = tokens.place(arena);
    for (int64_t time = 0; time < order.tokens; ++time) {
      const int32_t row = order.row_of(time), modality = order.modality_of_row(row);
      if (row < 0 || row >= order.tokens) FAIL_CHECK("row " << row);
      if (modality < 0 || modality > order.modalities) FAIL_CHECK("modality " << modality);
      if (!order.is_padding(row) && modality == order.modalities) FAIL_CHECK("a modality that is none");
    }
    for (int64_t s = 0; s < order.sequences; ++s) {
      const int64_t begin = order.sequence_begin(s), end = order.sequence_end(s);
      if (begin < 0 || begin > end || end > order.tokens) FAIL_CHECK(s << " is " << begin << " .. " << end);
    }
  }
}

// What lets kernels write every token's output whatever the boundaries say.
TEST_CASE("the first sequence begins at 0 and the last ends with the tokens", "[packing]") {
  for (int32_t garbage : {INT32_MIN, -1, 0, 3, 6, 7, INT32_MAX}) {
    const std::vector<int32_t> boundaries(4, garbage);
    TokenOrder order = example();
    order.cu_seqlens = boundaries.data();
    order.sequences = 3;
    CHECK(order.sequence_begin(0) == 0);
    CHECK(order.sequence_end(2) == 6);
  }
}

TEST_CASE("every tile of every packing has a checkpoint slot of its own", "[packing]") {
  for (int i = 0; i < random_cases(); ++i) {
    INFO("problem " << i);
    Random random(i);
    const Tokens tokens = Tokens::random(random, 70);
    HostArena arena;
    const TokenOrder order = tokens.place(arena);
    std::set<int64_t> slots;
    int64_t tiles = 0;
    for (int64_t s = 0; s < order.sequences; ++s) {
      const int64_t begin = order.sequence_begin(s), length = order.sequence_end(s) - begin;
      for (int64_t tile = 0; tile * kCheckpointInterval < length; ++tile, ++tiles) {
        slots.insert(begin / kCheckpointInterval + s + tile);
      }
    }
    CHECK(static_cast<int64_t>(slots.size()) == tiles);
    if (tiles > 0) CHECK(*slots.rbegin() < selective_scan_checkpoint_slots(order.tokens, order.sequences));
  }
}

}  // namespace
}  // namespace mixture_of_mamba::testing
