// Elementary functions of every lane of a vector, to about the precision of float, for the expressions of activations.

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {
namespace lanes {

// Functions without code for vectors are computed lane by lane.
#define LANE_BY_LANE(name)                                      \
  [[maybe_unused]] float name(float x) { return std::name(x); } \
  [[maybe_unused]] Floats name(Floats x) {                      \
    for (int i = 0; i < LANES; ++i) x[i] = std::name(x[i]);     \
    return x;                                                   \
  }
#define FOR_FLOATS(name) \
  [[maybe_unused]] float name(float x) { return std::name(x); }

LANE_BY_LANE(acos)
LANE_BY_LANE(acosh)
LANE_BY_LANE(asin)
LANE_BY_LANE(asinh)
LANE_BY_LANE(atan)
LANE_BY_LANE(atanh)
LANE_BY_LANE(cbrt)
LANE_BY_LANE(ceil)
LANE_BY_LANE(cos)
LANE_BY_LANE(cosh)
LANE_BY_LANE(erfc)
LANE_BY_LANE(exp2)
LANE_BY_LANE(expm1)
LANE_BY_LANE(fabs)
LANE_BY_LANE(abs)
LANE_BY_LANE(floor)
LANE_BY_LANE(lgamma)
LANE_BY_LANE(log)
LANE_BY_LANE(log10)
LANE_BY_LANE(log1p)
LANE_BY_LANE(log2)
LANE_BY_LANE(sin)
LANE_BY_LANE(sinh)
LANE_BY_LANE(sqrt)
LANE_BY_LANE(tan)
LANE_BY_LANE(tgamma)
FOR_FLOATS(exp)
FOR_FLOATS(erf)
FOR_FLOATS(tanh)
#undef LANE_BY_LANE
#undef FOR_FLOATS

[[maybe_unused]] float pow(float x, float y) { return std::pow(x, y); }
[[maybe_unused]] Floats pow(Floats x, float y) {
  for (int i = 0; i < LANES; ++i) x[i] = std::pow(x[i], y);
  return x;
}
[[maybe_unused]] Floats pow(float x, Floats y) {
  for (int i = 0; i < LANES; ++i) y[i] = std::pow(x, y[i]);
  return y;
}
[[maybe_unused]] Floats pow(Floats x, Floats y) {
  for (int i = 0; i < LANES; ++i) x[i] = std::pow(x[i], y[i]);
  return x;
}

// To the nearest integer, ties to even, of numbers below 2^22.
inline Floats nearest(Floats x) {
  const Floats shift = Floats{} + 0x1.8p23f;
  return (x + shift) - shift;
}

inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

inline Floats exp(Floats x) {
  const Floats least = Floats{} - 87.3f, most = Floats{} + 88.7f;
  const Floats within = x < least ? least : (x > most ? most : x);
  const Floats n = nearest(within * 1.44269504f);
  const Floats r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.383673095e-03f + 8.374898301e-03f;  // by weighted least squares, to 2e-9
  p = p * r + 4.166823200e-02f;
  p = p * r + 1.666641919e-01f;
  p = p * r + 4.999999203e-01f;
  p = p * r + 1.000000037f;
  p = p * r + 1;
  const Floats value = p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
  return x > most ? Floats{} + INFINITY : (x < least ? Floats{} : value);
}

// An odd function that is x P(x^2) / Q(x^2) up to `most`, and 1 from there on.
template <int P, int Q>
Floats saturating(Floats x, const float (&above)[P], const float (&below)[Q], float most) {
  const Floats square = x * x;
  Floats p = Floats{} + above[P - 1], q = Floats{} + below[Q - 1];
#pragma GCC unroll 8
  for (int i = P - 2; i >= 0; --i) p = p * square + above[i];
#pragma GCC unroll 8
  for (int i = Q - 2; i >= 0; --i) q = q * square + below[i];
  const Floats one = (Floats)((Ints)(Floats{} + 1) | ((Ints)x & int32_t(0x80000000)));
  return magnitude(x) >= most ? one : x * p / q;
}

// Rational functions by weighted least squares: to 2e-8 and 1e-9, in floats to 4e-7.
inline Floats erf(Floats x) {
  return saturating(x, {1.128379046e+00f, 1.937087176e-01f, 5.316348437e-02f, 3.902805248e-03f, 2.871796576e-04f, 2.013248836e-06f},
                    {1, 5.050016202e-01f, 1.154550089e-01f, 1.524231431e-02f, 1.194470834e-03f, 3.783279519e-05f}, 3.95f);
}

inline Floats tanh(Floats x) {
  return saturating(x, {9.999999946e-01f, 1.368116003e-01f, 3.869961511e-03f, 2.804485132e-05f, 3.069263524e-08f, -1.229930566e-11f},
                    {1, 4.701449100e-01f, 2.725162818e-02f, 3.941669405e-04f, 1.290215162e-06f}, 8.9f);
}

inline float as_vector(float value, float) { return value; }
inline Floats as_vector(Floats value, Floats) { return value; }
inline Floats as_vector(float value, Floats) { return Floats{} + value; }

}  // namespace lanes
}  // namespace
