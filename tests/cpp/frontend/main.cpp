// SPDX-License-Identifier: Apache-2.0
#define CATCH_CONFIG_RUNNER  // version 2 takes its implementation from this; version 3 has a library

#include "../catch.h"

// Catch2 returns a count of failures, which ctest could take for something else.
int main(int argc, char** argv) { return Catch::Session().run(argc, argv) == 0 ? 0 : 1; }
