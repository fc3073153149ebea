// The call that op.py packs, and the check whether the kernel supports it.

#pragma once

#include <cstdint>

#include "codes.h"

namespace {

constexpr int MOST_PROJECTIONS = 2;

struct Call {  // op.py packs it: fifteen pointers and eighteen integers
  void* out;
  const void *folded, *x, *projections[MOST_PROJECTIONS], *columns;
  const int64_t* counts;
  const int32_t* neurons;
  const uint8_t* codes;  // [capacity, k, ...], as are scale and zero
  const Half* scale;
  const uint8_t* zero;
  const float *guard, *surrogate, *biases;  // [capacity, 2 or k + 2], [capacity, k + 1], [capacity, k] or null
  const uint8_t* fold;
  int64_t k, tokens, d, d_out, hidden, capacity, d_groups, d_out_groups, strides[MOST_PROJECTIONS], column_stride, bits, activation,
      fold_bits, row_bits, low_bits, dtype, threads;
};

bool between(int64_t low, int64_t value, int64_t high) { return low <= value && value <= high; }

// Whether the kernel supports every number of a call, and its list fits the tensors that hold it. op.py has checked
// that the tensors have the sizes that these numbers state; neurons are checked where they are read.
bool supported(const Call& call) {
  const auto width = [](int64_t bits) { return between(1, bits, 8) || bits == 16; };
  const auto grouped = [](int64_t columns, int64_t groups) {
    for (int64_t size = BLOCK / 2; size <= 2 * BLOCK; size *= 2)
      if (groups == (columns + size - 1) / size) return true;
    return false;
  };
  const int64_t listed = call.counts[0], guarded = call.counts[1];
  const bool coded = call.row_bits != 16;
  return between(1, call.k, MOST_PROJECTIONS) && between(1, call.tokens, TOKENS) && call.d >= 1 && call.d_out >= 0 &&
         grouped(call.d, call.d_groups) && between(1, call.bits, 8) && width(call.fold_bits) && width(call.row_bits) &&
         (!coded || (between(1, call.low_bits, 8) && grouped(call.d_out, call.d_out_groups))) &&
         between(0, call.activation, ACTIVATIONS - 1) && between(0, call.dtype, 2) && call.threads >= 1 &&
         between(0, guarded, listed) && listed <= call.capacity && (!coded || guarded == listed) &&
         (listed == 0 || call.hidden >= 1);
}

}  // namespace
