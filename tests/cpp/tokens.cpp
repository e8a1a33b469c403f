// SPDX-License-Identifier: Apache-2.0
#include "tokens.h"

#include <algorithm>
#include <numeric>
#include <sstream>

namespace mixture_of_mamba::testing {

Tokens Tokens::random(Random& random, int longest) {
  Tokens tokens;
  tokens.packed = random.chance(2);
  tokens.lengths.assign(random.chance(10) ? 0 : random.between(1, 5), random.below(longest + 1));
  if (tokens.packed) {
    // cu_seqlens of no sequence would leave tokens to nobody, so there is at least one.
    if (tokens.lengths.empty()) tokens.lengths.push_back(0);
    for (int& length : tokens.lengths) length = random.chance(4) ? 0 : random.below(longest + 1);
  }
  tokens.sorted = !random.chance(4);
  tokens.routed = !random.chance(4);
  tokens.modalities = tokens.routed ? random.between(1, 5) : 1;
  tokens.padding = tokens.routed && random.chance(2);
  tokens.assign(random);
  return tokens;
}

void Tokens::assign(Random& random) {
  cu_seqlens = {0};
  for (int length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
  std::vector<int> ids(cu_seqlens.back());
  // Rows alone, without offsets, may be in any order.
  const int kinds = routed ? modalities + (padding ? 1 : 0) : 3;
  for (int& id : ids) id = random.below(kinds);
  if (modalities > 2 && random.chance(3)) {
    for (int& id : ids) id += id == 1;  // an empty modality
  }
  if (!sorted) std::sort(ids.begin(), ids.end());
  std::vector<int32_t> order(ids.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return ids[a] < ids[b]; });
  rows.resize(ids.size());
  for (size_t row = 0; row < order.size(); ++row) rows[order[row]] = static_cast<int32_t>(row);
  offsets.clear();
  for (int m = 0; m <= modalities; ++m) {
    offsets.push_back(
        static_cast<int32_t>(std::count_if(ids.begin(), ids.end(), [&](int id) { return id < m; })));
  }
}

Tokens Tokens::hostile(Random& random) const {
  Tokens garbage = *this;
  for (std::vector<int32_t>* values : {&garbage.rows, &garbage.offsets, &garbage.cu_seqlens}) {
    const bool keep_some = random.chance(2);
    for (int32_t& value : *values) {
      if (!keep_some || random.chance(3)) value = random.hostile(count());
    }
  }
  return garbage;
}

int64_t Tokens::begin(int64_t sequence) const {
  return std::accumulate(lengths.begin(), lengths.begin() + sequence, int64_t{0});
}

int modality_of_row(const std::vector<int32_t>& offsets, int64_t row) {
  return static_cast<int>(std::upper_bound(offsets.begin() + 1, offsets.end(), row) - offsets.begin()) - 1;
}

int Tokens::modality(int64_t row) const {
  if (!routed) return 0;
  for (int m = 0; m < modalities; ++m) {
    if (row >= offsets[m] && row < offsets[m + 1]) return m;
  }
  return -1;
}

TokenOrder Tokens::place(Arena& arena) const {
  TokenOrder order;
  order.rows = sorted ? arena.place(rows) : nullptr;
  order.offsets = routed ? arena.place(offsets) : nullptr;
  order.cu_seqlens = packed ? arena.place(cu_seqlens) : nullptr;
  order.tokens = count();
  order.sequences = sequences();
  order.length = packed || lengths.empty() ? 0 : lengths[0];
  order.modalities = modalities;
  return order;
}

std::string Tokens::describe() const {
  std::ostringstream text;
  text << "lengths";
  for (int length : lengths) text << " " << length;
  text << (packed ? ", packed" : "") << (sorted ? ", rows" : "");
  if (routed) text << ", " << modalities << " modalities, " << count() - offsets.back() << " padding";
  return text.str();
}

}  // namespace mixture_of_mamba::testing
