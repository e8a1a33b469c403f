// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>

namespace examples {

/// One line that is overwritten on a terminal; elsewhere a line every 15 seconds.
class Progress {
 public:
  /// \param seconds, tokens of training before.
  Progress(int64_t step, int64_t steps, double seconds, int64_t tokens)
      : first_(step), steps_(steps), tokens_(tokens), seconds_(seconds), begun_(now()), since_(begun_) {}

  /// \param text, image losses, means since the last call.
  /// \param tokens read since then.
  void show(int64_t step, double text, double image, int64_t tokens) {
    const double time = now();
    const double left =
        (time - begun_) / static_cast<double>(step - first_) * static_cast<double>(steps_ - step);
    const auto seconds = static_cast<int64_t>(left);
    seconds_ += time - since_;
    tokens_ += tokens;
    rate_ = static_cast<double>(tokens) / (time - since_);
    const std::string line =
        fmt::format("step {:>{}}/{}  text {:.3f}  image {:.3f}  {:.0f} tokens/s  ETA {}:{:02}", step,
                    std::to_string(steps_).size(), steps_, text, image, rate_, seconds / 60, seconds % 60);
    if (terminal_) {
      fmt::print("\r{:<78}{}", line, step == steps_ ? "\n" : "");
      open_ = step != steps_;
    } else if (time - printed_ >= kSeconds || step == steps_) {
      fmt::print("{}\n", line);
      printed_ = time;
    }
    std::fflush(stdout);
    since_ = time;
  }

  double seconds() const { return seconds_; }  ///< of training
  int64_t tokens() const { return tokens_; }   ///< read in it
  double rate() const { return rate_; }        ///< tokens a second, before the last show()

  /// A line of its own.
  void print(const std::string& line) {
    fmt::print("{}{}\n", open_ ? "\n" : "", line);
    std::fflush(stdout);
    open_ = false;
  }

  /// What took time since show() was not training.
  void resume() { since_ = now(); }

 private:
  static constexpr double kSeconds = 15;

  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  int64_t first_, steps_, tokens_;
  double seconds_, begun_, since_, printed_ = 0, rate_ = 0;
  bool terminal_ = isatty(STDOUT_FILENO) != 0;
  bool open_ = false;  // the terminal's line has no end yet
};

}  // namespace examples
