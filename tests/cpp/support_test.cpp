// SPDX-License-Identifier: Apache-2.0
#include "support.h"

#include <cmath>
#include <mutex>
#include <utility>

#include "catch.h"
#include "tokens.h"

// The tests' own tools: a reference that is wrong would hide what is.

namespace mixture_of_mamba::testing {
namespace {

const ScalarType kHalfTypes[] = {ScalarType::kBFloat16, ScalarType::kFloat16};

TEST_CASE("numbers of 16 bits have the values that their formats define", "[support]") {
  CHECK(decode16(ScalarType::kBFloat16, 0x3f80) == 1);
  CHECK(decode16(ScalarType::kBFloat16, 0xc040) == -3);
  CHECK(decode16(ScalarType::kBFloat16, 0x0001) == 0x1p-133L);
  CHECK(decode16(ScalarType::kBFloat16, 0x7f7f) == 0x1.fep127L);
  CHECK(std::isinf(decode16(ScalarType::kBFloat16, 0x7f80)));
  CHECK(decode16(ScalarType::kFloat16, 0x3c00) == 1);
  CHECK(decode16(ScalarType::kFloat16, 0x0001) == 0x1p-24L);
  CHECK(decode16(ScalarType::kFloat16, 0x0400) == 0x1p-14L);
  CHECK(decode16(ScalarType::kFloat16, 0x7bff) == 65504);
  CHECK(std::isnan(decode16(ScalarType::kFloat16, 0x7c01)));
  CHECK(std::signbit(decode16(ScalarType::kFloat16, 0x8000)));
}

TEST_CASE("rounding to 16 bits goes to the nearest, of two to the even one, and to infinity", "[support]") {
  CHECK(encode16(ScalarType::kBFloat16, 1 + 0x1p-8L) == 0x3f80);
  CHECK(encode16(ScalarType::kBFloat16, 1 + 0x3p-8L) == 0x3f82);
  CHECK(encode16(ScalarType::kBFloat16, 1 + 0x1.01p-8L) == 0x3f81);
  CHECK(encode16(ScalarType::kBFloat16, 0x1.ffp127L) == 0x7f80);
  CHECK(encode16(ScalarType::kFloat16, 65519.99L) == 0x7bff);
  CHECK(encode16(ScalarType::kFloat16, 65520) == 0x7c00);
  CHECK(encode16(ScalarType::kFloat16, 0x1p-25L) == 0);
  CHECK(encode16(ScalarType::kFloat16, 0x1.8p-24L) == 2);
  CHECK(encode16(ScalarType::kFloat16, 0x1.ffcp-15L) == 0x0400);
  CHECK(encode16(ScalarType::kFloat16, -Real(INFINITY)) == 0xfc00);
}

TEST_CASE("every number of 16 bits survives decoding and encoding", "[support]") {
  for (ScalarType type : kHalfTypes) {
    for (int bits = 0; bits < 0x10000; ++bits) {
      const Real value = decode16(type, static_cast<uint16_t>(bits));
      if (std::isnan(value)) {
        CHECK(std::isnan(decode16(type, encode16(type, value))));
      } else if (encode16(type, value) != bits) {
        FAIL_CHECK(name_of(type) << " " << bits);
      }
    }
  }
}

TEST_CASE("thread pools call the body on pieces that cover the range once", "[support]") {
  for (const ParallelFor& parallel : {kSerial, kPieces}) {
    for (int64_t size : {0, 1, 2, 7, 64, 100}) {
      for (int64_t grain : {1, 3, 64, 1000}) {
        std::vector<int> visits(size);
        std::mutex mutex;
        parallel(0, size, grain, [&](int64_t begin, int64_t end) {
          const std::lock_guard lock(mutex);
          if (end - begin < std::min(grain, size)) FAIL_CHECK("a piece below the grain");
          for (int64_t i = begin; i < end; ++i) ++visits.at(i);
        });
        CHECK(visits == std::vector<int>(size, 1));
      }
    }
  }
}

TEST_CASE("an arena notices a write before an allocation and a matrix one between its rows", "[support]") {
  HostArena arena;
  unsigned char* bytes = static_cast<unsigned char*>(arena.allocate(100));
  const Matrix matrix(arena, ScalarType::kFloat32, 3, 5, 2, 1);
  CHECK(arena.intact());
  CHECK(matrix.gaps_untouched());
  static_cast<float*>(matrix.data())[5] = 1;
  CHECK(arena.intact());
  CHECK(!matrix.gaps_untouched());
  bytes[-1] = 0;
  CHECK(!arena.intact());
}

TEST_CASE("a result is wrong when one element is, when it is so in the mean, and when it is not a number",
          "[support]") {
  const Tolerance tolerance = {1e-6L, 1e-4L};
  const auto verdict = [&](Reals values) {
    const Output expected{"x", ScalarType::kFloat32, Reals(1000, 1), {}};
    const Output got{"x", ScalarType::kFloat32, std::move(values), {}};
    return mismatch({got}, {expected}, ScalarType::kFloat32, tolerance) == "";
  };
  CHECK(verdict(Reals(1000, 1)));
  CHECK(verdict(Reals(1000, 1 + 0.9e-6L)));
  CHECK(!verdict(Reals(1000, 1 + 1.1e-6L)));
  for (const auto& [value, right] : {std::pair{1 + 2e-5L, true}, {1 + 3e-4L, false}, {Real(NAN), false}}) {
    Reals values(1000, 1);
    values[500] = value;
    CHECK(verdict(values) == right);
  }
}

TEST_CASE("random tokens are sorted by modality within a permutation", "[support]") {
  for (int i = 0; i < random_cases(); ++i) {
    Random random(i);
    const Tokens tokens = Tokens::random(random, 70);
    std::vector<int> owners(tokens.count());
    for (int32_t row : tokens.rows) ++owners.at(row);
    CHECK(owners == std::vector<int>(tokens.count(), 1));
    CHECK(tokens.cu_seqlens.back() == tokens.count());
    if (!tokens.routed) continue;
    int before = 0;
    for (int64_t row = 0; row < tokens.count(); ++row) {
      const int modality = tokens.modality(row) < 0 ? tokens.modalities : tokens.modality(row);
      if (modality < before) FAIL_CHECK("row " << row);
      before = modality;
    }
  }
}

}  // namespace
}  // namespace mixture_of_mamba::testing
