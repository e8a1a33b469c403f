// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "text.h"

// Names of what may be a modality's own, and options that are lists of them.

namespace mixture_of_mamba::frontend {

using Names = std::vector<std::string>;

inline const Names kProjections{"in_proj", "x_proj", "dt_proj", "out_proj"};

// What a layer may have per modality.
inline const Names kDecoupled{"in_proj", "x_proj", "dt_proj", "out_proj", "A_log", "D"};

inline bool contains(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// As Python writes a tuple or a list of names.
inline std::string tuple_of(const Names& names) {
  if (names.empty()) return "()";
  return fmt::format("('{}'{})", fmt::join(names, "', '"), names.size() == 1 ? "," : "");
}
inline std::string list_of(const Names& names) {
  return names.empty() ? "[]" : fmt::format("['{}']", fmt::join(names, "', '"));
}

inline void check_names(const std::string& argument, const Names& names, const Names& allowed) {
  Names unknown, sorted = names;
  for (const std::string& name : names) {
    if (!contains(allowed, name)) unknown.push_back(name);
  }
  require_value(unknown.empty(), "{} must name projections among {}, got {}", argument, tuple_of(allowed),
                list_of(unknown));
  std::sort(sorted.begin(), sorted.end());
  require_value(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
                "{} must name each projection at most once, got {}", argument, list_of(names));
}

}  // namespace mixture_of_mamba::frontend
