// Scores from levels, as they lie in their bytes: two directions at a time, whose coefficients are 16-bit integers.

#pragma once

#include "turned_queries.h"

constexpr int64_t AHEAD = 128;  // tokens whose levels are called for before they are needed

// Directions two at a time: those of two bit fields of a byte, or of a row of bytes and one of the second half of the
// rows where a byte is one level.
struct PairsOfLevels {
  int64_t first[WIDTHS], rows[WIDTHS], pairs[WIDTHS];  // first direction; pairs that follow each other, how often
  int64_t count = 0;                                   // of all pairs
  int64_t limit;                                       // of integer coefficients, so that no sum overflows
  Numbers middles;                                     // of the levels of all directions

  explicit PairsOfLevels(const Levels& levels) : middles(whole(levels.rank())) {
    int64_t direction = 0, most = 0;
    for (int64_t k = 0; k < WIDTHS; k++) {
      const int64_t directions = levels.rows[k] << k, highest = (1 << (8 >> k)) - 1;
      first[k] = direction;
      rows[k] = k == 0 ? (levels.rows[0] + 1) / 2 : levels.rows[k];
      pairs[k] = k == 0 ? 1 : 1 << (k - 1);
      std::fill_n(middles.data() + direction, directions, 0.5f * highest);
      direction += directions;
      most += directions * highest;
      count += rows[k] * pairs[k];
    }
    limit = std::min(MOST, MOST_SUM / (most + most / 2 + 1));
  }
};

// What the levels of a tile are multiplied by for one row: coefficients as integers of 16 bits, times a unit.
struct Coded {
  float* coefficients;  // integers at first
  int32_t* pairs;
  float greatest, half;  // of the coefficients; their sum with levels in the middle
  float unit;
  int32_t middle;

  void scale(const Maps& maps, const PairsOfLevels& order) {
    Floats most = {}, sum = {};
    for (int64_t c = 0; c < maps.columns; c += LANES) {
      const Floats x = as_floats(load((const int32_t*)coefficients + c)) * load(maps.scales.data() + c);
      most = (x > -x ? x : -x) > most ? (x > -x ? x : -x) : most;
      sum += x * load(order.middles.data() + c);
      store(coefficients + c, x);
    }
    greatest = greatest_of(most);
    half = total(sum);
  }

  // In a loop of its own after scale(): what is read across two vectors has to have arrived in memory.
  void round(const PairsOfLevels& order, float factor) {
    const float times = greatest > 0 ? order.limit / greatest : 0;
    int32_t* to = pairs;
    for (int64_t k = 0; k < WIDTHS; k++)
      for (int64_t pair = 0; pair < order.pairs[k]; pair++, to += order.rows[k]) {
        const float *left = coefficients + order.first[k] + 2 * pair * order.rows[k], *right = left + order.rows[k];
        for (int64_t j = 0; j < order.rows[k]; j += LANES) {
          const Integers both = (rounded(load(left + j) * times) & 0xffff) | rounded(load(right + j) * times) << 16;
          std::memcpy(to + j, &both, sizeof both);
        }
      }
    unit = greatest > 0 ? factor / times : 0;
    middle = int32_t(half * times);
  }
};

// Scores of STEP tokens of one tile.
struct Scoring {
  const Levels& levels;
  const Coded* rows;
  const float* shifts;  // [rows, tile]
  int64_t tile;
  const float* gains;
  float* scores;
  int64_t stride;

  template <int64_t M>
  void at(int64_t start) const {
    constexpr int64_t vectors = vectors_of(M);
    for (int64_t t = 0; t < STEP; t += vectors * LANES) part<M, vectors>(start, t);
  }

  template <int64_t M, int64_t vectors>
  inline void part(int64_t start, int64_t first) const {
    Integers sums[M][vectors];
    const int32_t* from[M];
    for (int64_t m = 0; m < M; m++) {
      for (int64_t v = 0; v < vectors; v++) sums[m][v] = Integers{} - rows[start + m].middle;
      from[m] = rows[start + m].pairs;
    }
    add<8>(sums, levels.of[0] + first, levels.rows[0], from);
    add<4>(sums, levels.of[1] + first, levels.rows[1], from);
    add<2>(sums, levels.of[2] + first, levels.rows[2], from);
    add<1>(sums, levels.of[3] + first, levels.rows[3], from);
    for (int64_t m = 0; m < M; m++)
      for (int64_t v = 0; v < vectors; v++) {
        const int64_t t = first + v * LANES;
        store(scores + (start + m) * stride + t, as_floats(sums[m][v]) * (load(gains + t) * rows[start + m].unit) +
                                                     load(shifts + (start + m) * tile + t));
      }
  }

  template <int width, int64_t M, int64_t vectors>
  inline void add(Integers (&sums)[M][vectors], const uint8_t* bytes, int64_t count, const int32_t* (&from)[M]) const {
    constexpr int pairs = width == 8 ? 1 : 4 / width;
    constexpr uint32_t mask = ((1u << width) - 1) * 0x10001u;
    const int64_t rows = width == 8 ? (count + 1) / 2 : count;
    for (int64_t j = 0; j < rows; j++, bytes += levels.stride) {
      Words wide[vectors];
      __builtin_prefetch(bytes + AHEAD);
      for (int64_t v = 0; v < vectors; v++) wide[v] = widened(bytes + v * LANES);
      if (width == 8 && rows + j < count) {
        const uint8_t* second = bytes + rows * levels.stride;
        __builtin_prefetch(second + AHEAD);
        for (int64_t v = 0; v < vectors; v++) wide[v] |= widened(second + v * LANES) << 16;
      }
#pragma GCC unroll 4
      for (int pair = 0; pair < pairs; pair++) {
        Integers level[vectors];
        for (int64_t v = 0; v < vectors; v++) {
          const Words x = wide[v] >> (2 * width * pair % 32);
          level[v] = (Integers)(width == 8 ? x : (x | x << (16 - width)) & mask);
        }
        for (int64_t m = 0; m < M; m++) {
          const int32_t factors = from[m][pair * rows + j];
          for (int64_t v = 0; v < vectors; v++) sums[m][v] = add_products(sums[m][v], factors, level[v]);
        }
      }
    }
    for (int64_t m = 0; m < M; m++) from[m] += pairs * rows;
  }
};
