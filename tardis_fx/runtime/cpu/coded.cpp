// Computes an FFN from codes, each neuron as precise as its token needs, for a few tokens, on a CPU.
//
// `coded_ffn` in coded_reference.py specifies the result. Neurons are taken in batches, in three steps: (a) estimates of
// the first pre-activation, for all tokens, (b) of the second one, where a token's gate needs it, and the levels, (c) what
// is added. Each step prefetches the rows that the next one reads, and a row is read once for all tokens. Thresholds
// relative to a token's scale need the first estimates of all neurons: then a phase of its own does (a) and keeps them.
// Do not compile with -ffast-math: a NaN must compare false, so that it reads everything.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "activation.h"
#include "call.h"
#include "codes.h"
#include "rotation.h"
#include "vectors.h"

namespace {

constexpr int64_t SERIAL_BYTES = 32768;  // of first projections: below, waking other threads costs more than it saves
constexpr int64_t BATCH = 16;            // neurons

// ---- Rows of codes with one scale each.

struct Matrix {
  const uint8_t* rows;
  int64_t columns, bits;

  int64_t blocks() const { return (columns + BLOCK - 1) / BLOCK; }
  int64_t bytes() const { return blocks() * bits * (BLOCK / 8) + int64_t(sizeof(Half)); }
  const uint8_t* row(int64_t number) const { return rows + number * bytes(); }
  float scale(int64_t number) const { return to_float(read<Half>(row(number + 1) - sizeof(Half))); }
  void prefetch(int64_t number) const { ::prefetch(row(number), bytes()); }
};

// A row's weights are scale * code - shift, the codes of up to 4 bits looked up. Padded, as `estimate` reads vectors.
template <int BITS>
struct Scale {
  float scale[LANES] = {}, shift[LANES] = {};

  Scale(const uint8_t* row, int64_t blocks) {
    const float of_level = to_float(read<Half>(row + blocks * (BITS * BLOCK / 8)));
    constexpr int COUNT = 1 << BITS;
    scale[0] = of_level * (BITS <= 4 ? 1 / 128.0f : 2.0f / COUNT);
    shift[0] = of_level * (BITS <= 4 ? 1 : float(COUNT - 1) / COUNT);
  }
};

// The products of a row with the tokens of a mask; those of others are undefined.
template <int BITS>
void multiply(const uint8_t* row, const Inputs& x, int64_t tokens, uint32_t mask, float* products) {
  const Scale<BITS> of(row, x.blocks);
  if (2 * __builtin_popcount(mask) > tokens) return estimate_all<BITS, true>(row, of.scale, of.shift, x, tokens, products);
  for (int64_t t = 0; t < tokens; ++t)
    if (mask >> t & 1) products[t] = estimate_one<BITS, true>(row, of.scale, of.shift, x, t);
}

// A row, and the values that it is multiplied with for the tokens of a mask.
struct Term {
  const uint8_t* row;
  uint32_t mask;
  const float* values;
};

// Adds up to BATCH rows times their values to sums, which are `blocks` blocks for each token.
template <int BITS>
void add_rows(const Term* terms, int64_t count, int64_t blocks, int64_t tokens, float* sums) {
  float scales[BATCH], shifts[BATCH];
  int32_t of_token[TOKENS][BATCH], counts[TOKENS] = {};  // terms of each token
  for (int64_t i = 0; i < count; ++i) {
    const Scale<BITS> of(terms[i].row, blocks);
    scales[i] = of.scale[0], shifts[i] = of.shift[0];
    for (int64_t t = 0; t < tokens; ++t)
      if (terms[i].mask >> t & 1) of_token[t][counts[t]++] = i;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    alignas(64) float weights[BATCH][BLOCK];
    for (int64_t i = 0; i < count; ++i) {
      uint8_t codes[BLOCK];
      unpack<BITS, true>(terms[i].row + b * (BITS * BLOCK / 8), codes);
      for (int k = 0; k < BLOCK; k += LANES) put(scales[i] * load(codes + k) - shifts[i], weights[i] + k);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float* const at = sums + (t * blocks + b) * BLOCK;
      Floats totals[BLOCK / LANES];
      for (int k = 0; k < BLOCK / LANES; ++k) totals[k] = load(at + k * LANES);
      for (int32_t n = 0; n < counts[t]; ++n) {
        const int32_t i = of_token[t][n];
        for (int k = 0; k < BLOCK / LANES; ++k) totals[k] += terms[i].values[t] * load(weights[i] + k * LANES);
      }
      for (int k = 0; k < BLOCK / LANES; ++k) put(totals[k], at + k * LANES);
    }
  }
}

constexpr decltype(multiply<1>)* MULTIPLY[] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                               multiply<5>, multiply<6>, multiply<7>, multiply<8>};
constexpr decltype(add_rows<1>)* ADD_ROWS[] = {add_rows<1>, add_rows<2>, add_rows<3>, add_rows<4>,
                                               add_rows<5>, add_rows<6>, add_rows<7>, add_rows<8>};

// Adds the products of a row with the tokens of a mask to pre-activations.
void add_estimates(const Matrix& matrix, int64_t row, const Inputs& x, int64_t tokens, uint32_t mask, float* z) {
  float products[TOKENS];
  MULTIPLY[matrix.bits - 1](matrix.row(row), x, tokens, mask, products);
  for (int64_t t = 0; t < tokens; ++t)
    if (mask >> t & 1) z[t] += products[t];
}

// ---- A neuron.

struct Matrices {
  Matrix projections[MOST_PROJECTIONS], refinements[MOST_PROJECTIONS], columns, column_refinements, fold;

  explicit Matrices(const CodedCall& call)
      : columns{call.columns, call.d_out, call.column_bits},
        column_refinements{call.column_refinements, call.d_out, call.column_low_bits},
        fold{call.fold, call.d, call.fold_bits} {
    for (int i = 0; i < call.k; ++i) {
      projections[i] = {call.projections[i], call.d, call.bits};
      refinements[i] = {call.refinements[i], call.d, call.low_bits};
    }
  }
};

// What the contributions of parts are compared with, for each token: thresholds times the token's scale.
struct Limits {
  double up[TOKENS], value[TOKENS], row[TOKENS], column[TOKENS];

  // `squares` are those of the scales, or null: scales are 1.
  Limits(const CodedCall& call, const double* squares) {
    const float* const others = call.thresholds + (call.k - 1);
    for (int64_t t = 0; t < call.tokens; ++t) {
      const double scale = squares ? std::sqrt(squares[t]) : 1;
      up[t] = call.thresholds[0] * scale;
      value[t] = others[0] * scale;
      row[t] = others[1] * scale;
      column[t] = others[2] * scale;
    }
  }
};

// Whether a part is read: infinity and NaN always are.
bool exceeds(double contribution, double limit) { return !(contribution <= limit && contribution < INFINITY); }

// Whether first estimates alone decide something: where to read `up`, or the scales.
bool decides_by_first(const CodedCall& call) { return call.k > 1 || call.relative; }

float bias(const CodedCall& call, int64_t number) {
  if (call.dtype == 0) return ((const float*)call.biases)[number];
  return call.dtype == 1 ? to_float(((const Bfloat16*)call.biases)[number]) : to_float(((const Half*)call.biases)[number]);
}

// What is known of a neuron in each step. In masks, bit t stands for token t; their names are those of `Levels`.
struct Neuron {
  int64_t position;
  float first_norm, norm, surrogate[MOST_PROJECTIONS + 1];
  float z[MOST_PROJECTIONS][TOKENS], active[TOKENS];  // `active` is the activation of the first estimate
  uint32_t up, value, row, column;

  Neuron() = default;
  Neuron(const CodedCall& call, int64_t position) : position(position), z{}, up(0), value(0), row(0), column(0) {
    first_norm = to_float(call.norms[position * call.k]);
    norm = to_float(call.norms[position * call.k + call.k - 1]);
    for (int i = 0; call.surrogate && i <= call.k; ++i) surrogate[i] = to_float(call.surrogate[position * (call.k + 1) + i]);
    for (int i = 0; call.biases && i < call.k; ++i) std::fill_n(z[i], call.tokens, bias(call, position * call.k + i));
  }

  // The response to k pre-activations minus the surrogate; `active` is the activation of the first.
  __attribute__((noinline)) float value_of(const CodedCall& call, float active, const float* z) const {
    float value = call.k == 1 ? active : active * z[1];
    if (!call.surrogate) return value;
    for (int i = 0; i < call.k; ++i) value -= surrogate[i] * z[i];
    return value - surrogate[call.k];
  }

  // The contribution of everything after the first estimate.
  double first(int64_t t) const { return double(std::fabs(active[t])) * first_norm; }

  // Sets the levels after `up` for the tokens of `up`. Squares are double, because those of floats overflow.
  void choose_levels(const CodedCall& call, const Matrices& of, const Limits& limits) {
    float noises[MOST_PROJECTIONS];
    for (int i = 0; i < call.k; ++i) noises[i] = of.projections[i].scale(position) * call.noise[i];
    for (int64_t t = 0; t < call.tokens; ++t) {
      if (!(up >> t & 1)) continue;
      const float at[] = {z[0][t], z[1][t]};
      if (!decides_by_first(call)) active[t] = activate(at[0], call.activation);
      const double value_here = value_of(call, active[t], at);
      double square = 0;
      for (int i = 0; i < call.k; ++i)
        for (const float step : {noises[i], -noises[i]}) {
          float moved[] = {at[0], at[1]};
          moved[i] += step;
          const double change =
              value_of(call, i == 0 ? activate(moved[0], call.activation) : active[t], moved) - value_here;
          square += change * change / 2;
        }
      if (!exceeds(std::sqrt(value_here * value_here + square) * norm, limits.value[t])) continue;
      value |= 1u << t;
      row |= uint32_t(exceeds(std::sqrt(square) * norm, limits.row[t])) << t;
      column |= uint32_t(exceeds(std::fabs(value_here) * norm, limits.column[t])) << t;
    }
  }
};

// ---- The op.

// Sets a batch to the neurons from `begin` to `end`, with their first estimates, and the activations of those if something
// is decided by them alone. Activations branch: in a loop of their own they do not delay estimates.
void estimate_first(const CodedCall& call, const Matrices& of, const Inputs& x, int64_t begin, int64_t end, Neuron* neurons) {
  const int64_t count = end - begin;
  for (int64_t i = 0; i < count; ++i) {
    neurons[i] = Neuron(call, begin + i);
    add_estimates(of.projections[0], begin + i, x, call.tokens, (1u << call.tokens) - 1, neurons[i].z[0]);
  }
  for (int64_t i = 0; i < count && decides_by_first(call); ++i)
    for (int64_t t = 0; t < call.tokens; ++t) neurons[i].active[t] = activate(neurons[i].z[0][t], call.activation);
}

// Keeps the first estimates of the neurons from `begin` to `end` and their activations, [listed, 2, tokens], and adds the
// squares of the neurons' contributions to those of the scales.
void keep_first(const CodedCall& call, const Matrices& of, const Inputs& x, int64_t begin, int64_t end, float* kept,
                double* squares) {
  Neuron neurons[BATCH];
  estimate_first(call, of, x, begin, end, neurons);
  for (int64_t i = 0; i < end - begin; ++i) {
    const Neuron& neuron = neurons[i];
    float* const row = kept + neuron.position * 2 * call.tokens;
    std::copy_n(neuron.z[0], call.tokens, row);
    std::copy_n(neuron.active, call.tokens, row + call.tokens);
    for (int64_t t = 0; t < call.tokens; ++t) squares[t] += neuron.first(t) * neuron.first(t);
  }
}

// Adds the values of the neurons from `begin` to `end`, times their columns, to sums; `kept` is null or from `keep_first`.
void add_neurons(const CodedCall& call, const Matrices& of, const Inputs& x, const Limits& limits, const float* kept,
                 int64_t begin, int64_t end, float* sums) {
  const int64_t tokens = call.tokens;
  Neuron neurons[BATCH];
  const int64_t count = end - begin;
  if (!kept) estimate_first(call, of, x, begin, end, neurons);
  for (int64_t i = 0; i < count; ++i) {
    Neuron& neuron = neurons[i];
    if (kept) {
      neuron = Neuron(call, begin + i);
      const float* const row = kept + neuron.position * 2 * tokens;
      std::copy_n(row, tokens, neuron.z[0]);
      std::copy_n(row + tokens, tokens, neuron.active);
    }
    if (call.k == 1) {
      neuron.up = (1u << tokens) - 1;
      continue;
    }
    for (int64_t t = 0; t < tokens; ++t) neuron.up |= uint32_t(exceeds(neuron.first(t), limits.up[t])) << t;
    if (neuron.up) of.projections[1].prefetch(neuron.position);
  }
  for (int64_t i = 0; i < count; ++i) {
    Neuron& neuron = neurons[i];
    if (!neuron.up) continue;
    if (call.k > 1) add_estimates(of.projections[1], neuron.position, x, tokens, neuron.up, neuron.z[1]);
    neuron.choose_levels(call, of, limits);
    for (int k = 0; k < call.k && neuron.row; ++k) of.refinements[k].prefetch(neuron.position);
    if (neuron.value) of.columns.prefetch(neuron.position);
    if (neuron.column) of.column_refinements.prefetch(neuron.position);
  }
  float values[BATCH][TOKENS];
  Term columns[BATCH], refinements[BATCH];
  int64_t column_count = 0, refinement_count = 0;
  for (int64_t i = 0; i < count; ++i) {
    Neuron& neuron = neurons[i];
    if (!neuron.value) continue;
    for (int k = 0; k < call.k && neuron.row; ++k)
      add_estimates(of.refinements[k], neuron.position, x, tokens, neuron.row, neuron.z[k]);
    for (int64_t t = 0; t < tokens; ++t) {
      const float at[] = {neuron.z[0][t], neuron.z[1][t]};
      if (neuron.value >> t & 1) values[i][t] = neuron.value_of(call, activate(at[0], call.activation), at);
    }
    columns[column_count++] = {of.columns.row(neuron.position), neuron.value, values[i]};
    if (neuron.column)
      refinements[refinement_count++] = {of.column_refinements.row(neuron.position), neuron.column, values[i]};
  }
  const int64_t blocks = of.columns.blocks();
  if (column_count) ADD_ROWS[call.column_bits - 1](columns, column_count, blocks, tokens, sums);
  if (refinement_count) ADD_ROWS[call.column_low_bits - 1](refinements, refinement_count, blocks, tokens, sums);
}

template <class W>
void compute(const CodedCall& call) {
  const int64_t tokens = call.tokens, d = call.d, d_out = call.d_out, listed = *call.listed;
  const Matrices of(call);
  float* const rotated = scratch<float, 5>(tokens * d);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < d; ++i) rotated[t * d + i] = to_float(((const W*)call.x)[t * d + i]) * call.signs[i];
    for_blocks(d, [&](int64_t start, int64_t size) { transform(rotated + t * d + start, size); });
  }
  const Inputs x(rotated, tokens, d, 1);
  // One thread or all of them: a team of another size makes libgomp end threads that PyTorch then starts again.
  const int64_t bytes = listed * of.projections[0].bytes() + (call.fold ? d_out * of.fold.bytes() : 0);
  const int threads = bytes < SERIAL_BYTES ? 1 : call.threads;
  const int64_t stride = of.columns.blocks() * BLOCK, size = tokens * stride;
  float* const partial = scratch<float, 6>(threads * size);
  float* const kept = call.relative ? scratch<float, 7>(listed * 2 * tokens) : nullptr;
  double* const squares = call.relative ? scratch<double, 8>(threads * TOKENS) : nullptr;

#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    float* const sums = partial + me * size;
    std::fill_n(sums, size, 0.0f);
    double total[TOKENS] = {};  // squared scales
    if (call.relative) {
      double own[TOKENS] = {};
#pragma omp for schedule(static, 1) nowait
      for (int64_t begin = 0; begin < listed; begin += BATCH)
        keep_first(call, of, x, begin, std::min(begin + BATCH, listed), kept, own);
      std::copy_n(own, TOKENS, squares + me * TOKENS);
#pragma omp barrier
      for (int64_t thread = 0; thread < team; ++thread)
        for (int64_t t = 0; t < tokens; ++t) total[t] += squares[thread * TOKENS + t];
    }
    const Limits limits(call, call.relative ? total : nullptr);
#pragma omp for schedule(static, 1) nowait
    for (int64_t begin = 0; begin < listed; begin += BATCH)
      add_neurons(call, of, x, limits, kept, begin, std::min(begin + BATCH, listed), sums);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < (call.fold ? d_out : 0); ++row) {
      float products[TOKENS];
      MULTIPLY[call.fold_bits - 1](of.fold.row(row), x, tokens, (1u << tokens) - 1, products);
      for (int64_t t = 0; t < tokens; ++t) sums[t * stride + row] += products[t];
    }
    int64_t turn = 0;
    for (int64_t t = 0; t < tokens; ++t)
      for_blocks(d_out, [&](int64_t start, int64_t size_of_block) {
        if (turn++ % team != me) return;
        float block[ROTATED] = {};
        for (int64_t thread = 0; thread < team; ++thread)
          for (int64_t i = 0; i < size_of_block; ++i) block[i] += partial[thread * size + t * stride + start + i];
        transform(block, size_of_block);
        for (int64_t i = 0; i < size_of_block; ++i) {
          const int64_t column = start + i;
          store(block[i] * call.out_signs[column] + to_float(((const W*)call.bias)[column]),
                (W*)call.out + t * d_out + column);
        }
      });
  }
}

}  // namespace

// Returns 0, or 1 if the call is refused; coded_op.py then raises the error that says why.
extern "C" int64_t tardis_coded_ffn(const CodedCall* call) {
  if (!supported(*call)) return 1;
  (call->dtype == 0 ? compute<float> : call->dtype == 1 ? compute<Bfloat16> : compute<Half>)(*call);
  return 0;
}
