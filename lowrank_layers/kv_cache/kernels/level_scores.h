// Scores from levels: two directions at a time, whose coefficients are 16-bit integers.

#pragma once

#include "entry_pairs.h"

constexpr int64_t AHEAD = 128;  // tokens whose levels are called for before they are needed

// Directions two at a time: those of two bit fields of a byte, or of a row of bytes and one of the second half of the
// rows where a byte is one level.
struct PairsOfLevels {
  int64_t first[WIDTHS], rows[WIDTHS], pairs[WIDTHS];  // first direction; pairs that follow each other, how often
  int64_t count = 0;                                   // of all pairs
  int64_t limit;                                       // of integer coefficients, so that no sum overflows
  std::vector<int32_t> highest;                        // levels of every pair

  explicit PairsOfLevels(const Levels& levels) {
    int64_t direction = 0, most = 0;
    for (int64_t k = 0; k < WIDTHS; k++) {
      const int64_t directions = levels.rows[k] << k, last = (1 << (8 >> k)) - 1;
      first[k] = direction;
      rows[k] = k == 0 ? (levels.rows[0] + 1) / 2 : levels.rows[k];
      pairs[k] = k == 0 ? 1 : 1 << (k - 1);
      direction += directions;
      most += directions * last;
      count += rows[k] * pairs[k];
      // a row of bytes may have no second one
      for (int64_t pair = 0; pair < rows[k] * pairs[k]; pair++)
        highest.push_back(int32_t(last | (k == 0 && pair + rows[0] >= levels.rows[0] ? 0 : last << 16)));
    }
    highest.resize(count + LANES);
    limit = std::min(MOST, MOST_SUM / (most + most / 2 + 1));
  }
};

// What the levels of a tile are multiplied by for one row: coefficients as integers of 16 bits, times a unit.
struct Coded {
  const float* coefficients;
  int32_t* pairs;
  float unit;
  int32_t middle;  // the sum of products with levels in the middle

  // "greatest" is at least the greatest coefficient.
  void round(const PairsOfLevels& order, float greatest, float factor) {
    const float times = greatest > 0 ? order.limit / greatest : 0;
    int32_t* to = pairs;
    for (int64_t k = 0; k < WIDTHS; k++)
      for (int64_t pair = 0; pair < order.pairs[k]; pair++, to += order.rows[k]) {
        const float *left = coefficients + order.first[k] + 2 * pair * order.rows[k], *right = left + order.rows[k];
        for (int64_t j = 0; j < order.rows[k]; j += LANES) {
          // the last bits of a number that ROUND is added to are those of the integer
          const Integers both = ((Integers)(load(left + j) * times + ROUND) & 0xffff) |
                                (Integers)(load(right + j) * times + ROUND) << 16;
          std::memcpy(to + j, &both, sizeof both);
        }
      }
    Integers twice = {};
    for (int64_t j = 0; j < order.count; j += LANES)
      twice = add_products(twice, load(pairs + j), load(order.highest.data() + j));
    unit = greatest > 0 ? factor / times : 0;
    middle = total(twice) / 2;
  }

  // The scores of STEP tokens from the sums of products.
  void scores(const int32_t* sums, const float* gains, const float* shifts, float* to) const {
    for (int64_t t = 0; t < STEP; t += LANES)
      store(to + t, as_floats(load(sums + t) - middle) * (load(gains + t) * unit) + load(shifts + t));
  }
};

// The levels of STEP tokens, two directions in a number, [pairs of directions, STEP].
struct UnpackedLevels {
  const Levels& levels;
  int32_t* to;

  void read() {
    add<8>(levels.of[0], levels.rows[0]);
    add<4>(levels.of[1], levels.rows[1]);
    add<2>(levels.of[2], levels.rows[2]);
    add<1>(levels.of[3], levels.rows[3]);
  }

  template <int width>
  void add(const uint8_t* bytes, int64_t count) {
    constexpr int pairs = width == 8 ? 1 : 4 / width;
    constexpr uint32_t mask = ((1u << width) - 1) * 0x10001u;
    const int64_t rows = width == 8 ? (count + 1) / 2 : count;
    for (int64_t j = 0; j < rows; j++, bytes += levels.stride, to += STEP) {
      const uint8_t* second = width == 8 && rows + j < count ? bytes + rows * levels.stride : nullptr;
      __builtin_prefetch(bytes + AHEAD);
      if (second != nullptr) __builtin_prefetch(second + AHEAD);
      for (int64_t t = 0; t < STEP; t += LANES) {
        const Words wide = widened(bytes + t);
        if (width == 8) {
          store(to + t, (Integers)(second == nullptr ? wide : wide | widened(second + t) << 16));
          continue;
        }
#pragma GCC unroll 4
        for (int pair = 0; pair < pairs; pair++) {
          const Words x = wide >> (2 * width * pair % 32);
          store(to + pair * rows * STEP + t, (Integers)((x | x << (16 - width)) & mask));
        }
      }
    }
    to += (pairs - 1) * rows * STEP;
  }
};
