// One decoding step over packed levels: scores of keys in the frames of their tiles, and weighted sums of values.
// compressed_tokens.py says the same in operations of torch.
//
// Levels of w bits lie 8 / w to a byte: bit field p of byte row j holds direction p * rows + j. Tokens come last. A level u
// stands for u - (2^w - 1) / 2, times the gain of its token. Bytes are widened to vectors of fp32 in registers and used
// there for several rows of products, so that the levels never go to memory unpacked.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// numbers in a vector, and rows of products at a time: two accumulators for each stay in registers
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, ROWS = 9;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, ROWS = 5;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4, ROWS = 9;
#else
constexpr int64_t LANES = 4, ROWS = 5;
#endif
constexpr int64_t STEP = 2 * LANES;  // tokens at a time
constexpr int64_t AHEAD = 256;       // tokens whose levels are called for before they are needed
constexpr int64_t RUN = 1024;        // tokens whose weights stay in the L1 cache
constexpr int64_t WEIGHTS = RUN + LANES;  // not a power of two, so that rows of weights do not share cache sets

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

static inline int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

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

static inline Floats signed_floats(const int8_t* x) {
  return __builtin_convertvector((Integers)(widened((const uint8_t*)x) << 24) >> 24, Floats);
}

static inline float total(Floats x) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[LANES / 4], sum = {};
  std::memcpy(parts, &x, sizeof x);
  for (const Four& part : parts) sum += part;
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Zeros that begin at a cache line: a vector that lies across two is read in twice the time.
class Numbers {
 public:
  explicit Numbers(int64_t count = 0) { assign(count); }
  void assign(int64_t count) { lines.assign((count + 15) / 16, Line{}); }
  float* data() { return lines.empty() ? nullptr : lines.data()->of; }

 private:
  struct alignas(64) Line {
    float of[16] = {};
  };
  std::vector<Line> lines;
};

// The bits of a level u as the leading bits of a mantissa make 2^w + u without a conversion.
template <int width>
static inline Floats level(Words bytes, int field) {
  constexpr uint32_t mask = ((1u << width) - 1) << (23 - width), exponent = (127u + width) << 23;
  constexpr float middle = 1.5f * (1 << width) - 0.5f;
  return (Floats)(((bytes << (23 - width - width * field)) & mask) | exponent) - middle;
}

struct Levels {
  const uint8_t* of[3];  // of 8, 4 and 2 bits
  int64_t rows[3];       // rows of bytes
  int64_t stride;        // from one row of bytes to the next

  int64_t rank() const { return rows[0] + 2 * rows[1] + 4 * rows[2]; }

  Levels from(int64_t token) const {
    Levels found = *this;
    for (auto& part : found.of) part += token;
    return found;
  }

  Levels of_group(int64_t group) const {
    Levels found = *this;
    for (int k = 0; k < 3; k++) found.of[k] += group * rows[k] * stride;
    return found;
  }

  // A copy of few tokens, filled up so that whole vectors can be read.
  Levels filled(int64_t tokens, int64_t up_to, std::vector<uint8_t>& held) const {
    held.assign((rows[0] + rows[1] + rows[2]) * up_to, 0);
    Levels found = *this;
    found.stride = up_to;
    uint8_t* to = held.data();
    for (int k = 0; k < 3; k++) {
      found.of[k] = to;
      for (int64_t j = 0; j < rows[k]; j++, to += up_to) std::memcpy(to, of[k] + j * stride, tokens);
    }
    return found;
  }
};

struct Gains {
  float of[256];
  explicit Gains(int64_t least) {
    for (int64_t g = 0; g < 256; g++) of[g] = std::exp2(0.5f * float(least + g));
  }
};

// Calls function.template at<M>(start) for runs of at most ROWS of a number of rows.
template <int64_t M, class Function>
static inline void in_blocks(int64_t rows, const Function& function, int64_t start = 0) {
  for (; rows - start >= M; start += M) function.template at<M>(start);
  if constexpr (M > 1) in_blocks<(M + 1) / 2>(rows, function, start);
}

// Which entries of a head are rotated together: the first and the second ones of all pairs, then those that stay. In
// this order queries, means and the rows of bases are read.
struct Pairs {
  const int64_t* entries;
  int64_t count, size;

  void read(const float* head, float* to) const {
    for (int64_t j = 0; j < size; j++) to[j] = head[entries[j]];
  }

  // R(-p) q for the waves (cosines, sines, a one) of a position p.
  void turn_back(const float* query, const float* waves, float* to) const {
    const float *first = query, *second = query + count, *cosines = waves, *sines = waves + count;
    for (int64_t j = 0; j < count; j++) to[j] = first[j] * cosines[j] + second[j] * sines[j];
    for (int64_t j = 0; j < count; j++) to[count + j] = second[j] * cosines[j] - first[j] * sines[j];
    for (int64_t j = 2 * count; j < size; j++) to[j] = query[j];
  }

  // What the waves of any position p are multiplied by to give (R(-p) q)^T mean.
  void along(const float* query, const float* mean, float* to) const {
    const float *first = mean, *second = mean + count, *q = query, *r = query + count;
    for (int64_t j = 0; j < count; j++) to[j] = q[j] * first[j] + r[j] * second[j];
    for (int64_t j = 0; j < count; j++) to[count + j] = r[j] * first[j] - q[j] * second[j];
    to[2 * count] = 0;
    for (int64_t j = 2 * count; j < size; j++) to[2 * count] += query[j] * mean[j];
  }
};

// The basis and mean of a group of heads: the basis as numbers, with its scale, and columns of zeros up to whole vectors.
struct Maps {
  Numbers columns_of, mean;
  int64_t columns = 0, group = -1;

  void read(const Pairs& pairs, int64_t heads, int64_t rank, int64_t own, const int8_t* bases, const float* scales,
            const float* means) {
    if (own == group) return;
    const int64_t size = pairs.size;
    group = own;
    columns = whole(rank);
    columns_of.assign(heads * size * columns);
    mean.assign(heads * size);
    for (int64_t h = 0; h < heads; h++) {
      const int64_t head = (own * heads + h) * size;
      pairs.read(means + head, mean.data() + h * size);
      for (int64_t k = 0; k < size; k++) {
        const int8_t* from = bases + (head + pairs.entries[k]) * rank;
        float* to = columns_of.data() + (h * size + k) * columns;
        for (int64_t j = 0; j < rank; j++) to[j] = float(from[j]) * scales[own * rank + j];
      }
    }
  }
};

// Products of rows ("from", inner numbers each) with a matrix of whole vectors of columns, to where a table says.
struct Product {
  const float* from;
  int64_t inner;
  const float* matrix;
  int64_t columns;
  float* const* to;
  int64_t shift;

  template <int64_t M>
  void at(int64_t start) const {
    int64_t c = 0;
    for (; c + STEP <= columns; c += STEP) part<M, 2>(start, c);
    if (c < columns) part<M, 1>(start, c);
  }

  template <int64_t M, int vectors>
  void part(int64_t start, int64_t c) const {
    Floats sums[M][vectors] = {};
    for (int64_t k = 0; k < inner; k++)
      for (int v = 0; v < vectors; v++) {
        const Floats column = load(matrix + k * columns + c + v * LANES);
        for (int64_t m = 0; m < M; m++) sums[m][v] += from[(start + m) * inner + k] * column;
      }
    for (int64_t m = 0; m < M; m++)
      for (int v = 0; v < vectors; v++) store(to[start + m] + shift + c + v * LANES, sums[m][v]);
  }
};

// Scores of STEP tokens of one tile.
struct Scoring {
  const Levels& levels;
  const float* rows;
  const float* shifts;
  int64_t columns;
  const float* gains;
  float* scores;
  int64_t stride;

  template <int64_t M>
  void at(int64_t start) const {
    Floats sums[M][2] = {};
    const float* from = rows + start * columns;
    add<8>(sums, levels.of[0], levels.rows[0], from);
    add<4>(sums, levels.of[1], levels.rows[1], from + levels.rows[0]);
    add<2>(sums, levels.of[2], levels.rows[2], from + levels.rows[0] + 2 * levels.rows[1]);
    for (int64_t m = 0; m < M; m++)
      for (int64_t half = 0; half < 2; half++) {
        const int64_t t = half * LANES;
        store(scores + (start + m) * stride + t,
              sums[m][half] * load(gains + t) + load(shifts + (start + m) * columns + t));
      }
  }

  template <int width, int64_t M>
  inline void add(Floats (&sums)[M][2], const uint8_t* bytes, int64_t count, const float* from) const {
    for (int64_t j = 0; j < count; j++, bytes += levels.stride) {
      __builtin_prefetch(bytes + AHEAD);
      const Words left = widened(bytes), right = widened(bytes + LANES);
#pragma GCC unroll 4
      for (int field = 0; field < 8 / width; field++) {
        const Floats u = level<width>(left, field), v = level<width>(right, field);
        for (int64_t m = 0; m < M; m++) {
          const float factor = from[m * columns + field * count + j];
          sums[m][0] += factor * u;
          sums[m][1] += factor * v;
        }
      }
    }
  }
};

extern "C" void tile_scores(
    const float* queries,         // [groups, heads, rows, size]
    const int64_t* entries,       // [size], see Pairs
    const float* waves,           // [tiles, 2 pairs + 1], of the tiles' centres
    const float* offset_waves,    // [2 pairs + 1, tile], of the tokens about them
    const int8_t* basis,          // [bases, heads * size, rank]
    const float* scale,           // [bases, rank]
    const float* mean,            // [bases, heads * size]
    const uint8_t* const* parts,  // levels of 8, 4 and 2 bits [groups, rows of bytes, tokens], gains [groups, tokens]
    float* scores,                // [groups, heads * rows, tokens]
    int64_t rows8, int64_t rows4, int64_t rows2, int64_t groups, int64_t bases, int64_t heads, int64_t rows,
    int64_t size, int64_t pairs, int64_t tokens, int64_t tile, int64_t least_gain, int64_t threads) {
  const Levels all = {{parts[0], parts[1], parts[2]}, {rows8, rows4, rows2}, tokens};
  const Gains factors(least_gain);
  const Pairs paired = {entries, pairs, size};
  const int64_t rank = all.rank(), inner = 2 * pairs + 1, joint = heads * rows, tiles = (tokens + tile - 1) / tile;
  const int64_t at_once = std::max<int64_t>(1, ROWS / rows), chunks = (tiles + at_once - 1) / at_once;
  const int64_t columns = tile + whole(rank);  // shifts of the tile's tokens, then directions
#pragma omp parallel num_threads(threads)
  {
    Numbers query(size), turned(at_once * rows * size), along(at_once * rows * inner), last(joint * STEP);
    Numbers formed(at_once * joint * columns);
    std::vector<float*> to(at_once * rows);
    std::vector<uint8_t> held;
    Maps maps;
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < groups * chunks; chunk++) {
      const int64_t group = chunk / chunks, first = chunk % chunks * at_once, count = std::min(at_once, tiles - first);
      maps.read(paired, heads, rank, group % bases, basis, scale, mean);
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t r = 0; r < rows; r++) {
          paired.read(queries + ((group * heads + h) * rows + r) * size, query.data());
          for (int64_t i = 0; i < count; i++) {
            const int64_t k = i * rows + r;
            paired.turn_back(query.data(), waves + (first + i) * inner, turned.data() + k * size);
            paired.along(turned.data() + k * size, maps.mean.data() + h * size, along.data() + k * inner);
            to[k] = formed.data() + (i * joint + h * rows + r) * columns;
          }
        }
        in_blocks<ROWS>(count * rows, Product{along.data(), inner, offset_waves, tile, to.data(), 0});
        const float* map = maps.columns_of.data() + h * size * maps.columns;
        in_blocks<ROWS>(count * rows, Product{turned.data(), size, map, maps.columns, to.data(), tile});
      }
      const int64_t stop = std::min(tokens, (first + count) * tile);
      for (int64_t t = first * tile; t < stop; t += STEP) {
        const int64_t here = std::min(STEP, stop - t);
        const bool full = here == STEP;
        float gains[STEP] = {};
        for (int64_t i = 0; i < here; i++) gains[i] = factors.of[parts[3][group * tokens + t + i]];
        Levels levels = all.of_group(group).from(t);
        if (!full) levels = levels.filled(here, STEP, held);
        const float* base = formed.data() + (t / tile - first) * joint * columns;
        float* out = scores + group * joint * tokens + t;
        in_blocks<ROWS>(joint, Scoring{levels, base + tile, base + t % tile, columns, gains,
                                       full ? out : last.data(), full ? tokens : STEP});
        for (int64_t m = 0; m < joint && !full; m++) std::copy_n(last.data() + m * STEP, here, out + m * tokens);
      }
    }
  }
}

// Weighted sums over a run of tokens, added to what is there.
struct Mixing {
  const Levels& levels;
  const float* weights;
  int64_t tokens;
  float* sums;
  int64_t rank;

  template <int64_t M>
  void at(int64_t start) const {
    float* to = sums + start * rank;
    add<8, M>(levels.of[0], levels.rows[0], start, to);
    add<4, M>(levels.of[1], levels.rows[1], start, to + levels.rows[0]);
    add<2, M>(levels.of[2], levels.rows[2], start, to + levels.rows[0] + 2 * levels.rows[1]);
  }

  template <int width, int64_t M>
  inline void add(const uint8_t* bytes, int64_t count, int64_t start, float* to) const {
    constexpr int fields = 8 / width, together = std::min(fields, 2);
    for (int64_t j = 0; j < count; j++, bytes += levels.stride) {
      for (int64_t t = 0; t < tokens; t += 64) __builtin_prefetch(bytes + levels.stride + t);
#pragma GCC unroll 2
      for (int field = 0; field < fields; field += together) {
        Floats found[together][M] = {};
        for (int64_t t = 0; t < tokens; t += LANES) {
          const Words wide = widened(bytes + t);
          Floats u[together];
          for (int f = 0; f < together; f++) u[f] = level<width>(wide, field + f);
          for (int64_t m = 0; m < M; m++) {
            const Floats weight = load(weights + (start + m) * WEIGHTS + t);
            for (int f = 0; f < together; f++) found[f][m] += u[f] * weight;
          }
        }
        for (int f = 0; f < together; f++)
          for (int64_t m = 0; m < M; m++) to[m * rank + (field + f) * count + j] += total(found[f][m]);
      }
    }
  }
};

// One entry of the values of some rows, from the sums of coefficients and, last, of weights.
struct Rebuilding {
  const int8_t* basis;
  float mean;
  int64_t rank;
  const float* sums;
  int64_t wide;
  float* values;
  int64_t size;

  template <int64_t M>
  void at(int64_t start) const {
    const float* from = sums + start * wide;
    Floats found[M] = {};
    for (int64_t j = 0; j < rank; j += LANES) {
      int8_t last[LANES] = {};
      if (rank - j < LANES) std::copy(basis + j, basis + rank, last);
      const Floats factors = signed_floats(rank - j < LANES ? last : basis + j);
      for (int64_t m = 0; m < M; m++) found[m] += load(from + m * wide + j) * factors;
    }
    for (int64_t m = 0; m < M; m++) values[(start + m) * size] = total(found[m]) + from[m * wide + wide - 1] * mean;
  }
};

extern "C" void mixed(
    const float* weights,         // [groups, heads * rows, tokens], rows "stride" apart
    const int8_t* basis,          // [bases, heads * size, rank]
    const float* scale,           // [bases, rank]
    const float* mean,            // [bases, heads * size]
    const uint8_t* const* parts,  // as above
    float* values,                // [groups, heads * rows, size]
    int64_t rows8, int64_t rows4, int64_t rows2, int64_t groups, int64_t bases, int64_t heads, int64_t rows,
    int64_t size, int64_t tokens, int64_t stride, int64_t least_gain, int64_t threads) {
  const Levels all = {{parts[0], parts[1], parts[2]}, {rows8, rows4, rows2}, tokens};
  const Gains factors(least_gain);
  // tokens are shared out where there are fewer groups than threads; the last number of a sum is that of the weights
  const int64_t rank = all.rank(), joint = heads * rows, wide = whole(rank) + 1;
  const int64_t shares = std::clamp<int64_t>(tokens / 256, 1, (threads + groups - 1) / groups);
  const int64_t share = ((tokens + shares - 1) / shares + 63) / 64 * 64;
  Numbers sums(groups * shares * joint * wide);
#pragma omp parallel num_threads(threads)
  {
    Numbers scaled(joint * WEIGHTS);
    std::vector<uint8_t> held;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < groups * shares; part++) {
      const int64_t group = part / shares, stop = std::min(tokens, (part % shares + 1) * share);
      float* to = sums.data() + part * joint * wide;
      for (int64_t t = part % shares * share, count; t < stop; t += count) {
        const bool full = stop - t >= LANES;
        count = full ? std::min(RUN, (stop - t) / LANES * LANES) : stop - t;
        float gains[RUN];
        for (int64_t i = 0; i < count; i++) gains[i] = factors.of[parts[3][group * tokens + t + i]];
        for (int64_t m = 0; m < joint; m++) {
          const float* from = weights + (group * joint + m) * stride + t;
          float* into = scaled.data() + m * WEIGHTS;
          Floats sum = {};
          for (int64_t i = 0; i < (full ? count : 0); i += LANES) sum += load(from + i);
          to[m * wide + wide - 1] += full ? total(sum) : std::accumulate(from, from + count, 0.0f);
          std::fill_n(into, LANES, 0.0f);
          for (int64_t i = 0; i < count; i++) into[i] = from[i] * gains[i];
        }
        Levels levels = all.of_group(group).from(t);
        if (!full) levels = levels.filled(count, LANES, held);
        in_blocks<ROWS>(joint, Mixing{levels, scaled.data(), full ? count : LANES, to, wide});
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < groups * joint; row++) {
      float* to = sums.data() + (row / joint * shares * joint + row % joint) * wide;
      for (int64_t part = 1; part < shares; part++)
        for (int64_t j = 0; j < wide; j++) to[j] += to[part * joint * wide + j];
      for (int64_t j = 0; j < rank; j++) to[j] *= scale[row / joint % bases * rank + j];
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < groups * heads * size; k++) {
      const int64_t group = k / (heads * size), h = k / size % heads, entry = group % bases * heads * size + k % (heads * size);
      in_blocks<4>(rows, Rebuilding{basis + entry * rank, mean[entry], rank,
                                    sums.data() + (group * shares * joint + h * rows) * wide, wide,
                                    values + (group * joint + h * rows) * size + k % size, size});
    }
  }
}
