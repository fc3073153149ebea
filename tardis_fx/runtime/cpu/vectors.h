// Vectors of the processor's width, numbers of 16 bits, and products with rows that are not in codes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512BW__)
#define WIDTH 64
#elif defined(__AVX2__) && defined(__F16C__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

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
[[maybe_unused]] float to_float(double value) { return value; }
[[maybe_unused]] float to_float(uint8_t value) { return value; }
float to_float(Bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  return read<float>(&bits);
}
void store(float value, float* at) { *at = value; }
[[maybe_unused]] void store(float value, double* at) { *at = value; }
void store(float value, Bfloat16* at) {
  const uint32_t bits = read<uint32_t>(&value);
  at->bits = std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#ifdef __F16C__
float to_float(Half value) { return _cvtsh_ss(value.bits); }
void store(float value, Half* at) { at->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
#ifdef __aarch64__
typedef __fp16 Float16;
#else
typedef _Float16 Float16;
#endif
float to_float(Half value) { return read<Float16>(&value); }
void store(float value, Half* at) {
  const Float16 rounded = value;
  at->bits = read<uint16_t>(&rounded);
}
#endif

// load: LANES elements as floats. pairs, singles: codes of the columns from `part * WIDTH` on, of a plane of 2 bits (in
// the lowest bits of each byte) or 1 bit. looked_up: entries of a table of 16. dot: adds to each sum four products of a code and an x of at most 64.
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
Bytes looked_up(const uint8_t* table, Bytes codes) {
  return (Bytes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(read<__m128i>(table)), (__m512i)codes);
}
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
Bytes looked_up(const uint8_t* table, Bytes codes) {
  return (Bytes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(read<__m128i>(table)), (__m256i)codes);
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
Bytes looked_up(const uint8_t* table, Bytes codes) {
  for (int i = 0; i < WIDTH; ++i) codes[i] = table[codes[i]];
  return codes;
}
Ints dot(Ints sums, Bytes codes, const int8_t* x) {
  typedef int16_t Shorts __attribute__((vector_size(WIDTH)));
  const Shorts both_codes = (Shorts)codes, both_x = read<Shorts>(x);
  const Ints products = (Ints)((both_codes & 255) * (both_x << 8 >> 8) + (both_codes >> 8 & 255) * (both_x >> 8));
  return sums + (products << 16 >> 16) + (products >> 16);
}
#endif

// ---- Levels of 8 bits and numbers of 8 bits that they are multiplied with.

// factors: levels as add_dots takes them, 128 - OFFSET less. add_dots: adds four products to each sum.
#if (WIDTH == 64 && defined(__AVX512VNNI__)) || (WIDTH == 32 && defined(__AVXVNNI__))
constexpr int32_t OFFSET = 128;
inline Bytes factors(Bytes levels) { return levels; }
inline Ints add_dots(Ints sums, Bytes levels, Bytes numbers) {
#if WIDTH == 64
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)levels, (__m512i)numbers);
#else
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)levels, (__m256i)numbers);
#endif
}
#else
constexpr int32_t OFFSET = 0;
inline Bytes factors(Bytes levels) { return levels ^ 128; }
#if WIDTH == 64
// Products of a size and a number with the sign of the level: two of them fit in 16 bits.
inline Ints add_dots(Ints sums, Bytes levels, Bytes numbers) {
  const __m512i signs = (__m512i)levels, x = (__m512i)numbers;
  const __m512i turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(signs), _mm512_setzero_si512(), x);
  const __m512i products = _mm512_maddubs_epi16(_mm512_abs_epi8(signs), turned);
  return sums + (Ints)_mm512_madd_epi16(products, _mm512_set1_epi16(1));
}
#elif WIDTH == 32
inline Ints add_dots(Ints sums, Bytes levels, Bytes numbers) {
  const __m256i signs = (__m256i)levels;
  const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(signs), _mm256_sign_epi8((__m256i)numbers, signs));
  return sums + (Ints)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_DOTPROD)
inline Ints add_dots(Ints sums, Bytes levels, Bytes numbers) {
  return (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)levels, (int8x16_t)numbers);
}
#else
inline Ints add_dots(Ints sums, Bytes levels, Bytes numbers) {
  typedef int16_t Signed __attribute__((vector_size(WIDTH)));
  const Signed a = (Signed)levels, b = (Signed)numbers;
  const Signed even = (a << 8 >> 8) * (b << 8 >> 8), odd = (a >> 8) * (b >> 8);
  return sums + ((Ints)even << 16 >> 16) + ((Ints)even >> 16) + ((Ints)odd << 16 >> 16) + ((Ints)odd >> 16);
}
#endif
#endif

// four: the same four bytes in every lane. sixteen: the same sixteen bytes in every 16 bytes.
inline Bytes four(const int8_t* from) { return (Bytes)(Ints{} + read<int32_t>(from)); }
#if WIDTH == 64
inline Bytes sixteen(const int8_t* from) { return (Bytes)_mm512_broadcast_i32x4(read<__m128i>(from)); }
#elif WIDTH == 32
inline Bytes sixteen(const int8_t* from) { return (Bytes)_mm256_broadcastsi128_si256(read<__m128i>(from)); }
#else
inline Bytes sixteen(const int8_t* from) { return read<Bytes>(from); }
#endif

// side_by_side: sixteen bytes of each of several rows. interleave: turns sixteen bytes of each of four rows into the first
// bytes of all rows, the second ones, and so on.
#if WIDTH == 64
inline Bytes side_by_side(const uint8_t* const* rows, int64_t at) {
  __m512i bytes = _mm512_castsi128_si512(read<__m128i>(rows[0] + at));
  bytes = _mm512_inserti32x4(bytes, read<__m128i>(rows[1] + at), 1);
  bytes = _mm512_inserti32x4(bytes, read<__m128i>(rows[2] + at), 2);
  return (Bytes)_mm512_inserti32x4(bytes, read<__m128i>(rows[3] + at), 3);
}
inline void interleave(Bytes* rows) {
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i moved = _mm512_permutexvar_epi32(lanes, (__m512i)rows[0]);
  rows[0] = (Bytes)_mm512_shuffle_epi8(moved, _mm512_broadcast_i32x4(order));
}
#else
#if WIDTH == 32
inline Bytes side_by_side(const uint8_t* const* rows, int64_t at) {
  const __m256i low = _mm256_castsi128_si256(read<__m128i>(rows[0] + at));
  return (Bytes)_mm256_inserti128_si256(low, read<__m128i>(rows[1] + at), 1);
}
#else
inline Bytes side_by_side(const uint8_t* const* rows, int64_t at) { return read<Bytes>(rows[0] + at); }
#endif
inline void interleave(Bytes* rows) {
  typedef uint8_t Sixteen __attribute__((vector_size(16)));
  typedef uint16_t Eight __attribute__((vector_size(16)));
  const Sixteen low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
  const Eight low_pairs = {0, 8, 1, 9, 2, 10, 3, 11}, high_pairs = low_pairs + 4;
  Sixteen row[4];
  std::memcpy(row, rows, sizeof row);
  const Eight first[] = {(Eight)__builtin_shuffle(row[0], row[1], low), (Eight)__builtin_shuffle(row[2], row[3], low)};
  const Eight last[] = {(Eight)__builtin_shuffle(row[0], row[1], high), (Eight)__builtin_shuffle(row[2], row[3], high)};
  const Eight all[] = {__builtin_shuffle(first[0], first[1], low_pairs), __builtin_shuffle(first[0], first[1], high_pairs),
                       __builtin_shuffle(last[0], last[1], low_pairs), __builtin_shuffle(last[0], last[1], high_pairs)};
  std::memcpy(rows, all, sizeof all);
}
#endif

[[maybe_unused]] Floats load(const double* from) {
  typedef double Doubles __attribute__((vector_size(2 * WIDTH)));
  return __builtin_convertvector(read<Doubles>(from), Floats);
}

float sum(Floats values) {
#if WIDTH == 64
  return _mm512_reduce_add_ps(values);
#else
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += values[i];
  return total;
#endif
}

// Numbers of a row are multiplied as floats, or directly as bfloat16 if the processor can.
#if WIDTH == 64 && defined(__AVX512BF16__)
#define BFLOATS
typedef __m512bh Bfloats;
Floats add_products(Floats sums, Bfloats a, Bfloats b) { return (Floats)_mm512_dpbf16_ps((__m512)sums, a, b); }
template <class W>
constexpr bool AS_BFLOATS = std::is_same_v<W, Bfloat16>;
#else
template <class W>
constexpr bool AS_BFLOATS = false;
#endif
Floats add_products(Floats sums, Floats a, Floats b) { return sums + a * b; }

// The type of x in products with numbers W, and how many of both are multiplied at a time.
template <class W>
using Factor = std::conditional_t<AS_BFLOATS<W>, Bfloat16, float>;
template <class W>
constexpr int LOT = AS_BFLOATS<W> ? 2 * LANES : LANES;
template <class W, class From>
auto lot(const From* from) {
#ifdef BFLOATS
  if constexpr (AS_BFLOATS<W>)
    return read<Bfloats>(from);
  else
#endif
    return load(from);
}

// Rows lie far apart and no hardware predicts the jump, so each pass over a row prefetches the next one into the
// second-level cache. Prefetching into the first level is no faster than not prefetching.
constexpr int SECOND_LEVEL = 2;

template <class W>
float dot(const W* row, const Factor<W>* x, int64_t size, const W* next) {
  constexpr int STEP = LOT<W>;
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * STEP <= size; i += 4 * STEP)
    for (int k = 0; k < 4; ++k) {
      __builtin_prefetch(next + i + k * STEP, 0, SECOND_LEVEL);
      sums[k] = add_products(sums[k], lot<W>(row + i + k * STEP), lot<W>(x + i + k * STEP));
    }
  for (; i + STEP <= size; i += STEP) sums[0] = add_products(sums[0], lot<W>(row + i), lot<W>(x + i));
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < size; ++i) total += to_float(row[i]) * to_float(x[i]);
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

// Prefetches a whole row: a row of codes is too short to prefetch while the row before it is read.
void prefetch(const uint8_t* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, SECOND_LEVEL);
}

}  // namespace
