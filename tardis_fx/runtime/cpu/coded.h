// The op of coded.cpp.

#pragma once

#include <cstdint>

// A prepared site (coded_layout.py) starts with so many integers, the first of which is this one.
constexpr int64_t HEADER = 24, MAGIC = 0x31736964726174;

// Computes an FFN from codes; sizes and dtype (0 float, 1 bfloat16, 2 float16, 3 double) are those of x, [tokens, d], and
// out, [tokens, d_out]. Returns 0, or 1 if the site is not of these sizes.
extern "C" int64_t tardis_coded_ffn(const uint8_t* site, int64_t size, const void* x, void* out, int64_t tokens, int64_t d, int64_t d_out,
                  int64_t dtype, int64_t threads);
