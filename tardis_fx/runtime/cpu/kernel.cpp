// Adds the exact terms of the predicted outliers to the output of a folded FFN, for a few tokens, on a CPU.
//
// `correct` in reference.py specifies the result. Most of the time is spent reading, once for all tokens, (a) the packed
// codes of every guarded neuron, (b) the rows of projections and columns of every outlier, which may be codes, too, those
// of projections nested in (a), and (c) the folded weight, if it is given. K is the number of projections of a neuron.
// Do not compile with -ffast-math: a NaN estimate must compare false, and infinite bounds are ordinary.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "activation.h"
#include "call.h"
#include "codes.h"
#include "pool.h"
#include "vectors.h"

namespace {

constexpr int64_t SERIAL_BYTES = 32768;  // of packed codes: below, waking other threads costs more than it saves

struct Outlier {
  int32_t position;  // in the list of neurons
  uint32_t tokens;   // bit t: token t
};

// A neuron's response minus an affine function, given as K slopes and an intercept.
template <int K>
float surrogate_error(const Call& call, const float* affine, const float* z, int64_t stride) {
  float response = activate(z[0], call.activation), surrogate = affine[0] * z[0];
#pragma GCC unroll 2
  for (int i = 1; i < K; ++i) {
    response *= z[i * stride];
    surrogate += affine[i] * z[i * stride];
  }
  return response - (surrogate + affine[K]);
}

// ---- The predictor.

// Adds the biases of a listed neuron to its pre-activations: K for each token, `stride` apart.
template <int K>
void add_biases(const Call& call, int64_t position, float* z, int64_t stride) {
  if (!call.biases) return;
  for (int i = 0; i < K; ++i)
    for (int64_t t = 0; t < call.tokens; ++t) z[i * stride + t] += call.biases[K * position + i];
}

// Whether the guard corrects a neuron for a token, by one estimate without its bias or by several with theirs.
template <int K>
bool outside(const Call& call, int64_t position, const float (&z)[K][TOKENS], int64_t t) {
  if constexpr (K == 1) {
    const float* const bounds = call.guard + 2 * position;
    return z[0][t] < bounds[0] || z[0][t] > bounds[1];
  } else {
    const float* const guard = call.guard + (K + 2) * position;
    return std::fabs(surrogate_error<K>(call, guard, &z[0][t], TOKENS)) > guard[K + 1];
  }
}

// Lists the outliers among the guarded neurons from `begin` to `end`, and returns the end of the list. Stores their
// estimates as the guard reads them, [guarded, K, tokens].
template <int K, int BITS>
Outlier* test(const Call& call, const Inputs& x, int64_t begin, int64_t end, Outlier* list, float* estimates) {
  const int64_t groups = K * x.row.groups, packed_bytes = x.blocks * (BITS * BLOCK / 8);
  const int64_t together = 1 + 63 / groups;  // neurons whose scales are converted at once
  std::vector<float> scales(together * groups + LANES), shifts(together * groups + LANES);
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
    float z_hat[K][TOKENS];
#pragma GCC unroll 2
    for (int i = 0; i < K; ++i) {
      const int64_t first = at + i * x.row.groups;
      estimate_all<BITS>(call.codes + (K * row + i) * packed_bytes, &scales[first], &shifts[first], x, call.tokens,
                         z_hat[i]);
    }
    if constexpr (K > 1) add_biases<K>(call, row, z_hat[0], TOKENS);
    uint32_t tokens = 0;
    for (int64_t t = 0; t < call.tokens; ++t) tokens |= uint32_t(outside<K>(call, row, z_hat, t)) << t;
    if (!tokens) continue;
    *list++ = {int32_t(row), tokens};
#pragma GCC unroll 2
    for (int i = 0; i < K; ++i) std::copy_n(z_hat[i], call.tokens, estimates + (K * row + i) * call.tokens);
  }
  return list;
}

template <int K>
constexpr decltype(test<K, 1>)* TESTS[] = {test<K, 1>, test<K, 2>, test<K, 3>, test<K, 4>,
                                           test<K, 5>, test<K, 6>, test<K, 7>, test<K, 8>};

// ---- The fold, and what corrections add.

// Adds the products of the tokens and the rows of the folded weight from `begin` to `end`.
template <int BITS>
void fold(const Call& call, const Inputs& x, int64_t begin, int64_t end, float* sums) {
  float *const scales = scratch<float, 8>(2 * x.stride), *const shifts = scales + x.stride;
  std::fill_n(scales, 2 * x.stride, 0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* const codes = call.fold + row * x.row.bytes(BITS);
    open<BITS>(codes, x.row, scales, shifts);
    float products[TOKENS];
    estimate_all<BITS>(codes, scales, shifts, x, call.tokens, products);
    for (int64_t t = 0; t < call.tokens; ++t) sums[t * call.d_out + row] += products[t];
  }
}

constexpr decltype(fold<1>)* FOLDS[] = {fold<1>, fold<2>, fold<3>, fold<4>, fold<5>, fold<6>, fold<7>, fold<8>};

// Rows of a folded weight that are multiplied at once; registers hold their sums.
constexpr int ROWS = WIDTH == 64 ? 4 : 2;

// Adds the products of four tokens from `first` on with R rows of a folded weight that is not in codes.
template <int R, class W>
void multiply(const Call& call, const Inputs& x, int64_t row, int64_t first, float* sums) {
  constexpr int T = 4;
  const int64_t d = call.d;
  const W* const weights = (const W*)call.fold + row * d;
  const Factor<W>* tokens[T];
  for (int t = 0; t < T; ++t) tokens[t] = x.token<W>(first + t, d);
  Floats totals[R][T] = {};
  int64_t i = 0;
  for (; i + LOT<W> <= d; i += LOT<W>) {
    decltype(lot<W>(weights)) lots[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) lots[r] = lot<W>(weights + r * d + i);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const auto token = lot<W>(tokens[t] + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) totals[r][t] = add_products(totals[r][t], lots[r], token);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      float total = sum(totals[r][t]);
      for (int64_t k = i; k < d; ++k) total += to_float(weights[r * d + k]) * to_float(tokens[t][k]);
      sums[(first + t) * call.d_out + row + r] += total;
    }
}

// Like `fold`, for a folded weight that is not in codes.
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
            dot(weights, x.token<W>(rest, call.d), call.d, row + 1 < end ? weights + call.d : weights);
    }
  }
}

// Adds the products with the low planes of a projection's row to an outlier's estimates, [tokens].
template <int BITS>
void refine(const Call& call, const Inputs& x, uint32_t tokens, const uint8_t* row, float* z) {
  float *const scales = scratch<float, 9>(2 * x.stride), *const shifts = scales + x.stride;
  std::fill_n(scales, 2 * x.stride, 0.0f);
  open<BITS>(row, x.row, scales, shifts);
  for (int64_t t = 0; t < call.tokens; ++t)
    if (tokens >> t & 1) z[t] += estimate_one<BITS>(row, scales, shifts, x, t);
}

// Adds a column of `down` times the residuals, [tokens], of an outlier.
template <int BITS>
void add_column(const Call& call, uint32_t tokens, const uint8_t* column, const float* residuals, float* sums) {
  const Row row(call.d_out, call.d_out_groups);
  float *const scales = scratch<float, 10>(2 * row.groups), *const shifts = scales + row.groups;
  open<BITS>(column, row, scales, shifts);
  float factors[TOKENS], *into[TOKENS];
  int count = 0;
  for (int64_t t = 0; t < call.tokens; ++t) {
    if (!(tokens >> t & 1)) continue;
    factors[count] = residuals[t];
    into[count++] = sums + t * call.d_out;
  }
  for (int64_t b = 0; b < row.blocks; ++b, column += BITS * BLOCK / 8) {
    uint8_t codes[BLOCK];
    unpack<BITS>(column, codes);
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

// A neuron's row of a projection, or of the columns.
template <class W>
const W* row_of(const void* matrix, int64_t neuron, int64_t stride) {
  return (const W*)matrix + neuron * stride;
}

// Adds an outlier's exact terms, and prefetches the rows of the following neuron, `next`. The outlier's estimates,
// [K, tokens], become its pre-activations, and the first of them its residuals.
template <int K>
void add_coded(const Call& call, const Inputs& x, Outlier outlier, int64_t neuron, int64_t next, float* estimates,
               float* sums) {
  for (int i = 0; i < K; ++i)
    prefetch(row_of<uint8_t>(call.projections[i], next, call.strides[i]), x.row.bytes(call.low_bits));
  prefetch(row_of<uint8_t>(call.columns, next, call.column_stride),
           Row(call.d_out, call.d_out_groups).bytes(call.row_bits));
  for (int i = 0; i < K; ++i)
    REFINE[call.low_bits - 1](call, x, outlier.tokens, row_of<uint8_t>(call.projections[i], neuron, call.strides[i]),
                              estimates + i * call.tokens);
  if constexpr (K == 1) add_biases<K>(call, outlier.position, estimates, call.tokens);
  const float* const surrogate = call.surrogate + (K + 1) * outlier.position;
  for (int64_t t = 0; t < call.tokens; ++t)
    if (outlier.tokens >> t & 1) estimates[t] = surrogate_error<K>(call, surrogate, estimates + t, call.tokens);
  ADD_COLUMN[call.row_bits - 1](call, outlier.tokens, row_of<uint8_t>(call.columns, neuron, call.column_stride),
                                estimates, sums);
}

// Like `add_coded`, for rows that are not in codes.
template <int K, class W>
void add_plain(const Call& call, const Inputs& x, Outlier outlier, int64_t neuron, int64_t next, float* sums) {
  const W* rows[K + 1];  // in the order that they are read in
#pragma GCC unroll 2
  for (int i = 0; i < K; ++i) rows[i] = row_of<W>(call.projections[i], neuron, call.strides[i]);
  rows[K] = row_of<W>(call.columns, neuron, call.column_stride);
  const float none[K] = {}, *const biases = call.biases ? call.biases + K * outlier.position : none;
  for (int64_t t = 0; t < call.tokens; ++t) {
    if (!(outlier.tokens >> t & 1)) continue;
    float z[K];
#pragma GCC unroll 2
    for (int i = 0; i < K; ++i) z[i] = dot(rows[i], x.token<W>(t, call.d), call.d, rows[i + 1]) + biases[i];
    const float error = surrogate_error<K>(call, call.surrogate + (K + 1) * outlier.position, z, 1);
    add_scaled(sums + t * call.d_out, error, rows[K], call.d_out,
               row_of<W>(call.projections[0], next, call.strides[0]));
  }
}

// ---- The op.

// Returns false if the list names a neuron that does not exist; `out` is then undefined.
template <int K, class W>
bool correct(const Call& call) {
  const int64_t tokens = call.tokens, d_out = call.d_out, size = tokens * d_out;
  const int64_t listed = call.counts[0], guarded = call.counts[1], always = listed - guarded;
  const W* const folded = (const W*)call.folded;
  const Inputs x((const W*)call.x, tokens, call.d, call.d_groups);
  const int64_t bits = K * listed * call.bits + (call.fold ? d_out * call.fold_bits : 0);
  const int threads = bits * x.blocks * (BLOCK / 8) < SERIAL_BYTES ? 1 : call.threads;
  float* const partial = scratch<float, 5>(threads * size);
  Outlier* const list = scratch<Outlier, 6>(listed);
  float* const estimates = scratch<float, 11>(guarded * K * tokens);
  int64_t *const begins = scratch<int64_t, 7>(2 * threads), *const ends = begins + threads;
  std::atomic<bool> all_exist = true;
  const auto neuron_of = [&](const Outlier& outlier) -> int64_t {
    const int64_t neuron = call.neurons[outlier.position];
    if (between(0, neuron, call.hidden - 1)) return neuron;
    all_exist.store(false, std::memory_order_relaxed);
    return 0;
  };

  const auto share = [threads](int64_t of, int64_t thread) { return of * thread / threads; };

  run_threads(threads, [&](int64_t me) {
    begins[me] = share(guarded, me) + share(always, me);
    Outlier* end = TESTS<K>[call.bits - 1](call, x, share(guarded, me), share(guarded, me + 1), list + begins[me],
                                           estimates);
    for (int64_t i = share(always, me); i < share(always, me + 1); ++i)
      *end++ = {int32_t(guarded + i), (1u << tokens) - 1};
    ends[me] = end - list;
    float* const sums = partial + me * size;
    std::fill_n(sums, size, 0.0f);
    if (call.fold)
      (call.fold_bits == 16 ? fold_plain<W> : FOLDS[call.fold_bits - 1])(call, x, share(d_out, me),
                                                                         share(d_out, me + 1), sums);
  });
  run_threads(threads, [&](int64_t me) {
    // The joint list, cut evenly: outliers cluster, and one thread may have found most of them.
    float* const sums = partial + me * size;
    int64_t total = 0, before = 0;
    for (int64_t thread = 0; thread < threads; ++thread) total += ends[thread] - begins[thread];
    for (int64_t thread = 0; thread < threads; before += ends[thread] - begins[thread], ++thread) {
      const Outlier* outlier = list + begins[thread] + std::max<int64_t>(share(total, me) - before, 0);
      const Outlier* const last = list + std::min(begins[thread] + share(total, me + 1) - before, ends[thread]);
      int64_t neuron = outlier < last ? neuron_of(*outlier) : 0;
      for (; outlier < last; ++outlier) {
        const int64_t next = outlier + 1 < last ? neuron_of(outlier[1]) : neuron;
        if (call.row_bits == 16)
          add_plain<K, W>(call, x, *outlier, neuron, next, sums);
        else
          add_coded<K>(call, x, *outlier, neuron, next, estimates + K * tokens * outlier->position, sums);
        neuron = next;
      }
    }
  });
  run_threads(threads, [&](int64_t me) {
    for (int64_t i = share(size, me); i < share(size, me + 1); ++i) {
      float value = to_float(folded[call.fold ? i % d_out : i]);
      for (int64_t thread = 0; thread < threads; ++thread) value += partial[thread * size + i];
      store(value, (W*)call.out + i);
    }
  });
  return all_exist;
}

template <int K>
bool any_dtype(const Call& call) {
  return call.dtype == 0   ? correct<K, float>(call)
         : call.dtype == 1 ? correct<K, Bfloat16>(call)
                           : correct<K, Half>(call);
}

}  // namespace

// Returns 0, or 1 if the call is refused; op.py then raises the error that says why.
extern "C" int64_t tardis_correct(const Call* call) {
  return supported(*call) && (call->k == 1 ? any_dtype<1> : any_dtype<2>)(*call) ? 0 : 1;
}

// The number of lines, each of at most 64 bytes, that differ from their copies (snapshot.py).
extern "C" int64_t tardis_differing_lines(const void* const* lines, const int64_t* sizes, const uint8_t* copies,
                                          int64_t count) {
  int64_t differing = 0;
  for (int64_t i = 0; i < count; ++i) differing += std::memcmp(lines[i], copies + 64 * i, sizes[i]) != 0;
  return differing;
}
