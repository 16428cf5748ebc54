// Sums of products of 16-bit integers, two of them per number of 32 bits: as exact as the integers are, and twice as
// many per instruction as of fp32.

#pragma once

#include "levels.h"

typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));  // two per number

constexpr int64_t MOST = 32767;         // the greatest integer of 16 bits
constexpr int64_t MOST_SUM = INT32_MAX;  // the greatest sum

// sum + x y for the lower and for the upper halves of all numbers.
static inline Integers add_products(Integers sum, Integers x, Integers y) {
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)y);
#elif defined(__AVX512F__)
  return sum + (Integers)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return sum + (Integers)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#else
  return sum + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// x y / 2^15, rounded, for the lower and for the upper halves of all numbers.
static inline Shorts multiplied(Integers x, Integers y) {
#if defined(__AVX512BW__)
  return (Shorts)_mm512_mulhrs_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (Shorts)_mm256_mulhrs_epi16((__m256i)x, (__m256i)y);
#else
  const Integers low = ((x << 16 >> 16) * (y << 16 >> 16) + 16384) >> 15, high = ((x >> 16) * (y >> 16) + 16384) >> 15;
  return (Shorts)((low & 0xffff) | high << 16);
#endif
}

static inline Integers load(const int32_t* x) {
  Integers found;
  std::memcpy(&found, x, sizeof found);
  return found;
}

static inline void store(int32_t* x, Integers value) { std::memcpy(x, &value, sizeof value); }

static inline Floats as_floats(Integers x) { return __builtin_convertvector(x, Floats); }

static inline int32_t total(Integers x) {
  typedef int32_t Four __attribute__((vector_size(16)));
  Four parts[LANES / 4], sum = {};
  std::memcpy(parts, &x, sizeof x);
  for (const Four& part : parts) sum += part;
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The closest integers, for |x| <= MOST.
static inline Integers rounded(Floats x) {
  const Floats moved = x + ROUND;
  return (Integers)moved - 0x4b400000;
}

// Writes LANES integers as 16 bits each.
static inline void store_shorts(int32_t* to, Integers x) {
  typedef int16_t Narrow __attribute__((vector_size(2 * LANES)));
  const Narrow narrow = __builtin_convertvector(x, Narrow);
  std::memcpy(to, &narrow, sizeof narrow);
}

static inline Floats reversed(Floats x) {
  Floats found;
  for (int64_t i = 0; i < LANES; i++) found[i] = x[LANES - 1 - i];
  return found;
}

// Products of rows (pairs of integers) with STEP columns of a matrix: so many rows at a time that their sums stay in
// registers.
struct Product {
  const int32_t* from;
  int64_t stride, inner;  // of rows: from one to the next, and how many pairs they have
  const int32_t* matrix;  // [inner, STEP]
  int32_t* to;            // [rows, STEP]

  template <int64_t M>
  void at(int64_t start) const {
    Integers sums[M][2];
    for (int64_t m = 0; m < M; m++) sums[m][0] = sums[m][1] = Integers{};  // "= {}" of them all would write to memory
    for (int64_t k = 0; k < inner; k++) {
      const Integers left = load(matrix + k * STEP), right = load(matrix + k * STEP + LANES);
      for (int64_t m = 0; m < M; m++) {
        const Integers row = Integers{} + from[(start + m) * stride + k];
        sums[m][0] = add_products(sums[m][0], row, left);
        sums[m][1] = add_products(sums[m][1], row, right);
      }
    }
    for (int64_t m = 0; m < M; m++)
      for (int64_t v = 0; v < 2; v++) store(to + (start + m) * STEP + v * LANES, sums[m][v]);
  }
};

// Products of rows with the waves of offsets about a centre. Cosines are even in the offset and sines odd: the sums over
// each give those of two offsets.
struct ProductWithWaves {
  const float* from;   // [rows, 2 pairs + 1]
  int64_t pairs;
  const float* waves;  // [2 pairs + 1, tile], from the first offset to the last; the last row is of ones
  int64_t tile;        // a multiple of 32
  float* to;           // [rows, tile]

  static constexpr int64_t VECTORS = LANES == 16 ? 1 : 2;

  template <int64_t M>
  void at(int64_t start) const {
    const int64_t half = tile / 2;
    for (int64_t c = 0; c < half; c += VECTORS * LANES) {
      Floats even[M][VECTORS], odd[M][VECTORS];
      for (int64_t m = 0; m < M; m++)
        for (int64_t v = 0; v < VECTORS; v++) {
          even[m][v] = Floats{} + from[(start + m) * (2 * pairs + 1) + 2 * pairs];
          odd[m][v] = Floats{};
        }
      add<M>(even, start, 0, half + c);
      add<M>(odd, start, pairs, half + c);
      for (int64_t m = 0; m < M; m++)
        for (int64_t v = 0; v < VECTORS; v++) {
          float* centre = to + (start + m) * tile + half;
          store(centre + c + v * LANES, even[m][v] + odd[m][v]);
          store(centre - c - (v + 1) * LANES, reversed(even[m][v] - odd[m][v]));
        }
    }
  }

  template <int64_t M>
  void add(Floats (&sums)[M][VECTORS], int64_t start, int64_t first, int64_t column) const {
    for (int64_t k = first; k < first + pairs; k++)
      for (int64_t v = 0; v < VECTORS; v++) {
        const Floats wave = load(waves + k * tile + column + v * LANES);
        for (int64_t m = 0; m < M; m++) sums[m][v] += from[(start + m) * (2 * pairs + 1) + k] * wave;
      }
  }
};
