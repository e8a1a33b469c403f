// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <mixture_of_mamba/models/vocabulary.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "failure.h"

namespace examples {

/// Words and image codes in one numbering: a vocabulary.txt, whose first line says how many codes there are
/// and how many one picture has. Codes are written [0], [1], ...
class Words {
 public:
  explicit Words(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw Failure(path + " cannot be opened; examples/python/export_stream.py writes it");
    std::string name, line;
    std::getline(file, line);
    std::istringstream sizes(line);
    if (!(sizes >> name >> codes_ >> patches_) || name != "image") {
      throw Failure(path + " is not a vocabulary.txt of export_stream.py");
    }
    while (std::getline(file, line)) {
      ids_[line] = first_code();
      words_.push_back(line);
    }
    for (const char* word : {"<boi>", "<eoi>", "<eos>"}) {
      if (!ids_.contains(word))
        throw Failure(path + " is not a vocabulary.txt of export_stream.py: it lacks " + word);
    }
  }

  mixture_of_mamba::models::Vocabulary vocabulary() const {
    return mixture_of_mamba::models::Vocabulary(
        {{first_code()}, {codes_, id("<boi>"), id("<eoi>"), patches_}});
  }

  int64_t first_code() const { return static_cast<int64_t>(words_.size()); }
  int64_t patches() const { return patches_; }
  int64_t id(const std::string& word) const { return ids_.at(word); }

  std::vector<int64_t> encode(const std::string& text) const {
    std::vector<int64_t> ids;
    std::istringstream stream(text);
    for (std::string word; stream >> word;) {
      const auto found = ids_.find(word);
      ids.push_back(found != ids_.end() ? found->second : first_code() + code(word));
    }
    return ids;
  }

  std::string decode(int64_t id) const {
    return id < first_code() ? words_[static_cast<size_t>(id)] : fmt::format("[{}]", id - first_code());
  }

 private:
  int64_t code(const std::string& word) const {
    int64_t value = -1;
    char bracket = 0;
    std::istringstream stream(word);
    if (stream >> bracket >> value && bracket == '[' && value >= 0 && value < codes_ &&
        word == fmt::format("[{}]", value)) {
      return value;
    }
    throw Failure(
        fmt::format("--prompt must hold words of vocabulary.txt and image codes [0] .. [{}], got '{}'",
                    codes_ - 1, word));
  }

  int64_t codes_ = 0, patches_ = 0;
  std::vector<std::string> words_;
  std::unordered_map<std::string, int64_t> ids_;
};

}  // namespace examples
