// SPDX-License-Identifier: Apache-2.0
#include "kernels/grouped_linear.h"

#include "catch.h"
#include "cuda_device.h"
#include "device.h"
#include "tokens.h"

// The parts of a grouped linear layer that are not a GEMM. They exist for a GPU only.

namespace mixture_of_mamba::testing {
namespace {

// Rows of a few modalities, then padding.
struct Groups {
  ScalarType type;
  int64_t rows, columns, gap, offset;
  int modalities;
  std::vector<int32_t> offsets;

  static Groups random(Random& random) {
    Groups groups;
    groups.type = random.type(false);
    groups.columns = random.chance(2) ? 8 * random.between(1, 20) : random.below(70);
    groups.gap = random.chance(2) ? 0 : random.chance(2) ? 8 * random.below(4) : random.below(9);
    groups.offset = random.chance(3) ? random.below(9) : 0;
    groups.modalities = random.between(1, 5);
    groups.offsets = {0};
    for (int m = 0; m < groups.modalities; ++m) {
      const int size = random.chance(4) ? 0 : random.chance(6) ? 3000 : random.below(100);
      groups.offsets.push_back(groups.offsets.back() + size);
    }
    groups.rows = groups.offsets.back() + (random.chance(2) ? random.below(50) : 0);
    return groups;
  }
  int64_t size() const { return rows * columns; }
  int modality(int64_t row) const { return modality_of_row(offsets, row); }
  Matrix matrix(Arena& arena) const { return Matrix(arena, type, rows, columns, gap, offset); }
  Reals values(Random& random) const { return random.normal(size(), 0, 1, type); }
  // Unspecified results, but nothing outside is touched.
  Groups hostile(Random& random) const {
    Groups garbage = *this;
    for (int32_t& boundary : garbage.offsets) boundary = random.hostile(rows);
    return garbage;
  }
};

void run(const std::function<int(void*)>& launch) { run_with_workspace(0, kPoison, launch); }

// Calls check(groups, random) on random groups, also with garbage for boundaries.
template <typename Check>
void for_random_groups(const Check& check) {
  for (int i = 0; i < random_cases(); ++i) {
    Random random(i);
    const Groups groups = Groups::random(random);
    INFO("groups " << i << ": " << name_of(groups.type) << ", " << groups.rows << " rows, " << groups.columns
                   << " columns, gap " << groups.gap << ", offset " << groups.offset);
    check(groups, groups.offsets, random);
    check(groups, groups.hostile(random).offsets, random);
  }
}

TEST_CASE("one modality's rows are selected, the others zeroed or left alone", "[grouped_linear]") {
  for_random_groups([](const Groups& groups, const std::vector<int32_t>& offsets, Random& random) {
    const Reals source = groups.values(random), before = groups.values(random);
    for (bool zero : {false, true}) {
      CudaArena arena;
      Matrix from = groups.matrix(arena), to = groups.matrix(arena);
      from.write(source);
      to.write(before);
      SelectRowsParams p;
      p.type = groups.type;
      p.source = from.const_rows();
      p.out = to.writable();
      p.rows = groups.rows;
      p.columns = groups.columns;
      p.offsets = arena.place(offsets);
      p.modality = random.below(groups.modalities);
      p.zero_other_rows = zero;
      run([&](void*) { return launch_select_rows_cuda(p, nullptr); });
      const Reals got = to.values();
      for (int64_t i = 0; i < groups.size(); ++i) {
        const int64_t row = i / groups.columns;
        const bool selected = row >= offsets[p.modality] && row < offsets[p.modality + 1];
        const Real expected = selected ? source[i] : zero ? 0 : before[i];
        if (got[i] != expected) FAIL_CHECK("row " << row << " is " << got[i] << ", expected " << expected);
      }
      CHECK(to.gaps_untouched());
      CHECK(arena.intact());
    }
  });
}

TEST_CASE("the bias of its modality is added to a row, and padding rows are cleared", "[grouped_linear]") {
  for_random_groups([](const Groups& groups, const std::vector<int32_t>& offsets, Random& random) {
    const Reals before = groups.values(random);
    const Reals bias = random.normal(groups.modalities * groups.columns, 0, 1, groups.type);
    for (bool with_bias : {false, true}) {
      CudaArena arena;
      Matrix y = groups.matrix(arena), biases(arena, groups.type, groups.modalities, groups.columns);
      y.write(before);
      biases.write(bias);
      FinishRowsParams p;
      p.type = groups.type;
      p.y = y.writable();
      p.rows = groups.rows;
      p.columns = groups.columns;
      p.offsets = arena.place(offsets);
      p.modalities = groups.modalities;
      if (with_bias) p.bias = biases.data();
      run([&](void*) { return launch_finish_rows_cuda(p, nullptr); });
      CHECK(y.gaps_untouched());
      CHECK(arena.intact());
      if (offsets != groups.offsets) continue;
      Reals expected(groups.size());
      for (int64_t i = 0; i < groups.size(); ++i) {
        const int modality = groups.modality(i / groups.columns);
        if (modality == groups.modalities) continue;
        expected[i] = before[i] + (with_bias ? bias[modality * groups.columns + i % groups.columns] : 0);
      }
      const Output wanted = {"y", groups.type, expected, {}};
      CHECK(mismatch({output_of("y", y)}, {wanted}, groups.type, {1e-6L, 1e-6L}) == "");
    }
  });
}

TEST_CASE("a modality's rows are summed, the same way in every run", "[grouped_linear]") {
  for_random_groups([](const Groups& groups, const std::vector<int32_t>& offsets, Random& random) {
    const Reals source = groups.values(random);
    Outputs first;
    for (unsigned char poison : kWorkspacePoisons) {
      CudaArena arena;
      Matrix from = groups.matrix(arena);
      from.write(source);
      const Matrix sums(arena, ScalarType::kFloat32, groups.modalities, groups.columns);
      SumRowsParams p;
      p.type = groups.type;
      p.source = from.const_rows();
      p.rows = groups.rows;
      p.columns = groups.columns;
      p.offsets = arena.place(offsets);
      p.modalities = groups.modalities;
      p.sums = static_cast<float*>(sums.data());
      run_with_workspace(sum_rows_workspace_cuda(p), poison,
                         [&](void* workspace) { return launch_sum_rows_cuda(p, workspace, nullptr); });
      CHECK(arena.intact());
      const Outputs got = {output_of("sums", sums)};
      if (first.empty()) first = got;
      CHECK(bitwise_mismatch(got, first) == "");
      if (offsets != groups.offsets) continue;
      Reals expected(groups.modalities * groups.columns);
      for (int64_t i = 0; i < groups.size(); ++i) {
        const int modality = groups.modality(i / groups.columns);
        if (modality == groups.modalities) continue;
        expected[modality * groups.columns + i % groups.columns] += source[i];
      }
      const Output wanted = {"sums", ScalarType::kFloat32, expected, {}};
      CHECK(mismatch(got, {wanted}, groups.type, {1e-6L, 2e-5L}) == "");
    }
  });
}

}  // namespace
}  // namespace mixture_of_mamba::testing
