// Sums of outer products of rows: one half is computed, in blocks whose sums stay in registers for a run of tokens.

#include "levels.h"

namespace {

constexpr int64_t RUN = 64;  // tokens that stay in the L1 cache

// The products of some entries with those from the first of them on, to the end of the row.
struct Sums {
  const float* rows;
  int64_t tokens, width, stride;
  float* to;

  template <int64_t M>
  void at(int64_t start) const {
    for (int64_t c = start / STEP * STEP; c < width; c += STEP) {
      Floats sums[M][2];
      for (int64_t m = 0; m < M; m++) sums[m][0] = sums[m][1] = Floats{};
      for (int64_t t = 0; t < tokens; t++) {
        const float* row = rows + t * stride;
        const Floats left = load(row + c), right = load(row + c + LANES);
        for (int64_t m = 0; m < M; m++) {
          sums[m][0] += row[start + m] * left;
          sums[m][1] += row[start + m] * right;
        }
      }
      for (int64_t m = 0; m < M; m++) {
        float* into = to + (start + m) * width + c;
        store(into, load(into) + sums[m][0]);
        store(into + LANES, load(into + LANES) + sums[m][1]);
      }
    }
  }
};

}  // namespace

extern "C" int64_t second_moment(
    const float* rows,  // [groups, tokens, width], rows "stride" apart
    float* found,       // [groups, width, width], zeros
    int64_t groups, int64_t tokens, int64_t width, int64_t stride, int64_t threads) {
  if (width % STEP) return 0;
  for (int64_t group = 0; group < groups; group++) {
    float* to = found + group * width * width;
#pragma omp parallel num_threads(threads)
    {
      Numbers own(width * width);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tokens; t += RUN) {
        const int64_t here = std::min(RUN, tokens - t);
        in_blocks<ROWS_OF_TWO>(width, Sums{rows + (group * tokens + t) * stride, here, width, stride, own.data()});
      }
#pragma omp critical
      for (int64_t i = 0; i < width; i++)
        for (int64_t j = i; j < width; j++) to[i * width + j] += own.data()[i * width + j];
    }
    for (int64_t i = 0; i < width; i++)
      for (int64_t j = 0; j < i; j++) to[i * width + j] = to[j * width + i];
  }
  return 1;
}
