// Coefficients as packed levels and gains, as BitCoefficients.encode gives them.

#include "codes.h"

extern "C" void encode(
    const float* values,      // [groups, rank, tokens]
    const float* weights,     // [weightings, rank]
    uint8_t* const* parts,    // levels by width [groups, rows of bytes, tokens], gains [groups, tokens], rows "pitch" apart
    const int64_t* counts,    // rows of bytes by width, and directions with 3 bits
    int64_t groups, int64_t weightings, int64_t tokens, int64_t pitch, int64_t least_gain, int64_t gains,
    int64_t threads) {
  const Gains factors(least_gain);
  const int64_t rank = Levels(parts, counts, pitch).directions(), steps = (tokens + STEP - 1) / STEP;
#pragma omp parallel num_threads(threads)
  {
    Numbers held(rank * STEP);
#pragma omp for schedule(static)
    for (int64_t step = 0; step < groups * steps; step++) {
      const int64_t group = step / steps, start = step % steps * STEP, here = std::min(STEP, tokens - start);
      for (int64_t i = 0; i < rank; i++)
        std::copy_n(values + (group * rank + i) * tokens + start, here, held.data() + i * STEP);
      Tokens{held.data(), weights + group % weightings * rank}.code(Parts(parts, counts, group, pitch), factors, gains,
                                                                    start, here);
    }
  }
}
