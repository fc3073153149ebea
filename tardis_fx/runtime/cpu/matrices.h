// Products of many tokens by the matrix units of a processor (AMX), where tiles.h has those by vectors.
//
// A unit multiplies 16 rows of 64 bytes with a matrix of 64 rows and 16 columns, of which four bytes of each column lie
// together: so lie the levels of tiles and quads. Levels that are unpacked once serve MATRIX tokens.

#pragma once

#include "tiles.h"

#if WIDTH == 64 && defined(__AMX_INT8__) && defined(__linux__)
#define MATRICES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Rows of a matrix, bytes of a row, and matrices of tokens.
constexpr int64_t MATRIX = 16, MATRIX_ROW = 64, MOST_MATRICES = 2;

#ifdef MATRICES
// Linux lets a process use the units when it asks for their state.
constexpr int64_t ASK = 0x1023, STATE = 18;
const bool permitted = syscall(SYS_arch_prctl, ASK, STATE) == 0;

// Whether products of so many tokens are by matrices: of fewer, they are faster by vectors.
bool in_matrices(int64_t tokens) { return permitted && tokens > 4; }

// Makes the units of the calling thread ready for so many tokens, and leaves them as they were.
struct Matrices {
  struct alignas(64) Shapes {
    uint8_t palette, start, zeros[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
  } before;
  bool ready;

  explicit Matrices(int64_t tokens) : ready(in_matrices(tokens)) {
    if (!ready) return;
    Shapes shapes = {};
    shapes.palette = 1;
    std::fill_n(shapes.bytes, 8, MATRIX_ROW);
    std::fill_n(shapes.rows, 6, std::min(tokens, MATRIX));  // sums and tokens
    std::fill_n(shapes.rows + 6, 2, MATRIX);                // levels
    _tile_storeconfig(&before);
    _tile_loadconfig(&shapes);
  }
  Matrices(const Matrices&) = delete;
  ~Matrices() {
    if (!ready) return;
    if (before.palette)
      _tile_loadconfig(&before);
    else
      _tile_release();
  }
};

// Compilers do not know that the units read memory: this keeps stores before that.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// Sums of the products of a group of columns, of MATRIX tokens with TILE rows.
typedef int32_t Sums[MATRIX][TILE];

// Multiplies the tokens of all matrices with the levels of a group, of two parts.
inline void multiply_group(const uint8_t (*levels)[GROUP / 4][WIDTH], const Tokens& x, int64_t g, int64_t tokens, Sums* sums) {
  const int64_t apart = x.groups * GROUP;
  finish_stores();
  for (int64_t first = 0; first < tokens; first += MATRIX) {
    const int8_t* const numbers = x.token(first) + g * GROUP;
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, numbers, apart);
    _tile_loadd(6, levels[0][0], WIDTH);
    _tile_dpbsud(0, 2, 6);
    _tile_loadd(7, levels[1][0], WIDTH);
    _tile_dpbsud(1, 2, 7);
    _tile_loadd(3, numbers + MATRIX_ROW, apart);
    _tile_loadd(6, levels[0][MATRIX], WIDTH);
    _tile_dpbsud(0, 3, 6);
    _tile_loadd(7, levels[1][MATRIX], WIDTH);
    _tile_dpbsud(1, 3, 7);
    _tile_stored(0, sums[first / MATRIX][0], sizeof **sums);
    _tile_stored(1, sums[first / MATRIX][0] + LANES, sizeof **sums);
  }
}

// Sets the products of TILE rows with all tokens, [tokens, TILE], without the rows' scales; `unpack(g, levels)` sets the
// levels of a group. While one group is unpacked, the one before it is multiplied, and the sums before that are added.
template <int BITS, class Unpack>
void multiply_groups(const Tokens& x, int64_t tokens, float* products, Unpack unpack) {
  alignas(64) uint8_t levels[2][PARTS][GROUP / 4][WIDTH];
  alignas(64) Sums sums[2][MOST_MATRICES];
  for (int64_t t = 0; t < tokens; ++t) std::fill_n(products + t * TILE, TILE, -MIDDLE<BITS> * x.sums[t]);
  for (int64_t g = 0; g < x.groups + 2; ++g) {
    if (g < x.groups) unpack(g, levels[g % 2]);
    if (0 < g && g <= x.groups) multiply_group(levels[(g - 1) % 2], x, g - 1, tokens, sums[(g - 1) % 2]);
    for (int64_t t = 0; t < tokens && g > 1; ++t) {
      const float unit = x.units[t * x.groups + g - 2];
      for (int i = 0; i < TILE; i += LANES) {
        float* const product = products + t * TILE + i;
        const Ints sum = read<Ints>(sums[g % 2][t / MATRIX][t % MATRIX] + i);
        put(load(product) + __builtin_convertvector(sum, Floats) * unit, product);
      }
    }
  }
}

// Sets the products of the rows of a tile. Prefetches tiles that follow.
template <int BITS>
void multiply_tile_by_matrices(const uint8_t* lines, int64_t cells, const Tokens& x, int64_t tokens, float* products) {
  constexpr int64_t GROUP_CELLS = GROUP / TILE_CELL;
  multiply_groups<BITS>(x, tokens, products, [&](int64_t g, uint8_t (*levels)[GROUP / 4][WIDTH]) {
    for (int64_t cell = 0; cell < std::min(GROUP_CELLS, cells - g * GROUP_CELLS); ++cell) {
      const uint8_t* const at = lines + (g * GROUP_CELLS + cell) * BITS * TILE_LINE;
      for (int i = 0; i < BITS * TILE_LINE; i += 64) __builtin_prefetch(at + AHEAD + i);
#pragma GCC unroll 4
      for (int pair = 0; pair < CELL / 2; ++pair)
        for (int part = 0; part < PARTS; ++part) {
          Bytes of[2];
          levels_of_pair<BITS>([&](int i) { return read<Bytes>(at + i * TILE_LINE + part * WIDTH); }, pair, of);
          std::memcpy(levels[part][cell * CELL + 2 * pair], of, sizeof of);
        }
    }
  });
}

// The row whose products are at a place among those of TILE rows that are read alone.
inline int row_at(int place) { return place / LANES * LANES + place % 4 * 4 + place % LANES / 4; }

// Sets the products of TILE rows that are read alone, in the order of `row_at`. Prefetches others.
template <int BITS>
void multiply_rows_by_matrices(const uint8_t* const* rows, const uint8_t* const* ahead, const Tokens& x, int64_t tokens,
                               float* products) {
  constexpr int64_t CELL_BYTES = BITS * ROW_LINE;
  multiply_groups<BITS>(x, tokens, products, [&](int64_t g, uint8_t (*levels)[GROUP / 4][WIDTH]) {
    for (int64_t i = 0; i < TILE; ++i)
      for (int64_t byte = 0; byte < CELL_BYTES; byte += 64)
        __builtin_prefetch(ahead[i] + g * CELL_BYTES + byte, 0, SECOND_LEVEL);
    for (int part = 0; part < PARTS; ++part) {
      Bytes lines[BITS][LINES];
      for (int quad = 0; quad < LINES; ++quad)
#pragma GCC unroll 8
        for (int i = 0; i < BITS; ++i)
          lines[i][quad] = side_by_side(rows + part * LANES + quad * QUAD, g * CELL_BYTES + i * ROW_LINE);
#pragma GCC unroll 4
      for (int pair = 0; pair < CELL / 2; ++pair) {
        Bytes of[LINES][2];
        for (int quad = 0; quad < LINES; ++quad)
          levels_of_pair<BITS>([&](int i) { return lines[i][quad]; }, pair, of[quad]);
        for (int j = 0; j < 2; ++j) {  // four columns of each row from sixteen columns of each
          const auto code = [&](int quad) { return (__m512i)of[quad][j]; };
          const __m512i low[] = {_mm512_unpacklo_epi32(code(0), code(1)), _mm512_unpacklo_epi32(code(2), code(3))};
          const __m512i high[] = {_mm512_unpackhi_epi32(code(0), code(1)), _mm512_unpackhi_epi32(code(2), code(3))};
          const __m512i fours[] = {_mm512_unpacklo_epi64(low[0], low[1]), _mm512_unpackhi_epi64(low[0], low[1]),
                                   _mm512_unpacklo_epi64(high[0], high[1]), _mm512_unpackhi_epi64(high[0], high[1])};
          std::memcpy(levels[part][(2 * pair + j) * 4], fours, sizeof fours);
        }
      }
    }
  });
}

// As add_chunk. All rows are read side by side, cell after cell. While a part of one cell is interleaved, a part of the cell
// before it is multiplied, and the sums of the part before that are added.
template <int BITS>
void add_chunk_by_matrices(const uint8_t* lines, int64_t cells, const int32_t* numbers, int64_t count, const Values* values,
                           int64_t tokens, float* sums) {
  constexpr int64_t CELL_BYTES = BITS * ROW_LINE, STRIDE = QUAD * GROUP, STEPS = GROUP / LANES, QUADS = CHUNK / QUAD;
  alignas(64) uint8_t quads[2][QUADS][STRIDE];
  alignas(64) int32_t products[2][MOST_MATRICES][2][MATRIX][LANES];  // with high and low values
  const uint8_t* of[CHUNK];
  for (int64_t i = 0; i < QUAD * count; ++i) of[i] = lines + numbers[i] * cells * CELL_BYTES;
  for (auto& of_cell : quads) std::fill(of_cell[count], of_cell[QUADS], 0);
  for (int64_t step = 0; step < (cells + 1) * STEPS + 1; ++step) {
    const int64_t cell = step / STEPS, first_quad = step % STEPS * (QUADS / STEPS);
    for (int64_t q = first_quad; q < std::min(first_quad + QUADS / STEPS, count) && cell < cells; ++q) {
      for (int64_t i = QUAD * q; i < QUAD * (q + 1); ++i)
        for (int64_t byte = 0; byte < CELL_BYTES; byte += 64)
          __builtin_prefetch(of[i] + (cell + 1) * CELL_BYTES + byte);
      interleave<BITS>(of + QUAD * q, cell, quads[cell % 2][q]);
    }
    if (cell > 0 && cell <= cells) {
      finish_stores();
      const uint8_t* const at = quads[(cell - 1) % 2][0] + step % STEPS * WIDTH;
      for (int64_t first = 0; first < tokens; first += MATRIX) {
        if (step == STEPS || tokens > MATRIX) {
          _tile_loadd(2, values[first].high, sizeof *values);
          _tile_loadd(3, values[first].low, sizeof *values);
          _tile_loadd(4, values[first].high + MATRIX_ROW, sizeof *values);
          _tile_loadd(5, values[first].low + MATRIX_ROW, sizeof *values);
        }
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(6, at, STRIDE);
        _tile_dpbsud(0, 2, 6);
        _tile_dpbsud(1, 3, 6);
        if (count > MATRIX) {
          _tile_loadd(7, at + MATRIX * STRIDE, STRIDE);
          _tile_dpbsud(0, 4, 7);
          _tile_dpbsud(1, 5, 7);
        }
        auto& of_matrix = products[step % 2][first / MATRIX];
        _tile_stored(0, of_matrix[0], MATRIX_ROW);
        _tile_stored(1, of_matrix[1], MATRIX_ROW);
      }
    }
    for (int64_t t = 0; t < tokens && step > STEPS; ++t) {
      const auto& of_matrix = products[(step - 1) % 2][t / MATRIX];
      const Ints high = read<Ints>(of_matrix[0][t % MATRIX]), low = read<Ints>(of_matrix[1][t % MATRIX]);
      float* const sum = sums + t * cells * GROUP + (step - 1 - STEPS) * LANES;
      put(load(sum) + values[t].of_levels<BITS>(STEP * high + low), sum);
    }
  }
}
#else
struct Matrices {
  explicit Matrices(int64_t) {}
};
#endif

}  // namespace
