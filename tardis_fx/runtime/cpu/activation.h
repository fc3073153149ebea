// The registered activations, of a number and of every lane of a vector.

#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace {

// build.py writes activations.inc, with one `case <number>: return lanes::as_vector(<expression of z>, z);` per activation.
// Not inlined, so that equal numbers give equal bits.
__attribute__((noinline, unused)) float activate(float z, int64_t activation) {
  switch (activation) {
#include "activations.inc"
  }
  return NAN;
}

__attribute__((noinline, unused)) Floats activate(Floats z, int64_t activation) {
  switch (activation) {
#include "activations.inc"
  }
  return Floats{} + NAN;
}

}  // namespace
