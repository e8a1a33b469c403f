// SPDX-License-Identifier: Apache-2.0
#include "support.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

// Random numbers and thread pools.

namespace mixture_of_mamba::testing {

namespace {

int64_t environment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoll(value) : otherwise;
}

}  // namespace

int random_cases() { return static_cast<int>(environment("MOM_TEST_CASES", 100)); }

Random::Random(uint64_t index) {
  std::seed_seq seed{static_cast<uint64_t>(environment("MOM_TEST_SEED", 1)), index};
  engine_.seed(seed);
}

ScalarType Random::type(bool with_float64) { return static_cast<ScalarType>(below(with_float64 ? 4 : 3)); }

Reals Random::normal(int64_t count, Real mean, Real deviation, ScalarType type) {
  std::normal_distribution<double> distribution;
  Reals values(count);
  unsigned char element[8];
  for (Real& value : values) {
    encode(type, mean + deviation * distribution(engine_), element);
    value = decode(type, element);
  }
  return values;
}

int32_t Random::hostile(int64_t end) {
  const int32_t extremes[] = {INT32_MIN, INT32_MAX, -1, static_cast<int32_t>(end),
                              static_cast<int32_t>(end) + 1};
  const int choice = below(8);
  return choice < 5 ? extremes[choice] : static_cast<int32_t>(bits());
}

const ParallelFor kSerial{[](int64_t begin, int64_t end, int64_t, void* context, ParallelFor::Body body) {
  body(context, begin, end);
}};

const ParallelFor kPieces{
    [](int64_t begin, int64_t end, int64_t grain, void* context, ParallelFor::Body body) {
      const int64_t pieces = std::max<int64_t>(1, (end - begin) / grain);
      const auto run = [=](int64_t last) {
        for (int64_t i = last; i >= 0; i -= 2) {
          body(context, begin + i * grain, i == pieces - 1 ? end : begin + (i + 1) * grain);
        }
      };
      std::thread other(run, pieces - 2);
      run(pieces - 1);
      other.join();
    }};

}  // namespace mixture_of_mamba::testing
