// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <limits>

#include "arena.h"
#include "catch.h"
#include "support.h"
#include "vector_code.h"

// Conversions of the chosen instruction set, by vectors and by single numbers, against arithmetic on values.

namespace mixture_of_mamba::testing {
namespace {

const ScalarType kHalfTypes[] = {ScalarType::kBFloat16, ScalarType::kFloat16};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

bool is_nan16(ScalarType type, uint16_t bits) { return std::isnan(decode16(type, bits)); }

// The same value; of NaNs any, of zeros that of the same sign.
void check_decoded(ScalarType type, uint16_t bits, float got) {
  const float expected = static_cast<float>(decode16(type, bits));
  if (std::isnan(expected) ? !std::isnan(got) : bits_of(got) != bits_of(expected)) {
    FAIL_CHECK(name_of(type) << " bits " << bits << " became " << got << ", expected " << expected);
  }
}

void check_encoded(ScalarType type, float value, uint16_t got) {
  const uint16_t expected = encode16(type, value);
  if (std::isnan(value) ? !is_nan16(type, got) : got != expected) {
    FAIL_CHECK(value << " became " << name_of(type) << " bits " << got << ", expected " << expected);
  }
}

TEST_CASE("every 16-bit number is converted to float exactly", "[vector]") {
  for (ScalarType type : kHalfTypes) {
    std::vector<uint16_t> all(0x10000);
    for (int i = 0; i < 0x10000; ++i) all[i] = static_cast<uint16_t>(i);
    std::vector<float> loaded(all.size());
    vector_code().load(type, all.data(), loaded.data(), all.size());
    for (int i = 0; i < 0x10000; ++i) {
      check_decoded(type, all[i], loaded[i]);
      check_decoded(type, all[i], vector_code().to_float(type, all[i]));
    }
  }
}

// Every 16-bit number, the middle to the next one, and the floats beside both.
std::vector<float> around_all(ScalarType type) {
  std::vector<float> values;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const Real value = decode16(type, static_cast<uint16_t>(bits));
    const Real next = decode16(type, static_cast<uint16_t>(bits + 1));
    for (Real center : {value, (value + next) / 2}) {
      const float narrow = static_cast<float>(center);
      values.push_back(narrow);
      if (!std::isfinite(narrow)) continue;
      values.push_back(std::nextafter(narrow, std::numeric_limits<float>::infinity()));
      values.push_back(std::nextafter(narrow, -std::numeric_limits<float>::infinity()));
    }
  }
  return values;
}

TEST_CASE("a float is rounded to the nearest 16-bit number, of two to the even one", "[vector]") {
  for (ScalarType type : kHalfTypes) {
    std::vector<float> values = around_all(type);
    const float largest = std::numeric_limits<float>::max(),
                smallest = std::numeric_limits<float>::denorm_min();
    for (float extreme : {largest, smallest, std::numeric_limits<float>::min(), 65519.996f, 65520.0f, 1e5f}) {
      values.push_back(extreme);
      values.push_back(-extreme);
    }
    std::vector<uint16_t> stored(values.size());
    vector_code().store(type, values.data(), stored.data(), values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      check_encoded(type, values[i], stored[i]);
      check_encoded(type, values[i], vector_code().from_float(type, values[i]));
    }
  }
}

TEST_CASE("a NaN stays a NaN whatever its payload and sign", "[vector]") {
  for (ScalarType type : kHalfTypes) {
    std::vector<float> values;
    for (uint32_t payload = 1; payload < 0x800000; payload = payload * 2 + 1) {
      for (uint32_t bits : {0x7f800000 | payload, 0xff800000 | payload, 0x7fc00000 | payload}) {
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        values.push_back(value);
      }
    }
    std::vector<uint16_t> stored(values.size());
    vector_code().store(type, values.data(), stored.data(), values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      CHECK(is_nan16(type, stored[i]));
      CHECK(is_nan16(type, vector_code().from_float(type, values[i])));
    }
  }
}

TEST_CASE("a partial vector is loaded and stored without touching what lies behind it", "[vector]") {
  for (ScalarType type : kHalfTypes) {
    for (int count = 0; count <= 40; ++count) {
      HostArena arena;
      std::vector<uint16_t> numbers(count);
      for (int i = 0; i < count; ++i) numbers[i] = encode16(type, i - 7.5L);
      float* const loaded = arena.place(std::vector<float>(count));
      uint16_t* const stored = arena.place(std::vector<uint16_t>(count));
      vector_code().load(type, arena.place(numbers), loaded, count);
      vector_code().store(type, loaded, stored, count);
      CHECK(arena.fetch(stored, count) == numbers);
      for (int i = 0; i < count; ++i) CHECK(loaded[i] == i - 7.5f);
      CHECK(arena.intact());
    }
  }
}

}  // namespace
}  // namespace mixture_of_mamba::testing
