// Products of a few tokens with tables of codes, in the layout that coded_layout.py prepares.
//
// Eight codes of one position lie together in a cell of `BITS` lines, one byte of each line. A line of a tile has 128
// bytes, four columns of each of its 32 rows: a sum needs no additions across lanes. A line of a row that is read alone
// has 16 bytes, and several cells or rows fill a vector. Codes become levels of 8 bits; a weight is scale / 128 * (level - 128), with 8 bits
// scale / 128 * (level - 127.5). What levels are multiplied with has 8 bits, too, and one unit for each 128 columns.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "scratch.h"
#include "vectors.h"

namespace {

constexpr int CELL = 8;                 // codes of one position
constexpr int TILE = 32;                // rows
constexpr int GROUP = 128;              // columns that share a unit
constexpr int QUAD = 4;                 // rows that are read together
constexpr int TILE_LINE = 128, ROW_LINE = 16;
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

// Two of the eight vectors of codes of a cell, those of pair 0 to 3; `line(i)` returns its lines.
template <int BITS, class Line>
__attribute__((always_inline)) inline void codes_of_pair(Line line, int pair, Bytes* codes) {
  if constexpr (BITS == 8) {
    codes[0] = line(2 * pair);
    codes[1] = line(2 * pair + 1);
  } else if constexpr (BITS >= 4) {
    const Bytes both = line(pair);
    codes[0] = both & 15;
    codes[1] = shifted(both, 4) & 15;
    if constexpr (BITS > 4) {
      Bytes low[2];
      codes_of_pair<BITS - 4>([&](int i) { return line(4 + i); }, pair, low);
      for (int i = 0; i < 2; ++i) codes[i] = codes[i] << (BITS - 4) | low[i];
    }
  } else if constexpr (BITS == 3) {  // lines have three pairs, and in two bits each the fourth
    if (pair < 3) {
      const Bytes both = line(pair);
      codes[0] = both & 7;
      codes[1] = shifted(both, 3) & 7;
    } else {
      codes[0] = (shifted(line(0), 6) & 3) | (shifted(line(1), 4) & 4);
      codes[1] = (shifted(line(2), 6) & 3) | (shifted(line(1), 5) & 4);
    }
  } else {
    const Bytes many = shifted(line(pair * BITS / 4), pair * 2 * BITS % 8);
    codes[0] = many & uint8_t((1 << BITS) - 1);
    codes[1] = shifted(many, BITS) & uint8_t((1 << BITS) - 1);
  }
}

// The vectors of levels of a pair.
template <int BITS, class Line>
__attribute__((always_inline)) inline void levels_of_pair(Line line, int pair, Bytes* levels) {
  if constexpr (BITS == 2) {  // four bits hold both codes, and each lookup reads one of them
    static constexpr Table first(2, 0), second(2, 1);
    const Bytes both = shifted(line(pair / 2), pair % 2 * 4) & 15;
    levels[0] = looked_up(first.levels, both);
    levels[1] = looked_up(second.levels, both);
  } else {
    codes_of_pair<BITS>(line, pair, levels);
    for (int i = 0; i < 2; ++i) {
      if constexpr (BITS <= 4) levels[i] = looked_up(LEVELS[BITS - 1], levels[i]);
      else if constexpr (BITS < 8) levels[i] = levels[i] << (8 - BITS) | uint8_t(1 << (7 - BITS));
    }
  }
  for (int i = 0; i < 2; ++i) levels[i] = factors(levels[i]);
}

// What the sum of the numbers is multiplied with, and taken from sums over levels; levels of 8 bits are codes.
template <int BITS>
constexpr float MIDDLE = BITS == 8 ? OFFSET - 0.5f : float(OFFSET);

// Cells of a row that fill a vector.
constexpr int LINES = WIDTH / ROW_LINE;

constexpr int STEP = 254;

// Rows of numbers of 8 bits; or of 16 bits, as a sum of two such, the first of which has a unit STEP times that of the rest.
struct Tokens {
  int64_t groups;
  int8_t* numbers;     // [tokens, groups, GROUP], for tiles
  float* units;        // [tokens, groups]
  int8_t* turned;      // [tokens, strips, CELL, LINES, 16], for rows: 16 columns of each of LINES groups; zeros at the end
  float* lane_units;   // [tokens, strips, LANES]: of the groups
  float* sums;         // [tokens]: of numbers times units
  const Tokens* rest;  // or null

  int64_t strips() const { return (groups + LINES - 1) / LINES; }
  const int8_t* token(int64_t t) const { return numbers + t * groups * GROUP; }
  const int8_t* turned_token(int64_t t) const { return turned + t * strips() * CELL * WIDTH; }
};

constexpr int64_t AHEAD = 8192;  // bytes of tiles that are prefetched before they are read

// Products of a tile with T tokens, [T, TILE], without the rows' scales; R vectors of rows at a time.
template <int BITS, int T, int R>
void multiply_tile(const uint8_t* lines, int64_t cells, const Tokens& x, int64_t first, float* products) {
  constexpr int SETS = T * R < 4 ? 2 : 1;  // of sums, because each waits for the one before it
  const int8_t* tokens[T];
  for (int t = 0; t < T; ++t) tokens[t] = x.token(first + t);
  for (int part = 0; part < PARTS; part += R) {
    const uint8_t* at = lines + part * WIDTH;
    Floats totals[R][T] = {};
    for (int64_t g = 0; g < x.groups; ++g) {
      Ints sums[SETS][R][T] = {};
      const int64_t end = std::min((g + 1) * GROUP, cells * TILE_CELL);
      for (int64_t column = g * GROUP; column < end; column += TILE_CELL, at += BITS * TILE_LINE) {
        for (int i = 0; i < BITS * TILE_LINE && part == 0; i += 64) __builtin_prefetch(at + AHEAD + i);
#pragma GCC unroll 4
        for (int pair = 0; pair < CELL / 2; ++pair) {
          Bytes levels[R][2];
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) {
            const uint8_t* const of = at + r * WIDTH;
            levels_of_pair<BITS>([&](int i) { return read<Bytes>(of + i * TILE_LINE); }, pair, levels[r]);
          }
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
              const Bytes numbers = four(tokens[t] + column + 4 * (2 * pair + i));
#pragma GCC unroll 2
              for (int r = 0; r < R; ++r)
                sums[i % SETS][r][t] = add_dots(sums[i % SETS][r][t], levels[r][i], numbers);
            }
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const float unit = x.units[(first + t) * x.groups + g];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          const Ints sum = SETS == 2 ? sums[0][r][t] + sums[SETS - 1][r][t] : sums[0][r][t];
          totals[r][t] += __builtin_convertvector(sum, Floats) * unit;
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t)
        put(totals[r][t] - MIDDLE<BITS> * x.sums[first + t], products + t * TILE + (part + r) * LANES);
  }
}

// Products of a row with T tokens, without the row's scale. Prefetches a row that follows, `ahead`.
template <int BITS, int T>
void multiply_row(const uint8_t* row, const uint8_t* ahead, const Tokens& x, const int32_t* which, float* products) {
  constexpr int64_t STRIP = BITS * WIDTH;  // bytes
  const int64_t strips = x.strips();
  const int8_t* tokens[T];
  for (int t = 0; t < T; ++t) tokens[t] = x.turned_token(which[t]);
  Floats totals[T] = {};
  for (int64_t strip = 0; strip < strips; ++strip) {
    for (int64_t i = 0; i < STRIP; i += 64) __builtin_prefetch(ahead + strip * STRIP + i);
    const uint8_t* cells[LINES];
    for (int i = 0; i < LINES; ++i)
      cells[i] = row + (strip * LINES + i < x.groups ? strip * LINES + i : 0) * (BITS * ROW_LINE);
    Ints sums[T] = {};
#pragma GCC unroll 4
    for (int pair = 0; pair < CELL / 2; ++pair) {
      Bytes levels[2];
      levels_of_pair<BITS>([&](int i) { return side_by_side(cells, i * ROW_LINE); }, pair, levels);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          sums[t] = add_dots(sums[t], levels[i], read<Bytes>(tokens[t] + (strip * CELL + 2 * pair + i) * WIDTH));
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      totals[t] += __builtin_convertvector(sums[t], Floats) * load(x.lane_units + (which[t] * strips + strip) * LANES);
  }
  for (int t = 0; t < T; ++t) products[t] = sum(totals[t]) - MIDDLE<BITS> * x.sums[which[t]];
}

// ---- Rows times values, added to what is not a product with the tokens.

constexpr int CHUNK = 128;  // rows that share a unit of their values
constexpr int QUADS_TOGETHER = 4, ROWS_TOGETHER = QUAD * QUADS_TOGETHER;  // that are read side by side

// The values of a token for up to CHUNK rows, in fixed point: unit * (STEP high + low), which errs by less than 2^-15 of
// the largest one.
struct Values {
  float unit;
  uint32_t active;          // bit q: quad q has values other than 0
  int32_t highs, lows;      // sums
  int8_t high[CHUNK], low[CHUNK];

  // Sums of fixed values times weights, from those times levels.
  template <int BITS>
  Floats of_levels(Ints sums) const {
    const int32_t total = STEP * highs + lows;
    return (__builtin_convertvector(sums - OFFSET * total, Floats) + (OFFSET - MIDDLE<BITS>) * total) * unit;
  }
};

typedef int8_t Small __attribute__((vector_size(LANES)));

// Sets the values of a token, which are padded with zeros to CHUNK. An infinity or NaN makes the unit NaN.
inline void set_values(Values& to, const float* values, int count) {
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

// The levels of a quad of rows in one cell, as GROUP columns of four bytes. Codes are interleaved before they are taken
// apart, when there are fewer of their bytes.
template <int BITS>
void interleave(const uint8_t* const* rows, int64_t cell, uint8_t* quad) {
  constexpr int PARTS_OF_QUAD = QUAD / LINES;
  Bytes lines[BITS][PARTS_OF_QUAD];
#pragma GCC unroll 8
  for (int i = 0; i < BITS; ++i) {
    for (int part = 0; part < PARTS_OF_QUAD; ++part)
      lines[i][part] = side_by_side(rows + part * LINES, (cell * BITS + i) * ROW_LINE);
    interleave(lines[i]);
  }
#pragma GCC unroll 4
  for (int pair = 0; pair < CELL / 2; ++pair)
    for (int part = 0; part < PARTS_OF_QUAD; ++part) {
      Bytes levels[2];
      levels_of_pair<BITS>([&](int i) { return lines[i][part]; }, pair, levels);
      for (int i = 0; i < 2; ++i)
        std::memcpy(quad + (2 * pair + i) * QUAD * ROW_LINE + part * WIDTH, levels + i, WIDTH);
    }
}

// Adds quads of a cell from `first` on, times the values of a token, to GROUP sums in fixed point.
inline void add_quads(const uint8_t* quads, const Values& values, int first, int count, int32_t* sums) {
  constexpr int TOGETHER = WIDTH == 64 ? 8 : WIDTH == 32 ? 4 : 8;
  const uint32_t active = values.active >> first & ((1u << count) - 1);
  for (int from = 0; from < QUAD * GROUP && active; from += TOGETHER * WIDTH) {
    Ints high[TOGETHER] = {}, low[TOGETHER] = {};
    for (uint32_t rest = active; rest; rest &= rest - 1) {
      const int q = __builtin_ctz(rest);
      const Bytes h = four(values.high + QUAD * (first + q)), l = four(values.low + QUAD * (first + q));
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
      int32_t* const at = sums + (from + v * WIDTH) / QUAD;
      const Ints sum = read<Ints>(at) + (STEP * high[v] + low[v]);
      std::memcpy(at, &sum, sizeof sum);
    }
  }
}

// Adds `count` quads of rows, [cells, BITS, ROW_LINE] each, times the values of tokens to sums, [tokens, cells, GROUP].
// ROWS_TOGETHER rows are read from their first to their last cell, and meanwhile the next ones are prefetched: the
// second-level cache takes more lines at a time than the first.
template <int BITS>
void add_chunk(const uint8_t* lines, int64_t cells, const int32_t* numbers, int64_t count, const Values* values,
               int64_t tokens, float* sums) {
  constexpr int64_t CELL_BYTES = BITS * ROW_LINE;
  alignas(64) uint8_t quads[QUADS_TOGETHER][QUAD * GROUP];
  const int64_t width = cells * GROUP;
  int32_t* const fixed = scratch<int32_t, 11>(tokens * width);
  std::fill_n(fixed, tokens * width, 0);
  for (int64_t first = 0; first < count; first += QUADS_TOGETHER) {
    const int64_t some = std::min<int64_t>(QUADS_TOGETHER, count - first), after = first + QUADS_TOGETHER;
    const uint8_t *of[ROWS_TOGETHER], *ahead[ROWS_TOGETHER];
    for (int64_t i = 0; i < QUAD * some; ++i) of[i] = lines + numbers[QUAD * first + i] * cells * CELL_BYTES;
    const int64_t next = std::clamp<int64_t>(count - after, 0, QUADS_TOGETHER) * QUAD;
    for (int64_t i = 0; i < next; ++i) ahead[i] = lines + numbers[QUAD * after + i] * cells * CELL_BYTES;
    for (int64_t cell = 0; cell < cells; ++cell) {
      for (int64_t i = 0; i < next; ++i)
        for (int64_t byte = 0; byte < CELL_BYTES; byte += 64)
          __builtin_prefetch(ahead[i] + cell * CELL_BYTES + byte, 0, SECOND_LEVEL);
      for (int64_t q = 0; q < some; ++q) interleave<BITS>(of + QUAD * q, cell, quads[q]);
      for (int64_t t = 0; t < tokens; ++t)
        if (values[t].unit != 0) add_quads(quads[0], values[t], int(first), int(some), fixed + t * width + cell * GROUP);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (values[t].unit == 0) continue;
    for (int64_t i = 0; i < width; i += LANES) {
      float* const at = sums + t * width + i;
      put(load(at) + values[t].of_levels<BITS>(read<Ints>(fixed + t * width + i)), at);
    }
  }
}

}  // namespace
