// Rotations by signs and Hadamard matrices (rotation.py).

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

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

// The lane numbers of a vector with one bit flipped.
template <int HALF>
Ints partners() {
  Ints lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i ^ HALF;
  return lanes;
}

// Sums of lanes that lie HALF apart in the lower one, and differences in the higher one.
template <int HALF>
Floats butterfly(Floats values) {
  Ints signs;
  for (int i = 0; i < LANES; ++i) signs[i] = i & HALF ? int32_t(0x80000000) : 0;
  return __builtin_shuffle(values, partners<HALF>()) + (Floats)((Ints)values ^ signs);
}

template <int HALF>
void transform_lanes(Floats* values, int64_t count) {
  if constexpr (HALF < LANES) {
    for (int64_t i = 0; i < count; ++i) values[i] = butterfly<HALF>(values[i]);
    transform_lanes<2 * HALF>(values, count);
  }
}

// Multiplies a block by its Hadamard matrix, which is its own inverse. Additions have the order of rotation.in_order, so
// that float32 gives the same bits.
void transform(float* block, int64_t size) {
  const float factor = float(1 / std::sqrt(double(size)));
  if (size < LANES) {
    for (int64_t half = 1; half < size; half *= 2)
      for (int64_t start = 0; start < size; start += 2 * half)
        for (int64_t i = start; i < start + half; ++i) {
          const float low = block[i], high = block[i + half];
          block[i] = low + high;
          block[i + half] = low - high;
        }
    for (int64_t i = 0; i < size; ++i) block[i] *= factor;
    return;
  }
  Floats values[ROTATED / LANES];
  const int64_t count = size / LANES;
  for (int64_t i = 0; i < count; ++i) values[i] = load(block + i * LANES);
  transform_lanes<1>(values, count);
  for (int64_t half = 1; half < count; half *= 2)
    for (int64_t start = 0; start < count; start += 2 * half)
      for (int64_t i = start; i < start + half; ++i) {
        const Floats low = values[i], high = values[i + half];
        values[i] = low + high;
        values[i + half] = low - high;
      }
  for (int64_t i = 0; i < count; ++i) put(values[i] * factor, block + i * LANES);
}

}  // namespace
