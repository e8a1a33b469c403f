// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "failure.h"

namespace examples {

/// Words and image codes in one numbering: the lines of words.txt, then codes, written [0], [1], ...
class Vocabulary {
 public:
  explicit Vocabulary(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw Failure(path + " cannot be opened; examples/python/export_stream.py writes it");
    for (std::string word; std::getline(file, word);) {
      ids_[word] = first_code();
      words_.push_back(word);
    }
    for (const char* word : {"<boi>", "<eos>"}) {
      if (!ids_.contains(word))
        throw Failure(path + " is not a words.txt of export_stream.py: it lacks " + word);
    }
  }

  int64_t first_code() const { return static_cast<int64_t>(words_.size()); }
  int64_t id(const std::string& word) const { return ids_.at(word); }

  std::vector<int64_t> encode(const std::string& text, int64_t codes) const {
    std::vector<int64_t> ids;
    std::istringstream stream(text);
    for (std::string word; stream >> word;) {
      const auto found = ids_.find(word);
      ids.push_back(found != ids_.end() ? found->second : first_code() + code(word, codes));
    }
    return ids;
  }

  std::string decode(int64_t id) const {
    return id < first_code() ? words_[static_cast<size_t>(id)] : fmt::format("[{}]", id - first_code());
  }

 private:
  static int64_t code(const std::string& word, int64_t codes) {
    int64_t value = -1;
    char bracket = 0;
    std::istringstream stream(word);
    if (stream >> bracket >> value && bracket == '[' && value >= 0 && value < codes &&
        word == fmt::format("[{}]", value)) {
      return value;
    }
    throw Failure(fmt::format("--prompt must hold words of words.txt and image codes [0] .. [{}], got '{}'",
                              codes - 1, word));
  }

  std::vector<std::string> words_;
  std::unordered_map<std::string, int64_t> ids_;
};

/// Follows a sequence and says of each token which modality it has and which place of a picture comes next.
class Position {
 public:
  Position(const Vocabulary& vocabulary, int64_t slots)
      : begin_(vocabulary.id("<boi>")), first_code_(vocabulary.first_code()), slots_(slots) {}

  /// Read a token. \return its modality: 0 text, 1 image.
  int64_t read(int64_t token) {
    const bool image = token >= first_code_;
    if (token == begin_) {
      slot_ = 1;
    } else {
      slot_ = image && slot_ > 0 ? (slot_ + 1) % slots_ : 0;
    }
    return image;
  }

  /// 1 .. slots - 1 when the next token is that code of a picture, else 0.
  int64_t slot() const { return slot_; }

 private:
  int64_t begin_, first_code_, slots_;
  int64_t slot_ = 0;
};

}  // namespace examples
