// The ops of coded.cpp.

#pragma once

#include <cstdint>

// What coded_layout.py prepares starts with so many integers, the first of which is one of these.
constexpr int64_t HEADER = 24, SITE_MAGIC = 0x31736964726174, LINEAR_MAGIC = 0x316c6964726174;

// Compute an FFN or a linear layer from codes; sizes and dtype (0 float, 1 bfloat16, 2 float16, 3 double) are those of x,
// [tokens, d], and out, [tokens, d_out]. Return 0, or 1 if what is prepared is not of these sizes.
typedef int64_t Coded(const uint8_t* prepared, int64_t size, const void* x, void* out, int64_t tokens, int64_t d, int64_t d_out,
                      int64_t dtype, int64_t threads);
extern "C" Coded tardis_coded_ffn, tardis_coded_linear;
