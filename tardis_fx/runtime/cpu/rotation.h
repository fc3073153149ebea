// Rotations by signs and Hadamard matrices (rotation.py).

#pragma once

#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t ROTATED = 128;  // columns of a block

// Calls `visit(start, size)` for every block of d columns.
template <class Visit>
void for_blocks(int64_t d, Visit visit) {
  int64_t size = ROTATED;
  for (int64_t start = 0; start < d; start += size) {
    while (size > d - start) size /= 2;
    visit(start, size);
  }
}

// Multiplies a block by its Hadamard matrix, which is its own inverse.
void transform(float* block, int64_t size) {
  for (int64_t half = 1; half < size; half *= 2)
    for (int64_t start = 0; start < size; start += 2 * half) {
      float *const low = block + start, *const high = low + half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float difference = low[i] - high[i];
        low[i] += high[i];
        high[i] = difference;
      }
    }
  const float factor = 1 / std::sqrt(float(size));
  for (int64_t i = 0; i < size; ++i) block[i] *= factor;
}

}  // namespace
