// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "failure.h"
#include "torch_file.h"

namespace examples {

/// A file of one JSON object a line. It is cut to its first `length` bytes when it is opened: what was
/// written after the checkpoint that a run goes on from is dropped, and steps done twice appear once.
class Metrics {
 public:
  Metrics(const std::string& path, int64_t length) : path_(path) {
    const bool there = std::filesystem::exists(path);
    if (length > (there ? static_cast<int64_t>(std::filesystem::file_size(path)) : 0)) {
      throw Failure(path + " is shorter than it was at the checkpoint; start over with --fresh");
    }
    if (there) std::filesystem::resize_file(path, static_cast<uintmax_t>(length));
    file_.open(path, std::ios::app);
  }

  void write(const std::string& line) { file_ << line << '\n'; }

  /// The length of the file, all of it safe on the disk.
  int64_t sync() {
    file_.flush();
    if (!file_) throw Failure(path_ + " cannot be written");
    flush_to_disk(path_);
    return static_cast<int64_t>(std::filesystem::file_size(path_));
  }

 private:
  std::string path_;
  std::ofstream file_;
};

}  // namespace examples
