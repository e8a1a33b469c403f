// SPDX-License-Identifier: Apache-2.0
#include "arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace mixture_of_mamba::testing {

namespace {
const int64_t kPage = sysconf(_SC_PAGESIZE);
}

void* HostArena::allocate(int64_t bytes) {
  const int64_t usable = (bytes + kPage - 1) / kPage * kPage, size = usable + 2 * kPage;
  void* mapped = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  unsigned char* const begin = static_cast<unsigned char*>(mapped);
  if (usable > 0) {
    if (mprotect(begin + kPage, usable, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    std::memset(begin + kPage, kPoison, usable);
  }
  unsigned char* const data = begin + kPage + usable - bytes;
  mappings_.push_back({begin, size, data});
  return data;
}

HostArena::~HostArena() {
  for (const Mapping& mapping : mappings_) munmap(mapping.begin, mapping.size);
}

void HostArena::write(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void HostArena::read(void* to, const void* from, int64_t bytes) const {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

bool HostArena::intact() const {
  return std::all_of(mappings_.begin(), mappings_.end(), [](const Mapping& mapping) {
    return std::all_of(mapping.begin + kPage, mapping.data,
                       [](unsigned char byte) { return byte == kPoison; });
  });
}

}  // namespace mixture_of_mamba::testing
