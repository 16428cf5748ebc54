// Entries of heads two at a time, and the basis and mean of keys in that order.

#pragma once

#include "integer_products.h"

// Which entries of a head are rotated together: the first and the second ones of all pairs, then those that stay. In
// this order queries, means and the rows of bases are read.
struct Pairs {
  const int64_t* entries;
  int64_t count, size;

  void read(const float* head, float* to) const {
    for (int64_t j = 0; j < size; j++) to[j] = head[entries[j]];
  }

  // A head is multiplied two entries at a time: those of a pair, then those that stay. Their number is even.
  int64_t halves() const { return (count + (size - 2 * count + 1) / 2 + 1) / 2 * 2; }
  // Indices of the two entries; the second one, or both, may be beyond the last.
  int64_t first(int64_t half) const { return half < count ? half : 2 * half; }
  int64_t second(int64_t half) const { return half < count ? count + half : 2 * half + 1; }

  // Queries q and a mean m as what the waves of a position p are multiplied by to give q^T R(p) m.
  void meet(const float* query, const float* mean, float* along) const {
    for (int64_t j = 0; j < count; j++) {
      along[j] = query[j] * mean[j] + query[count + j] * mean[count + j];
      along[count + j] = query[count + j] * mean[j] - query[j] * mean[count + j];
    }
    along[2 * count] = 0;
    for (int64_t j = 2 * count; j < size; j++) along[2 * count] += query[j] * mean[j];
  }

  // What meet() gives for R(-p) q in the place of q, by the waves of p.
  void shift(const float* along, const float* waves, float* to) const {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
      const Floats even = load(along + j), odd = load(along + count + j);
      const Floats cosine = load(waves + j), sine = load(waves + count + j);
      store(to + j, even * cosine + odd * sine);
      store(to + count + j, odd * cosine - even * sine);
    }
    for (; j < count; j++) {
      to[j] = along[j] * waves[j] + along[count + j] * waves[count + j];
      to[count + j] = along[count + j] * waves[j] - along[j] * waves[count + j];
    }
    to[2 * count] = along[2 * count];
  }
};

// The basis and mean of a group of heads: the basis times 2^7 with a column per level, and in a number the first entries
// of two halves, or the second ones. That of a direction with 3 bits comes twice: its first bit counts four times as much
// as those that follow.
struct Maps {
  Zeros<int32_t> pairs;  // [heads, steps of columns, halves, STEP]
  Numbers scales, mean;  // of columns; of entries
  std::vector<float> longest;  // norm of the longest column, by head
  int64_t halves = 0, columns = 0, group = -1;

  void read(const Pairs& paired, int64_t heads, const Levels& levels, int64_t own, const int8_t* bases,
            const float* all_scales, const float* means) {
    if (own == group) return;
    const int64_t size = paired.size, rank = levels.rank(), directions = levels.directions();
    const int64_t low = levels.low(), high = levels.high(), threes = levels.threes;
    group = own;
    halves = paired.halves();
    columns = steps(rank) * STEP;
    pairs.room(heads * halves * columns);
    scales.assign(columns);
    mean.assign(heads * size);
    longest.assign(heads, 0.0f);
    const float* own_scales = all_scales + own * directions;
    std::copy_n(own_scales, high, scales.data());
    for (int64_t i = 0; i < threes; i++) scales.data()[high + i] = 4 * own_scales[low + i];
    std::copy(own_scales + high, own_scales + directions, scales.data() + high + threes);
    const auto by_columns = [&](const int8_t* from, int8_t* to) {
      std::copy_n(from, high, to);
      std::copy_n(from + low, threes, to + high);
      std::copy(from + high, from + directions, to + high + threes);
    };
    std::vector<int8_t> four(4 * columns);  // rows of the basis, by columns: the first entries of two halves, the second
    std::vector<int32_t> squares(columns);
    for (int64_t h = 0; h < heads; h++) {
      const int64_t head = (own * heads + h) * size;
      std::fill(squares.begin(), squares.end(), 0);
      paired.read(means + head, mean.data() + h * size);
      for (int64_t k = 0; k < halves; k += 2) {
        const int64_t entries[] = {paired.first(k), paired.first(k + 1), paired.second(k), paired.second(k + 1)};
        for (int64_t i = 0; i < 4; i++) {
          int8_t* row = four.data() + i * columns;
          if (entries[i] < size) by_columns(bases + (head + paired.entries[entries[i]]) * directions, row);
          else std::fill_n(row, columns, 0);
        }
        for (int64_t half = 0; half < 2; half++) {
          const int8_t *left = four.data() + 2 * half * columns, *right = left + columns;
          int32_t* to = pairs.data() + h * halves * columns + (k + half) * STEP;
          for (int64_t c = 0; c < columns; c += STEP)
            for (int64_t i = 0; i < STEP; i++)
              to[c * halves + i] = (left[c + i] * 128 & 0xffff) | right[c + i] * 128 << 16;
          for (int64_t c = 0; c < columns; c++) squares[c] += left[c] * left[c] + right[c] * right[c];
        }
      }
      for (int32_t square : squares) longest[h] = std::max(longest[h], std::sqrt(float(square)));
    }
  }
};
