// Adds the exact terms of the predicted outliers to the output of a folded FFN, for a few tokens, on a CPU.
//
// What is computed is specified by `correct` in reference.py, of gated sites in reference_gated.py; how the codes lie in memory, by packing.py. The time goes
// into reading, once for all tokens, (a) the packed codes of every guarded neuron, (b) the rows of W1 and W2 of every
// outlier, which may be codes, too, those of W1 nested in (a), (c) the folded weight, where it is given. The build (cpu.py) writes
// activations.inc: one `case <number>: return <expression of z>;` an activation.
// Not to be compiled with -ffast-math: a NaN estimate must compare false, and infinite bounds are ordinary.

#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BW__)
#define WIDTH 64
#elif defined(__AVX2__) && defined(__F16C__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 64;                // columns whose codes lie together; half a block, one, or two share a scale
constexpr int64_t SERIAL_BYTES = 32768;  // of packed codes: below, waking other threads costs more than it saves

// ---- Vectors.

constexpr int LANES = WIDTH / 4;
typedef float Floats __attribute__((vector_size(WIDTH)));
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To>
To read(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}
void put(Floats values, float* at) { std::memcpy(at, &values, sizeof values); }

float to_float(float value) { return value; }
[[maybe_unused]] float to_float(uint8_t value) { return value; }
float to_float(Bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  return read<float>(&bits);
}
void store(float value, float* at) { *at = value; }
void store(float value, Bfloat16* at) {
  const uint32_t bits = read<uint32_t>(&value);
  at->bits = std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#ifdef __F16C__
float to_float(Half value) { return _cvtsh_ss(value.bits); }
void store(float value, Half* at) { at->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
float to_float(Half value) { return read<_Float16>(&value); }
void store(float value, Half* at) {
  const _Float16 rounded = value;
  at->bits = read<uint16_t>(&rounded);
}
#endif

// load: LANES elements as floats. pairs, singles: codes of the columns from `part * WIDTH` on, of a plane of 2 bits (in
// the lowest bits of each byte) or 1 bit. dot: adds to each sum four products of a code and an x of at most 64.
Floats load(const float* from) { return read<Floats>(from); }
#if WIDTH == 64
Floats load(const Half* from) { return _mm512_cvtph_ps(read<__m256i>(from)); }
Floats load(const Bfloat16* from) { return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(from)), 16); }
Floats load(const uint8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(read<__m128i>(from))); }
Bytes pairs(const uint8_t* packed, int) {
  const __m512i shifts = _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0);
  return (Bytes)_mm512_srlv_epi64(_mm512_broadcast_i32x4(read<__m128i>(packed)), shifts);
}
Bytes singles(const uint8_t* packed, int) { return (Bytes)_mm512_maskz_set1_epi8(read<uint64_t>(packed), 1); }
Ints dot(Ints sums, Bytes codes, const int8_t* x) {
#ifdef __AVX512VNNI__
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, read<__m512i>(x));
#else
  const __m512i products = _mm512_maddubs_epi16((__m512i)codes, read<__m512i>(x));
  return sums + (Ints)_mm512_madd_epi16(products, _mm512_set1_epi16(1));
#endif
}
#elif WIDTH == 32
Floats load(const Half* from) { return _mm256_cvtph_ps(read<__m128i>(from)); }
Floats load(const Bfloat16* from) { return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(from)), 16); }
Floats load(const uint8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(read<int64_t>(from))));
}
Bytes pairs(const uint8_t* packed, int part) {
  const __m256i shifts = _mm256_set_epi64x(4 * part + 2, 4 * part + 2, 4 * part, 4 * part);
  return (Bytes)_mm256_srlv_epi64(_mm256_broadcastsi128_si256(read<__m128i>(packed)), shifts);
}
Bytes singles(const uint8_t* packed, int part) {
  const __m256i each = _mm256_set1_epi64x(0x8040201008040201);
  const __m256i byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
  const __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi32(read<int32_t>(packed + 4 * part)), byte) & each;
  return (Bytes)_mm256_cmpeq_epi8(bits, each) & 1;
}
Ints dot(Ints sums, Bytes codes, const int8_t* x) {
  const __m256i products = _mm256_maddubs_epi16((__m256i)codes, read<__m256i>(x));
  return sums + (Ints)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
}
#else
template <class W>
Floats load(const W* from) {
  const auto one = [from](int i) { return to_float(read<W>(from + i)); };
  return Floats{one(0), one(1), one(2), one(3)};
}
Bytes pairs(const uint8_t* packed, int part) { return read<Bytes>(packed) >> 2 * part; }
Bytes singles(const uint8_t* packed, int part) {
  const uint64_t ones = 0x0101010101010101, each[] = {0x8040201008040201, 0x8040201008040201};
  const uint64_t bytes[] = {packed[2 * part] * ones, packed[2 * part + 1] * ones};
  return (Bytes)((read<Bytes>(bytes) & read<Bytes>(each)) != 0) & 1;
}
Ints dot(Ints sums, Bytes codes, const int8_t* x) {
  typedef int16_t Shorts __attribute__((vector_size(WIDTH)));
  const Shorts both_codes = (Shorts)codes, both_x = read<Shorts>(x);
  const Ints products = (Ints)((both_codes & 255) * (both_x << 8 >> 8) + (both_codes >> 8 & 255) * (both_x >> 8));
  return sums + (products << 16 >> 16) + (products >> 16);
}
#endif

float sum(Floats values) {
#if WIDTH == 64
  return _mm512_reduce_add_ps(values);
#else
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += values[i];
  return total;
#endif
}

// Rows lie far apart and no hardware foresees the jump, so each pass over one asks for the next: into the second level
// of the cache, since into the first is no faster than not asking.
constexpr int SECOND_LEVEL = 2;

template <class W>
float dot(const W* row, const float* x, int64_t size, const W* next) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int k = 0; k < 4; ++k) {
      __builtin_prefetch(next + i + k * LANES, 0, SECOND_LEVEL);
      sums[k] += load(row + i + k * LANES) * load(x + i + k * LANES);
    }
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < size; ++i) total += to_float(row[i]) * x[i];
  return total;
}

template <class W>
void add_scaled(float* out, float factor, const W* row, int64_t size, const W* next) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    __builtin_prefetch(next + i, 0, SECOND_LEVEL);
    put(load(out + i) + factor * load(row + i), out + i);
  }
  for (; i < size; ++i) out[i] += factor * to_float(row[i]);
}

// Every line of a row that is about to be read: a row of codes is too short to ask for along the way.
void prefetch(const uint8_t* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, SECOND_LEVEL);
}

// ---- The call.

struct Call {  // of a plain site; cpu.py packs it: sixteen pointers and fourteen integers
  static constexpr int PROJECTIONS = 1;  // in front of the activation
  void* out;
  const void *folded, *x, *w1, *b1, *w2t;
  const int64_t* counts;
  const int32_t* neurons;
  const uint8_t* codes;
  const Half* scale;
  const uint8_t* zero;
  const float *lower, *upper, *slope, *intercept;
  const uint8_t* fold;
  int64_t tokens, d, d_out, d_groups, d_out_groups, w1_stride, w2t_stride, bits, activation, fold_bits, row_bits,
      low_bits, dtype, threads;
};

// The blocks of a row of codes, and how many of its scales lie one behind the other.
struct Row {
  int64_t blocks, groups;
  int shift;  // half block number i has the scale i >> shift

  Row(int64_t columns, int64_t groups)
      : blocks((columns + BLOCK - 1) / BLOCK), groups(groups), shift(1 + (groups < blocks) - (groups > blocks)) {}
  // Of a row that its scales and zero points follow (packing.join).
  int64_t bytes(int64_t bits) const { return blocks * bits * (BLOCK / 8) + 3 * groups; }
};

struct Outlier {
  int32_t position;  // in the list of neurons
  uint32_t tokens;   // bit t: token t
};

struct alignas(64) Line {
  char bytes[64];
};

// Scratch memory number N of the calling thread, kept from call to call so that its pages are mapped once.
template <class T, int N>
T* scratch(int64_t count) {
  static thread_local std::vector<Line> lines;
  lines.resize(std::max(lines.size(), (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line) + 1));
  return reinterpret_cast<T*>(lines.data());
}

float activate(float z, int64_t activation) {
  switch (activation) {
#include "activations.inc"
  }
  return NAN;
}

// ---- The predictor.

// The tokens, as floats and in fixed point: x = unit * (128 high + low), which errs by less than 2^-13 of the largest
// |x| of its block. That is far below the error of the codes, and integers take half the time of floats.
struct Inputs {
  Row row;             // of codes to be multiplied with
  int64_t blocks, stride;
  float* plain;        // [tokens, blocks, BLOCK], zeros after the last column
  int8_t *high, *low;  // [tokens, blocks, BLOCK]
  float* units;        // [tokens, blocks]
  float* sums;         // [tokens, stride]: of each group, zeros after the last one

  template <class W>
  Inputs(const W* x, int64_t tokens, int64_t d, int64_t groups)
      : row(d, groups),
        blocks(row.blocks),
        stride((groups + LANES - 1) / LANES * LANES),
        plain(scratch<float, 0>(tokens * blocks * BLOCK)),
        high(scratch<int8_t, 1>(tokens * blocks * BLOCK)),
        low(scratch<int8_t, 2>(tokens * blocks * BLOCK)),
        units(scratch<float, 3>(tokens * blocks)),
        sums(scratch<float, 4>(tokens * stride)) {
    std::fill_n(plain, tokens * blocks * BLOCK, 0.0f);
    std::fill_n(sums, tokens * stride, 0.0f);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < d; ++i) plain[t * blocks * BLOCK + i] = to_float(x[t * d + i]);
    for (int64_t b = 0; b < tokens * blocks; ++b) {
      const float* const block = plain + b * BLOCK;
      int8_t *const highs = high + b * BLOCK, *const lows = low + b * BLOCK;
      Floats most = {};
      for (int half = 0; half < 2; ++half) {
        Floats total = {};
        for (int k = half * BLOCK / 2; k < (half + 1) * BLOCK / 2; k += LANES) {
          const Floats values = load(block + k), sizes = values < 0 ? -values : values;
          total += values;
          most = most < sizes ? sizes : most;
        }
        sums[b / blocks * stride + ((2 * (b % blocks) + half) >> row.shift)] += sum(total);
      }
      float largest = 0;
      for (int i = 0; i < LANES; ++i) largest = std::max(largest, most[i]);
      units[b] = largest / (63 * 128);
      const float factor = units[b] >= FLT_MIN ? 1 / units[b] : 0;
#pragma omp simd
      for (int k = 0; k < BLOCK; ++k) {
        const int32_t fixed = int32_t(std::rint(block[k] * factor));
        highs[k] = (fixed + 64) >> 7;
        lows[k] = ((fixed + 64) & 127) - 64;
      }
    }
  }
};

// The codes of the columns from `part * WIDTH` on of a packed block.
template <int BITS>
Bytes codes_of(const uint8_t* packed, int part) {
  Bytes codes = {};
  for (int plane = 0; plane < BITS / 2; ++plane) codes = codes << 2 | (pairs(packed + 16 * plane, part) & 3);
  if (BITS % 2) codes = codes << 1 | singles(packed + BITS / 2 * 16, part);
  return codes;
}

// The scales of so many columns as there are in a vector, from half block number `half` on.
Floats scales_of(const float* scale, int64_t half, int shift) {
#if WIDTH == 64
  const __m512 one = _mm512_set1_ps(scale[half >> shift]);
  return (Floats)_mm512_mask_blend_ps(0xff00, one, _mm512_set1_ps(scale[(half + 1) >> shift]));
#else
  return scale[half >> shift] + Floats{};
#endif
}

// The estimates of one neuron for T tokens from `first` on. Scales are read up to an even number of them.
template <int BITS, int T>
void estimate(const uint8_t* packed, const float* scale, const float* shift, const Inputs& x, int64_t first,
              float* z_hat) {
  Floats total[T] = {};
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const float* const sums = x.sums + (first + t) * x.stride;
    for (int64_t g = 0; g < x.stride; g += LANES) total[t] -= load(shift + g) * load(sums + g);
  }
  for (int64_t b = 0; b < x.blocks; ++b, packed += BITS * BLOCK / 8) {
    for (int part = 0; part < BLOCK / WIDTH; ++part) {
      const Bytes codes = codes_of<BITS>(packed, part);
      const Floats scales = scales_of(scale, 2 * b + part * WIDTH / 32, x.row.shift);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const int64_t unit = (first + t) * x.blocks + b, at = unit * BLOCK + part * WIDTH;
        const Ints dots = dot(dot(Ints{}, codes, x.high + at) << 7, codes, x.low + at);
        total[t] += __builtin_convertvector(dots, Floats) * x.units[unit] * scales;
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) z_hat[t] = sum(total[t]);
}

// The estimates of one neuron for all tokens.
template <int BITS>
void estimate_all(const uint8_t* packed, const float* scale, const float* shift, const Inputs& x, int64_t tokens,
                  float* z_hat) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) estimate<BITS, 4>(packed, scale, shift, x, t, z_hat + t);
  for (; t < tokens; ++t) estimate<BITS, 1>(packed, scale, shift, x, t, z_hat + t);
}

// Lists the outliers among the guarded neurons from `begin` to `end`, returns the end of the list. Their estimates are
// kept, [guarded, tokens].
template <int BITS>
Outlier* test(const Call& call, const Inputs& x, int64_t begin, int64_t end, Outlier* list, float* estimates) {
  const int64_t groups = x.row.groups, together = 1 + 63 / groups;  // neurons whose scales are converted at once
  std::vector<float> scales(together * groups + 1), shifts(together * groups + LANES);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = (row - begin) % together * groups;
    if (at == 0) {
      const Half* const scale = call.scale + row * groups;
      const uint8_t* const zero = call.zero + row * groups;
      const int64_t size = std::min(together, end - row) * groups;
      int64_t i = 0;
      for (; i + LANES <= size; i += LANES) {
        put(load(scale + i), &scales[i]);
        put(load(scale + i) * load(zero + i), &shifts[i]);
      }
      for (; i < size; ++i) shifts[i] = (scales[i] = to_float(scale[i])) * zero[i];
    }
    const uint8_t* const packed = call.codes + row * x.blocks * (BITS * BLOCK / 8);
    float z_hat[16];
    estimate_all<BITS>(packed, &scales[at], &shifts[at], x, call.tokens, z_hat);
    uint32_t tokens = 0;
    for (int64_t t = 0; t < call.tokens; ++t)
      tokens |= uint32_t(z_hat[t] < call.lower[row] || z_hat[t] > call.upper[row]) << t;
    if (!tokens) continue;
    *list++ = {int32_t(row), tokens};
    std::copy_n(z_hat, call.tokens, estimates + row * call.tokens);
  }
  return list;
}

constexpr decltype(test<1>)* TESTS[] = {test<1>, test<2>, test<3>, test<4>, test<5>, test<6>, test<7>, test<8>};

Outlier* find(const Call& call, const Inputs& x, int64_t begin, int64_t end, Outlier* list, float* estimates) {
  return TESTS[call.bits - 1](call, x, begin, end, list, estimates);
}

// ---- Rows of codes, each followed by its scales and zero points (packing.join).

// A row's scales and scales times zero points, as floats.
template <int BITS>
void open(const uint8_t* codes, const Row& row, float* scales, float* shifts) {
  const uint8_t *const half = codes + row.blocks * (BITS * BLOCK / 8), *const zero = half + 2 * row.groups;
  int64_t g = 0;
  for (; g + LANES <= row.groups; g += LANES) {
    const Floats scale = load((const Half*)(half + 2 * g));
    put(scale, scales + g);
    put(scale * load(zero + g), shifts + g);
  }
  for (; g < row.groups; ++g) shifts[g] = (scales[g] = to_float(read<Half>(half + 2 * g))) * zero[g];
}

// Adds the products of the tokens and the rows of the folded weight from `begin` to `end`.
template <int BITS>
void fold(const Call& call, const Inputs& x, int64_t begin, int64_t end, float* sums) {
  float *const scales = scratch<float, 8>(2 * x.stride), *const shifts = scales + x.stride;
  std::fill_n(scales, 2 * x.stride, 0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* const codes = call.fold + row * x.row.bytes(BITS);
    open<BITS>(codes, x.row, scales, shifts);
    float products[16];
    estimate_all<BITS>(codes, scales, shifts, x, call.tokens, products);
    for (int64_t t = 0; t < call.tokens; ++t) sums[t * call.d_out + row] += products[t];
  }
}

constexpr decltype(fold<1>)* FOLDS[] = {fold<1>, fold<2>, fold<3>, fold<4>, fold<5>, fold<6>, fold<7>, fold<8>};

// Rows of a folded weight that are multiplied at once: so many registers hold sums.
constexpr int ROWS = WIDTH == 64 ? 4 : 2;

// Adds the products of four tokens from `first` on and R rows of a folded weight that is stored as it is.
template <int R, class W>
void multiply(const Call& call, const Inputs& x, int64_t row, int64_t first, float* sums) {
  constexpr int T = 4;
  const int64_t d = call.d, stride = x.blocks * BLOCK;
  const W* const weights = (const W*)call.fold + row * d;
  const float* const tokens = x.plain + first * stride;
  Floats totals[R][T] = {};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    Floats some[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) some[r] = load(weights + r * d + i);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const Floats token = load(tokens + t * stride + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) totals[r][t] += some[r] * token;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      float total = sum(totals[r][t]);
      for (int64_t k = i; k < d; ++k) total += to_float(weights[r * d + k]) * tokens[t * stride + k];
      sums[(first + t) * call.d_out + row + r] += total;
    }
}

// As `fold`, of such a weight.
template <class W>
void fold_plain(const Call& call, const Inputs& x, int64_t begin, int64_t end, float* sums) {
  for (int64_t row = begin; row < end;) {
    const int64_t last = row + ROWS <= end ? row + ROWS : row + 1;
    int64_t t = 0;
    for (; t + 4 <= call.tokens; t += 4)
      (last - row == ROWS ? multiply<ROWS, W> : multiply<1, W>)(call, x, row, t, sums);
    for (; row < last; ++row) {
      const W* const weights = (const W*)call.fold + row * call.d;
      for (int64_t rest = t; rest < call.tokens; ++rest)
        sums[rest * call.d_out + row] +=
            dot(weights, x.plain + rest * x.blocks * BLOCK, call.d, row + 1 < end ? weights + call.d : weights);
    }
  }
}

float beyond_surrogate(const Call& call, int64_t position, float z) {
  return activate(z, call.activation) - (call.slope[position] * z + call.intercept[position]);
}

// What the low planes of a row of W1 add to the estimates, [tokens], of an outlier.
template <int BITS>
void refine(const Call& call, const Inputs& x, uint32_t tokens, const uint8_t* row, float* z) {
  float *const scales = scratch<float, 9>(2 * x.stride), *const shifts = scales + x.stride;
  std::fill_n(scales, 2 * x.stride, 0.0f);
  open<BITS>(row, x.row, scales, shifts);
  for (int64_t t = 0; t < call.tokens; ++t) {
    if (!(tokens >> t & 1)) continue;
    float low;
    estimate<BITS, 1>(row, scales, shifts, x, t, &low);
    z[t] += low;
  }
}

// Adds a column of W2 times the residuals, [tokens], of an outlier.
template <int BITS>
void add_column(const Call& call, uint32_t tokens, const uint8_t* column, const float* residuals, float* sums) {
  const Row row(call.d_out, call.d_out_groups);
  float *const scales = scratch<float, 10>(2 * row.groups), *const shifts = scales + row.groups;
  open<BITS>(column, row, scales, shifts);
  float factors[16], *into[16];
  int count = 0;
  for (int64_t t = 0; t < call.tokens; ++t) {
    if (!(tokens >> t & 1)) continue;
    factors[count] = residuals[t];
    into[count++] = sums + t * call.d_out;
  }
  for (int64_t b = 0; b < row.blocks; ++b, column += BITS * BLOCK / 8) {
    uint8_t codes[BLOCK];
    for (int part = 0; part < BLOCK / WIDTH; ++part) {
      const Bytes some = codes_of<BITS>(column, part);
      std::memcpy(codes + part * WIDTH, &some, WIDTH);
    }
    const int64_t first = b * BLOCK, size = std::min<int64_t>(BLOCK, call.d_out - first);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
      const int64_t g = (2 * b + i / (BLOCK / 2)) >> row.shift;
      const Floats weights = scales[g] * load(codes + i) - shifts[g];
      for (int k = 0; k < count; ++k) put(load(into[k] + first + i) + factors[k] * weights, into[k] + first + i);
    }
    for (; i < size; ++i) {
      const int64_t g = (2 * b + i / (BLOCK / 2)) >> row.shift;
      for (int k = 0; k < count; ++k) into[k][first + i] += factors[k] * (scales[g] * codes[i] - shifts[g]);
    }
  }
}

constexpr decltype(refine<1>)* REFINE[] = {refine<1>, refine<2>, refine<3>, refine<4>,
                                           refine<5>, refine<6>, refine<7>, refine<8>};
constexpr decltype(add_column<1>)* ADD_COLUMN[] = {add_column<1>, add_column<2>, add_column<3>, add_column<4>,
                                                   add_column<5>, add_column<6>, add_column<7>, add_column<8>};

// Adds an outlier's exact terms, and asks for the rows of the neuron `next`, which comes after it. The outlier's
// estimates become its pre-activations.
void add_coded(const Call& call, const Inputs& x, Outlier outlier, int64_t neuron, int64_t next, float b1, float* z,
               float* sums) {
  const auto *const w1 = (const uint8_t*)call.w1, *const w2t = (const uint8_t*)call.w2t;
  prefetch(w1 + next * call.w1_stride, x.row.bytes(call.low_bits));
  prefetch(w2t + next * call.w2t_stride, Row(call.d_out, call.d_out_groups).bytes(call.row_bits));
  REFINE[call.low_bits - 1](call, x, outlier.tokens, w1 + neuron * call.w1_stride, z);
  for (int64_t t = 0; t < call.tokens; ++t)
    if (outlier.tokens >> t & 1) z[t] = beyond_surrogate(call, outlier.position, z[t] + b1);
  ADD_COLUMN[call.row_bits - 1](call, outlier.tokens, w2t + neuron * call.w2t_stride, z, sums);
}

// The same from rows that are stored as they are.
template <class W>
void add_plain(const Call& call, const Inputs& x, Outlier outlier, int64_t neuron, int64_t next, float b1,
               float* sums) {
  const W *const row = (const W*)call.w1 + neuron * call.w1_stride,
                *const column = (const W*)call.w2t + neuron * call.w2t_stride;
  for (int64_t t = 0; t < call.tokens; ++t) {
    if (!(outlier.tokens >> t & 1)) continue;
    const float z = dot(row, x.plain + t * x.blocks * BLOCK, call.d, column) + b1;
    add_scaled(sums + t * call.d_out, beyond_surrogate(call, outlier.position, z), column, call.d_out,
               (const W*)call.w1 + next * call.w1_stride);
  }
}

template <class W>
void add(const Call& call, const Inputs& x, Outlier outlier, int64_t neuron, int64_t next, float* estimates,
         float* sums) {
  const float bias = call.b1 ? to_float(((const W*)call.b1)[neuron]) : 0;
  if (call.row_bits == 16)
    add_plain<W>(call, x, outlier, neuron, next, bias, sums);
  else
    add_coded(call, x, outlier, neuron, next, bias, estimates, sums);
}

// ---- Gated sites.

#include "cpu_gated.h"

// ---- The ops.

template <class W, class AnyCall>
void correct(const AnyCall& call) {
  const int64_t tokens = call.tokens, d_out = call.d_out, size = tokens * d_out;
  const int64_t listed = call.counts[0], guarded = call.counts[1], always = listed - guarded;
  const W* const folded = (const W*)call.folded;
  const Inputs x((const W*)call.x, tokens, call.d, call.d_groups);
  // One thread or all of them: a team of another size makes libgomp end threads that PyTorch then starts again.
  const int64_t kept = AnyCall::PROJECTIONS * tokens;  // estimates of a neuron
  const int64_t bits = AnyCall::PROJECTIONS * listed * call.bits + (call.fold ? d_out * call.fold_bits : 0);
  const int threads = bits * x.blocks * (BLOCK / 8) < SERIAL_BYTES ? 1 : call.threads;
  float* const partial = scratch<float, 5>(threads * size);
  Outlier* const list = scratch<Outlier, 6>(listed);
  float* const estimates = scratch<float, 11>(guarded * kept);
  int64_t *const begins = scratch<int64_t, 7>(2 * threads), *const ends = begins + threads;

#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const auto share = [team](int64_t of, int64_t thread) { return of * thread / team; };

    begins[me] = share(guarded, me) + share(always, me);
    Outlier* end = find(call, x, share(guarded, me), share(guarded, me + 1), list + begins[me], estimates);
    for (int64_t i = share(always, me); i < share(always, me + 1); ++i)
      *end++ = {int32_t(guarded + i), (1u << tokens) - 1};
    ends[me] = end - list;
    float* const sums = partial + me * size;
    std::fill_n(sums, size, 0.0f);
    if (call.fold)
      (call.fold_bits == 16 ? fold_plain<W> : FOLDS[call.fold_bits - 1])(call, x, share(d_out, me),
                                                                         share(d_out, me + 1), sums);
#pragma omp barrier
    // The joint list, cut evenly: outliers cluster, and one thread may have found most of them.
    int64_t total = 0, before = 0;
    for (int64_t thread = 0; thread < team; ++thread) total += ends[thread] - begins[thread];
    for (int64_t thread = 0; thread < team; before += ends[thread] - begins[thread], ++thread) {
      const Outlier* outlier = list + begins[thread] + std::max<int64_t>(share(total, me) - before, 0);
      const Outlier* const last = list + std::min(begins[thread] + share(total, me + 1) - before, ends[thread]);
      for (; outlier < last; ++outlier) {
        const int64_t neuron = call.neurons[outlier->position];
        const int64_t next = outlier + 1 < last ? call.neurons[outlier[1].position] : neuron;
        add<W>(call, x, *outlier, neuron, next, estimates + outlier->position * kept, sums);
      }
    }
#pragma omp barrier
    for (int64_t i = share(size, me); i < share(size, me + 1); ++i) {
      float value = to_float(folded[call.fold ? i % d_out : i]);
      for (int64_t thread = 0; thread < team; ++thread) value += partial[thread * size + i];
      store(value, (W*)call.out + i);
    }
  }
}

template <class AnyCall>
void any_dtype(const AnyCall& call) {
  (call.dtype == 0   ? correct<float, AnyCall>
   : call.dtype == 1 ? correct<Bfloat16, AnyCall>
                     : correct<Half, AnyCall>)(call);
}

}  // namespace

extern "C" void tardis_correct(const Call* call) { any_dtype(*call); }
extern "C" void tardis_correct_gated(const GatedCall* call) { any_dtype(*call); }
