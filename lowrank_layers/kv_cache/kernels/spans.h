// Coefficients of a query in the frames of the tiles of a span, from what the tiles have in common.
//
// With Q the query turned back to the middle of the span, and B the basis, two rows per pair of entries, a tile at the
// offset d has the coefficients sum_j cos(w_j d) U_j + sin(w_j d) V_j with U = Q_1 B_1 + Q_2 B_2 and V = Q_2 B_1 - Q_1 B_2.
// The sums of cosines serve the tiles at d and at -d, and so do those of sines.

#pragma once

#include "entry_pairs.h"

// Cosines and sines of the tiles' centres, (i + 1/2) tiles from the middle of a span: as integers of 16 bits, two pairs of
// entries in a number, and those of all pairs at the farthest one.
struct SpanWaves {
  int64_t quarters;
  std::vector<int32_t> cosines, sines;  // [half of the span, quarters]
  std::vector<float> cosine, sine;      // [pairs]

  SpanWaves(const Pairs& paired, const float* offset_waves, int64_t tile, int64_t half)
      : quarters(paired.halves() / 2), cosines(half * quarters), sines(half * quarters), cosine(paired.count),
        sine(paired.count) {
    const auto put = [&](std::vector<int32_t>& to, int64_t i, int64_t k, double wave) {
      to[i * quarters + k / 2] |= (int32_t(std::lrint(wave * MOST)) & 0xffff) << k % 2 * 16;
    };
    for (int64_t k = 0; k < 2 * quarters; k++) {
      double c = 1, s = 0, step_c = 1, step_s = 0;
      if (k < paired.count) {
        const float *even = offset_waves + k * tile, *odd = even + paired.count * tile;
        // half a tile is what the last token is from the centre, and half a token
        c = double(even[tile - 1]) * even[tile / 2] - double(odd[tile - 1]) * odd[tile / 2];
        s = double(odd[tile - 1]) * even[tile / 2] + double(even[tile - 1]) * odd[tile / 2];
        step_c = c * c - s * s, step_s = 2 * s * c;
      }
      for (int64_t i = 0; i < half; i++) {
        put(cosines, i, k, c);
        put(sines, i, k, s);
        if (i == half - 1 && k < paired.count) cosine[k] = float(c), sine[k] = float(s);
        const double next = c * step_c - s * step_s;
        s = s * step_c + c * step_s, c = next;
      }
    }
  }
};

// A query that is turned back to the middle of a span.
struct TurnedQuery {
  const Pairs& paired;
  std::vector<int32_t> first, second;  // [halves / 2], the first entries of two halves in a number, and the second ones
  float unit = 0;                      // of the sums of U and V with waves

  explicit TurnedQuery(const Pairs& pairs) : paired(pairs), first(pairs.halves() / 2), second(pairs.halves() / 2) {}

  // From the waves of the first tile's centre.
  void turn(const float* query, const float* waves, const SpanWaves& span, float longest) {
    float most = 0, norm = 0;
    for (int64_t j = 0; j < paired.count; j++)
      most = std::max(most, query[j] * query[j] + query[paired.count + j] * query[paired.count + j]);
    for (int64_t j = 2 * paired.count; j < paired.size; j++) most = std::max(most, 2 * query[j] * query[j]);
    for (int64_t j = 0; j < paired.size; j++) norm += query[j] * query[j];
    most = std::sqrt(most), norm = std::sqrt(norm);
    // bounds of all U and V together, and of each; they are a 2^8th of the products, off by less than 3 per half
    float times = most > 0 ? (MOST - 1) / most : 0;
    const float sum = norm * times * longest / 256, each = MOST * 127 * 1.42f / 256;
    times *= std::min(1.0f, std::min((2 * MOST - 3 * paired.halves()) / sum, (MOST - 3) / each));
    unit = times > 0 ? 256 / (times * MOST) : 0;
    std::fill(first.begin(), first.end(), 0);
    std::fill(second.begin(), second.end(), 0);
    for (int64_t k = 0; k < paired.halves(); k++) {
      float x = 0, y = 0;
      if (k < paired.count) {
        const float q = query[k], r = query[paired.count + k], c = waves[k], s = waves[paired.count + k];
        const float cosine = c * span.cosine[k] - s * span.sine[k], sine = s * span.cosine[k] + c * span.sine[k];
        x = q * cosine + r * sine, y = r * cosine - q * sine;
      } else {
        if (paired.first(k) < paired.size) x = query[paired.first(k)];
        if (paired.second(k) < paired.size) y = query[paired.second(k)];
      }
      first[k / 2] |= (int32_t(std::lrint(x * times)) & 0xffff) << k % 2 * 16;
      second[k / 2] |= (int32_t(std::lrint(y * times)) & 0xffff) << k % 2 * 16;
    }
  }
};

// Coefficients of all tiles of a span for STEP columns of a basis.
struct SpanProducts {
  const SpanWaves& waves;
  const TurnedQuery& query;
  int64_t half;
  Zeros<int32_t> room;
  Floats most = {};  // of the coefficients' absolute values

  SpanProducts(const SpanWaves& span, const TurnedQuery& turned, int64_t half)
      : waves(span), query(turned), half(half), room((span.quarters + half) * 2 * STEP) {}

  // Columns of the basis [halves, STEP] give coefficients [2 half, columns], times the scales of the columns.
  void run(const int32_t* basis, const float* scales, float* to, int64_t columns) {
    int32_t *even = room.data(), *odd = even + waves.quarters * STEP;
    int32_t *cosines = odd + waves.quarters * STEP, *sines = cosines + half * STEP;
    for (int64_t k = 0; k < waves.quarters; k++)
      for (int64_t v = 0; v < STEP; v += LANES) {
        const Integers first = load(basis + 2 * k * STEP + v), second = load(basis + (2 * k + 1) * STEP + v);
        const Integers x = Integers{} + query.first[k], y = Integers{} + query.second[k];
        store(even + k * STEP + v, (Integers)(multiplied(x, first) + multiplied(y, second)));
        store(odd + k * STEP + v, (Integers)(multiplied(y, first) - multiplied(x, second)));
      }
    in_blocks<ROWS_OF_TWO>(half, Product{waves.cosines.data(), waves.quarters, waves.quarters, even, cosines});
    in_blocks<ROWS_OF_TWO>(half, Product{waves.sines.data(), waves.quarters, waves.quarters, odd, sines});
    for (int64_t i = 0; i < half; i++)
      for (int64_t v = 0; v < STEP; v += LANES) {
        const Integers c = load(cosines + i * STEP + v), s = load(sines + i * STEP + v);
        const Floats after = as_floats(c + s) * load(scales + v), before = as_floats(c - s) * load(scales + v);
        store(to + (half + i) * columns + v, after);
        store(to + (half - 1 - i) * columns + v, before);
        most = greater(most, greater(absolute(after), absolute(before)));
      }
  }
};
