// Packed levels, and the vectors in which they are unpacked for several rows of products: they never go to memory so.
//
// Levels of w bits lie 8 / w to a byte: bit field p of byte row j holds direction p * rows + j. Tokens come last. A
// level u stands for u - (2^w - 1) / 2, times the gain of its token.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// numbers in a vector, and vectors that the processor holds
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4, REGISTERS = 32;
#else
constexpr int64_t LANES = 4, REGISTERS = 16;
#endif
constexpr int64_t STEP = 2 * LANES;  // tokens at a time
// rows of products at a time, at most; and those of which two vectors of sums each stay in registers
constexpr int64_t ROWS = 9, ROWS_OF_TWO = REGISTERS == 32 ? ROWS : 5;
constexpr int64_t vectors_of(int64_t rows) { return rows <= ROWS_OF_TWO ? 2 : 1; }

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

static inline int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }
static inline int64_t steps(int64_t count) { return (count + STEP - 1) / STEP; }

static inline Floats load(const float* x) {
  Floats found;
  std::memcpy(&found, x, sizeof found);
  return found;
}

static inline void store(float* x, Floats value) { std::memcpy(x, &value, sizeof value); }

static inline Words widened(const uint8_t* x) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)x));
#else
  Bytes found;
  std::memcpy(&found, x, sizeof found);
  return __builtin_convertvector(found, Words);
#endif
}

static inline float total(Floats x) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[LANES / 4], sum = {};
  std::memcpy(parts, &x, sizeof x);
  for (const Four& part : parts) sum += part;
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static inline Floats greater(Floats x, Floats y) { return x > y ? x : y; }

static inline Floats absolute(Floats x) { return (Floats)((Words)x & 0x7fffffff); }

static inline float greatest_of(Floats x) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[LANES / 4];
  std::memcpy(parts, &x, sizeof x);
  Four most = parts[0];
  for (const Four& part : parts) most = part > most ? part : most;
  return std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
}

static inline float maximum(const float* x, int64_t count) {
  float found = -INFINITY;
  int64_t i = 0;
  if (count >= LANES) {
    Floats most = load(x);
    for (i = LANES; i + LANES <= count; i += LANES) most = load(x + i) > most ? load(x + i) : most;
    found = greatest_of(most);
  }
  for (; i < count; i++) found = std::max(found, x[i]);
  return found;
}

static inline float product(const float* x, const float* y, int64_t count) {
  Floats sum = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) sum += load(x + i) * load(y + i);
  float found = total(sum);
  for (; i < count; i++) found += x[i] * y[i];
  return found;
}

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the last bits

// e^x for x <= 0 as 2^n e^r with |r| <= log(2) / 2: e^r to its 7th power, the integer n as bits of the exponent.
static inline Floats exponential(Floats x) {
  x = x > -87.0f ? x : Floats{} - 87.0f;
  const Floats rounded = x * 1.44269504f + ROUND, n = rounded - ROUND;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats found = r * (1 / 5040.0f) + 1 / 720.0f;
  for (float term : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) found = found * r + term;
  return (Floats)((Words)found + ((Words)rounded << 23));
}

// Zeros that begin at a cache line: a vector that lies across two is read in twice the time.
template <class Number>
class Zeros {
 public:
  explicit Zeros(int64_t count = 0) { assign(count); }
  void assign(int64_t count) { lines.assign((count + 15) / 16, Line{}); }
  // Room for so many, whatever they are.
  Number* room(int64_t count) {
    if (int64_t(lines.size()) * 16 < count) assign(count);
    return data();
  }
  Number* data() { return lines.empty() ? nullptr : lines.data()->of; }
  const Number* data() const { return lines.empty() ? nullptr : lines.data()->of; }

 private:
  struct alignas(64) Line {
    Number of[16] = {};
  };
  std::vector<Line> lines;
};

using Numbers = Zeros<float>;

constexpr int64_t WIDTHS = 4;  // of 8, 4, 2 and 1 bits
constexpr int64_t COUNTS = WIDTHS + 1;  // rows of bytes of each, and directions with 3 bits

struct Levels {
  const uint8_t* of[WIDTHS];
  int64_t rows[WIDTHS];  // rows of bytes
  int64_t threes;        // directions with 3 bits, in two planes
  int64_t stride;        // from one row of bytes to the next

  Levels(const uint8_t* const* parts, const int64_t* counts, int64_t tokens)
      : threes(counts[WIDTHS]), stride(tokens) {
    std::copy_n(parts, WIDTHS, of);
    std::copy_n(counts, WIDTHS, rows);
  }

  int64_t bytes() const { return rows[0] + rows[1] + rows[2] + rows[3]; }
  // levels as they are read, of which a direction with 3 bits has two: in the plane of 2 bits, and of 1 bit
  int64_t rank() const { return rows[0] + 2 * rows[1] + 4 * rows[2] + 8 * rows[3]; }
  int64_t directions() const { return rank() - threes; }
  int64_t low() const { return rows[0] + 2 * rows[1]; }
  int64_t high() const { return low() + 4 * rows[2]; }

  Levels from(int64_t token) const {
    Levels found = *this;
    for (auto& part : found.of) part += token;
    return found;
  }

  Levels of_group(int64_t group) const {
    Levels found = *this;
    for (int k = 0; k < WIDTHS; k++) found.of[k] += group * rows[k] * stride;
    return found;
  }

  // A copy of few tokens, filled up so that whole vectors can be read.
  Levels filled(int64_t tokens, int64_t up_to, std::vector<uint8_t>& held) const {
    held.assign(bytes() * up_to, 0);
    Levels found = *this;
    found.stride = up_to;
    uint8_t* to = held.data();
    for (int k = 0; k < WIDTHS; k++) {
      found.of[k] = to;
      for (int64_t j = 0; j < rows[k]; j++, to += up_to) std::memcpy(to, of[k] + j * stride, tokens);
    }
    return found;
  }
};

// As in bit_coefficients.py: gains per octave, and how far apart the first are that are tried.
constexpr int64_t PER_OCTAVE = 8, COARSE = 16;

struct Gains {
  float of[256];
  explicit Gains(int64_t least) {
    for (int64_t g = 0; g < 256; g++)
      of[g] = g < PER_OCTAVE ? float(std::exp2(double(least + g) / PER_OCTAVE)) : 2 * of[g - PER_OCTAVE];
  }
};

template <int64_t M, class Function>
static inline void call_with(int64_t rows, const Function& function, int64_t start) {
  if constexpr (M > 1)
    if (rows < M) return call_with<M - 1>(rows, function, start);
  function.template at<M>(start);
}

// Calls function.at<M>(start) for runs of rows, as few and as equal as M at most that given allows.
template <int64_t most, class Function>
static inline void in_blocks(int64_t rows, const Function& function) {
  const int64_t blocks = (rows + most - 1) / most;
  for (int64_t start = 0, left = blocks; left > 0; left--) {
    const int64_t here = (rows - start + left - 1) / left;
    call_with<most>(here, function, start);
    start += here;
  }
}
