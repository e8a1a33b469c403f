// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/cuda.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "failure.h"

// Command line of the examples. Whatever is wrong gets one line on stderr and exit status 2.

namespace examples {

/// The projections per modality that --mixer names: mom, mamba, or some of them with commas.
inline std::vector<std::string> decoupled(const std::string& mixer) {
  const std::vector<std::string> all{"in_proj", "x_proj", "dt_proj", "out_proj"};
  if (mixer == "mom") return all;
  if (mixer == "mamba") return {};
  std::set<std::string> named;
  std::istringstream names(mixer);
  bool fine = !mixer.empty();
  for (std::string name; std::getline(names, name, ',');) {
    fine &= std::find(all.begin(), all.end(), name) != all.end() && named.insert(name).second;
  }
  if (!fine) {
    throw Failure(fmt::format("--mixer must be mom, mamba, or some of {} with commas, got '{}'",
                              fmt::join(all, ", "), mixer));
  }
  std::vector<std::string> chosen;
  for (const std::string& name : all) {
    if (named.contains(name)) chosen.push_back(name);
  }
  return chosen;
}

/// Options `--name value`, and `--flag` for those named in `flags`.
class Arguments {
 public:
  Arguments(int argc, char** argv, const std::set<std::string>& names,
            const std::set<std::string>& flags = {}) {
    for (int i = 1; i < argc; ++i) {
      const std::string name = argv[i];
      if (flags.contains(name)) {
        values_[name] = "";
      } else if (!names.contains(name)) {
        throw Failure(fmt::format("unknown argument '{}' (--help lists the arguments)", name));
      } else if (i + 1 == argc) {
        throw Failure(name + " needs a value");
      } else {
        values_[name] = argv[++i];
      }
    }
  }

  bool has(const std::string& name) const { return values_.contains(name); }

  std::string text(const std::string& name, const std::string& otherwise) const {
    const auto found = values_.find(name);
    return found == values_.end() ? otherwise : found->second;
  }

  std::string required(const std::string& name) const {
    if (!has(name)) throw Failure(name + " is required (--help lists the arguments)");
    return values_.at(name);
  }

  int64_t integer(const std::string& name, int64_t otherwise, int64_t least = 1) const {
    return has(name) ? parse<int64_t>(name, static_cast<double>(least), "an integer", &to_integer)
                     : otherwise;
  }

  double number(const std::string& name, double otherwise, double least = 0) const {
    return has(name) ? parse<double>(name, least, "a number", &to_number) : otherwise;
  }

  std::string one_of(const std::string& name, const std::vector<std::string>& choices) const {
    const std::string value = text(name, choices.front());
    for (const std::string& choice : choices) {
      if (value == choice) return value;
    }
    throw Failure(fmt::format("{} must be {}, got '{}'", name, fmt::join(choices, " or "), value));
  }

  torch::Device device() const {
    const std::string value = one_of("--device", {"cpu", "cuda"});
    if (value == "cuda" && !torch::cuda::is_available()) {
      throw Failure("--device cuda needs a GPU and a CUDA build of LibTorch, which sees none");
    }
    return torch::Device(value);
  }

 private:
  static int64_t to_integer(const std::string& text, size_t* used) { return std::stoll(text, used); }
  static double to_number(const std::string& text, size_t* used) { return std::stod(text, used); }

  template <typename T>
  T parse(const std::string& name, double least, const char* kind,
          T (*convert)(const std::string&, size_t*)) const {
    const std::string& text = values_.at(name);
    try {
      size_t used = 0;
      const T value = convert(text, &used);
      // Written so that NaN is refused as well.
      if (used == text.size() && static_cast<double>(value) >= least) return value;
    } catch (const std::logic_error&) {  // not a number, or out of range
    }
    throw Failure(fmt::format("{} must be {}, {} or more, got '{}'", name, kind, least, text));
  }

  std::map<std::string, std::string> values_;
};

}  // namespace examples
