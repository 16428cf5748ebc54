// Weighted sums of values: of the levels first, and of those the values. HeadGroups.mixed says the same in operations
// of torch.

#pragma once

#include "integer_products.h"

constexpr int64_t RUN = 1024;             // tokens whose weights stay in the L1 cache
constexpr int64_t WEIGHTS = RUN + LANES;  // not a power of two, so that rows of weights do not share cache sets

static inline Floats signed_floats(const int8_t* x) {
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

// Weighted sums of the values of all tokens, by the threads of a parallel region. With "softmax" the weights are scores
// whose exponentials are taken here, less "greatest", which every row has.
template <bool softmax>
struct Mixed {
  const float* weights;     // [groups, heads * rows, tokens], rows "stride" apart
  const int8_t* basis;      // [bases, heads * size, directions]
  const float* scale;       // [bases, directions]
  const float* mean;        // [bases, heads * size]
  Levels levels;            // of all groups
  const uint8_t* gains;     // [groups, tokens], as far apart as levels
  float* values;            // [groups, heads * rows, size]
  int64_t stride, groups, bases, heads, rows, size, tokens, threads;
  const Gains& factors;

  int64_t joint() const { return heads * rows; }
  // the last number of a sum is that of the weights
  int64_t wide() const { return whole(levels.rank()) + 1; }
  // tokens are shared out where there are fewer groups than threads
  int64_t shares() const { return std::clamp<int64_t>(tokens / 256, 1, (threads + groups - 1) / groups); }
  int64_t numbers() const { return groups * shares() * joint() * wide(); }

  // Sums of levels times gains and weights, for every share of the tokens.
  void add(const float* greatest, float* sums) const {
    const int64_t share = ((tokens + shares() - 1) / shares() + 63) / 64 * 64;
    Numbers scaled(joint() * WEIGHTS);
    std::vector<uint8_t> held;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < groups * shares(); part++) {
      const int64_t group = part / shares(), stop = std::min(tokens, (part % shares() + 1) * share);
      float* to = sums + part * joint() * wide();
      for (int64_t t = part % shares() * share, count; t < stop; t += count) {
        const bool full = stop - t >= LANES;
        count = full ? std::min(RUN, (stop - t) / LANES * LANES) : stop - t;
        float gain[RUN] = {};
        for (int64_t i = 0; i < count; i++) gain[i] = factors.of[gains[group * levels.stride + t + i]];
        for (int64_t m = 0; m < joint(); m++) {
          const float* from = weights + (group * joint() + m) * stride + t;
          float* into = scaled.data() + m * WEIGHTS;
          float few[LANES] = {};
          if (!full) {
            std::fill_n(few, LANES, softmax ? -INFINITY : 0.0f);
            from = std::copy_n(from, count, few) - count;
          }
          Floats sum = {};
          for (int64_t i = 0; i < count; i += LANES) {
            Floats weight = load(from + i);
            if constexpr (softmax) weight = exponential(weight - greatest[group * joint() + m]);
            sum += weight;
            store(into + i, weight * load(gain + i));
          }
          to[m * wide() + wide() - 1] += total(sum);
        }
        Levels these = levels.of_group(group).from(t);
        if (!full) these = these.filled(count, LANES, held);
        in_blocks<ROWS>(joint(), Mixing{these, scaled.data(), full ? count : LANES, to, wide()});
      }
    }
  }

  // The sums of all shares, a number per direction in units of the basis, times what "factor" gives for a row and its sum of weights.
  template <class Factor>
  void join(float* sums, const Factor& factor) const {
    const int64_t directions = levels.directions(), low = levels.low(), high = levels.high(), threes = levels.threes;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < groups * joint(); row++) {
      float* to = sums + (row / joint() * shares() * joint() + row % joint()) * wide();
      for (int64_t part = 1; part < shares(); part++)
        for (int64_t j = 0; j < wide(); j++) to[j] += to[part * joint() * wide() + j];
      const float times = factor(row, to[wide() - 1]);
      for (int64_t j = 0; j < threes; j++) to[low + j] += 4 * to[high + j];
      std::copy(to + high + threes, to + levels.rank(), to + high);
      std::fill(to + directions, to + wide() - 1, 0.0f);
      for (int64_t j = 0; j < directions; j++) to[j] *= scale[row / joint() % bases * directions + j] * times;
      to[wide() - 1] *= times;
    }
  }

  void rebuild(const float* sums) const {
    const int64_t rank = levels.directions();
#pragma omp for collapse(2) schedule(static)
    for (int64_t head = 0; head < groups * heads; head++)
      for (int64_t entry = 0; entry < size; entry++) {
        const int64_t group = head / heads, at = (group % bases * heads + head % heads) * size + entry;
        const float* from = sums + (group * shares() * joint() + head % heads * rows) * wide();
        in_blocks<4>(rows, Rebuilding{basis + at * rank, mean[at], rank, from, wide(),
                                      values + head * rows * size + entry, size});
      }
  }
};
