// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

// Memory that notices writes beyond what a kernel was given.

namespace mixture_of_mamba::testing {

using Bytes = std::vector<unsigned char>;
constexpr unsigned char kPoison = 0xff;  // every element of poison is a NaN, or -1

class Arena {
 public:
  virtual ~Arena() = default;
  // Filled with kPoison; freed with the arena.
  virtual void* allocate(int64_t bytes) = 0;
  virtual void write(void* to, const void* from, int64_t bytes) = 0;
  virtual void read(void* to, const void* from, int64_t bytes) const = 0;
  // Whether nothing beside the allocations was written.
  virtual bool intact() const = 0;

  template <typename T>
  T* place(const std::vector<T>& values) {
    T* memory = static_cast<T*>(allocate(values.size() * sizeof(T)));
    write(memory, values.data(), values.size() * sizeof(T));
    return memory;
  }
  template <typename T>
  std::vector<T> fetch(const T* memory, int64_t count) const {
    std::vector<T> values(count);
    read(values.data(), memory, count * sizeof(T));
    return values;
  }
};

// Every allocation ends where an unmapped page begins, and another one lies before it: a read or write
// behind the end is a fault. Bytes between the first unmapped page and the allocation are poison.
class HostArena : public Arena {
 public:
  HostArena() = default;
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;
  ~HostArena() override;
  void* allocate(int64_t bytes) override;
  void write(void* to, const void* from, int64_t bytes) override;
  void read(void* to, const void* from, int64_t bytes) const override;
  bool intact() const override;

 private:
  struct Mapping {
    unsigned char* begin;
    int64_t size;
    unsigned char* data;
  };
  std::vector<Mapping> mappings_;
};

}  // namespace mixture_of_mamba::testing
