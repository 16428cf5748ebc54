// Scores of keys in the frames of their tiles: a query is turned back to each tile, and multiplied by the basis and
// then by the levels of the tile's tokens. HeadGroups.tile_scores says the same in operations of torch.

#pragma once

#include "levels.h"

constexpr int64_t AHEAD = 256;  // tokens whose levels are called for before they are needed

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

// The basis and mean of a group of heads: the basis with its scale, and columns of zeros up to whole vectors.
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
    add<1>(sums, levels.of[3], levels.rows[3], from + levels.rows[0] + 2 * levels.rows[1] + 4 * levels.rows[2]);
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
#pragma GCC unroll 8
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

// Scores of all tokens, by the threads of a parallel region.
struct TileScores {
  const float* queries;       // [groups, heads, rows, size]
  const int64_t* entries;     // [size], see Pairs
  const float* waves;         // [tiles, 2 pairs + 1], of the tiles' centres
  const float* offset_waves;  // [2 pairs + 1, tile], of the tokens about them
  const int8_t* basis;        // [bases, heads * size, rank]
  const float* scale;         // [bases, rank]
  const float* mean;          // [bases, heads * size]
  Levels levels;              // of all groups
  const uint8_t* gains;       // [groups, tokens], as far apart as levels
  float* scores;              // [groups, heads * rows, tokens], rows "stride" apart
  int64_t stride, groups, bases, heads, rows, size, pairs, tokens, tile;
  float factor;               // of the scores
  const Gains& factors;

  int64_t at_once() const { return std::max<int64_t>(1, ROWS / rows); }
  int64_t tiles() const { return (tokens + tile - 1) / tile; }
  int64_t chunks() const { return (tiles() + at_once() - 1) / at_once(); }

  // The greatest score of every row goes to "greatest" [groups, chunks, heads * rows], unless that is null.
  void run(float* greatest) const {
    const Pairs paired = {entries, pairs, size};
    const int64_t rank = levels.rank(), inner = 2 * pairs + 1, joint = heads * rows;
    const int64_t columns = tile + whole(rank);  // shifts of the tile's tokens, then directions
    Numbers query(size), turned(at_once() * rows * size), along(at_once() * rows * inner), last(joint * STEP);
    Numbers formed(at_once() * joint * columns);
    std::vector<float*> to(at_once() * rows);
    std::vector<uint8_t> held;
    Maps maps;
#pragma omp for schedule(static) nowait
    for (int64_t chunk = 0; chunk < groups * chunks(); chunk++) {
      const int64_t group = chunk / chunks(), first = chunk % chunks() * at_once();
      const int64_t count = std::min(at_once(), tiles() - first);
      maps.read(paired, heads, rank, group % bases, basis, scale, mean);
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t r = 0; r < rows; r++) {
          paired.read(queries + ((group * heads + h) * rows + r) * size, query.data());
          for (int64_t k = 0; k < size; k++) query.data()[k] *= factor;
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
      float* out = scores + group * joint * stride;
      for (int64_t t = first * tile; t < stop; t += STEP) {
        const int64_t here = std::min(STEP, stop - t);
        const bool full = here == STEP;
        float gain[STEP] = {};
        for (int64_t i = 0; i < here; i++) gain[i] = factors.of[gains[group * levels.stride + t + i]];
        Levels these = levels.of_group(group).from(t);
        if (!full) these = these.filled(here, STEP, held);
        const float* base = formed.data() + (t / tile - first) * joint * columns;
        in_blocks<ROWS>(joint, Scoring{these, base + tile, base + t % tile, columns, gain,
                                       full ? out + t : last.data(), full ? stride : STEP});
        for (int64_t m = 0; m < joint && !full; m++) std::copy_n(last.data() + m * STEP, here, out + m * stride + t);
      }
      for (int64_t m = 0; greatest != nullptr && m < joint; m++)
        greatest[chunk * joint + m] = maximum(out + m * stride + first * tile, stop - first * tile);
    }
  }
};
