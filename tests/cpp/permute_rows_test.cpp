// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <numeric>
#include <sstream>

#include "catch.h"
#include "device.h"

namespace mixture_of_mamba::testing {
namespace {

// A gather of rows of bytes; x begins `offset` bytes behind an aligned address.
struct Gather {
  std::vector<int32_t> index;
  int64_t row_bytes = 0, gap = 0, offset = 0;

  int64_t rows() const { return static_cast<int64_t>(index.size()); }
  int64_t stride() const { return row_bytes + gap; }

  void check(Random& random) const {
    INFO(rows() << " rows of " << row_bytes << " bytes, gap " << gap << ", offset " << offset);
    Bytes x(rows() == 0 ? offset : offset + (rows() - 1) * stride() + row_bytes);
    for (unsigned char& byte : x) byte = static_cast<unsigned char>(random.bits());
    Bytes expected(rows() * row_bytes, 0);
    for (int64_t i = 0; i < rows(); ++i) {
      if (index[i] < 0 || index[i] >= rows()) continue;
      std::copy_n(x.begin() + offset + index[i] * stride(), row_bytes, expected.begin() + i * row_bytes);
    }
    for (const auto& run : device().permute_rows) {
      const std::unique_ptr<Arena> arena = device().new_arena();
      unsigned char* const out = static_cast<unsigned char*>(arena->allocate(expected.size()));
      PermuteRowsParams p;
      p.x = arena->place(x) + offset;
      p.x_stride = stride();
      p.out = out;
      p.index = arena->place(index);
      p.rows = rows();
      p.row_bytes = row_bytes;
      run(p);
      CHECK((arena->fetch(out, expected.size()) == expected));
      CHECK(arena->intact());
    }
  }
};

std::vector<int32_t> permutation(int rows, Random& random) {
  std::vector<int32_t> index(rows);
  std::iota(index.begin(), index.end(), 0);
  for (int i = rows - 1; i > 0; --i) std::swap(index[i], index[random.below(i + 1)]);
  return index;
}

TEST_CASE("rows of any size are gathered by a permutation", "[permute_rows]") {
  Random random(0);
  for (int64_t row_bytes : {0, 1, 2, 3, 4, 12, 16, 48, 100, 256, 4096, 4100, 70000}) {
    for (int rows : {0, 1, 5, 33}) Gather{permutation(rows, random), row_bytes}.check(random);
  }
  for (int rows : {1000, 4097}) Gather{permutation(rows, random), 24}.check(random);
}

TEST_CASE("rows are gathered from any stride and alignment", "[permute_rows]") {
  Random random(1);
  for (int64_t row_bytes : {6, 16, 64}) {
    for (int64_t gap : {0, 1, 2, 4, 16}) {
      for (int64_t offset : {0, 1, 2, 4, 8, 16}) {
        Gather{permutation(37, random), row_bytes, gap, offset}.check(random);
      }
    }
  }
}

TEST_CASE("an index may repeat, and one out of range gives zeros", "[permute_rows]") {
  Random random(2);
  for (int i = 0; i < random_cases(); ++i) {
    Gather gather{permutation(random.below(70), random), random.between(1, 80), random.below(5)};
    for (int32_t& index : gather.index) {
      if (random.chance(2))
        index = random.hostile(gather.rows());
      else if (random.chance(2))
        index = random.below(static_cast<int>(gather.rows()));
    }
    gather.check(random);
  }
}

}  // namespace
}  // namespace mixture_of_mamba::testing
