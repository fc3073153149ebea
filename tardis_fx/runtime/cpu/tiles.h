// Products of a few tokens with tables of codes, in the layout that coded_layout.py prepares.
//
// Eight codes of one position lie together in a cell of `BITS` lines, one byte of each line. A line of a tile has 64 bytes,
// four columns of each of its 16 rows: a sum needs no additions across lanes. A line of a row that is read alone has 16
// bytes, and four rows fill a vector. Codes become levels of 8 bits; a weight is scale / 128 * (level - 128), with 8 bits
// scale / 128 * (level - 127.5). What levels are multiplied with has 8 bits, too, and one unit for each 128 columns.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "vectors.h"

namespace {

constexpr int CELL = 8;                 // codes of one position
constexpr int TILE = 16;                // rows
constexpr int GROUP = 128;              // columns that share a unit
constexpr int QUAD = 4;                 // rows that are read together
constexpr int TILE_LINE = 64, ROW_LINE = 16;
constexpr int TILE_CELL = 32;           // columns of a cell of a tile; one of a row has GROUP columns
constexpr int PARTS = TILE_LINE / WIDTH;

// By bits, 128 times one plus each level: the bytes that build.py writes.
constexpr uint8_t LEVELS[][16] = {
#include "levels.inc"
};

// For every index of 4 bits, the level of one of the codes of `bits` bits in it.
struct Table {
  alignas(16) uint8_t levels[16];
  constexpr Table(int bits, int number) : levels{} {
    for (int i = 0; i < 16; ++i) levels[i] = LEVELS[bits - 1][i >> number * bits & ((1 << bits) - 1)];
  }
};

typedef uint16_t Shorts __attribute__((vector_size(WIDTH)));

// Bytes shifted to the right; bits of the next byte come in from above.
Bytes shifted(Bytes bytes, int count) { return (Bytes)((Shorts)bytes >> count); }

// The eight vectors of codes of a cell; `line(i)` returns its lines.
template <int BITS, class Line>
__attribute__((always_inline)) inline void codes_of_cell(Line line, Bytes* codes) {
  if constexpr (BITS == 8) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) codes[i] = line(i);
  } else if constexpr (BITS >= 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Bytes both = line(i);
      codes[2 * i] = both & 15;
      codes[2 * i + 1] = shifted(both, 4) & 15;
    }
    if constexpr (BITS > 4) {
      Bytes low[CELL];
      codes_of_cell<BITS - 4>([&](int i) { return line(4 + i); }, low);
#pragma GCC unroll 8
      for (int i = 0; i < CELL; ++i) codes[i] = codes[i] << (BITS - 4) | low[i];
    }
  } else if constexpr (BITS == 3) {  // two codes a line, and two bits of the seventh and eighth
    const Bytes lines[] = {line(0), line(1), line(2)};
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      codes[2 * i] = lines[i] & 7;
      codes[2 * i + 1] = shifted(lines[i], 3) & 7;
    }
    codes[6] = (shifted(lines[0], 6) & 3) | (shifted(lines[1], 4) & 4);
    codes[7] = (shifted(lines[2], 6) & 3) | (shifted(lines[1], 5) & 4);
  } else if constexpr (BITS == 2) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Bytes four = line(i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) codes[4 * i + j] = shifted(four, 2 * j) & 3;
    }
  } else {
    const Bytes eight = line(0);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) codes[j] = shifted(eight, j) & 1;
  }
}

// The eight vectors of levels of a cell.
template <int BITS, class Line>
__attribute__((always_inline)) inline void levels_of_cell(Line line, Bytes* levels) {
  if constexpr (BITS == 2) {  // four bits hold two codes: each lookup reads one of them, and no shift comes before it
    static constexpr Table low(2, 0), high(2, 1);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Bytes four = line(i), first = four & 15, last = shifted(four, 4) & 15;
      levels[4 * i] = looked_up(low.levels, first);
      levels[4 * i + 1] = looked_up(high.levels, first);
      levels[4 * i + 2] = looked_up(low.levels, last);
      levels[4 * i + 3] = looked_up(high.levels, last);
    }
  } else {
    codes_of_cell<BITS>(line, levels);
#pragma GCC unroll 8
    for (int i = 0; i < CELL; ++i) {
      if constexpr (BITS <= 4) levels[i] = looked_up(LEVELS[BITS - 1], levels[i]);
      else if constexpr (BITS < 8) levels[i] = levels[i] << (8 - BITS) | uint8_t(1 << (7 - BITS));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < CELL; ++i) levels[i] = factors(levels[i]);
}

// Sums over levels, which miss half of the sum of the numbers if the levels are codes of 8 bits, whose middle is 127.5.
template <int BITS>
Floats centred(Ints sums, float half) {
  const Floats values = __builtin_convertvector(sums, Floats);
  if constexpr (BITS == 8) return values + half;
  return values;
}

// Rows of numbers of 8 bits, [tokens, groups, GROUP].
struct Tokens {
  int64_t groups;
  int8_t* numbers;
  float* units;   // [tokens, groups]
  int32_t* sums;  // [tokens, groups]: of the numbers

  const int8_t* token(int64_t t) const { return numbers + t * groups * GROUP; }
};

// Products of the 16 rows of a tile with T tokens, [T, TILE], without the rows' scales.
template <int BITS, int T>
void multiply_tile(const uint8_t* lines, int64_t cells, const Tokens& x, int64_t first, float* products) {
  const int8_t* tokens[T];
  for (int t = 0; t < T; ++t) tokens[t] = x.token(first + t);
  for (int part = 0; part < PARTS; ++part) {
    const uint8_t* at = lines + part * WIDTH;
    Floats totals[T] = {};
    for (int64_t g = 0, column = 0; g < x.groups; ++g) {
      Ints sums[T];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[t] = Ints{} - OFFSET * x.sums[(first + t) * x.groups + g];
      const int64_t end = std::min((g + 1) * GROUP, cells * TILE_CELL);
      for (; column < end; column += TILE_CELL, at += BITS * TILE_LINE) {
        Bytes levels[CELL];
        levels_of_cell<BITS>([&](int i) { return read<Bytes>(at + i * TILE_LINE); }, levels);
#pragma GCC unroll 8
        for (int j = 0; j < CELL; ++j)
#pragma GCC unroll 16
          for (int t = 0; t < T; ++t) sums[t] = add_dots(sums[t], levels[j], four(tokens[t] + column + 4 * j));
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const int64_t unit = (first + t) * x.groups + g;
        totals[t] += centred<BITS>(sums[t], 0.5f * x.sums[unit]) * x.units[unit];
      }
      column = (g + 1) * GROUP;
    }
    for (int t = 0; t < T; ++t) put(totals[t], products + t * TILE + part * LANES);
  }
}

// Products of four rows with T tokens, [T, QUAD], without the rows' scales. Prefetches the rows that follow, `next`.
template <int BITS, int T>
void multiply_rows(const uint8_t* const* rows, const uint8_t* const* next, const Tokens& x, const int32_t* which,
                   float* products) {
  constexpr int ROWS = WIDTH / ROW_LINE;
  const int8_t* tokens[T];
  for (int t = 0; t < T; ++t) tokens[t] = x.token(which[t]);
  for (int part = 0; part < QUAD / ROWS; ++part) {
    const uint8_t* const* const of = rows + part * ROWS;
    Floats totals[T] = {};
    for (int64_t g = 0; g < x.groups; ++g) {
      Ints sums[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t] = Ints{} - OFFSET / 4 * x.sums[which[t] * x.groups + g];
      for (int r = 0; r < QUAD && part == 0; ++r) __builtin_prefetch(next[r] + g * BITS * ROW_LINE);
      Bytes levels[CELL];
      levels_of_cell<BITS>([&](int i) { return side_by_side(of, (g * BITS + i) * ROW_LINE); }, levels);
#pragma GCC unroll 8
      for (int j = 0; j < CELL; ++j)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sums[t] = add_dots(sums[t], levels[j], sixteen(tokens[t] + g * GROUP + 16 * j));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const int64_t unit = which[t] * x.groups + g;
        totals[t] += centred<BITS>(sums[t], 0.125f * x.sums[unit]) * x.units[unit];
      }
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < ROWS; ++r) {
        float* const product = products + t * QUAD + part * ROWS + r;
        *product = (totals[t][4 * r] + totals[t][4 * r + 1]) + (totals[t][4 * r + 2] + totals[t][4 * r + 3]);
      }
  }
}

// ---- Rows times values, added to what is not a product with the tokens.

constexpr int CHUNK = 128, QUADS = CHUNK / QUAD;  // rows that share a unit of their values

constexpr int STEP = 254;

// Up to CHUNK rows, and the values of tokens for them, in fixed point: unit * (STEP high + low), which errs by less than
// 2^-15 of the largest one.
struct Chunk {
  int32_t count, rows[CHUNK];
  struct Values {
    float unit;
    uint32_t active;          // bit q: quad q has values other than 0
    int32_t highs, lows;      // sums
    int8_t high[CHUNK], low[CHUNK];
  };
};

typedef int8_t Small __attribute__((vector_size(LANES)));

// Sets the values of a token, which are padded with zeros to CHUNK. An infinity or NaN makes the unit NaN.
inline void set_values(Chunk::Values& to, const float* values, int count) {
  const int end = (count + LANES - 1) / LANES * LANES;
  Floats most = {};
  for (int i = 0; i < end; i += LANES) {
    const Floats size = (Floats)((Ints)load(values + i) & 0x7fffffff);
    most = most < size ? size : (size < INFINITY ? most : Floats{} + INFINITY);  // of a NaN, too
  }
  float largest = 0;
  for (int i = 0; i < LANES; ++i) largest = std::max(largest, most[i]);
  to.unit = largest < INFINITY ? largest / (STEP * 126) : NAN;
  to.active = 0, to.highs = to.lows = 0;
  const float factor = 1 / to.unit;
  if (!(to.unit > 0 && factor < INFINITY)) {
    std::fill_n(to.high, CHUNK, 0);
    std::fill_n(to.low, CHUNK, 0);
    if (to.unit > 0) to.unit = 0;  // too small for fixed point
    return;
  }
  Ints highs = {}, lows = {};
  for (int i = 0; i < end; i += LANES) {
    const Floats fixed = lanes::nearest(load(values + i) * factor), high = lanes::nearest(fixed * (1.0f / STEP));
    const Ints of_high = __builtin_convertvector(high, Ints), of_low = __builtin_convertvector(fixed, Ints) - STEP * of_high;
    highs += of_high, lows += of_low;
    const Small small_high = __builtin_convertvector(of_high, Small), small_low = __builtin_convertvector(of_low, Small);
    std::memcpy(to.high + i, &small_high, sizeof small_high);
    std::memcpy(to.low + i, &small_low, sizeof small_low);
  }
  for (int i = 0; i < LANES; ++i) to.highs += highs[i], to.lows += lows[i];
  for (int q = 0; q < end / QUAD; ++q)
    to.active |= uint32_t((read<int32_t>(to.high + QUAD * q) | read<int32_t>(to.low + QUAD * q)) != 0) << q;
}

// The levels of a quad of rows in one cell, as GROUP columns of four bytes.
template <int BITS>
void interleave(const uint8_t* const* rows, int64_t cell, uint8_t* quad) {
  constexpr int ROWS = WIDTH / ROW_LINE;
  Bytes levels[QUAD / ROWS][CELL];
  for (int part = 0; part < QUAD / ROWS; ++part)
    levels_of_cell<BITS>(
        [&](int i) { return side_by_side(rows + part * ROWS, (cell * BITS + i) * ROW_LINE); }, levels[part]);
#pragma GCC unroll 8
  for (int j = 0; j < CELL; ++j) {
    Bytes of[QUAD / ROWS];
    for (int part = 0; part < QUAD / ROWS; ++part) of[part] = levels[part][j];
    put_interleaved(of, quad + j * QUAD * ROW_LINE);
  }
}

// Adds quads of rows times the values of one token to GROUP sums.
template <int BITS>
void add_quads(const uint8_t* quads, const Chunk::Values& values, float* sums) {
  constexpr int TOGETHER = WIDTH == 64 ? 8 : WIDTH == 32 ? 4 : 8;
  const float half = 0.5f * (float(STEP) * values.highs + values.lows);
  for (int from = 0; from < QUAD * GROUP; from += TOGETHER * WIDTH) {
    Ints high[TOGETHER], low[TOGETHER];
#pragma GCC unroll 8
    for (int v = 0; v < TOGETHER; ++v) {
      high[v] = Ints{} - OFFSET * values.highs;
      low[v] = Ints{} - OFFSET * values.lows;
    }
    for (uint32_t rest = values.active; rest; rest &= rest - 1) {
      const int q = __builtin_ctz(rest);
      const Bytes h = four(values.high + QUAD * q), l = four(values.low + QUAD * q);
      const uint8_t* const quad = quads + q * QUAD * GROUP + from;
#pragma GCC unroll 8
      for (int v = 0; v < TOGETHER; ++v) {
        const Bytes levels = read<Bytes>(quad + v * WIDTH);
        high[v] = add_dots(high[v], levels, h);
        low[v] = add_dots(low[v], levels, l);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < TOGETHER; ++v) {
      float* const at = sums + (from + v * WIDTH) / QUAD;
      const Floats both = float(STEP) * __builtin_convertvector(high[v], Floats) + centred<BITS>(low[v], half);
      put(load(at) + both * values.unit, at);
    }
  }
}

}  // namespace
