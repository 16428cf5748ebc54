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

  // R(-p) q for the waves (cosines, sines, a one) of a position p; and what the waves of any offset d are multiplied by
  // to give (R(-p) q)^T R(d) mean.
  void turn_back(const float* query, const float* waves, const float* mean, float* turned, float* along) const {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) turn_back<Floats>(j, query, waves, mean, turned, along);
    for (; j < count; j++) turn_back<float>(j, query, waves, mean, turned, along);
    along[2 * count] = 0;
    for (j = 2 * count; j < size; j++) along[2 * count] += (turned[j] = query[j]) * mean[j];
  }

  template <class Number>
  void turn_back(int64_t j, const float* query, const float* waves, const float* mean, float* turned,
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
    std::memcpy(turned + j, &first, sizeof first);
    std::memcpy(turned + count + j, &second, sizeof second);
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

// The basis and mean of a group of heads: the basis with two entries of a head in a number, and with a column per level.
// That of a direction with 3 bits comes twice: its first bit counts four times as much as those that follow.
struct Maps {
  Zeros<int32_t> pairs;  // [heads, halves, columns]
  Numbers scales, mean;  // of columns; of entries
  int64_t halves = 0, columns = 0, group = -1;

  void read(const Pairs& paired, int64_t heads, const Levels& levels, int64_t own, const int8_t* bases,
            const float* all_scales, const float* means) {
    if (own == group) return;
    const int64_t size = paired.size, rank = levels.rank(), directions = levels.directions();
    const int64_t low = levels.low(), high = levels.high(), threes = levels.threes;
    group = own;
    halves = whole(size) / 2;
    columns = whole(rank);
    pairs.assign(heads * halves * columns);
    scales.assign(columns);
    mean.assign(heads * size);
    const float* own_scales = all_scales + own * directions;
    std::copy_n(own_scales, high, scales.data());
    for (int64_t i = 0; i < threes; i++) scales.data()[high + i] = 4 * own_scales[low + i];
    std::copy(own_scales + high, own_scales + directions, scales.data() + high + threes);
    for (int64_t h = 0; h < heads; h++) {
      const int64_t head = (own * heads + h) * size;
      paired.read(means + head, mean.data() + h * size);
      for (int64_t k = 0; k < size; k++) {
        const int8_t* from = bases + (head + paired.entries[k]) * directions;
        int32_t* to = pairs.data() + (h * halves + k / 2) * columns;
        const auto add = [&](const int8_t* from, int64_t first, int64_t stop) {
          if (k % 2)
            for (int64_t c = first; c < stop; c++) to[c] |= int32_t(from[c - first]) << 16;
          else
            for (int64_t c = first; c < stop; c++) to[c] = int32_t(from[c - first]) & 0xffff;
        };
        add(from, 0, high);
        add(from + low, high, high + threes);
        add(from + high, high + threes, rank);
      }
    }
  }
};
