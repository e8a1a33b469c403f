// SPDX-License-Identifier: Apache-2.0
#include "kernels/few_rows.h"

#include <algorithm>

#include "catch.h"
#include "cuda_device.h"
#include "device.h"
#include "kernels/cuda/few_rows_kernels.h"
#include "tokens.h"

// Projections of few rows. The kernels exist for a GPU only.

namespace mixture_of_mamba::testing {
namespace {

// One of the two kernels.
struct Kernel {
  const char* name;
  bool (*serves)(const FewRowsParams&);
  int (*launch)(const FewRowsParams&, CUstream_st*);
  int most_rows, most_rows_of_small;
};
constexpr Kernel kKernels[] = {{"direct", few_rows::direct_serves, few_rows::launch_direct,
                                few_rows::kMostDirectRows, few_rows::kMostDirectRowsOfSmall},
                               {"tiles", few_rows::tiles_serve, few_rows::launch_tiles, few_rows::kMostRows,
                                few_rows::kMostRowsOfSmall}};

bool has(const Kernel& kernel) {
  FewRowsParams p;
  p.rows = p.begin[1] = 1, p.in_features = p.x.stride = p.weight_stride[0] = 8, p.out_features = 1;
  return kernel.serves(p);
}

struct Projection {
  const Kernel* kernel;
  ScalarType type;
  int in_features, out_features, modalities, x_gap, weight_gap, y_gap;
  std::vector<int32_t> offsets;
  int32_t rows;
  bool on_device;
  Settled settled;
  std::vector<bool> has_bias;
  Reals x;
  std::vector<Reals> weight, bias;

  static Projection random(Random& random, const Kernel& kernel) {
    Projection p;
    p.kernel = &kernel;
    p.type = random.chance(3) ? ScalarType::kFloat16 : ScalarType::kBFloat16;
    // Few out_features and many in_features are cut into parts, many out_features into wide tiles.
    const int kind = random.below(16);
    const bool parts = kind < 4, wide = kind == 4 || kind == 5, both = kind == 6;
    p.in_features = parts  ? 8 * random.between(200, 600)
                    : both ? 8 * random.between(256, 270)
                           : 8 * random.between(1, wide ? 4 : 60);
    p.out_features = parts  ? random.between(1, 50)
                     : wide ? random.between(3100, 5000)
                     : both ? random.between(1000, 1100)
                            : random.between(1, 200);
    p.modalities =
        !both && random.chance(8) ? FewRowsParams::kMostModalities : random.between(1, both ? 2 : 4);
    p.x_gap = 8 * random.below(3), p.weight_gap = 8 * random.below(3), p.y_gap = random.below(9);
    p.on_device = random.chance(3), p.settled = static_cast<Settled>(random.below(3));
    const bool small = int64_t{p.in_features} * p.out_features <= 1 << 20;
    const int limit = small ? kernel.most_rows_of_small : kernel.most_rows;
    // Boundaries on the device leave the host with all rows for every modality; tiles serve any number.
    const bool several_tiles = p.on_device && kernel.serves == few_rows::tiles_serve && random.chance(2);
    const int largest = several_tiles ? 2 * limit / (1 + p.modalities / 4)
                        : p.on_device ? limit / p.modalities
                                      : limit;
    const int most = random.chance(2) ? std::min(4, largest) : random.between(1, largest);
    p.offsets = {0};
    for (int m = 0; m < p.modalities; ++m) {
      p.offsets.push_back(p.offsets.back() + (random.chance(4) ? 0 : random.between(0, most)));
    }
    p.rows = p.offsets.back();
    const int padding = several_tiles || !p.on_device ? 9 : limit - p.rows + 1;
    if (random.chance(2)) p.rows += random.below(padding);
    p.x = random.normal(int64_t{p.rows} * p.in_features, 0, 1, p.type);
    for (int m = 0; m < p.modalities; ++m) {
      p.has_bias.push_back(random.chance(2));
      p.weight.push_back(random.normal(int64_t{p.out_features} * p.in_features, 0, 1, p.type));
      p.bias.push_back(random.normal(p.out_features, 0, 1, p.type));
    }
    return p;
  }

  int modality(int64_t row) const { return modality_of_row(offsets, row); }

  Real expected(int64_t row, int64_t column) const {
    const int m = modality(row);
    if (m == modalities) return 0;
    Real sum = has_bias[m] ? bias[m][column] : 0;
    for (int k = 0; k < in_features; ++k) {
      sum += x[row * in_features + k] * weight[m][column * in_features + k];
    }
    return sum;
  }

  // The result, from boundaries that may be others than those of this problem.
  Output run(const std::vector<int32_t>& boundaries) const {
    CudaArena arena;
    Matrix in(arena, type, rows, in_features, x_gap), out(arena, type, rows, out_features, y_gap);
    in.write(x);
    FewRowsParams p;
    p.type = type;
    p.x = in.const_rows();
    p.y = out.writable();
    p.rows = rows, p.in_features = in_features, p.out_features = out_features, p.modalities = modalities;
    p.settled = settled;
    place_boundaries(p, arena, boundaries, on_device);
    for (int m = 0; m < modalities; ++m) {
      Matrix matrix(arena, type, out_features, in_features, weight_gap), vector(arena, type, 1, out_features);
      matrix.write(weight[m]);
      vector.write(bias[m]);
      p.weight[m] = matrix.data(), p.weight_stride[m] = matrix.const_rows().stride;
      if (has_bias[m]) p.bias[m] = vector.data();
    }
    REQUIRE(few_rows_supports(p));
    REQUIRE(kernel->serves(p));
    run_with_workspace(0, kPoison, [&](void*) { return rows == 0 ? 0 : kernel->launch(p, nullptr); });
    CHECK(arena.intact());
    CHECK(out.gaps_untouched());
    return output_of("y", out);
  }
};

// Calls check(problem, random) on random problems of each kernel.
template <typename Check>
void for_random_projections(const Check& check) {
  for (const Kernel& kernel : kKernels) {
    if (!has(kernel)) continue;
    for (int i = 0; i < random_cases(); ++i) {
      Random random(i);
      const Projection p = Projection::random(random, kernel);
      INFO(kernel.name << " projection " << i << ": " << name_of(p.type) << ", " << p.rows << " x "
                       << p.in_features << " -> " << p.out_features << ", " << p.modalities
                       << " modalities, boundaries on the " << (p.on_device ? "device" : "host")
                       << ", settled " << static_cast<int>(p.settled));
      check(p, random);
    }
  }
}

TEST_CASE("few rows times the matrix of their modality", "[few_rows]") {
  for_random_projections([](const Projection& p, Random& random) {
    const Output got = p.run(p.offsets);
    CHECK(bitwise_mismatch({p.run(p.offsets)}, {got}) == "");
    // All of a small result; of a large one some elements of every row.
    for (int64_t row = 0; row < p.rows; ++row) {
      const int step = 1 + p.out_features * int64_t{p.in_features} / 30000;
      for (int64_t column = random.below(step); column < p.out_features; column += step) {
        const Real expected = p.expected(row, column);
        const Real value = got.values[row * p.out_features + column];
        const Real tolerance = half_unit(p.type, expected) + 1e-5L * std::sqrt(Real(p.in_features));
        if (!(std::abs(value - expected) <= tolerance)) {
          FAIL_CHECK("row " << row << ", column " << column << " is " << value << ", expected " << expected);
        }
      }
    }
  });
}

TEST_CASE("a row's result does not depend on the rows beside it", "[few_rows]") {
  for_random_projections([](const Projection& p, Random& random) {
    if (p.rows == 0) return;
    const int64_t row = random.below(p.rows), m = p.modality(row);
    const auto row_of = [&](const Output& output, int64_t i) {
      const auto begin = output.values.begin() + i * p.out_features;
      return Reals(begin, begin + p.out_features);
    };
    const Reals expected = row_of(p.run(p.offsets), row);
    const Reals x(p.x.begin() + row * p.in_features, p.x.begin() + (row + 1) * p.in_features);

    Projection others = p;
    others.x = random.normal(p.x.size(), 0, 1, p.type);
    std::copy(x.begin(), x.end(), others.x.begin() + row * p.in_features);
    CHECK(row_of(others.run(p.offsets), row) == expected);

    // Of many in_features tiles of more rows have other sections.
    int most = p.on_device ? p.rows : 0;
    for (int k = 0; k < p.modalities; ++k) most = std::max(most, p.offsets[k + 1] - p.offsets[k]);
    if (p.kernel->serves == few_rows::tiles_serve && p.in_features >= 1024 && most > 32) return;
    Projection one = p;
    one.rows = 1, one.x = x;
    for (int k = 0; k <= p.modalities; ++k) one.offsets[k] = k > m;
    CHECK(row_of(one.run(one.offsets), 0) == expected);
  });
}

TEST_CASE("boundaries on the device that nobody honest would send harm no memory", "[few_rows]") {
  for_random_projections([](Projection p, Random& random) {
    if (!p.on_device) return;
    std::vector<int32_t> garbage = p.offsets;
    for (int32_t& boundary : garbage) boundary = random.hostile(p.rows);
    p.run(garbage);
  });
}

TEST_CASE("what is not few rows of 16 bits in whole words is left to others", "[few_rows]") {
  const bool tiles = has(kKernels[1]);
  const auto most = [&](bool small) {
    const Kernel& kernel = kKernels[tiles];
    return small ? kernel.most_rows_of_small : kernel.most_rows;
  };
  FewRowsParams p;
  alignas(16) static char memory[64];
  p.x = {memory, 8};
  p.weight[0] = memory, p.weight_stride[0] = 8;
  p.rows = p.begin[1] = 1, p.in_features = 8, p.out_features = 1;
  CHECK(few_rows_supports(p));
  const auto refused = [&](auto change) {
    FewRowsParams other = p;
    change(other);
    return !few_rows_supports(other);
  };
  CHECK(refused([](FewRowsParams& q) { q.type = ScalarType::kFloat32; }));
  CHECK(refused([](FewRowsParams& q) { q.in_features = 12; }));
  CHECK(refused([](FewRowsParams& q) { q.in_features = 0; }));
  CHECK(refused([](FewRowsParams& q) { q.out_features = 0; }));
  CHECK(refused([](FewRowsParams& q) { q.x.data = memory + 2; }));
  CHECK(refused([](FewRowsParams& q) { q.x.stride = 12; }));
  CHECK(refused([](FewRowsParams& q) { q.weight[0] = memory + 8; }));
  CHECK(refused([](FewRowsParams& q) { q.weight_stride[0] = 9; }));
  CHECK(refused([](FewRowsParams& q) { q.modalities = FewRowsParams::kMostModalities + 1; }));
  CHECK(refused([&](FewRowsParams& q) { q.rows = q.begin[1] = most(true) + 1; }));
  CHECK(refused([&](FewRowsParams& q) {
    q.in_features = q.x.stride = q.weight_stride[0] = 1024, q.out_features = 1025;
    q.rows = q.begin[1] = most(false) + 1;
  }));
  CHECK_FALSE(refused([&](FewRowsParams& q) { q.rows = q.begin[1] = most(true); }));
}

}  // namespace
}  // namespace mixture_of_mamba::testing
