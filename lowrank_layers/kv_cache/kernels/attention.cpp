// One step of attention to a whole cache: a query per head, exact tokens and coded ones, one softmax over both.
// attend.py says the same in operations of torch.

#include "mixed.h"
#include "tile_scores.h"

namespace {

// Exact tokens in one buffer: keys and values [batch, key heads, tokens, size].
struct Exact {
  const float *keys, *values;
  int64_t tokens, keys_batch, keys_head, values_batch, values_head;
};

}  // namespace

extern "C" void attention(
    const float* queries,        // [batch, query heads, size]
    float* out,                  // [batch, query heads, size of a value]
    const void* const* tensors,  // entries, waves and offset waves of TileScores; basis, scale, mean, levels by width and
                                 // gains of keys and of values; keys and values of the first tokens, and of the recent
    const int64_t* numbers,      // counts of levels, of keys and of values; for first and recent tokens: how many,
                                 // steps between batch rows and heads, of keys and of values; and those below
    float factor) {
  constexpr int64_t SIDE = 4 + WIDTHS;
  const void *const *keys = tensors + 3, *const *values = keys + SIDE;
  const float* const* exact = (const float* const*)(values + SIDE);
  const int64_t *counts = numbers, *exact_sizes = counts + 2 * COUNTS, *rest = exact_sizes + 10;
  const int64_t keys_pitch = rest[0], values_pitch = rest[1], batch = rest[2], groups = rest[3], key_bases = rest[4],
                value_bases = rest[5], heads = rest[6], rows = rest[7], size = rest[8], value_size = rest[9],
                pairs = rest[10], tokens = rest[11], tile = rest[12], least_gain = rest[13], threads = rest[14];
  const Gains factors(least_gain);
  Exact parts[2];
  int64_t others = 0;
  for (int k = 0; k < 2; k++) {
    const int64_t* sizes = exact_sizes + 5 * k;
    parts[k] = {exact[2 * k], exact[2 * k + 1], sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    others += sizes[0];
  }
  const int64_t joint = heads * rows, coded = whole(tokens), stride = coded + whole(others);
  static thread_local Numbers held;  // new memory at every step would cost as much as the scores
  float* scores = held.room(batch * groups * joint * stride);
  const TileScores scoring = {
      queries, (const int64_t*)tensors[0], (const float*)tensors[1], (const float*)tensors[2], (const int8_t*)keys[0], (const float*)keys[1], (const float*)keys[2],
      Levels((const uint8_t* const*)keys + 3, counts, keys_pitch), (const uint8_t*)keys[3 + WIDTHS], scores,
      stride, batch * groups, key_bases, heads, rows, size, pairs, tokens, tile, threads, factor, factors};
  const Mixed<true> mixing = {
      scores, (const int8_t*)values[0], (const float*)values[1], (const float*)values[2],
      Levels((const uint8_t* const*)values + 3, counts + COUNTS, values_pitch), (const uint8_t*)values[3 + WIDTHS], out,
      stride, batch * groups, value_bases, heads, rows, value_size, tokens, threads, factors};
  Numbers sums(mixing.numbers()), best(batch * groups * scoring.chunks() * joint);
  const int64_t all_rows = batch * groups * joint, key_heads = groups * heads;
#pragma omp parallel num_threads(threads)
  {
    scoring.run(best.data());
#pragma omp for schedule(static)
    for (int64_t row = 0; row < all_rows; row++) {
      const int64_t head = row / rows % key_heads, b = row / rows / key_heads;
      float* to = scores + row * stride + coded;
      for (const Exact& part : parts) {
        const float* key = part.keys + b * part.keys_batch + head * part.keys_head;
        for (int64_t t = 0; t < part.tokens; t++) *to++ = factor * product(queries + row * size, key + t * size, size);
      }
    }
    std::vector<float> greatest(all_rows);
    for (int64_t row = 0; row < all_rows; row++) {
      const float* from = best.data() + row / joint * scoring.chunks() * joint + row % joint;
      greatest[row] = maximum(scores + row * stride + coded, others);
      for (int64_t k = 0; k < scoring.chunks(); k++) greatest[row] = std::max(greatest[row], from[k * joint]);
    }
    mixing.add(greatest.data(), sums.data());
    mixing.join(sums.data(), [&](int64_t row, float sum) {
      float* weights = scores + row * stride + coded;
      for (int64_t t = 0; t < others; t++) sum += weights[t] = std::exp(weights[t] - greatest[row]);
      for (int64_t t = 0; t < others; t++) weights[t] /= sum;
      return 1 / sum;
    });
    mixing.rebuild(sums.data());
#pragma omp for schedule(static)
    for (int64_t row = 0; row < all_rows; row++) {
      const int64_t head = row / rows % key_heads, b = row / rows / key_heads;
      const float* weights = scores + row * stride + coded;
      for (const Exact& part : parts) {
        const float* value = part.values + b * part.values_batch + head * part.values_head;
        for (int64_t t = 0; t < part.tokens; t++, weights++)
          for (int64_t j = 0; j < value_size; j++) out[row * value_size + j] += *weights * value[t * value_size + j];
      }
    }
  }
}
