// Runs calls from a file through the kernel in codes, and compares the outputs with those in the file (test_aarch64.py).
//
// A call is six integers (bytes of the prepared site, tokens, d, d_out, dtype, threads), the site, x, and the output that the
// reference gives in double. Prints the largest error, relative to the largest output.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "coded.h"
#include "pool.h"
#include "vectors.h"

void start_threads(int64_t threads, void (*task)(void* context, int64_t thread), void* context) {
  for (int64_t thread = 0; thread < threads; ++thread) task(context, thread);
}

template <class T>
std::vector<T> read_some(FILE* file, size_t count) {
  std::vector<T> values(count);
  if (fread(values.data(), sizeof(T), count, file) != count) exit(2);
  return values;
}

int main(int, char** arguments) {
  FILE* const file = fopen(arguments[1], "rb");
  double worst = 0;
  for (int64_t numbers[6]; fread(numbers, sizeof numbers, 1, file) == 1;) {
    const auto [size, tokens, d, d_out, dtype, threads] = numbers;
    const auto site = read_some<uint8_t>(file, size);
    uint8_t* const aligned = static_cast<uint8_t*>(aligned_alloc(64, (size + 63) / 64 * 64));
    std::memcpy(aligned, site.data(), size);
    const size_t element = dtype == 0 ? 4 : 2;
    const auto x = read_some<uint8_t>(file, tokens * d * element);
    const auto expected = read_some<double>(file, tokens * d_out);
    std::vector<uint8_t> out(tokens * d_out * element);
    if (tardis_coded_ffn(aligned, size, x.data(), out.data(), tokens, d, d_out, dtype, threads)) return 1;
    double largest = 1, error = 0;
    for (const double value : expected) largest = std::max(largest, std::fabs(value));
    for (size_t i = 0; i < expected.size(); ++i) {
      const uint8_t* const at = out.data() + i * element;
      const float value = dtype == 0   ? read<float>(at)
                          : dtype == 1 ? to_float(read<Bfloat16>(at))
                                       : to_float(read<Half>(at));
      error = std::max(error, std::isfinite(value) ? std::fabs(value - expected[i]) / largest : INFINITY);
    }
    worst = std::max(worst, dtype == 0 ? error : error / 32);
    free(aligned);
  }
  std::printf("%g\n", worst);
}
