// SPDX-License-Identifier: Apache-2.0
#include "kernels/few_rows.h"

#include <algorithm>

#include "catch.h"
#include "cuda_device.h"
#include "device.h"
#include "kernels/cuda/device_info.h"
#include "tokens.h"

// Projections of few rows. The kernels exist for a GPU only.

namespace mixture_of_mamba::testing {
namespace {

// Rows of a modality that the kernel which needs compute capability 9.0 serves, and the one for all devices.
constexpr int kMostTileRows = 128, kMostRows = 32, kMostRowsOfSmall = 64;

bool has_tiles() { return compute_capability_cuda() == 90; }
bool is_small(int64_t elements) { return elements <= 1 << 20; }
int most_rows(int64_t elements) {
  if (has_tiles()) return is_small(elements) ? 2 * kMostTileRows : kMostTileRows;
  return is_small(elements) ? kMostRowsOfSmall : kMostRows;
}

struct Projection {
  ScalarType type;
  int in_features, out_features, modalities, x_gap, weight_gap, y_gap;
  std::vector<int32_t> offsets;
  int32_t rows;
  bool on_device;
  Settled settled;
  std::vector<bool> has_bias;
  Reals x;
  std::vector<Reals> weight, bias;

  static Projection random(Random& random) {
    Projection p;
    p.type = random.chance(3) ? ScalarType::kFloat16 : ScalarType::kBFloat16;
    // Few out_features and many in_features are cut into parts, many out_features into wide tiles.
    const int kind = random.below(8);
    p.in_features = kind < 2 ? 8 * random.between(200, 600) : 8 * random.between(1, kind == 2 ? 4 : 60);
    p.out_features = kind == 2 ? random.between(3100, 5000) : random.between(1, kind < 2 ? 50 : 200);
    p.modalities = random.chance(8) ? FewRowsParams::kMostModalities : random.between(1, 4);
    p.x_gap = 8 * random.below(3), p.weight_gap = 8 * random.below(3), p.y_gap = random.below(9);
    p.on_device = random.chance(3), p.settled = static_cast<Settled>(random.below(3));
    // Boundaries on the device leave the host with all rows for every modality, of which there are several tiles.
    const int limit = most_rows(p.in_features * p.out_features) * (p.on_device && has_tiles() ? 3 : 1);
    const int largest = p.on_device ? limit / p.modalities : limit;
    const int most = random.chance(2) ? std::min(4, largest) : random.between(1, largest);
    p.offsets = {0};
    for (int m = 0; m < p.modalities; ++m) {
      p.offsets.push_back(p.offsets.back() + (random.chance(4) ? 0 : random.between(0, most)));
    }
    p.rows = p.offsets.back();
    if (random.chance(2)) p.rows += random.below(p.on_device ? limit - p.rows + 1 : 9);
    p.x = random.normal(int64_t{p.rows} * p.in_features, 0, 1, p.type);
    for (int m = 0; m < p.modalities; ++m) {
      p.has_bias.push_back(random.chance(2));
      p.weight.push_back(random.normal(int64_t{p.out_features} * p.in_features, 0, 1, p.type));
      p.bias.push_back(random.normal(p.out_features, 0, 1, p.type));
    }
    return p;
  }

  int modality(int64_t row) const { return modality_of_row(offsets, row); }

  // Whether as many rows, and one row, are added up alike.
  bool is_as_one_row() const {
    const int tiles = (out_features + 63) / 64;
    int most = on_device ? rows : 0;
    for (int m = 0; m < modalities; ++m) most = std::max(most, offsets[m + 1] - offsets[m]);
    if (!has_tiles() || tiles >= 64) return true;
    return most <= (is_small(int64_t{in_features} * out_features) && tiles < 32 ? kMostRowsOfSmall : 32);
  }

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
    if (on_device) {
      p.offsets = arena.place(boundaries);
    } else {
      std::copy(boundaries.begin(), boundaries.end(), p.begin);
    }
    for (int m = 0; m < modalities; ++m) {
      Matrix matrix(arena, type, out_features, in_features, weight_gap), vector(arena, type, 1, out_features);
      matrix.write(weight[m]);
      vector.write(bias[m]);
      p.weight[m] = matrix.data(), p.weight_stride[m] = matrix.const_rows().stride;
      if (has_bias[m]) p.bias[m] = vector.data();
    }
    REQUIRE(few_rows_supports(p));
    run_with_workspace(0, kPoison, [&](void*) { return launch_few_rows_cuda(p, nullptr); });
    CHECK(arena.intact());
    CHECK(out.gaps_untouched());
    return output_of("y", out);
  }
};

// Calls check(problem, random) on random problems.
template <typename Check>
void for_random_projections(const Check& check) {
  for (int i = 0; i < random_cases(); ++i) {
    Random random(i);
    const Projection p = Projection::random(random);
    INFO("projection " << i << ": " << name_of(p.type) << ", " << p.rows << " x " << p.in_features << " -> "
                       << p.out_features << ", " << p.modalities << " modalities, boundaries on the "
                       << (p.on_device ? "device" : "host") << ", settled " << static_cast<int>(p.settled));
    check(p, random);
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
    if (p.rows == 0 || !p.is_as_one_row()) return;
    const Output all = p.run(p.offsets);
    const int64_t row = random.below(p.rows), m = p.modality(row);
    Projection one = p;
    one.rows = 1;
    one.x = {p.x.begin() + row * p.in_features, p.x.begin() + (row + 1) * p.in_features};
    for (int k = 0; k <= p.modalities; ++k) one.offsets[k] = k > m;
    const Output alone = one.run(one.offsets);
    const Reals expected(all.values.begin() + row * p.out_features,
                         all.values.begin() + (row + 1) * p.out_features);
    CHECK(alone.values == expected);
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
  CHECK(refused([](FewRowsParams& q) { q.rows = q.begin[1] = most_rows(1) + 1; }));
  CHECK(refused([](FewRowsParams& q) {
    q.in_features = q.x.stride = q.weight_stride[0] = 1024, q.out_features = 1025;
    q.rows = q.begin[1] = most_rows(1024 * 1025) + 1;
  }));
  CHECK_FALSE(refused([](FewRowsParams& q) { q.rows = q.begin[1] = most_rows(1); }));
}

}  // namespace
}  // namespace mixture_of_mamba::testing
