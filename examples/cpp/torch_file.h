// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <caffe2/serialize/inline_container.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <torch/types.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "failure.h"

// Files of torch.save, read and written on both sides: a dict of tensors and plain values, which Python reads
// with torch.load(weights_only=True).

namespace examples {

using Dict = c10::impl::GenericDict;

inline Dict make_dict() { return Dict(c10::AnyType::get(), c10::AnyType::get()); }

/// The dict in a file of torch.save or save_dict(), its tensors on the CPU.
inline Dict load_dict(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failure(path + " cannot be opened");
  try {
    std::vector<char> bytes(std::filesystem::file_size(path));
    file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    return torch::jit::pickle_load(bytes).toGenericDict();
  } catch (const std::exception&) {
    throw Failure(path +
                  " is not a torch.save file of plain dicts, values and tensors; LibTorch reads no "
                  "OrderedDict, so save dict(model.state_dict())");
  }
}

inline void flush_to_disk(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY);
  const bool failed = descriptor < 0 || ::fsync(descriptor) != 0;
  if (descriptor >= 0) ::close(descriptor);
  if (failed) throw Failure(path + " cannot be written");
}

/// Replaces the file at `path` in one atomic rename, so a whole one is there at any moment.
inline void save_dict(const Dict& content, const std::string& path) {
  const std::string partial = path + ".partial";
  std::string pickle;
  // torch::pickle_save marks the types of dicts and lists, which torch.load(weights_only=True) refuses.
  torch::jit::Pickler pickler([&pickle](const char* bytes, size_t count) { pickle.append(bytes, count); },
                              nullptr, nullptr, nullptr, nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(content);
  pickler.stop();
  try {
    caffe2::serialize::PyTorchStreamWriter file(partial);
    file.writeRecord("data.pkl", pickle.data(), pickle.size());
    size_t index = 0;
    for (const torch::Tensor& tensor : pickler.tensorData()) {
      const auto data = torch::jit::getWriteableTensorData(tensor);
      file.writeRecord(fmt::format("data/{}", index++), data.data(), data.sizeInBytes());
    }
    file.writeEndOfFile();
  } catch (const c10::Error&) {
    throw Failure(partial + " cannot be written");
  }
  flush_to_disk(partial);
  std::filesystem::rename(partial, path);
  flush_to_disk(std::filesystem::absolute(path).parent_path());
}

}  // namespace examples
