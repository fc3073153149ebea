// Computes an FFN from codes, each neuron as precise as its token needs, for a few tokens, on a CPU.
//
// `coded_ffn` in coded_reference.py specifies the result, and coded_layout.py prepares the codes. Threads share the neurons, in
// batches: (a) estimates of the first pre-activation by tiles, for all tokens, (b) of the second one, where a token's gate
// needs it, (c) which parts are read, and the refinements of pre-activations, (d) the columns, in chunks. Then they share
// the outputs: (e) the sums of all threads, and the fold, by tiles, (f) the rotation. Thresholds relative to a token's
// scale need the first estimates of all neurons: then (a) comes first for all of them.
// Do not compile with -ffast-math: a NaN must compare false, so that it reads everything.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <utility>

#include "activation.h"
#include "coded.h"
#include "matrices.h"
#include "pool.h"
#include "rotation.h"
#include "scratch.h"
#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int64_t MOST_TOKENS = 32;      // of a step; more are computed in several
constexpr int64_t SERIAL_BYTES = 32768;  // of first projections: below, waking other threads costs more than it saves
constexpr int BATCH = CHUNK, TILES = BATCH / TILE;
constexpr int MOST_PROJECTIONS = 2;

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// ---- What is prepared: a header, then sections in the order of coded_layout.py, each from a multiple of 64 bytes on.

struct Tiles {
  const uint8_t* lines;
  int64_t cells, bits;

  const uint8_t* tile(int64_t number) const { return lines + number * cells * bits * TILE_LINE; }
};

struct Rows {
  const uint8_t* lines;
  int64_t cells, bits;
  const Half* scales;

  int64_t bytes() const { return cells * bits * ROW_LINE; }
  const uint8_t* row(int64_t number) const { return lines + number * bytes(); }
};

constexpr int64_t MOST_SIZE = int64_t(1) << 28;  // of a dimension
constexpr int64_t ELEMENT[] = {4, 2, 2, 8};      // bytes, by dtype

bool between(int64_t low, int64_t value, int64_t high) { return low <= value && value <= high; }

struct Sections {
  const uint8_t* bytes;
  int64_t at = HEADER * sizeof(int64_t);
  bool valid;

  // Reads the numbers of the header.
  Sections(const uint8_t* bytes, int64_t size, int64_t magic, std::initializer_list<int64_t*> numbers)
      : bytes(bytes), valid(size >= at) {
    if (!valid) return;
    int64_t header[HEADER];
    std::memcpy(header, bytes, sizeof header);
    valid = header[0] == magic;
    const int64_t* next = header + 1;
    for (int64_t* number : numbers) *number = *next++;
  }

  const uint8_t* take(int64_t size) {
    const uint8_t* const start = bytes + at;
    at = blocks(at + size, 64) * 64;
    return start;
  }
  Tiles tiles(int64_t rows, int64_t columns, int64_t bits) {
    const int64_t cells = blocks(columns, TILE_CELL);
    return {take(blocks(rows, TILE) * cells * bits * TILE_LINE), cells, bits};
  }
  Rows rows(int64_t rows, int64_t columns, int64_t bits, const Half* scales) {
    const int64_t cells = blocks(columns, GROUP);
    return {take(rows * cells * bits * ROW_LINE), cells, bits, scales};
  }
};

struct Site {
  int64_t k, d, d_out, capacity, listed, bits, low_bits, column_bits, column_low_bits, fold_bits, activation, relative, biased,
      dtype;
  const int8_t *signs, *out_signs;
  const void *bias, *biases;          // of the dtype of x; biases [k, capacity] or null
  const float *noise, *thresholds;    // [k], [k + 2]
  const Bfloat16 *norms, *surrogate;  // [k, capacity], [k + 1, capacity] or null
  const Half *scales, *fold_scales;   // [k, capacity], [d_out] or null
  Tiles first, fold;
  Rows second, refinements[MOST_PROJECTIONS], columns, column_refinements;

  // Whether the header is one that coded_layout.py writes, and `size` bytes are all that it tells of.
  bool open(const uint8_t* site, int64_t size) {
    Sections sections(site, size, SITE_MAGIC,
                      {&k, &d, &d_out, &capacity, &listed, &bits, &low_bits, &column_bits, &column_low_bits, &fold_bits,
                       &activation, &relative, &biased, &dtype});
    if (!sections.valid) return false;
    for (const int64_t width : {bits, low_bits, column_bits, column_low_bits})
      if (!between(1, width, 8)) return false;
    if (!between(1, k, MOST_PROJECTIONS) || !between(1, d, MOST_SIZE) || !between(0, d_out, MOST_SIZE) ||
        !between(0, listed, capacity) || !between(0, capacity, MOST_SIZE) || !between(0, fold_bits, 8) ||
        !between(0, activation, ACTIVATIONS - 1) || !between(0, relative, 1) || !between(0, biased, 1) || !between(0, dtype, 3))
      return false;
    signs = (const int8_t*)sections.take(d);
    out_signs = (const int8_t*)sections.take(d_out);
    bias = sections.take(d_out * ELEMENT[dtype]);
    noise = (const float*)sections.take(k * sizeof(float));
    thresholds = (const float*)sections.take((k + 2) * sizeof(float));
    biases = biased ? sections.take(k * room() * ELEMENT[dtype]) : nullptr;
    norms = (const Bfloat16*)sections.take(k * room() * 2);
    surrogate = fold_bits ? (const Bfloat16*)sections.take((k + 1) * room() * 2) : nullptr;
    scales = (const Half*)sections.take(k * room() * 2);
    const Half* const low_scales = (const Half*)sections.take(k * room() * 2);
    const Half* const column_scales = (const Half*)sections.take(room() * 2);
    const Half* const column_low_scales = (const Half*)sections.take(room() * 2);
    fold_scales = fold_bits ? (const Half*)sections.take(blocks(d_out, TILE) * TILE * 2) : nullptr;
    first = sections.tiles(capacity, d, bits);
    second = k > 1 ? sections.rows(room(), d, bits, scales + room()) : Rows{};
    for (int i = 0; i < k; ++i) refinements[i] = sections.rows(room(), d, low_bits, low_scales + i * room());
    columns = sections.rows(room(), d_out, column_bits, column_scales);
    column_refinements = sections.rows(room(), d_out, column_low_bits, column_low_scales);
    fold = fold_bits ? sections.tiles(d_out, d, fold_bits) : Tiles{};
    return sections.at == size;
  }

  int64_t room() const { return blocks(capacity, TILE) * TILE; }
};

// ---- Products, by bits and number of tokens.

constexpr auto EVERY_WIDTH = std::make_integer_sequence<int, 8>();
// What the registers hold at once: vectors of a tile, and tokens. AVX2 has 16 of them.
constexpr int VECTORS = WIDTH == 64 ? 2 : 1, TOKENS_TOGETHER = WIDTH == 32 ? 4 : 8;

template <int T, int... BITS>
constexpr auto tile_products(std::integer_sequence<int, BITS...>) {
  return std::array{multiply_tile<BITS + 1, T, VECTORS>...};
}
template <int T, int... BITS>
constexpr auto row_products(std::integer_sequence<int, BITS...>) {
  return std::array{multiply_row<BITS + 1, T>...};
}
template <int... BITS>
constexpr auto additions(std::integer_sequence<int, BITS...>) {
  return std::array{add_chunk<BITS + 1>...};
}

#ifdef MATRICES
template <int... BITS>
constexpr auto tiles_by_matrices(std::integer_sequence<int, BITS...>) {
  return std::array{multiply_tile_by_matrices<BITS + 1>...};
}
template <int... BITS>
constexpr auto rows_by_matrices(std::integer_sequence<int, BITS...>) {
  return std::array{multiply_rows_by_matrices<BITS + 1>...};
}
template <int... BITS>
constexpr auto additions_by_matrices(std::integer_sequence<int, BITS...>) {
  return std::array{add_chunk_by_matrices<BITS + 1>...};
}
#endif

// Products of a tile with the tokens from `first` on, [tokens, TILE].
template <int T = TOKENS_TOGETHER>
void multiply_by_vectors(const Tiles& tiles, int64_t number, const Tokens& x, int64_t tokens, float* products,
                         int64_t first = 0) {
  static constexpr auto multiply_some = tile_products<T>(EVERY_WIDTH);
  for (; first + T <= tokens; first += T)
    multiply_some[tiles.bits - 1](tiles.tile(number), tiles.cells, x, first, products + first * TILE);
  if constexpr (T > 1) multiply_by_vectors<T / 2>(tiles, number, x, tokens, products, first);
}

// Products of a tile with all tokens, [tokens, TILE].
void multiply(const Tiles& tiles, int64_t number, const Tokens& x, int64_t tokens, float* products) {
#ifdef MATRICES
  static constexpr auto by_matrices = tiles_by_matrices(EVERY_WIDTH);
  if (in_matrices(tokens))
    by_matrices[tiles.bits - 1](tiles.tile(number), tiles.cells, x, tokens, products);
  else
#endif
    multiply_by_vectors(tiles, number, x, tokens, products);
  if (x.rest) {
    float others[MOST_TOKENS * TILE];
    multiply(tiles, number, *x.rest, tokens, others);
    for (int64_t i = 0; i < tokens * TILE; ++i) products[i] += others[i];
  }
}

// Products of a row with the tokens of a list from `first` on.
template <int T = TOKENS_TOGETHER>
void multiply(const Rows& of, int32_t number, int32_t ahead, const Tokens& x, const int32_t* which, int64_t count,
              float* products, int64_t first = 0) {
  static constexpr auto multiply_some = row_products<T>(EVERY_WIDTH);
  for (; first + T <= count; first += T)
    multiply_some[of.bits - 1](of.row(number), of.row(ahead), x, which + first, products + first);
  if constexpr (T > 1) multiply<T / 2>(of, number, ahead, x, which, count, products, first);
  if (T == TOKENS_TOGETHER && x.rest) {
    float others[MOST_TOKENS];
    multiply(of, number, ahead, *x.rest, which, count, others);
    for (int64_t i = 0; i < count; ++i) products[i] += others[i];
  }
}

// ---- Tokens.

// Sets the numbers of a group of a token.
void set_group(Tokens& to, int64_t t, int64_t g, const Ints* numbers, float unit) {
  int8_t* const at = to.numbers + (t * to.groups + g) * GROUP;
  Ints sums = {};
  for (int i = 0; i < GROUP / LANES; ++i) {
    sums += numbers[i];
    const Small small = __builtin_convertvector(numbers[i], Small);
    std::memcpy(at + i * LANES, &small, sizeof small);
  }
  int8_t* const turned = to.turned + t * to.strips() * CELL * WIDTH;
  for (int j = 0; j < CELL; ++j)
    std::memcpy(turned + ((g / LINES * CELL + j) * LINES + g % LINES) * ROW_LINE, at + j * ROW_LINE, ROW_LINE);
  int32_t total = 0;
  for (int i = 0; i < LANES; ++i) total += sums[i];
  to.units[t * to.groups + g] = unit;
  float* const lane_units = to.lane_units + t * to.strips() * LANES;
  std::fill_n(lane_units + g / LINES * LANES + g % LINES * (ROW_LINE / 4), ROW_LINE / 4, unit);
  to.sums[t] += unit * total;
}

// Tokens that are rotated, and rounded to 8 or 16 bits; a group with an infinity or NaN becomes NaN.
struct Rounded {
  int64_t d;
  const int8_t* signs;
  Tokens planes[2];
  int count;

  // Rounded to 16 bits if `wide`. Memory is of the calling thread.
  Rounded(int64_t d, const int8_t* signs, bool wide, int64_t tokens) : d(d), signs(signs), planes{}, count(1 + wide) {
    const int64_t groups = blocks(d, GROUP), whole = blocks(tokens, MATRIX) * MATRIX;
    for (Tokens& plane : planes) plane.groups = groups;
    const int64_t strips = planes[0].strips();
    int8_t *const numbers = scratch<int8_t, 5>(2 * whole * groups * GROUP),
                 *const turned = scratch<int8_t, 7>(2 * tokens * strips * CELL * WIDTH);
    float *const units = scratch<float, 6>(2 * tokens * groups), *const lane_units = scratch<float, 12>(2 * tokens * strips * LANES),
               *const sums = scratch<float, 13>(2 * tokens);
    std::fill_n(turned, count * tokens * strips * CELL * WIDTH, 0);
    std::fill_n(lane_units, count * tokens * strips * LANES, 0.0f);
    std::fill_n(sums, count * tokens, 0.0f);
    for (int i = 0; i < count; ++i)
      planes[i] = {groups, numbers + i * whole * groups * GROUP, units + i * tokens * groups,
                   turned + i * tokens * strips * CELL * WIDTH, lane_units + i * tokens * strips * LANES, sums + i * tokens,
                   i + 1 < count ? planes + 1 : nullptr};
  }
  Rounded(const Rounded&) = delete;

  template <class W>
  void set(const W* x, int64_t t) {
    const int64_t groups = planes[0].groups;
    float* const rotated = scratch<float, 0>(groups * GROUP);
    for (int64_t i = 0; i < d; ++i) rotated[i] = to_float(x[i]) * signs[i];
    std::fill(rotated + d, rotated + groups * GROUP, 0.0f);
    for_blocks(d, [&](int64_t start, int64_t size) { transform(rotated + start, size); });
    const float most_units = count == 2 ? STEP * 127 : 127;
    for (int64_t g = 0; g < groups; ++g) {
      const float* const group = rotated + g * GROUP;
      Floats most = {};
      for (int i = 0; i < GROUP; i += LANES) {
        const Floats size = lanes::magnitude(load(group + i));
        most = most < size ? size : (size < INFINITY ? most : Floats{} + INFINITY);  // of a NaN, too
      }
      float largest = 0;
      for (int i = 0; i < LANES; ++i) largest = std::max(largest, most[i]);
      const float whole_unit = largest / most_units, unit = whole_unit < INFINITY ? whole_unit : NAN;
      Ints first[GROUP / LANES], rest[GROUP / LANES];
      for (int i = 0; i < GROUP / LANES; ++i) {
        Floats number = load(group + i * LANES) / unit;
        number = number > most_units ? Floats{} + most_units : (number < -most_units ? Floats{} - most_units : number);
        number = unit > 0 ? lanes::nearest(number) : Floats{};
        const Floats high = count == 2 ? lanes::nearest(number * (1.0f / STEP)) : number;
        first[i] = __builtin_convertvector(high, Ints);
        rest[i] = __builtin_convertvector(number, Ints) - STEP * first[i];
      }
      // Levels are multiples of 1/128, so that products are not much larger than what they stand for.
      set_group(planes[0], t, g, first, (count == 2 ? STEP * unit : unit) / 128);
      if (count == 2) set_group(planes[1], t, g, rest, unit / 128);
    }
  }

  // Sets all tokens, of which threads take shares if they are many.
  template <class W>
  void set(const W* x, int64_t tokens, int64_t threads) {
    const int64_t sharing = tokens < 4 ? 1 : threads;
    run_threads(sharing, [&](int64_t thread) {
      for (int64_t t = tokens * thread / sharing; t < tokens * (thread + 1) / sharing; ++t) set(x + t * d, t);
    });
  }
};

// ---- Neurons.

// What the contributions of parts are compared with, for each token: thresholds times the token's scale.
struct Limits {
  float up[MOST_TOKENS], value[MOST_TOKENS], row[MOST_TOKENS], column[MOST_TOKENS];
  uint32_t ordinary = 0;  // bit t: the squares of the last three neither overflow nor vanish

  // `squares` are those of the scales, or null: scales are 1.
  Limits(const Site& site, const double* squares, int64_t tokens) {
    const float* const others = site.thresholds + (site.k - 1);
    for (int64_t t = 0; t < tokens; ++t) {
      const double scale = squares ? std::sqrt(squares[t]) : 1;
      up[t] = float(site.thresholds[0] * scale);
      value[t] = float(others[0] * scale);
      row[t] = float(others[1] * scale);
      column[t] = float(others[2] * scale);
      const auto is_ordinary = [](float limit) { return limit > 1e-15f && limit < 1e15f; };
      ordinary |= uint32_t(is_ordinary(value[t]) && is_ordinary(row[t]) && is_ordinary(column[t])) << t;
    }
  }
};

// Bits of the lanes that are read; infinity and NaN always are.
uint32_t exceeds(Floats contributions, float limit) {
  const Ints read = ~((contributions <= limit) & (contributions < INFINITY));
#if WIDTH == 64
  return _mm512_movepi32_mask((__m512i)read);
#elif WIDTH == 32
  return _mm256_movemask_ps((__m256)read);
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= uint32_t(read[i] & 1) << i;
  return bits;
#endif
}

Floats square_root(Floats x) {
#if WIDTH == 64
  return (Floats)_mm512_sqrt_ps((__m512)x);
#elif WIDTH == 32
  return (Floats)_mm256_sqrt_ps((__m256)x);
#else
  return lanes::sqrt(x);
#endif
}

// The root of the sum of two squares, none of which overflows.
Floats hypotenuse(Floats a, Floats b) {
  a = lanes::magnitude(a), b = lanes::magnitude(b);
  const Floats large = a < b ? b : a, small = a < b ? a : b, ratio = large > 0 ? small / large : small;
  return large * square_root(1 + ratio * ratio) + (a + b) * 0;  // NaN if one is NaN or infinite
}

// Lanes of the constants of neurons.
struct Constants {
  Floats surrogate[MOST_PROJECTIONS + 1], first_norm, norm, noise[MOST_PROJECTIONS];

  Constants(const Site& site, int64_t position) {
    const int64_t room = site.room();
    first_norm = load(site.norms + position);
    norm = load(site.norms + (site.k - 1) * room + position);
    for (int i = 0; i < site.k; ++i) noise[i] = load(site.scales + i * room + position) * site.noise[i];
    for (int i = 0; site.surrogate && i <= site.k; ++i) surrogate[i] = load(site.surrogate + i * room + position);
  }

  // Responses to k pre-activations minus surrogates; `active` is the activation of the first. Not inlined, so that equal
  // numbers give equal bits.
  __attribute__((noinline)) Floats value(const Site& site, Floats active, Floats first, Floats second) const {
    const Floats response = site.k == 1 ? active : active * second;
    if (!site.surrogate) return response;
    Floats affine = surrogate[0] * first;
    if (site.k > 1) affine += surrogate[1] * second;
    return response - (affine + surrogate[site.k]);
  }
};

// What is known of a batch of neurons: [tokens, BATCH], and bits of the neurons of each tile, [tokens, TILES].
struct Batch {
  float z[MOST_PROJECTIONS][MOST_TOKENS][BATCH], active[MOST_TOKENS][BATCH], value[MOST_TOKENS][BATCH];
  uint32_t up[MOST_TOKENS][TILES], read[MOST_TOKENS][TILES], row[MOST_TOKENS][TILES], column[MOST_TOKENS][TILES];
};

template <class W>
void add_biases(const void* biases, int64_t at, float* z) {
  for (int i = 0; i < TILE; i += LANES) put(load(z + i) + load((const W*)biases + at + i), z + i);
}

// Adds the biases of projection i of a tile.
void add_biases(const Site& site, int i, int64_t position, float* z) {
  if (!site.biases) return;
  const auto add = site.dtype == 0   ? add_biases<float>
                   : site.dtype == 1 ? add_biases<Bfloat16>
                   : site.dtype == 2 ? add_biases<Half>
                                     : add_biases<double>;
  add(site.biases, i * site.room() + position, z);
}

// Sets the first estimates of a batch and their activations, each `stride` apart for the tokens.
void estimate(const Site& site, const Tokens& x, int64_t tokens, int64_t position, float* z, float* active, int64_t stride) {
  for (int64_t at = 0; at < BATCH && position + at < site.listed; at += TILE) {
    float products[MOST_TOKENS * TILE];
    multiply(site.first, (position + at) / TILE, x, tokens, products);
    for (int64_t t = 0; t < tokens; ++t) {
      float* const to = z + t * stride + at;
      for (int lane = 0; lane < TILE; lane += LANES)
        put(load(products + t * TILE + lane) * load(site.scales + position + at + lane), to + lane);
      add_biases(site, 0, position + at, to);
      for (int lane = 0; lane < TILE; lane += LANES)
        put(activate(load(to + lane), site.activation), active + t * stride + at + lane);
    }
  }
}

// Which of LANES neurons' columns, refinements of projections, and refinements of columns are read.
struct Reads {
  uint32_t value, row, column;
};

// `changes` are two for each pre-activation, if it moves up and down by its noise.
Reads read(const Limits& limits, int64_t t, Floats value, const Floats* changes, int count, Floats norm) {
  const Floats size = value * norm;
  if (limits.ordinary >> t & 1) {  // squares are compared: if they overflow or vanish, a limit's square does not
    Floats square = {};
    for (int i = 0; i < count; ++i) square += (changes[i] * norm) * (changes[i] * norm);
    square *= 0.5f;
    const auto over = [](Floats x, float limit) { return exceeds(x, limit * limit); };
    return {over(size * size + square, limits.value[t]), over(square, limits.row[t]), over(size * size, limits.column[t])};
  }
  Floats change = {};
  for (int i = 0; i < count; ++i) change = hypotenuse(change, changes[i]);
  change *= 0.707106781f;
  return {exceeds(hypotenuse(value, change) * norm, limits.value[t]), exceeds(change * norm, limits.row[t]),
          exceeds(lanes::magnitude(size), limits.column[t])};
}

// Sets which parts of a tile's neurons are read for a token, and their values, for the neurons of `up`.
void choose(const Site& site, const Limits& limits, int64_t position, int64_t t, int64_t tile, Batch& batch) {
  const uint32_t up = batch.up[t][tile];
  Reads reads = {};
  for (int lane = 0; lane < TILE && up; lane += LANES) {
    const int64_t at = tile * TILE + lane;
    const Constants of(site, position + lane);
    const Floats first = load(batch.z[0][t] + at), active = load(batch.active[t] + at);
    const Floats second = site.k > 1 ? load(batch.z[1][t] + at) : Floats{};
    const Floats value = of.value(site, active, first, second);
    Floats changes[2 * MOST_PROJECTIONS];
    for (int side = 0; side < 2; ++side) {
      const Floats z = side ? first - of.noise[0] : first + of.noise[0];
      changes[side] = of.value(site, activate(z, site.activation), z, second) - value;
      if (site.k > 1) {
        const Floats other = side ? second - of.noise[1] : second + of.noise[1];
        changes[2 + side] = of.value(site, active, first, other) - value;
      }
    }
    const Reads here = read(limits, t, value, changes, int(2 * site.k), of.norm);
    reads.value |= here.value << lane, reads.row |= here.row << lane, reads.column |= here.column << lane;
    put(value, batch.value[t] + at);
  }
  reads.value &= up;
  batch.read[t][tile] = reads.value;
  batch.row[t][tile] = reads.row & reads.value;
  batch.column[t][tile] = reads.column & reads.value;
}

// The neurons of a batch that bits are set of, with bits of their tokens.
struct Members {
  int count = 0, pairs = 0;
  int32_t neurons[BATCH];
  uint32_t tokens[BATCH];

  Members(const uint32_t (*bits)[TILES], int64_t of_tokens) {
    for (int tile = 0; tile < TILES; ++tile) {
      uint32_t of[TILE] = {}, any = 0;
      for (int64_t t = 0; t < of_tokens; ++t) {
        any |= bits[t][tile];
        pairs += __builtin_popcount(bits[t][tile]);
        for (uint32_t rest = bits[t][tile]; rest; rest &= rest - 1) of[__builtin_ctz(rest)] |= 1u << t;
      }
      for (; any; any &= any - 1) {
        neurons[count] = tile * TILE + __builtin_ctz(any);
        tokens[count++] = of[__builtin_ctz(any)];
      }
    }
  }
};

#ifdef MATRICES
// As add_rows, by matrices.
void add_rows_by_matrices(const Rows& rows, const Members& members, int64_t position, const Tokens& x, int64_t tokens,
                          float (*z)[BATCH]) {
  static constexpr auto multiply = rows_by_matrices(EVERY_WIDTH);
  float products[2][MOST_TOKENS * TILE];
  for (int first = 0; first < members.count; first += TILE) {
    const uint8_t *of[TILE], *ahead[TILE];
    for (int i = 0; i < TILE; ++i) {
      of[i] = rows.row(position + members.neurons[std::min(first + i, members.count - 1)]);
      ahead[i] = rows.row(position + members.neurons[std::min(first + TILE + i, members.count - 1)]);
    }
    int planes = 0;
    for (const Tokens* plane = &x; plane; plane = plane->rest)
      multiply[rows.bits - 1](of, ahead, *plane, tokens, products[planes++]);
    for (int place = 0; place < TILE; ++place) {
      const int i = first + row_at(place);
      if (i >= members.count) continue;
      const int32_t neuron = members.neurons[i];
      const float scale = to_float(rows.scales[position + neuron]);
      for (uint32_t rest = members.tokens[i]; rest; rest &= rest - 1) {
        const int t = __builtin_ctz(rest);
        z[t][neuron] += scale * (products[0][t * TILE + place] + (planes > 1 ? products[1][t * TILE + place] : 0));
      }
    }
  }
}
#endif

// Adds the products of rows with tokens to pre-activations, where bits are set.
void add_rows(const Rows& rows, const Members& members, int64_t position, const Tokens& x, int64_t tokens, float (*z)[BATCH]) {
  constexpr int ROWS_AHEAD = 8;
#ifdef MATRICES
  constexpr int ENOUGH = 6;  // tokens of a row for which all of them are multiplied
  if (in_matrices(tokens) && members.pairs >= ENOUGH * members.count)
    return add_rows_by_matrices(rows, members, position, x, tokens, z);
#endif
  for (int i = 0; i < std::min(ROWS_AHEAD, members.count); ++i)
    for (int64_t line = 0; line < rows.bytes(); line += 64) __builtin_prefetch(rows.row(position + members.neurons[i]) + line);
  for (int i = 0; i < members.count; ++i) {
    int32_t which[MOST_TOKENS];
    float products[MOST_TOKENS];
    int64_t of = 0;
    for (uint32_t rest = members.tokens[i]; rest; rest &= rest - 1) which[of++] = __builtin_ctz(rest);
    const int32_t neuron = members.neurons[i], ahead = members.neurons[std::min(i + ROWS_AHEAD, members.count - 1)];
    multiply(rows, position + neuron, position + ahead, x, which, of, products);
    const float scale = to_float(rows.scales[position + neuron]);
    for (int64_t n = 0; n < of; ++n) z[which[n]][neuron] += scale * products[n];
  }
}

// ---- Rows of columns, with their values.

// Those lanes of a vector whose bits are set; others are 0.
Floats kept(uint32_t bits, Floats values) {
#if WIDTH == 64
  return (Floats)_mm512_maskz_mov_ps(bits, (__m512)values);
#else
  Ints lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = 1 << i;
  return (Floats)((Ints)values & ((Ints{} + int32_t(bits) & lanes) != 0));
#endif
}

// Collects rows and values until a chunk is full, and adds the products of the chunk to sums, [tokens, cells, GROUP].
struct Collector {
  const Rows& rows;
  float* sums;
  int64_t tokens;
  int count = 0;
  int32_t numbers[CHUNK];
  float values[MOST_TOKENS][CHUNK];
  Values fixed[MOST_TOKENS];

  Collector(const Rows& rows, float* sums, int64_t tokens) : rows(rows), sums(sums), tokens(tokens) {}

  // Adds the neurons of a batch that bits are set of.
  void add(int64_t position, const uint32_t (*bits)[TILES], const float (*value)[BATCH]) {
    int32_t neurons[BATCH];
    float scales[BATCH];
    int size = 0;
    for (int tile = 0; tile < TILES; ++tile) {
      uint32_t any = 0;
      for (int64_t t = 0; t < tokens; ++t) any |= bits[t][tile];
      for (; any; any &= any - 1) neurons[size++] = tile * TILE + __builtin_ctz(any);
    }
    for (int i = 0; i < size; ++i) scales[i] = to_float(rows.scales[position + neurons[i]]) * (1 / 128.0f);
    for (int first = 0; first < size;) {
      const int some = std::min(size - first, CHUNK - count);
      for (int i = 0; i < some; ++i) {
        numbers[count + i] = int32_t(position) + neurons[first + i];
        if (count + i < ROWS_TOGETHER) prefetch(rows.row(numbers[count + i]), rows.bytes());
      }
      for (int64_t t = 0; t < tokens; ++t) {
        alignas(64) float read[BATCH];
        for (int i = 0; i < BATCH; i += LANES) put(kept(bits[t][i / TILE] >> i % TILE, load(value[t] + i)), read + i);
        float* const at = values[t] + count;
#pragma omp simd
        for (int i = 0; i < some; ++i) at[i] = scales[first + i] * read[neurons[first + i]];
      }
      first += some, count += some;
      if (count == CHUNK) flush();
    }
  }

  void flush() {
    if (!count) return;
    for (int i = count; i % QUAD; ++i) numbers[i] = numbers[count - 1];
    for (int64_t t = 0; t < tokens; ++t) {
      std::fill(values[t] + count, values[t] + CHUNK, 0.0f);
      set_values(fixed[t], values[t], count);
    }
    auto add = additions(EVERY_WIDTH)[rows.bits - 1];
#ifdef MATRICES
    if (in_matrices(tokens)) add = additions_by_matrices(EVERY_WIDTH)[rows.bits - 1];
#endif
    add(rows.lines, rows.cells, numbers, blocks(count, QUAD), fixed, tokens, sums);
    count = 0;
  }
};

// ---- The op, for up to MOST_TOKENS tokens.

template <class W>
struct Step {
  const Site& site;
  W* out;
  int64_t tokens, threads;
  const Tokens& x;
  float* kept;        // [batches, tokens, 2, BATCH]: first estimates and their activations, if thresholds are relative
  double* squares;    // [threads, MOST_TOKENS]: of the scales
  float* sums;        // [threads, tokens, width]: of the columns times their values

  int64_t batches() const { return blocks(site.listed, BATCH); }
  int64_t share(int64_t of, int64_t thread) const { return of * thread / threads; }
  int64_t width() const { return site.columns.cells * GROUP; }
  // Bits of the neurons of a tile that are listed.
  uint32_t listed(int64_t position) const {
    return (uint64_t(1) << std::clamp<int64_t>(site.listed - position, 0, TILE)) - 1;
  }

  void keep_first(int64_t thread) {
    const Matrices matrices(tokens);
    double* const own = squares + thread * MOST_TOKENS;
    std::fill_n(own, MOST_TOKENS, 0.0);
    for (int64_t b = share(batches(), thread); b < share(batches(), thread + 1); ++b) {
      const int64_t position = b * BATCH, end = std::min(site.listed - position, int64_t(BATCH));
      float* const z = kept + b * tokens * 2 * BATCH;
      estimate(site, x, tokens, position, z, z + BATCH, 2 * BATCH);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < end; ++i) {
          const double first = double(z[t * 2 * BATCH + BATCH + i]) * to_float(site.norms[position + i]);
          own[t] += first * first;
        }
    }
  }

  void take_first(int64_t b, Batch& batch) const {
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy_n(kept + (b * tokens + t) * 2 * BATCH, BATCH, batch.z[0][t]);
      std::copy_n(kept + (b * tokens + t) * 2 * BATCH + BATCH, BATCH, batch.active[t]);
    }
  }

  void add_neurons(int64_t thread) {
    const Matrices matrices(tokens);
    double total[MOST_TOKENS] = {};
    for (int64_t of = 0; site.relative && of < threads; ++of)
      for (int64_t t = 0; t < tokens; ++t) total[t] += squares[of * MOST_TOKENS + t];
    const Limits limits(site, site.relative ? total : nullptr, tokens);
    Batch& batch = *scratch<Batch, 1>(1);
    float* const own = sums + thread * tokens * width();
    std::fill_n(own, tokens * width(), 0.0f);
    Collector& of_columns = *new (scratch<Collector, 2>(1)) Collector(site.columns, own, tokens);
    Collector& of_refinements = *new (scratch<Collector, 3>(1)) Collector(site.column_refinements, own, tokens);
    for (int64_t b = thread; b < batches(); b += threads) {
      const int64_t position = b * BATCH;
      for (int64_t tile = 0; tile < TILES; ++tile)
        for (int64_t t = 0; t < tokens; ++t) batch.up[t][tile] = listed(position + tile * TILE);
      if (site.relative)
        take_first(b, batch);
      else
        estimate(site, x, tokens, position, batch.z[0][0], batch.active[0], BATCH);
      if (site.k > 1) estimate_second(limits, position, batch);
      for (int64_t tile = 0; tile < TILES; ++tile)
        for (int64_t t = 0; t < tokens; ++t) choose(site, limits, position + tile * TILE, t, tile, batch);
      refine(position, batch);
      of_columns.add(position, batch.read, batch.value);
      of_refinements.add(position, batch.column, batch.value);
    }
    of_columns.flush();
    of_refinements.flush();
  }

  // Sets the second estimates of the neurons whose gates say so.
  void estimate_second(const Limits& limits, int64_t position, Batch& batch) const {
    for (int64_t tile = 0; tile < TILES && position + tile * TILE < site.listed; ++tile)
      for (int64_t t = 0; t < tokens; ++t) {
        uint32_t up = 0;
        for (int lane = 0; lane < TILE; lane += LANES) {
          const int64_t at = tile * TILE + lane;
          const Floats norm = load(site.norms + position + at);
          up |= exceeds(lanes::magnitude(load(batch.active[t] + at)) * norm, limits.up[t]) << lane;
          put(Floats{}, batch.z[1][t] + at);
        }
        batch.up[t][tile] &= up;
      }
    add_rows(site.second, Members(batch.up, tokens), position, x, tokens, batch.z[1]);
    for (int64_t tile = 0; tile < TILES && position + tile * TILE < site.listed; ++tile)
      for (int64_t t = 0; t < tokens; ++t)
        if (batch.up[t][tile]) add_biases(site, 1, position + tile * TILE, batch.z[1][t] + tile * TILE);
  }

  // Adds the refinements of pre-activations, and sets the values anew where there are any.
  void refine(int64_t position, Batch& batch) const {
    const Members members(batch.row, tokens);
    if (!members.count) return;
    for (int i = 0; i < site.k; ++i) add_rows(site.refinements[i], members, position, x, tokens, batch.z[i]);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t tile = 0; tile < TILES; ++tile) {
        if (!batch.row[t][tile]) continue;
        for (int lane = 0; lane < TILE; lane += LANES) {
          const int64_t at = tile * TILE + lane;
          const Constants of(site, position + at);
          const Floats first = load(batch.z[0][t] + at), second = site.k > 1 ? load(batch.z[1][t] + at) : Floats{};
          put(of.value(site, activate(first, site.activation), first, second), batch.value[t] + at);
        }
      }
  }

  void add_outputs(int64_t thread) {
    const Matrices matrices(tokens);
    const int64_t cells = blocks(site.d_out, GROUP), begin = share(cells, thread), end = share(cells, thread + 1);
    if (begin == end) return;
    const int64_t size = (end - begin) * GROUP;
    float* const totals = scratch<float, 4>(tokens * size);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < size; i += LANES) {
        Floats total = {};
        for (int64_t of = 0; of < threads; ++of) total += load(sums + (of * tokens + t) * width() + begin * GROUP + i);
        put(total, totals + t * size + i);
      }
    const int64_t last = std::min(end * GROUP, site.d_out);
    for (int64_t row = begin * GROUP; site.fold_bits && row < last; row += TILE) {
      float products[MOST_TOKENS * TILE];
      multiply(site.fold, row / TILE, x, tokens, products);
      for (int64_t t = 0; t < tokens; ++t)
        for (int lane = 0; lane < TILE; lane += LANES) {
          float* const at = totals + t * size + row - begin * GROUP + lane;
          put(load(at) + load(products + t * TILE + lane) * load(site.fold_scales + row + lane), at);
        }
    }
    for (int64_t t = 0; t < tokens; ++t)
      for_blocks(site.d_out, [&](int64_t start, int64_t length) {
        if (start < begin * GROUP || start >= end * GROUP) return;
        float* const block = totals + t * size + start - begin * GROUP;
        transform(block, length);
        for (int64_t i = 0; i < length; ++i)
          store(block[i] * site.out_signs[start + i] + to_float(((const W*)site.bias)[start + i]),
                out + t * site.d_out + start + i);
      });
  }
};

template <class W>
void compute(const Site& site, const W* x, W* out, int64_t tokens, int64_t threads) {
  Rounded rounded(site.d, site.signs, site.bits + site.low_bits >= 8, tokens);
  rounded.set(x, tokens, threads);
  Step<W> step{site, out, tokens, threads, rounded.planes[0], nullptr, nullptr, nullptr};
  if (site.relative) {
    step.kept = scratch<float, 8>(step.batches() * tokens * 2 * BATCH);
    step.squares = scratch<double, 9>(threads * MOST_TOKENS);
  }
  step.sums = scratch<float, 10>(threads * tokens * step.width());
  if (site.relative) run_threads(threads, [&](int64_t thread) { step.keep_first(thread); });
  run_threads(threads, [&](int64_t thread) { step.add_neurons(thread); });
  run_threads(threads, [&](int64_t thread) { step.add_outputs(thread); });
}

// Calls `of` for a value of the type that a number stands for.
template <class Function>
void with_dtype(int64_t dtype, Function of) {
  if (dtype == 0) return of(float());
  if (dtype == 1) return of(Bfloat16());
  if (dtype == 2) return of(Half());
  of(double());
}

// ---- A prepared linear layer.

struct Linear {
  int64_t d, d_out, bits, biased, dtype;
  const int8_t* signs;
  const void* bias;  // of the dtype of x, or null
  const Half* scales;
  Tiles tiles;

  // As for a site.
  bool open(const uint8_t* layer, int64_t size) {
    Sections sections(layer, size, LINEAR_MAGIC, {&d, &d_out, &bits, &biased, &dtype});
    if (!sections.valid || !between(1, d, MOST_SIZE) || !between(0, d_out, MOST_SIZE) || !between(1, bits, 8) ||
        !between(0, biased, 1) || !between(0, dtype, 3))
      return false;
    signs = (const int8_t*)sections.take(d);
    bias = biased ? sections.take(d_out * ELEMENT[dtype]) : nullptr;
    scales = (const Half*)sections.take(blocks(d_out, TILE) * TILE * 2);
    tiles = sections.tiles(d_out, d, bits);
    return sections.at == size;
  }
};

template <class W>
void multiply(const Linear& layer, const W* x, W* out, int64_t tokens, int64_t threads) {
  Rounded rounded(layer.d, layer.signs, layer.bits == 8, tokens);
  rounded.set(x, tokens, threads);
  const int64_t count = blocks(layer.d_out, TILE);
  run_threads(threads, [&](int64_t thread) {
    const Matrices matrices(tokens);
    for (int64_t tile = count * thread / threads; tile < count * (thread + 1) / threads; ++tile) {
      float products[MOST_TOKENS * TILE];
      multiply(layer.tiles, tile, rounded.planes[0], tokens, products);
      const int64_t row = tile * TILE, rows = std::min<int64_t>(TILE, layer.d_out - row);
      for (int64_t t = 0; t < tokens; ++t) {
        float* const product = products + t * TILE;
        for (int lane = 0; lane < TILE; lane += LANES)
          put(load(product + lane) * load(layer.scales + row + lane), product + lane);
        for (int64_t i = 0; i < rows; ++i) {
          const float bias = layer.bias ? to_float(((const W*)layer.bias)[row + i]) : 0;
          store(product[i] + bias, out + t * layer.d_out + row + i);
        }
      }
    }
  });
}

}  // namespace

extern "C" int64_t tardis_coded_ffn(const uint8_t* prepared, int64_t size, const void* x, void* out, int64_t tokens, int64_t d,
                                    int64_t d_out, int64_t dtype, int64_t threads) {
  Site site;
  if (!site.open(prepared, size) || site.d != d || site.d_out != d_out || site.dtype != dtype || tokens < 0 || threads < 1)
    return 1;
  const int64_t bytes = blocks(site.listed, TILE) * site.first.cells * site.bits * TILE_LINE;
  if (bytes < SERIAL_BYTES) threads = 1;
  with_dtype(dtype, [&](auto value) {
    typedef decltype(value) W;
    for (int64_t t = 0; t < tokens; t += MOST_TOKENS)
      compute(site, (const W*)x + t * d, (W*)out + t * d_out, std::min(MOST_TOKENS, tokens - t), threads);
  });
  return 0;
}

extern "C" int64_t tardis_coded_linear(const uint8_t* prepared, int64_t size, const void* x, void* out, int64_t tokens, int64_t d,
                                       int64_t d_out, int64_t dtype, int64_t threads) {
  Linear layer;
  if (!layer.open(prepared, size) || layer.d != d || layer.d_out != d_out || layer.dtype != dtype || tokens < 0 || threads < 1)
    return 1;
  if (d * d_out * layer.bits / 8 < SERIAL_BYTES) threads = 1;
  with_dtype(dtype, [&](auto value) {
    typedef decltype(value) W;
    for (int64_t t = 0; t < tokens; t += MOST_TOKENS)
      multiply(layer, (const W*)x + t * d, (W*)out + t * d_out, std::min(MOST_TOKENS, tokens - t), threads);
  });
  return 0;
}
