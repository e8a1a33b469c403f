// SPDX-License-Identifier: Apache-2.0
#include <functional>

#include "scan_problem.h"

// Calls of the scan that are chosen, not drawn.

namespace mixture_of_mamba::testing {

namespace {

ScanProblem unfilled(ScalarType type) {
  ScanProblem p;
  p.name = "base";
  p.type = type;
  // What the GPU's fast paths take for 16-bit types, and not a whole number of vectors for the others.
  p.channels = size_of(type) == 2 ? 128 : 70;
  p.tokens.lengths = {37, 37};
  p.tokens.sorted = p.tokens.routed = true;
  p.tokens.modalities = p.bias_modalities = 3;
  p.softplus = p.skip = p.gate = p.initial = p.final = p.grad_final = true;
  return p;
}

class Table {
 public:
  explicit Table(ScalarType type) : type_(type) {}

  void vary(const std::string& name, const std::function<void(ScanProblem&)>& change) {
    ScanProblem p = unfilled(type_);
    p.name = name;
    change(p);
    Random random(problems_.size());
    p.fill(random);
    problems_.push_back(p);
  }
  void lengths(const std::string& name, std::vector<int> lengths, bool packed) {
    vary(name, [&](ScanProblem& p) { p.tokens.lengths = lengths, p.tokens.packed = packed; });
  }
  std::vector<ScanProblem> problems() const { return problems_; }

 private:
  ScalarType type_;
  std::vector<ScanProblem> problems_;
};

void pad(ScanProblem& p) { p.tokens.padding = p.garbage = true; }

}  // namespace

ScanProblem ScanProblem::base(ScalarType type) {
  ScanProblem p = unfilled(type);
  Random random(0);
  p.fill(random);
  return p;
}

std::vector<ScanProblem> ScanProblem::table(ScalarType type) {
  Table table(type);
  table.vary("base", [](ScanProblem&) {});
  table.vary("time order, one modality", [](ScanProblem& p) {
    p.tokens.sorted = p.tokens.routed = false, p.tokens.modalities = p.bias_modalities = 1;
  });
  table.vary("rows alone",
             [](ScanProblem& p) { p.tokens.routed = false, p.tokens.modalities = p.bias_modalities = 1; });
  table.vary("offsets alone", [](ScanProblem& p) { p.tokens.sorted = false, pad(p); });
  table.vary("one bias", [](ScanProblem& p) { p.bias_modalities = 1; });
  table.vary("no bias", [](ScanProblem& p) { p.bias_modalities = 0; });
  table.vary("no D", [](ScanProblem& p) { p.skip = false; });
  table.vary("no z", [](ScanProblem& p) { p.gate = false; });
  table.vary("no softplus", [](ScanProblem& p) { p.softplus = false; });
  table.vary("no states in or out", [](ScanProblem& p) { p.initial = p.final = p.grad_final = false; });
  table.vary("state in place", [](ScanProblem& p) { p.in_place = true; });
  table.vary("padding", pad);
  table.vary("reverse", [](ScanProblem& p) { p.reverse = true, pad(p); });
  if (type != ScalarType::kFloat16) table.vary("growing states", [](ScanProblem& p) { p.growing = true; });
  table.lengths("packed", {0, 5, 16, 0, 33, 1, 90, 0}, true);
  table.vary("packed, reverse", [](ScanProblem& p) {
    p.tokens.lengths = {3, 0, 48, 17}, p.tokens.packed = p.reverse = true, pad(p);
  });
  for (int length : {1, 15, 16, 17}) table.lengths("a tile, more and less", {length, length}, false);
  table.lengths("length 0", {0, 0}, false);
  table.lengths("batch 0", {}, false);
  table.lengths("empty documents", {0, 0, 0}, true);
  table.vary("no channels", [](ScanProblem& p) { p.channels = 0; });
  for (int states : {0, 1, 3, 4, 8, 12, 15, 17, 64}) {
    table.vary("other states", [&](ScanProblem& p) { p.states = states, pad(p); });
  }
  table.vary("many states", [](ScanProblem& p) { p.states = 300, p.channels = 9, pad(p); });
  table.vary("many modalities", [](ScanProblem& p) { p.tokens.modalities = p.bias_modalities = 13; });
  table.vary("aligned rows", [](ScanProblem& p) { p.gap = 64; });
  table.vary("odd rows", [](ScanProblem& p) { p.gap = 3, p.offset = 1; });
  table.vary("one channel", [](ScanProblem& p) { p.channels = 1; });
  for (int bit = 0; bit < 6; ++bit) {
    table.vary("absent output", [&](ScanProblem& p) { p.absent_outputs = 1u << bit; });
  }
  table.vary("all outputs absent that may be", [](ScanProblem& p) { p.absent_outputs = 63; });
  return table.problems();
}

std::vector<ScanProblem> ScanProblem::large_table(ScalarType type) {
  Table table(type);
  table.lengths("chunks", {517, 517}, false);
  table.vary("packed chunks", [](ScanProblem& p) {
    p.tokens.lengths = {300, 0, 64, 411, 2}, p.tokens.packed = true, pad(p);
  });
  table.vary("reverse chunks", [](ScanProblem& p) { p.tokens.lengths = {700}, p.reverse = true; });
  table.vary("chunks of many states", [](ScanProblem& p) {
    p.tokens.lengths = {301, 301}, p.states = 37, p.channels = 66;
  });
  for (int modalities : {1, 2}) {
    table.vary("chunks of few states", [&](ScanProblem& p) {
      p.tokens.lengths = {301, 301}, p.states = 8, p.tokens.modalities = p.bias_modalities = modalities;
    });
  }
  table.vary("many channels", [](ScanProblem& p) { p.tokens.lengths = {40, 40, 40}, p.channels = 384; });
  table.vary("many sequences",
             [](ScanProblem& p) { p.tokens.lengths = std::vector<int>(300, 9), p.channels = 64; });
  if (size_of(type) > 2) return table.problems();
  // The GPU's fast path gives a multiprocessor one block where blocks are few.
  for (int length : {5, 20, 40}) {
    table.vary("a block a multiprocessor", [&](ScanProblem& p) {
      p.tokens.lengths = std::vector<int>(120, length), p.channels = 128;
      p.tokens.padding = p.reverse = length == 40;
    });
  }
  return table.problems();
}

}  // namespace mixture_of_mamba::testing
