// Memory of the calling thread, kept from call to call so that its pages are mapped once.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct alignas(64) Line {
  char bytes[64];
};

// Memory number N of the calling thread.
template <class T, int N>
T* scratch(int64_t count) {
  static thread_local std::vector<Line> lines;
  lines.resize(std::max(lines.size(), (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line) + 1));
  return reinterpret_cast<T*>(lines.data());
}

}  // namespace
