// The registered activations.

#pragma once

#include <cmath>
#include <cstdint>

namespace {

// build.py writes activations.inc, with one `case <number>: return <expression of z>;` per activation. Not inlined, so that
// equal numbers give equal bits.
__attribute__((noinline)) float activate(float z, int64_t activation) {
  switch (activation) {
#include "activations.inc"
  }
  return NAN;
}

}  // namespace
