// Coefficients as packed levels and gains: for every token the gain of least error is found among all. What
// BitCoefficients.encode says in operations of torch is said here for STEP tokens at a time, which stay in the L1 cache.

#pragma once

#include "levels.h"

struct Parts {
  uint8_t* of[WIDTHS];
  int64_t rows[WIDTHS];  // rows of bytes
  int64_t threes;        // directions with 3 bits
  uint8_t* gains;
  int64_t stride;  // from one row of bytes to the next

  Parts(uint8_t* const* parts, const int64_t* counts, int64_t group, int64_t pitch)
      : threes(counts[WIDTHS]), stride(pitch) {
    std::copy_n(counts, WIDTHS, rows);
    for (int k = 0; k < WIDTHS; k++) of[k] = parts[k] + group * rows[k] * pitch;
    gains = parts[WIDTHS] + group * pitch;
  }
};

template <int width>
static inline Floats closest(Floats scaled) {
  const Floats zero = {}, highest = zero + float((1 << width) - 1);
  scaled = scaled < zero ? zero : scaled;
  return (scaled > highest ? highest : scaled) + ROUND;
}

// STEP tokens of a group: their coefficients, [rank, STEP].
struct Tokens {
  float* values;
  const float* weights;  // of the directions' errors

  // The errors of the directions of one width, from the first one on, in units of squared gains.
  template <int width>
  inline void add(Floats (&errors)[2], int64_t first, int64_t count, const Floats (&inverse)[2]) const {
    constexpr float middle = 0.5f * (1 << width) - 0.5f;
    for (int64_t i = first; i < first + count; i++)
      for (int half = 0; half < 2; half++) {
        const Floats scaled = load(values + i * STEP + half * LANES) * inverse[half] + middle;
        const Floats off = scaled - (closest<width>(scaled) - ROUND);
        errors[half] += weights[i] * off * off;
      }
  }

  void errors(const Parts& parts, const Floats (&gains)[2], Floats (&found)[2]) const {
    const Floats zero = {}, inverse[2] = {1.0f / gains[0], 1.0f / gains[1]};
    const int64_t threes = parts.threes, four = 2 * parts.rows[1], two = 4 * parts.rows[2] - threes;
    int64_t first = 0;
    found[0] = found[1] = zero;
    add<8>(found, first, parts.rows[0], inverse);
    add<4>(found, first += parts.rows[0], four, inverse);
    add<3>(found, first += four, threes, inverse);
    add<2>(found, first += threes, two, inverse);
    add<1>(found, first += two, 8 * parts.rows[3] - threes, inverse);
    for (int half = 0; half < 2; half++) found[half] *= gains[half] * gains[half];
  }

  // Gains far apart are tried, and then those half as far from the best; of equal ones the least is taken.
  void best(const Parts& parts, const Gains& factors, int64_t count, int64_t (&found)[STEP]) const {
    float least[STEP];
    const auto attempt = [&](const int64_t (&gains)[STEP]) {
      float tried[STEP], errors_of[STEP];
      for (int64_t t = 0; t < STEP; t++) tried[t] = factors.of[gains[t]];
      Floats each[2];
      errors(parts, {load(tried), load(tried + LANES)}, each);
      store(errors_of, each[0]);
      store(errors_of + LANES, each[1]);
      for (int64_t t = 0; t < STEP; t++) {
        const bool better = errors_of[t] < least[t] || (errors_of[t] == least[t] && gains[t] < found[t]);
        least[t] = better ? errors_of[t] : least[t];
        found[t] = better ? gains[t] : found[t];
      }
    };
    std::fill_n(least, STEP, INFINITY);
    std::fill_n(found, STEP, 0);
    int64_t gains[STEP];
    for (int64_t gain = 0; gain < count; gain += COARSE) {
      std::fill_n(gains, STEP, gain);
      attempt(gains);
    }
    for (int64_t apart = COARSE / 2; apart > 0; apart /= 2) {
      int64_t held[STEP];
      std::copy_n(found, STEP, held);
      for (const int64_t off : {-apart, apart}) {
        for (int64_t t = 0; t < STEP; t++) gains[t] = std::clamp<int64_t>(held[t] + off, 0, count - 1);
        attempt(gains);
      }
    }
  }

  // The closest level of a coefficient, in whose place the one is left that it stands for.
  template <int width>
  static inline Words coded(float* value, Floats gain, bool leave) {
    constexpr float middle = 0.5f * (1 << width) - 0.5f;
    const Floats level = closest<width>(load(value) * (1.0f / gain) + middle);
    if (leave) store(value, (level - ROUND - middle) * gain);
    return (Words)level;
  }

  // Writes the levels of one plane, of which the first "threes" are parts of those of 3 bits: the last two bits, or the
  // first one, which is written after them.
  template <int width>
  inline void pack(uint8_t* to, int64_t stride, int64_t first, int64_t count, int64_t threes, int64_t apart,
                   const Floats (&gains)[2], int64_t tokens) const {
    for (int64_t j = 0; j < count; j++, to += stride) {
      uint8_t bytes[STEP];
      for (int half = 0; half < 2; half++) {
        Words whole = {};
#pragma GCC unroll 8
        for (int field = 0; field < 8 / width; field++) {
          const int64_t at = field * count + j;
          const bool of_three = width < 3 && at < threes;
          float* value = values + (first + at + (of_three ? 0 : apart)) * STEP + half * LANES;
          Words level;
          if (of_three)
            level = coded<3>(value, gains[half], width == 1) >> (width == 1 ? 2 : 0);
          else
            level = coded<width>(value, gains[half], true);
          whole |= (level & ((1u << width) - 1)) << (field * width);
        }
        const Bytes narrow = __builtin_convertvector(whole, Bytes);
        std::memcpy(bytes + half * LANES, &narrow, LANES);
      }
      std::memcpy(to, bytes, tokens);
    }
  }

  void code(const Parts& parts, const Gains& factors, int64_t gains, int64_t start, int64_t tokens) const {
    int64_t chosen[STEP];
    best(parts, factors, gains, chosen);
    float held[STEP];
    for (int64_t t = 0; t < STEP; t++) held[t] = factors.of[chosen[t]];
    for (int64_t t = 0; t < tokens; t++) parts.gains[start + t] = chosen[t];
    const Floats own[2] = {load(held), load(held + LANES)};
    const int64_t *rows = parts.rows, threes = parts.threes, low = rows[0] + 2 * rows[1], two = 4 * rows[2] - threes;
    pack<8>(parts.of[0] + start, parts.stride, 0, rows[0], 0, 0, own, tokens);
    pack<4>(parts.of[1] + start, parts.stride, rows[0], rows[1], 0, 0, own, tokens);
    pack<2>(parts.of[2] + start, parts.stride, low, rows[2], threes, 0, own, tokens);
    pack<1>(parts.of[3] + start, parts.stride, low, rows[3], threes, two, own, tokens);
  }
};
