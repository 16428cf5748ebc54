#include "tile_scores.h"

extern "C" void tile_scores(
    const float* queries, const int64_t* entries, const float* waves, const float* offset_waves, const int8_t* basis,
    const float* scale, const float* mean,
    const uint8_t* const* parts,  // levels by width [groups, rows of bytes, tokens], gains [groups, tokens]
    float* scores,
    const int64_t* counts,  // rows of bytes by width, and directions with 3 bits
    int64_t pitch,          // from one row of bytes to the next
    int64_t groups, int64_t bases, int64_t heads, int64_t rows, int64_t size, int64_t pairs, int64_t tokens,
    int64_t tile, int64_t least_gain, int64_t threads) {
  const Gains factors(least_gain);
  const TileScores all = {queries, entries, waves, offset_waves, basis, scale, mean, Levels(parts, counts, pitch),
                          parts[WIDTHS], scores, tokens, groups, bases, heads, rows, size, pairs, tokens, tile, threads, 1.0f,
                          factors};
#pragma omp parallel num_threads(threads)
  all.run(nullptr);
}
