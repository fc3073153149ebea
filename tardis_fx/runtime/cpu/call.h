// The calls that op.py and coded_op.py pack, and the checks whether the kernels support them.

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

struct CodedCall {  // coded_op.py packs it: eighteen pointers and fourteen integers
  void* out;
  const void *x, *bias;
  const int8_t *signs, *out_signs;
  const int64_t* listed;
  const uint8_t *projections[MOST_PROJECTIONS], *refinements[MOST_PROJECTIONS], *columns, *column_refinements;
  const void* biases;          // [capacity, k], of the dtype of x, or null
  const Bfloat16* norms;       // [capacity, k]
  const float *noise, *thresholds;  // [k], [k + 2]
  const Bfloat16* surrogate;   // [capacity, k + 1] or null
  const uint8_t* fold;         // or null
  int64_t k, tokens, d, d_out, capacity, bits, low_bits, column_bits, column_low_bits, fold_bits, activation, relative, dtype,
      threads;
};

// As for the other call.
bool supported(const CodedCall& call) {
  for (const int64_t bits : {call.bits, call.low_bits, call.column_bits, call.column_low_bits, call.fold_bits})
    if (!between(1, bits, 8)) return false;
  return between(1, call.k, MOST_PROJECTIONS) && between(1, call.tokens, TOKENS) && call.d >= 1 && call.d_out >= 0 &&
         between(0, call.activation, ACTIVATIONS - 1) && between(0, call.relative, 1) && between(0, call.dtype, 2) &&
         call.threads >= 1 && between(0, *call.listed, call.capacity);
}

}  // namespace
