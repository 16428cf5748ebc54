#include "mixed.h"

extern "C" void mixed(
    const float* weights, const int8_t* basis, const float* scale, const float* mean,
    const uint8_t* const* parts,  // levels by width [groups, rows of bytes, tokens], gains [groups, tokens]
    float* values,
    const int64_t* counts,  // rows of bytes by width, and directions with 3 bits
    int64_t pitch,          // from one row of bytes to the next
    int64_t groups, int64_t bases, int64_t heads, int64_t rows, int64_t size, int64_t tokens, int64_t stride,
    int64_t least_gain, int64_t threads) {
  const Gains factors(least_gain);
  const Mixed<false> all = {weights, basis, scale, mean, Levels(parts, counts, pitch), parts[WIDTHS], values,
                            stride, groups, bases, heads, rows, size, tokens, threads, factors};
  Numbers sums(all.numbers());
#pragma omp parallel num_threads(threads)
  {
    all.add(nullptr, sums.data());
    all.join(sums.data(), [](int64_t, float) { return 1.0f; });
    all.rebuild(sums.data());
  }
}
