// Weighted sums of values: of the levels first, and of those the values. HeadGroups.mixed says the same in operations
// of torch.
//
// Weights, times the gains of their tokens, are 16-bit integers in units of the greatest of a run of tokens. What
// rounding takes off one is added to the next, so that many small ones are not lost.

#pragma once

#include "integer_products.h"

constexpr int64_t RUN = 1024;         // tokens whose weights stay in the L1 cache, and whose sums do not overflow
constexpr int64_t HELD = RUN + STEP;  // not a power of two, so that rows of weights do not share cache sets
static_assert(RUN / STEP * (2 * 255 * MOST) <= MOST_SUM);

typedef uint16_t Halfwords __attribute__((vector_size(4 * LANES)));

// The levels of STEP tokens, 16 bits each.
static inline Halfwords halfwords(const uint8_t* x) {
#if defined(__AVX512BW__)
  return (Halfwords)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__AVX2__)
  return (Halfwords)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)x));
#else
  uint8_t found __attribute__((vector_size(STEP)));
  std::memcpy(&found, x, sizeof found);
  return __builtin_convertvector(found, Halfwords);
#endif
}

static inline Floats signed_floats(const int8_t* x) {
  return __builtin_convertvector((Integers)(widened((const uint8_t*)x) << 24) >> 24, Floats);
}

// The weights of a run of tokens for one row, as integers.
struct Weights {
  int32_t* pairs;  // of tokens that follow each other
  float unit = 0;
  float sum = 0;   // of the integers, times the unit

  // Whole vectors of numbers, which are read; the greatest of them is "most".
  void round(const float* x, int64_t count, float most) {
    constexpr float highest = MOST - 1;  // what is left of the last one may be added to it
    const float times = most > 0 ? highest / most : 0;
    Floats left = {};
    Integers total_of = {};
    unit = most / highest;
    for (int64_t i = 0; i < count; i += LANES) {
      const Floats wanted = load(x + i) * times + left;
      const Integers found = rounded(wanted);
      left = wanted - as_floats(found);
      total_of += found;
      store_shorts(pairs + i / 2, found);
    }
    sum = total(as_floats(total_of)) * unit;
  }
};

// Weighted sums over a run of tokens, a number of whole steps, added to what is there.
struct Mixing {
  const Levels& levels;
  const Weights* weights;
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
    constexpr int fields = 8 / width, together = std::min<int>(fields, vectors_of(M));
    constexpr float middle = 0.5f * (1 << width) - 0.5f;
    constexpr uint16_t mask = (1 << width) - 1;
    const int32_t* from[M];
    for (int64_t m = 0; m < M; m++) from[m] = weights[start + m].pairs;
    for (int64_t j = 0; j < count; j++, bytes += levels.stride) {
      for (int64_t t = 0; t < tokens; t += 64) __builtin_prefetch(bytes + levels.stride + t);
#pragma GCC unroll 2
      for (int field = 0; field < fields; field += together) {
        Integers found[together][M];
        for (int f = 0; f < together; f++)
          for (int64_t m = 0; m < M; m++) found[f][m] = Integers{};
        for (int64_t t = 0; t < tokens; t += STEP) {
          const Halfwords wide = halfwords(bytes + t);
          Integers u[together];
          for (int f = 0; f < together; f++) u[f] = (Integers)((wide >> (field + f) * width) & mask);
          for (int64_t m = 0; m < M; m++) {
            const Integers weight = load(from[m] + t / 2);
            for (int f = 0; f < together; f++) found[f][m] = add_products(found[f][m], weight, u[f]);
          }
        }
        for (int f = 0; f < together; f++)
          for (int64_t m = 0; m < M; m++) {
            const Weights& own = weights[start + m];
            to[m * rank + (field + f) * count + j] += total(as_floats(found[f][m])) * own.unit - middle * own.sum;
          }
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
    Floats found[M];
    for (Floats& sum : found) sum = Floats{};
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
  // tokens are shared out where there are few groups for all threads; long ones more often, since a thread may be slower
  int64_t shares() const {
    const int64_t each = (threads + groups - 1) / groups;
    return std::max(std::clamp<int64_t>(tokens / 256, 1, each), std::clamp<int64_t>(tokens / RUN, 1, 4 * each));
  }
  int64_t numbers() const { return groups * shares() * joint() * wide(); }

  // Sums of levels times gains and weights, for every share of the tokens.
  void add(const float* greatest, float* sums) const {
    const int64_t share = ((tokens + shares() - 1) / shares() + 63) / 64 * 64;
    Numbers scaled(RUN + STEP);
    Zeros<int32_t> pairs(joint() * HELD / 2);
    std::vector<Weights> rounded_weights(joint());
    for (int64_t m = 0; m < joint(); m++) rounded_weights[m].pairs = pairs.data() + m * HELD / 2;
    std::vector<uint8_t> held;
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < groups * shares(); part++) {
      const int64_t group = part / shares(), stop = std::min(tokens, (part % shares() + 1) * share);
      float* to = sums + part * joint() * wide();
      for (int64_t t = part % shares() * share, count; t < stop; t += count) {
        const bool full = stop - t >= STEP;
        count = full ? std::min(RUN, (stop - t) / STEP * STEP) : stop - t;
        const int64_t steps = full ? count : STEP;
        float gain[RUN] = {};
        for (int64_t i = 0; i < count; i++) gain[i] = factors.of[gains[group * levels.stride + t + i]];
        for (int64_t m = 0; m < joint(); m++) {
          const float* from = weights + (group * joint() + m) * stride + t;
          float few[STEP];
          if (!full) {
            std::fill_n(few, STEP, softmax ? -INFINITY : 0.0f);
            from = std::copy_n(from, count, few) - count;
          }
          Floats sum = {}, most = {};
          for (int64_t i = 0; i < steps; i += LANES) {
            Floats weight = load(from + i);
            if constexpr (softmax) weight = exponential(weight - greatest[group * joint() + m]);
            sum += weight;
            weight *= load(gain + i);
            const Floats size = weight > -weight ? weight : -weight;
            most = size > most ? size : most;
            store(scaled.data() + i, weight);
          }
          to[m * wide() + wide() - 1] += total(sum);
          rounded_weights[m].round(scaled.data(), steps, greatest_of(most));
        }
        Levels these = levels.of_group(group).from(t);
        if (!full) these = these.filled(count, STEP, held);
        in_blocks<ROWS>(joint(), Mixing{these, rounded_weights.data(), steps, to, wide()});
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
