// Sums of products of 16-bit integers, two of them per number of 32 bits: as exact as the integers are, and twice as
// many per instruction as of fp32.

#pragma once

#include "levels.h"

typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));

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

static inline Integers add_products(Integers sum, int32_t x, Integers y) { return add_products(sum, Integers{} + x, y); }
static inline Floats add_products(Floats sum, float x, Floats y) { return sum + x * y; }

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
  const Shorts narrow = __builtin_convertvector(x, Shorts);
  std::memcpy(to, &narrow, sizeof narrow);
}

// Products of rows ("from", inner numbers each) with a matrix of whole vectors of columns, to where a table says.
template <class Number>
struct Product {
  const Number* from;
  int64_t inner;
  const Number* matrix;
  int64_t columns;
  Number* to;
  const int64_t* places;  // of the rows, in "to"

  template <int64_t M>
  void at(int64_t start) const {
    constexpr int64_t vectors = vectors_of(M);
    int64_t c = 0;
    for (; c + vectors * LANES <= columns; c += vectors * LANES) part<M, vectors>(start, c);
    if (c < columns) part<M, 1>(start, c);
  }

  template <int64_t M, int64_t vectors>
  void part(int64_t start, int64_t c) const {
    typedef decltype(load(matrix)) Vector;
    Vector sums[M][vectors];
    for (int64_t m = 0; m < M; m++)
      for (int64_t v = 0; v < vectors; v++) sums[m][v] = Vector{};  // "= {}" of them all would write to memory
    for (int64_t k = 0; k < inner; k++)
      for (int64_t v = 0; v < vectors; v++) {
        const Vector column = load(matrix + k * columns + c + v * LANES);
        for (int64_t m = 0; m < M; m++) sums[m][v] = add_products(sums[m][v], from[(start + m) * inner + k], column);
      }
    for (int64_t m = 0; m < M; m++)
      for (int64_t v = 0; v < vectors; v++) store(to + places[start + m] * columns + c + v * LANES, sums[m][v]);
  }
};
