// Adds the exact terms of the predicted outliers to the output of a folded FFN, for a few tokens, on a CPU.
//
// What is computed is specified by `correct` in reference.py; how the codes lie in memory, by packing.py. The time goes
// into reading, once for all tokens, (a) the packed codes of every guarded neuron and (b) the rows of W1 and W2 of every
// outlier. The build (cpu.py) writes activations.inc: one `case <id>: return <expression of z>;` for each activation.
// Not to be compiled with -ffast-math: a NaN estimate must compare false, and infinite bounds are ordinary.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__F16C__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr int64_t GROUP = 64;          // columns that share a scale and a zero point
constexpr int64_t SERIAL_BYTES = 32768; // packed codes below which waking other threads costs more than it saves

// ---- The element types: bits in memory, floats in registers.

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

float to_float(float value) { return value; }
float to_float(Bfloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

void store(float value, float* at) { *at = value; }
void store(float value, Bfloat16* at) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  at->bits = std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#if defined(__F16C__)
float to_float(Half value) { return _cvtsh_ss(value.bits); }
void store(float value, Half* at) { at->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
float to_float(Half value) { return bit_cast<_Float16>(value.bits); }
void store(float value, Half* at) { at->bits = bit_cast<uint16_t>(_Float16(value)); }
#endif

Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

void put(Floats values, float* at) { std::memcpy(at, &values, sizeof values); }

#if defined(__AVX512F__)
Floats load(const Half* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
Floats load(const Bfloat16* from) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}
Ints load(const uint8_t* from) { return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)); }
#elif defined(__AVX2__) && defined(__F16C__)
Floats load(const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
Floats load(const Bfloat16* from) {
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
}
Ints load(const uint8_t* from) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
#else
template <class W>
Floats load(const W* from) {
  Floats values;
  for (int i = 0; i < LANES; ++i) values[i] = to_float(from[i]);
  return values;
}
Ints load(const uint8_t* from) {
  Ints values;
  for (int i = 0; i < LANES; ++i) values[i] = from[i];
  return values;
}
#endif

float sum(Floats values) {
  float lanes[LANES];
  put(values, lanes);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class W>
float dot(const W* row, const float* x, int64_t size) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int k = 0; k < 4; ++k) sums[k] += load(row + i + k * LANES) * load(x + i + k * LANES);
  for (; i + LANES <= size; i += LANES) sums[0] += load(row + i) * load(x + i);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < size; ++i) total += to_float(row[i]) * x[i];
  return total;
}

template <class W>
void add_scaled(float* out, float factor, const W* row, int64_t size) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    put(load(out + i) + factor * load(row + i), out + i);
  }
  for (; i < size; ++i) out[i] += factor * to_float(row[i]);
}

float activate(float z, int64_t activation) {
  switch (activation) {
#include "activations.inc"
  }
  return NAN;
}

// ---- The predictor.

// The tokens as the predictor reads them, each of `groups * GROUP` columns, zeros after the last.
struct Inputs {
  int64_t groups;
  std::vector<float> plain;     // for the correction and for planes of one bit
  std::vector<float> quarters;  // columns 16 q .. 16 q + 15 of a group divided by 4^q: see `estimate`
  std::vector<float> sums;      // of each group

  const float* token(const std::vector<float>& of, int64_t t) const { return of.data() + t * groups * GROUP; }
};

// The estimates of one neuron for T tokens from `first` on.
//
// A byte of a 2-bit plane holds four codes. Masking the q-th in place gives 4^q times its value, which `quarters`
// divides away: no shift is needed.
template <int T>
void estimate(const uint8_t* codes, const float* scale, const float* shift, int bits, const Inputs& x, int64_t first,
              float* z_hat) {
  Floats total[T] = {};
  Ints each;
  for (int i = 0; i < LANES; ++i) each[i] = 1 << i;
  for (int64_t g = 0; g < x.groups; ++g) {
    for (int high = bits - 2; high >= 0; high -= 2, codes += 16) {
      Floats plane[T] = {};
      for (int k = 0; k < 16; k += LANES) {
        const Ints packed = load(codes + k);
        for (int q = 0; q < 4; ++q) {
          const Floats code = __builtin_convertvector(packed & (3 << 2 * q), Floats);
          for (int t = 0; t < T; ++t) plane[t] += code * load(x.token(x.quarters, first + t) + g * GROUP + 16 * q + k);
        }
      }
      for (int t = 0; t < T; ++t) total[t] += plane[t] * (scale[g] * float(1 << high));
    }
    if (bits % 2) {
      uint64_t ones;
      std::memcpy(&ones, codes, sizeof ones);
      for (int k = 0; k < GROUP; k += LANES) {
        const Floats code = scale[g] * -__builtin_convertvector((int32_t(ones >> k) & each) != 0, Floats);
        for (int t = 0; t < T; ++t) total[t] += code * load(x.token(x.plain, first + t) + g * GROUP + k);
      }
      codes += 8;
    }
  }
  for (int t = 0; t < T; ++t) z_hat[t] = sum(total[t]) - dot(shift, &x.sums[(first + t) * x.groups], x.groups);
}

// ---- The op.

struct Outlier {
  int32_t position;  // in the list of neurons
  uint32_t tokens;   // bit t: token t
};

struct Call {
  void* out;
  const void *folded, *x, *w1, *b1, *w2t;
  const int64_t* counts;
  const int32_t* neurons;
  const uint8_t* codes;
  const Half* scale;
  const uint8_t* zero;
  const float *lower, *upper, *slope, *intercept;
  int64_t tokens, d, d_out, w1_stride, w2t_stride, bits, activation, threads;
};

// The tokens for which guarded neuron `position` is an outlier.
uint32_t test(const Call& call, const Inputs& x, int64_t position, float* scale, float* shift) {
  const Half* const scales = call.scale + position * x.groups;
  const uint8_t* const zeros = call.zero + position * x.groups;
  int64_t g = 0;
  for (; g + LANES <= x.groups; g += LANES) {
    put(load(scales + g), scale + g);
    put(load(scales + g) * __builtin_convertvector(load(zeros + g), Floats), shift + g);
  }
  for (; g < x.groups; ++g) {
    scale[g] = to_float(scales[g]);
    shift[g] = scale[g] * zeros[g];
  }
  const uint8_t* codes = call.codes + position * x.groups * call.bits * (GROUP / 8);
  uint32_t outliers = 0;
  for (int64_t t = 0; t < call.tokens;) {
    const int together = call.tokens - t >= 4 ? 4 : 1;
    float z_hat[4];
    (together == 4 ? estimate<4> : estimate<1>)(codes, scale, shift, call.bits, x, t, z_hat);
    for (int i = 0; i < together; ++i, ++t)
      outliers |= uint32_t(z_hat[i] < call.lower[position] || z_hat[i] > call.upper[position]) << t;
  }
  return outliers;
}

template <class W>
void correct(const Call& call) {
  static thread_local Inputs x;  // kept from call to call, like all scratch: its pages are mapped once
  static thread_local std::vector<float> partial, scales;
  static thread_local std::vector<Outlier> outliers;
  const int64_t listed = call.counts[0], guarded = call.counts[1], size = call.tokens * call.d_out;
  const W *w1 = (const W*)call.w1, *b1 = (const W*)call.b1, *w2t = (const W*)call.w2t;

  x.groups = (call.d + GROUP - 1) / GROUP;
  x.plain.assign(call.tokens * x.groups * GROUP, 0);
  x.quarters.assign(x.plain.size(), 0);
  x.sums.assign(call.tokens * x.groups, 0);
  for (int64_t t = 0; t < call.tokens; ++t)
    for (int64_t i = 0; i < call.d; ++i) {
      const float value = to_float(((const W*)call.x)[t * call.d + i]);
      const int64_t at = t * x.groups * GROUP + i;
      x.plain[at] = value;
      x.quarters[at] = value / float(1 << i % GROUP / 16 * 2);
      x.sums[at / GROUP] += value;
    }

  // One thread or all of them: a team of another size makes libgomp end threads that PyTorch then starts again.
  const int threads = listed * x.groups * call.bits * (GROUP / 8) < SERIAL_BYTES ? 1 : call.threads;
  partial.resize(threads * size);
  scales.resize(threads * 2 * x.groups);
  outliers.resize(listed);
  std::vector<int64_t> begins(threads + 1), ends(threads + 1);
  // thread_local names mean another object in each thread of the team: pass the caller's.
  float *const partials = partial.data(), *const scratch = scales.data();
  Outlier* const list = outliers.data();
  const Inputs& inputs = x;

#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const auto share = [team](int64_t of, int64_t thread) { return of * thread / team; };

    float *scale = scratch + me * 2 * inputs.groups, *shift = scale + inputs.groups;
    int64_t end = begins[me] = share(guarded, me) + share(listed - guarded, me);
    for (int64_t i = share(guarded, me); i < share(guarded, me + 1); ++i)
      if (const uint32_t tokens = test(call, inputs, i, scale, shift)) list[end++] = {int32_t(i), tokens};
    for (int64_t i = guarded + share(listed - guarded, me); i < guarded + share(listed - guarded, me + 1); ++i)
      list[end++] = {int32_t(i), (1u << call.tokens) - 1};
    ends[me] = end;

    float* const sums = partials + me * size;
    std::memset(sums, 0, size * sizeof(float));
#pragma omp barrier
    // The joint list, cut evenly: outliers cluster, and a thread may have found most of them.
    int64_t total = 0, before = 0;
    for (int64_t thread = 0; thread < team; ++thread) total += ends[thread] - begins[thread];
    for (int64_t thread = 0; thread < team; ++thread) {
      const int64_t found = ends[thread] - begins[thread];
      for (int64_t k = std::max(share(total, me) - before, int64_t(0)); k < std::min(share(total, me + 1) - before, found); ++k) {
        const Outlier outlier = list[begins[thread] + k];
        const int64_t neuron = call.neurons[outlier.position];
        for (int64_t t = 0; t < call.tokens; ++t) {
          if (!(outlier.tokens >> t & 1)) continue;
          const float z = dot(w1 + neuron * call.w1_stride, inputs.token(inputs.plain, t), call.d) + (b1 ? to_float(b1[neuron]) : 0);
          const float surrogate = call.slope[outlier.position] * z + call.intercept[outlier.position];
          add_scaled(sums + t * call.d_out, activate(z, call.activation) - surrogate, w2t + neuron * call.w2t_stride, call.d_out);
        }
      }
      before += found;
    }
#pragma omp barrier
    for (int64_t i = share(size, me); i < share(size, me + 1); ++i) {
      float value = to_float(((const W*)call.folded)[i]);
      for (int64_t thread = 0; thread < team; ++thread) value += partials[thread * size + i];
      store(value, (W*)call.out + i);
    }
  }
}

}  // namespace

extern "C" void tardis_correct(void* out, const void* w1, const void* w2t, const void* folded, const void* x,
                               const int64_t* counts, const int32_t* neurons, const uint8_t* codes,
                               const uint16_t* scale, const uint8_t* zero, const float* lower, const float* upper,
                               const float* slope, const float* intercept, const void* b1, int64_t tokens, int64_t d, int64_t d_out,
                               int64_t w1_stride, int64_t w2t_stride, int64_t bits, int64_t activation, int64_t dtype,
                               int64_t threads) {
  const Call call = {out,  folded, x, w1, b1, w2t, counts, neurons, codes, (const Half*)scale, zero, lower, upper, slope, intercept, tokens, d, d_out, w1_stride, w2t_stride, bits, activation, threads};
  (dtype == 0 ? correct<float> : dtype == 1 ? correct<Bfloat16> : correct<Half>)(call);
}
