// SPDX-License-Identifier: Apache-2.0
#define CATCH_CONFIG_RUNNER  // version 2 takes its implementation from this; version 3 has a library

#include <cstdio>

#include "catch.h"
#include "support.h"

int main(int argc, char** argv) {
  if (const char* reason = mixture_of_mamba::testing::reason_to_skip(); reason != nullptr) {
    std::printf("skipped: %s\n", reason);
    return mixture_of_mamba::testing::kSkipped;
  }
  // Catch2 returns a count of failures, which could be the status that means skipped.
  return Catch::Session().run(argc, argv) == 0 ? 0 : 1;
}
