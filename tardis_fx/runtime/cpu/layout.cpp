// Places codes of a plan in the layout of the kernel: the same as coded_layout.py, but in a fraction of the time.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pool.h"

namespace {

constexpr int64_t BLOCK = 64;  // columns whose codes lie together in a plan (packing.py)

// The codes of a row of a plan.
void unpack(const uint8_t* row, int64_t columns, int64_t bits, uint8_t* codes) {
  for (int64_t start = 0; start < columns; start += BLOCK, row += bits * BLOCK / 8, codes += BLOCK) {
    std::fill_n(codes, BLOCK, 0);
    for (int64_t plane = 0; plane < bits / 2; ++plane)
      for (int64_t i = 0; i < BLOCK; ++i) codes[i] = codes[i] << 2 | (row[plane * 16 + i % 16] >> i / 16 * 2 & 3);
    if (bits % 2)
      for (int64_t i = 0; i < BLOCK; ++i) codes[i] = codes[i] << 1 | (row[bits / 2 * 16 + i / 8] >> i % 8 & 1);
  }
}

// The bytes of eight codes in the lines of their cell, `stride` apart.
void put_lines(const uint8_t* c, int64_t bits, uint8_t* lines, int64_t stride) {
  if (bits == 8) {
    for (int i = 0; i < 8; ++i) lines[i * stride] = c[i];
  } else if (bits >= 4) {
    const int64_t low = bits - 4;
    for (int i = 0; i < 4; ++i) lines[i * stride] = c[2 * i] >> low | c[2 * i + 1] >> low << 4;
    if (!low) return;
    uint8_t rest[8];
    for (int i = 0; i < 8; ++i) rest[i] = c[i] & ((1 << low) - 1);
    put_lines(rest, low, lines + 4 * stride, stride);
  } else if (bits == 3) {
    lines[0] = c[0] | c[1] << 3 | (c[6] & 3) << 6;
    lines[stride] = c[2] | c[3] << 3 | c[6] >> 2 << 6 | c[7] >> 2 << 7;
    lines[2 * stride] = c[4] | c[5] << 3 | (c[7] & 3) << 6;
  } else {
    const int64_t count = 8 / bits;
    for (int64_t i = 0; i < bits; ++i) {
      uint8_t line = 0;
      for (int64_t j = 0; j < count; ++j) line |= c[count * i + j] << bits * j;
      lines[i * stride] = line;
    }
  }
}

}  // namespace

// Places rows of a plan in tiles of `tile` rows, or alone if that is 1; `cell` columns are those of a cell.
extern "C" void tardis_place(const uint8_t* rows, int64_t count, int64_t row_bytes, int64_t columns, int64_t bits, int64_t tile,
                             int64_t cell, uint8_t* out, int64_t threads) {
  const int64_t cells = (columns + cell - 1) / cell, apart = cell / 8, line = tile * apart;
  run_threads(threads, [&](int64_t thread) {
    std::vector<uint8_t> codes(cells * cell + BLOCK);
    for (int64_t row = count * thread / threads; row < count * (thread + 1) / threads; ++row) {
      unpack(rows + row * row_bytes, columns, bits, codes.data());
      std::fill(codes.begin() + columns, codes.end(), 0);
      uint8_t* const start = out + (row / tile * cells * bits) * line + row % tile * apart;
      for (int64_t i = 0; i < cells; ++i)
        for (int64_t c = 0; c < apart; ++c) {
          uint8_t of_position[8];
          for (int j = 0; j < 8; ++j) of_position[j] = codes[i * cell + j * apart + c];
          put_lines(of_position, bits, start + i * bits * line + c, line);
        }
    }
  });
}
