// Queries in the frames of tiles, and what they are multiplied by there.

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

  // R(-p) q for the waves (cosines, sines, a one) of a position p, times a factor and as integers of 16 bits; and what the
  // waves of any offset d are multiplied by to give (R(-p) q)^T R(d) mean.
  void turn_back(const float* query, const float* waves, const float* mean, float times, int16_t* turned,
                 float* along) const {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) turn_back<Floats>(j, query, waves, mean, times, turned, along);
    for (; j < count; j++) turn_back<float>(j, query, waves, mean, times, turned, along);
    along[2 * count] = 0;
    for (j = 2 * count; j < size; j++) {
      along[2 * count] += query[j] * mean[j];
      store_rounded(turned + j, query[j] * times);
    }
  }

  template <class Number>
  void turn_back(int64_t j, const float* query, const float* waves, const float* mean, float times, int16_t* turned,
                 float* along) const {
    const auto read = [](const float* x) {
      Number found;
      std::memcpy(&found, x, sizeof found);
      return found;
    };
    const Number q = read(query + j), r = read(query + count + j);
    const Number cosine = read(waves + j), sine = read(waves + count + j);
    const Number first = q * cosine + r * sine, second = r * cosine - q * sine;
    const Number m = read(mean + j), n = read(mean + count + j);
    const Number even = first * m + second * n, odd = second * m - first * n;
    store_rounded(turned + j, first * times);
    store_rounded(turned + count + j, second * times);
    std::memcpy(along + j, &even, sizeof even);
    std::memcpy(along + count + j, &odd, sizeof odd);
  }

  // What no entry of a turned head exceeds.
  float most(const float* head) const {
    float found = 0;
    for (int64_t j = 0; j < size; j++) found = std::max(found, std::abs(head[j]));
    return 1.41421357f * found;
  }
};

// The basis and mean of a group of heads: the basis with two entries of a head in a number, and a column per level.
// That of a direction with 3 bits comes twice: its first bit counts four times as much as those that follow.
struct Maps {
  Zeros<int32_t> pairs;  // [heads, steps of columns, halves, STEP]
  Numbers scales, mean;  // of columns; of entries
  int64_t halves = 0, columns = 0, group = -1;

  void read(const Pairs& paired, int64_t heads, const Levels& levels, int64_t own, const int8_t* bases,
            const float* all_scales, const float* means) {
    if (own == group) return;
    const int64_t size = paired.size, rank = levels.rank(), directions = levels.directions();
    const int64_t low = levels.low(), high = levels.high(), threes = levels.threes;
    group = own;
    halves = whole(size) / 2;
    columns = steps(rank) * STEP;
    pairs.assign(heads * halves * columns);
    scales.assign(columns);
    mean.assign(heads * size);
    const float* own_scales = all_scales + own * directions;
    std::copy_n(own_scales, high, scales.data());
    for (int64_t i = 0; i < threes; i++) scales.data()[high + i] = 4 * own_scales[low + i];
    std::copy(own_scales + high, own_scales + directions, scales.data() + high + threes);
    std::vector<int8_t> two(2 * columns);  // rows of the basis, by columns
    int8_t *left = two.data(), *right = left + columns;
    const auto by_columns = [&](const int8_t* from, int8_t* to) {
      std::copy_n(from, high, to);
      std::copy_n(from + low, threes, to + high);
      std::copy(from + high, from + directions, to + high + threes);
    };
    for (int64_t h = 0; h < heads; h++) {
      const int64_t head = (own * heads + h) * size;
      paired.read(means + head, mean.data() + h * size);
      for (int64_t k = 0; k < size; k += 2) {
        by_columns(bases + (head + paired.entries[k]) * directions, left);
        if (k + 1 < size)
          by_columns(bases + (head + paired.entries[k + 1]) * directions, right);
        else
          std::fill_n(right, columns, 0);
        int32_t* to = pairs.data() + h * halves * columns + k / 2 * STEP;
        for (int64_t c = 0; c < columns; c += STEP)
          for (int64_t i = 0; i < STEP; i++) to[c * halves + i] = (left[c + i] & 0xffff) | int32_t(right[c + i]) << 16;
      }
    }
  }
};
