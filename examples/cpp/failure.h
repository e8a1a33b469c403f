// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/Exception.h>

#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>

namespace examples {

/// What a user can mend; main() prints it and ends with status 2.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Runs a program: --help prints its usage, a failure is one line on stderr and status 2.
inline int run(int argc, char** argv, const char* name, const char* usage,
               const std::function<int(int, char**)>& body) {
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--help") {
      std::cout << usage;
      return 0;
    }
  }
  try {
    return body(argc, argv);
  } catch (const Failure& failure) {
    std::cerr << name << ": " << failure.what() << '\n';
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    std::cerr << name << ": " << text.substr(0, text.find('\n')) << '\n';
  } catch (const std::exception& error) {
    std::cerr << name << ": " << error.what() << '\n';
  }
  return 2;
}

}  // namespace examples
