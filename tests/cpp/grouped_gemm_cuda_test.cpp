// SPDX-License-Identifier: Apache-2.0
#include "kernels/grouped_gemm.h"

#include <algorithm>

#include "catch.h"
#include "cuda_device.h"
#include "device.h"
#include "kernels/cuda/device_info.h"
#include "tokens.h"

// Products of groups of rows. The kernels exist for a GPU of compute capability 9.0 only.

namespace mixture_of_mamba::testing {
namespace {

using Result = GroupedGemmParams::Result;

// Sizes and addresses that are served where anything is.
GroupedGemmParams smallest() {
  alignas(16) static char memory[256];
  GroupedGemmParams p;
  p.rows = p.begin[1] = 1;
  p.left_columns = p.right_columns = 8;
  p.left = {memory, 8};
  p.right = {memory, 8};
  p.matrix[0] = memory, p.matrix_stride[0] = 8;
  return p;
}

struct Problem {
  ScalarType type;
  Result result;
  bool transposed, add, on_device;
  int left_columns, right_columns, groups, gap;
  int32_t rows;
  std::vector<int32_t> offsets;
  std::vector<bool> has_bias;
  Reals left, right;
  std::vector<Reals> matrix, bias;  // [right_columns, left_columns]

  static Problem random(Random& random) {
    Problem p;
    p.type = random.chance(3) ? ScalarType::kFloat16 : ScalarType::kBFloat16;
    p.result = random.chance(3) ? Result::kMatrix : Result::kRight;
    const bool right = p.result == Result::kRight;
    p.transposed = right && random.chance(2), p.add = right && random.chance(4),
    p.on_device = random.chance(2);
    // What is deep is shared by the blocks of a cluster; of many tiles a block has several.
    const bool many = random.chance(16), deep = !many && random.chance(3);
    p.groups = random.chance(8) || (many && !right) ? GroupedGemmParams::kMostGroups : random.between(1, 4);
    p.left_columns =
        8 * (deep && right ? random.between(40, 200) : random.between(1, many && right ? 3 : 40));
    p.right_columns = 8 * (many && right ? random.between(140, 200) : random.between(1, 40));
    if (many && !right) p.left_columns = p.right_columns = 520;
    p.gap = 8 * random.below(3);
    // References are slow.
    const int64_t elements = many && right ? 8000000 : 100000,
                  widest = std::max(p.left_columns, p.right_columns);
    const int longest = many && right ? 2400 : random.chance(2) ? 70 : 1200;
    const int most = std::min<int64_t>(longest, 1 + elements / widest / p.groups);
    p.offsets = {0};
    for (int g = 0; g < p.groups; ++g) {
      const int size = random.chance(4) ? 0 : random.between(most / 4, most);
      p.offsets.push_back(p.offsets.back() + size);
    }
    p.rows = p.offsets.back() + (random.chance(2) ? random.below(most + 1) : 0);
    p.rows = std::max(p.rows, 1);
    p.fill(random);
    return p;
  }

  static Problem of(Random& random, Result result, bool transposed, bool add,
                    const std::vector<int32_t>& rows, int left_columns, int right_columns) {
    Problem p;
    p.type = ScalarType::kBFloat16, p.result = result, p.transposed = transposed, p.add = add;
    p.on_device = false;
    p.left_columns = left_columns, p.right_columns = right_columns, p.groups = rows.size(), p.gap = 0;
    p.offsets = {0};
    for (const int32_t count : rows) p.offsets.push_back(p.offsets.back() + count);
    p.rows = p.offsets.back();
    p.fill(random);
    return p;
  }

  void fill(Random& random) {
    left = random.normal(int64_t{rows} * left_columns, 0, 1, type);
    right = random.normal(int64_t{rows} * right_columns, 0, 1, type);
    for (int g = 0; g < groups; ++g) {
      has_bias.push_back(result == Result::kRight && !add && random.chance(2));
      matrix.push_back(random.normal(int64_t{right_columns} * left_columns, 0, 1, type));
      bias.push_back(random.normal(right_columns, 0, 1, type));
    }
  }

  std::string describe() const {
    return std::string(name_of(type)) + (result == Result::kMatrix ? ", matrices" : ", rows") +
           (transposed ? ", transposed" : "") + (add ? ", added" : "") + ", " + std::to_string(rows) + " x " +
           std::to_string(left_columns) + " and " + std::to_string(right_columns) + ", " +
           std::to_string(groups) + " groups, boundaries on the " + (on_device ? "device" : "host");
  }

  // Element (row, column) of the rows, or of a group's matrix.
  Real expected(int group, int64_t row, int64_t column) const {
    Real sum = 0;
    if (result == Result::kMatrix) {
      for (int64_t r = offsets[group]; r < offsets[group + 1]; ++r) {
        sum += right[r * right_columns + row] * left[r * left_columns + column];
      }
      return sum;
    }
    if (add) sum = right[row * right_columns + column];
    if (group == groups) return sum;
    if (has_bias[group]) sum = bias[group][column];
    for (int64_t k = 0; k < left_columns; ++k) {
      sum += left[row * left_columns + k] * matrix[group][column * left_columns + k];
    }
    return sum;
  }

  // The rows, or the matrices, from boundaries that may be others than those of this problem.
  Outputs run(const std::vector<int32_t>& boundaries) const {
    CudaArena arena;
    Matrix x(arena, type, rows, left_columns, gap), y(arena, type, rows, right_columns, gap);
    x.write(left);
    y.write(right);
    GroupedGemmParams p;
    p.type = type, p.result = result, p.transposed = transposed, p.add = add;
    p.rows = rows, p.groups = groups, p.left_columns = left_columns, p.right_columns = right_columns;
    p.left = x.const_rows(), p.right = y.writable();
    place_boundaries(p, arena, boundaries, on_device);
    std::vector<Matrix> matrices;
    for (int g = 0; g < groups; ++g) {
      matrices.emplace_back(arena, type, transposed ? left_columns : right_columns,
                            transposed ? right_columns : left_columns, gap);
      Matrix vector(arena, type, 1, right_columns);
      matrices.back().write(transposed ? transpose(matrix[g]) : matrix[g]);
      vector.write(bias[g]);
      p.matrix[g] = matrices.back().data(), p.matrix_stride[g] = matrices.back().const_rows().stride;
      if (has_bias[g]) p.bias[g] = vector.data();
    }
    REQUIRE(grouped_gemm_supports(p));
    run_with_workspace(0, kPoison, [&](void*) { return launch_grouped_gemm_cuda(p, nullptr); });
    CHECK(arena.intact());
    CHECK(y.gaps_untouched());
    if (result == Result::kRight) return {output_of("rows", y)};
    Outputs outputs;
    for (int g = 0; g < groups; ++g) {
      CHECK(matrices[g].gaps_untouched());
      outputs.push_back(output_of("matrix " + std::to_string(g), matrices[g]));
    }
    return outputs;
  }

  Reals transpose(const Reals& values) const {
    Reals other(values.size());
    for (int64_t i = 0; i < right_columns; ++i) {
      for (int64_t j = 0; j < left_columns; ++j) other[j * right_columns + i] = values[i * left_columns + j];
    }
    return other;
  }

  // Some elements of every row of an output, of which `group` has the rows.
  void check(const Output& got, int group, Random& random) const {
    const int64_t columns = result == Result::kMatrix ? left_columns : right_columns;
    const int64_t count = got.values.size() / columns;
    for (int64_t row = 0; row < count; ++row) {
      const int owner = result == Result::kMatrix ? group : modality_of_row(offsets, row);
      const int64_t depth =
          result == Result::kMatrix ? offsets[group + 1] - offsets[group] : int64_t{left_columns};
      const int step = 1 + std::min<int64_t>(columns - 1, count * columns * (1 + depth / 8) / 20000);
      for (int64_t column = random.below(step); column < columns; column += step) {
        const Real wanted = expected(owner, row, column), value = got.values[row * columns + column];
        const Real tolerance = half_unit(type, wanted) + 2e-5L * std::sqrt(Real(1 + depth));
        if (!(std::abs(value - wanted) <= tolerance)) {
          FAIL_CHECK(got.name << ": row " << row << ", column " << column << " is " << value << ", expected "
                              << wanted);
          return;
        }
      }
    }
  }
};

// Whether this device has the kernels; where it must, they are there.
bool served() {
  const bool yes = grouped_gemm_supports(smallest());
#ifdef MOM_SM90A
  REQUIRE(yes == (compute_capability_cuda() == 90));
#endif
  return yes;
}

template <typename Check>
void for_random_problems(const Check& check) {
  if (!served()) return;
  for (int i = 0; i < random_cases(); ++i) {
    Random random(i);
    const Problem problem = Problem::random(random);
    INFO("problem " << i << ": " << problem.describe());
    check(problem, random);
  }
}

TEST_CASE("a group's rows meet its matrix", "[grouped_gemm]") {
  for_random_problems([](const Problem& problem, Random& random) {
    const Outputs got = problem.run(problem.offsets);
    for (size_t i = 0; i < got.size(); ++i) problem.check(got[i], i, random);
    // Again, and from boundaries on the other side.
    Problem other = problem;
    other.on_device = !problem.on_device;
    CHECK(bitwise_mismatch(problem.run(problem.offsets), got) == "");
    CHECK(bitwise_mismatch(other.run(problem.offsets), got) == "");
  });
}

TEST_CASE("many tiles, and deep ones", "[grouped_gemm]") {
  if (!served()) return;
  struct Sizes {
    const char* meant_for;  // on 132 multiprocessors
    Result result;
    std::vector<int32_t> rows;
    int left_columns, right_columns;
  };
  const Sizes all[] = {
      {"pairs with several tiles, the last ones outside", Result::kRight, {2816, 40, 60}, 136, 2816},
      {"pairs with several narrow tiles", Result::kRight, {9000, 8500, 40}, 24, 200},
      {"more tiles than are found at once", Result::kRight, {300000, 260000, 40}, 8, 8},
      {"clusters of 2", Result::kRight, {600, 400}, 2048, 1280},
      {"clusters of 4", Result::kRight, {600, 400}, 2048, 640},
      {"clusters of 8", Result::kRight, {300, 0, 200}, 2048, 768},
      {"clusters of 8, narrow", Result::kRight, {300, 0, 200}, 2048, 160},
      {"pairs with three matrices' tiles each", Result::kMatrix, {200, 0, 150}, 1408, 2816},
      {"clusters of 7, narrow matrices", Result::kMatrix, {2000, 0, 1500}, 400, 160}};
  for (const Sizes& sizes : all) {
    for (const bool transposed : {false, true}) {
      if (transposed && sizes.result == Result::kMatrix) continue;
      Random random(sizes.right_columns);
      const bool add = transposed;
      const Problem problem = Problem::of(random, sizes.result, transposed, add, sizes.rows,
                                          sizes.left_columns, sizes.right_columns);
      INFO(sizes.meant_for << ": " << problem.describe());
      const Outputs got = problem.run(problem.offsets);
      for (size_t i = 0; i < got.size(); ++i) problem.check(got[i], i, random);
      CHECK(bitwise_mismatch(problem.run(problem.offsets), got) == "");
    }
  }
}

TEST_CASE("what is not a group's does not reach it, not even NaN", "[grouped_gemm]") {
  for_random_problems([](const Problem& problem, Random& random) {
    const int chosen = random.below(problem.groups);
    const int32_t begin = problem.offsets[chosen], end = problem.offsets[chosen + 1];
    Problem poisoned = problem;
    const auto poison = [&](Reals& values, int64_t columns) {
      for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
        if (i / columns < begin || i / columns >= end) values[i] = std::nanl("");
      }
    };
    poison(poisoned.left, problem.left_columns);
    poison(poisoned.right, problem.right_columns);
    const Output got = poisoned.run(problem.offsets)[problem.result == Result::kMatrix ? chosen : 0];
    const Output wanted = problem.run(problem.offsets)[problem.result == Result::kMatrix ? chosen : 0];
    if (problem.result == Result::kMatrix) {
      CHECK(got.values == wanted.values);
      return;
    }
    const auto part = [&](const Output& output, int64_t from, int64_t to) {
      const auto first = output.values.begin();
      return Reals(first + from * problem.right_columns, first + to * problem.right_columns);
    };
    CHECK(part(got, begin, end) == part(wanted, begin, end));
    if (problem.add) return;
    const int32_t padding = problem.offsets.back();
    CHECK(part(got, padding, problem.rows) == Reals((problem.rows - padding) * problem.right_columns));
  });
}

TEST_CASE("boundaries of groups that nobody honest would send harm no memory", "[grouped_gemm]") {
  for_random_problems([](Problem problem, Random& random) {
    problem.on_device = true;
    std::vector<int32_t> garbage = problem.offsets;
    // Some within the rows, but in no order.
    for (int32_t& boundary : garbage) {
      boundary = random.chance(2) ? random.below(problem.rows + 1) : random.hostile(problem.rows);
    }
    problem.run(garbage);
  });
}

TEST_CASE("products that are not of 16 bits in whole words are left to others", "[grouped_gemm]") {
  const GroupedGemmParams p = smallest();
  if (!served()) return;
  const auto refused = [&](auto change) {
    GroupedGemmParams other = p;
    change(other);
    return !grouped_gemm_supports(other);
  };
  const auto behind = [](const void* data, int bytes) {
    return const_cast<char*>(static_cast<const char*>(data)) + bytes;
  };
  CHECK_FALSE(refused([](GroupedGemmParams& q) { q.type = ScalarType::kFloat16; }));
  CHECK(refused([](GroupedGemmParams& q) { q.type = ScalarType::kFloat32; }));
  CHECK(refused([](GroupedGemmParams& q) { q.rows = 0; }));
  CHECK(refused([](GroupedGemmParams& q) { q.left_columns = 12; }));
  CHECK(refused([](GroupedGemmParams& q) { q.right_columns = 4; }));
  CHECK(refused([](GroupedGemmParams& q) { q.left_columns = 0; }));
  CHECK(refused([&](GroupedGemmParams& q) { q.left.data = behind(q.left.data, 8); }));
  CHECK(refused([&](GroupedGemmParams& q) { q.right.data = behind(q.right.data, 2); }));
  CHECK(refused([&](GroupedGemmParams& q) { q.matrix[0] = behind(q.matrix[0], 4); }));
  CHECK(refused([&](GroupedGemmParams& q) { q.bias[0] = behind(q.matrix[0], 2); }));
  CHECK(refused([](GroupedGemmParams& q) { q.left.stride = 12; }));
  CHECK(refused([](GroupedGemmParams& q) { q.rows = 2, q.left.stride = 0; }));
  CHECK(refused([](GroupedGemmParams& q) { q.matrix_stride[0] = 9; }));
  CHECK(refused([](GroupedGemmParams& q) { q.groups = GroupedGemmParams::kMostGroups + 1; }));
  CHECK(refused([](GroupedGemmParams& q) { q.groups = 0; }));
  CHECK(refused([](GroupedGemmParams& q) {
    q.result = Result::kMatrix, q.transposed = true, q.left_columns = q.left.stride = 16;
  }));
  CHECK(
      refused([](GroupedGemmParams& q) { q.rows = INT32_MAX, q.right_columns = q.right.stride = 1 << 24; }));
}

}  // namespace
}  // namespace mixture_of_mamba::testing
