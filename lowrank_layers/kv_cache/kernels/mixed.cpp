// Weighted sums of values: of the levels first, and of those the values. HeadGroups.mixed says the same in operations
// of torch.

#include <numeric>

#include "levels.h"

namespace {

constexpr int64_t RUN = 1024;             // tokens whose weights stay in the L1 cache
constexpr int64_t WEIGHTS = RUN + LANES;  // not a power of two, so that rows of weights do not share cache sets

typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

Floats signed_floats(const int8_t* x) {
  return __builtin_convertvector((Integers)(widened((const uint8_t*)x) << 24) >> 24, Floats);
}

// Weighted sums over a run of tokens, added to what is there.
struct Mixing {
  const Levels& levels;
  const float* weights;
  int64_t tokens;
  float* sums;
  int64_t rank;

  template <int64_t M>
  void at(int64_t start) const {
    float* to = sums + start * rank;
    add<8, M>(levels.of[0], levels.rows[0], start, to);
    add<4, M>(levels.of[1], levels.rows[1], start, to + levels.rows[0]);
    add<2, M>(levels.of[2], levels.rows[2], start, to + levels.rows[0] + 2 * levels.rows[1]);
    add<1, M>(levels.of[3], levels.rows[3], start, to + levels.rows[0] + 2 * levels.rows[1] + 4 * levels.rows[2]);
  }

  template <int width, int64_t M>
  inline void add(const uint8_t* bytes, int64_t count, int64_t start, float* to) const {
    constexpr int fields = 8 / width, together = std::min(fields, 2);
    for (int64_t j = 0; j < count; j++, bytes += levels.stride) {
      for (int64_t t = 0; t < tokens; t += 64) __builtin_prefetch(bytes + levels.stride + t);
#pragma GCC unroll 2
      for (int field = 0; field < fields; field += together) {
        Floats found[together][M] = {};
        for (int64_t t = 0; t < tokens; t += LANES) {
          const Words wide = widened(bytes + t);
          Floats u[together];
          for (int f = 0; f < together; f++) u[f] = level<width>(wide, field + f);
          for (int64_t m = 0; m < M; m++) {
            const Floats weight = load(weights + (start + m) * WEIGHTS + t);
            for (int f = 0; f < together; f++) found[f][m] += u[f] * weight;
          }
        }
        for (int f = 0; f < together; f++)
          for (int64_t m = 0; m < M; m++) to[m * rank + (field + f) * count + j] += total(found[f][m]);
      }
    }
  }
};

// One entry of the values of some rows, from the sums of coefficients and, last, of weights.
struct Rebuilding {
  const int8_t* basis;
  float mean;
  int64_t rank;
  const float* sums;
  int64_t wide;
  float* values;
  int64_t size;

  template <int64_t M>
  void at(int64_t start) const {
    const float* from = sums + start * wide;
    Floats found[M] = {};
    for (int64_t j = 0; j < rank; j += LANES) {
      int8_t last[LANES] = {};
      if (rank - j < LANES) std::copy(basis + j, basis + rank, last);
      const Floats factors = signed_floats(rank - j < LANES ? last : basis + j);
      for (int64_t m = 0; m < M; m++) found[m] += load(from + m * wide + j) * factors;
    }
    for (int64_t m = 0; m < M; m++) values[(start + m) * size] = total(found[m]) + from[m * wide + wide - 1] * mean;
  }
};

}  // namespace

extern "C" void mixed(
    const float* weights,         // [groups, heads * rows, tokens], rows "stride" apart
    const int8_t* basis,          // [bases, heads * size, rank]
    const float* scale,           // [bases, rank]
    const float* mean,            // [bases, heads * size]
    const uint8_t* const* parts,  // levels by width [groups, rows of bytes, tokens], gains [groups, tokens]
    float* values,                // [groups, heads * rows, size]
    const int64_t* counts,        // rows of bytes by width
    int64_t groups, int64_t bases, int64_t heads, int64_t rows,
    int64_t size, int64_t tokens, int64_t stride, int64_t least_gain, int64_t threads) {
  const Levels all(parts, counts, tokens);
  const Gains factors(least_gain);
  // tokens are shared out where there are fewer groups than threads; the last number of a sum is that of the weights
  const int64_t rank = all.rank(), joint = heads * rows, wide = whole(rank) + 1;
  const int64_t shares = std::clamp<int64_t>(tokens / 256, 1, (threads + groups - 1) / groups);
  const int64_t share = ((tokens + shares - 1) / shares + 63) / 64 * 64;
  Numbers sums(groups * shares * joint * wide);
#pragma omp parallel num_threads(threads)
  {
    Numbers scaled(joint * WEIGHTS);
    std::vector<uint8_t> held;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < groups * shares; part++) {
      const int64_t group = part / shares, stop = std::min(tokens, (part % shares + 1) * share);
      float* to = sums.data() + part * joint * wide;
      for (int64_t t = part % shares * share, count; t < stop; t += count) {
        const bool full = stop - t >= LANES;
        count = full ? std::min(RUN, (stop - t) / LANES * LANES) : stop - t;
        float gains[RUN];
        for (int64_t i = 0; i < count; i++) gains[i] = factors.of[parts[WIDTHS][group * tokens + t + i]];
        for (int64_t m = 0; m < joint; m++) {
          const float* from = weights + (group * joint + m) * stride + t;
          float* into = scaled.data() + m * WEIGHTS;
          Floats sum = {};
          for (int64_t i = 0; i < (full ? count : 0); i += LANES) sum += load(from + i);
          to[m * wide + wide - 1] += full ? total(sum) : std::accumulate(from, from + count, 0.0f);
          std::fill_n(into, LANES, 0.0f);
          for (int64_t i = 0; i < count; i++) into[i] = from[i] * gains[i];
        }
        Levels levels = all.of_group(group).from(t);
        if (!full) levels = levels.filled(count, LANES, held);
        in_blocks<ROWS>(joint, Mixing{levels, scaled.data(), full ? count : LANES, to, wide});
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < groups * joint; row++) {
      float* to = sums.data() + (row / joint * shares * joint + row % joint) * wide;
      for (int64_t part = 1; part < shares; part++)
        for (int64_t j = 0; j < wide; j++) to[j] += to[part * joint * wide + j];
      for (int64_t j = 0; j < rank; j++) to[j] *= scale[row / joint % bases * rank + j];
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t head = 0; head < groups * heads; head++)
      for (int64_t entry = 0; entry < size; entry++) {
        const int64_t group = head / heads, at = (group % bases * heads + head % heads) * size + entry;
        const float* from = sums.data() + (group * shares * joint + head % heads * rows) * wide;
        in_blocks<4>(rows, Rebuilding{basis + at * rank, mean[at], rank, from, wide,
                                      values + head * rows * size + entry, size});
      }
  }
}
