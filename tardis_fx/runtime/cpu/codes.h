// Products of a few tokens with rows of codes, whose memory layout packing.py defines.

#pragma once

#include <cfloat>

#include "scratch.h"
#include "vectors.h"

namespace {

constexpr int BLOCK = 64;  // columns whose codes lie together; half a block, one, two or the whole row share a scale

// The numbers of blocks and scales of a row of codes.
struct Row {
  int64_t blocks, groups;
  int shift;  // half block number i has the scale i >> shift

  Row(int64_t columns, int64_t groups)
      : blocks((columns + BLOCK - 1) / BLOCK),
        groups(groups),
        shift(groups == 1 ? 62 : 1 + (groups < blocks) - (groups > blocks)) {}
  // Bytes of a row with its scales and zero points (packing.join).
  int64_t bytes(int64_t bits) const { return blocks * bits * (BLOCK / 8) + 3 * groups; }
};

// The tokens, as floats and in fixed point: x = unit * (128 high + low), which errs by less than 2^-13 of the largest
// |x| of its block. That is far below the error of the codes, and integers take half the time of floats. Tokens with a
// NaN, an infinity or a number so large that products of sums of x could overflow are multiplied as floats.
struct Inputs {
  static constexpr float LARGEST = 0x1p64f;
  Row row;             // of the codes to multiply with
  int64_t d, blocks, stride;
  float* plain;        // [tokens, blocks, BLOCK], zeros after the last column
  int8_t *high, *low;  // [tokens, blocks, BLOCK]
  float* units;        // [tokens, blocks]
  float* sums;         // [tokens, stride]: of each group, zeros after the last one
  const void* source;  // [tokens, d]
  Bfloat16* bfloats;   // [tokens, blocks, BLOCK], of each block the even columns, then the odd ones; or null
  uint32_t wild = 0;   // bit t: token t is multiplied as floats

  template <class W>
  Inputs(const W* x, int64_t tokens, int64_t d, int64_t groups)
      : row(d, groups),
        d(d),
        blocks(row.blocks),
        stride((groups + LANES - 1) / LANES * LANES),
        plain(scratch<float, 0>(tokens * blocks * BLOCK)),
        high(scratch<int8_t, 1>(tokens * blocks * BLOCK)),
        low(scratch<int8_t, 2>(tokens * blocks * BLOCK)),
        units(scratch<float, 3>(tokens * blocks)),
        sums(scratch<float, 4>(tokens * stride)),
        source(x),
        bfloats(AS_BFLOATS<W> ? scratch<Bfloat16, 12>(tokens * blocks * BLOCK) : nullptr) {
    std::fill_n(plain, tokens * blocks * BLOCK, 0.0f);
    std::fill_n(sums, tokens * stride, 0.0f);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < d; ++i) plain[t * blocks * BLOCK + i] = to_float(x[t * d + i]);
    for (int64_t b = 0; b < tokens * blocks; ++b) {
      const float* const block = plain + b * BLOCK;
      const int64_t t = b / blocks;
      int8_t *const highs = high + b * BLOCK, *const lows = low + b * BLOCK;
      Floats most = {};
      bool tame = true;
      for (int half = 0; half < 2; ++half) {
        Floats total = {};
        for (int k = half * BLOCK / 2; k < (half + 1) * BLOCK / 2; k += LANES) {
          const Floats values = load(block + k), sizes = values < 0 ? -values : values;
          total += values;
          most = most < sizes ? sizes : most;
        }
        const float of_half = sum(total);
        tame = tame && !std::isnan(of_half);
        if (AS_BFLOATS<W>) sum_of(t, b, half) += of_half;
      }
      float largest = 0;
      for (int i = 0; i < LANES; ++i) largest = std::max(largest, most[i]);
      if (!tame || largest > LARGEST) {
        wild |= 1u << t;
        largest = 0;
      }
      units[b] = largest / (63 * 128);
      const float factor = units[b] >= FLT_MIN ? 1 / units[b] : 0;
      if (factor == 0) {  // the block is zero, or too small for fixed point
        std::fill_n(highs, BLOCK, 0);
        std::fill_n(lows, BLOCK, 0);
        continue;
      }
#pragma omp simd
      for (int k = 0; k < BLOCK; ++k) {
        const int32_t fixed = int32_t(std::rint(block[k] * factor));
        highs[k] = (fixed + 64) >> 7;
        lows[k] = ((fixed + 64) & 127) - 64;
      }
      // Sums of what is multiplied: else the error of x would be multiplied with zero points, too, alike in every row.
      for (int half = 0; half < 2 && !AS_BFLOATS<W>; ++half) {
        int32_t total = 0;
        for (int k = half * BLOCK / 2; k < (half + 1) * BLOCK / 2; ++k) total += 128 * highs[k] + lows[k];
        sum_of(t, b, half) += total * units[b];
      }
    }
    if constexpr (AS_BFLOATS<W>) {
      std::fill_n(bfloats, tokens * blocks * BLOCK, Bfloat16{});
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < d; ++i)
          bfloats[(t * blocks + i / BLOCK) * BLOCK + i % 2 * (BLOCK / 2) + i % BLOCK / 2] = x[t * d + i];
    }
  }

  // The sum of the group of half of block number b, of token t.
  float& sum_of(int64_t t, int64_t b, int half) { return sums[t * stride + ((2 * (b % blocks) + half) >> row.shift)]; }

  // Token t in the form in which it is multiplied with rows of W.
  template <class W>
  const Factor<W>* token(int64_t t, int64_t d) const {
    if constexpr (AS_BFLOATS<W>)
      return (const W*)source + t * d;
    else
      return plain + t * blocks * BLOCK;
  }
};

// The codes of WIDTH columns of a packed block, from column `part * WIDTH` on.
template <int BITS>
Bytes codes_of(const uint8_t* packed, int part) {
  Bytes codes = {};
  for (int plane = 0; plane < BITS / 2; ++plane) codes = codes << 2 | (pairs(packed + 16 * plane, part) & 3);
  if (BITS % 2) codes = codes << 1 | singles(packed + BITS / 2 * 16, part);
  return codes;
}

template <int BITS>
void unpack(const uint8_t* packed, uint8_t* codes) {
  for (int part = 0; part < BLOCK / WIDTH; ++part) {
    const Bytes vector = codes_of<BITS>(packed, part);
    std::memcpy(codes + part * WIDTH, &vector, WIDTH);
  }
}

// The scales of one vector of columns, from half block `half` on.
Floats scales_of(const float* scale, int64_t half, int shift) {
#if WIDTH == 64
  const __m512 low = _mm512_set1_ps(scale[half >> shift]);
  return (Floats)_mm512_mask_blend_ps(0xff00, low, _mm512_set1_ps(scale[(half + 1) >> shift]));
#else
  return scale[half >> shift] + Floats{};
#endif
}

#ifdef BFLOATS
// Like `estimate` with half the instructions: a code is multiplied as 2^BITS + code, which is exact in bfloat16.
template <int BITS, int T>
void estimate_bfloats(const uint8_t* packed, const float* scale, const float* shift, const Inputs& x, int64_t first,
                      float* z_hat) {
  const __m512i mask = _mm512_set1_epi16(((1 << BITS) - 1) << (7 - BITS)), power = _mm512_set1_epi16((127 + BITS) << 7);
  const auto number = [mask, power](__m512i code) { return (Bfloats)_mm512_ternarylogic_epi32(code, mask, power, 0xea); };
  Floats total[T] = {};
  for (int64_t g = 0; g < x.stride; g += LANES) {
    const Floats shifts = load(shift + g) + float(1 << BITS) * load(scale + g);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) total[t] -= shifts * load(x.sums + (first + t) * x.stride + g);
  }
  for (int64_t b = 0; b < x.blocks; ++b, packed += BITS * BLOCK / 8) {
    const __m512i codes = (__m512i)codes_of<BITS>(packed, 0);
    const Bfloats even = number(_mm512_slli_epi16(codes, 7 - BITS)), odd = number(_mm512_srli_epi16(codes, 1 + BITS));
    const Floats scales = scales_of(scale, 2 * b, x.row.shift);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Bfloat16* const at = x.bfloats + ((first + t) * x.blocks + b) * BLOCK;
      total[t] += add_products(add_products(Floats{}, even, read<Bfloats>(at)), odd, read<Bfloats>(at + 32)) * scales;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) z_hat[t] = sum(total[t]);
}
#endif

// The estimates of one neuron for T tokens from `first` on. Reads whole vectors of scales.
template <int BITS, int T>
void estimate(const uint8_t* packed, const float* scale, const float* shift, const Inputs& x, int64_t first,
              float* z_hat) {
#ifdef BFLOATS
  if constexpr (BITS < 8)
    if (x.bfloats) return estimate_bfloats<BITS, T>(packed, scale, shift, x, first, z_hat);
#endif
  Floats total[T] = {};
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const float* const sums = x.sums + (first + t) * x.stride;
    for (int64_t g = 0; g < x.stride; g += LANES) total[t] -= load(shift + g) * load(sums + g);
  }
  for (int64_t b = 0; b < x.blocks; ++b, packed += BITS * BLOCK / 8) {
    for (int part = 0; part < BLOCK / WIDTH; ++part) {
      const Bytes codes = codes_of<BITS>(packed, part);
      const Floats scales = scales_of(scale, 2 * b + part * WIDTH / 32, x.row.shift);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const int64_t unit = (first + t) * x.blocks + b, at = unit * BLOCK + part * WIDTH;
        const Ints dots = dot(dot(Ints{}, codes, x.high + at) << 7, codes, x.low + at);
        total[t] += __builtin_convertvector(dots, Floats) * x.units[unit] * scales;
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) z_hat[t] = sum(total[t]);
}

// The estimate of one neuron for a token that is multiplied as floats: the products of the specification, summed in
// double, so that it is finite, infinite or NaN as in the specification.
template <int BITS>
__attribute__((noinline, cold)) float estimate_wild(const uint8_t* packed, const float* scale, const float* shift,
                                                    const Inputs& x, int64_t t) {
  double total = 0;
  for (int64_t b = 0; b < x.blocks; ++b, packed += BITS * BLOCK / 8) {
    uint8_t codes[BLOCK];
    unpack<BITS>(packed, codes);
    const float* const block = x.plain + (t * x.blocks + b) * BLOCK;
    for (int64_t i = 0; i < std::min<int64_t>(BLOCK, x.d - b * BLOCK); ++i) {
      const int64_t g = (2 * b + i / (BLOCK / 2)) >> x.row.shift;
      total += double(block[i]) * (scale[g] * codes[i] - shift[g]);
    }
  }
  return total;
}

// The estimate of one neuron for one token.
template <int BITS>
float estimate_one(const uint8_t* packed, const float* scale, const float* shift, const Inputs& x, int64_t t) {
  if (x.wild >> t & 1) return estimate_wild<BITS>(packed, scale, shift, x, t);
  float z_hat;
  estimate<BITS, 1>(packed, scale, shift, x, t, &z_hat);
  return z_hat;
}

// The estimates of one neuron for all tokens.
template <int BITS>
void estimate_all(const uint8_t* packed, const float* scale, const float* shift, const Inputs& x, int64_t tokens,
                  float* z_hat) {
  int64_t t = 0;
  for (; t + 8 <= tokens; t += 8) estimate<BITS, 8>(packed, scale, shift, x, t, z_hat + t);
  for (; t + 4 <= tokens; t += 4) estimate<BITS, 4>(packed, scale, shift, x, t, z_hat + t);
  for (; t < tokens; ++t) estimate<BITS, 1>(packed, scale, shift, x, t, z_hat + t);
  for (t = 0; x.wild >> t; ++t)
    if (x.wild >> t & 1) z_hat[t] = estimate_wild<BITS>(packed, scale, shift, x, t);
}

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

}  // namespace
