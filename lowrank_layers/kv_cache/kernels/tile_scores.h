// Scores of keys in the frames of their tiles: a query is turned back to each tile and multiplied by the basis, for all
// tiles of a span at once, and then by the levels of the tile's tokens. HeadGroups.tile_scores says the same in operations
// of torch.

#pragma once

#include "level_scores.h"
#include "spans.h"

constexpr int64_t SPAN = 32, HELD_ROWS = SPAN * ROWS;  // tiles that are computed together, and their rows, at most

// Scores of all tokens, by the threads of a parallel region.
struct TileScores {
  const float* queries;       // [groups, heads, rows, size]
  const int64_t* entries;     // [size], see Pairs
  const float* waves;         // [tiles, 2 pairs + 1], of the tiles' centres
  const float* offset_waves;  // [2 pairs + 1, tile], of the tokens about them
  const int8_t* basis;        // [bases, heads * size, directions]
  const float* scale;         // [bases, directions]
  const float* mean;          // [bases, heads * size]
  Levels levels;              // of all groups
  const uint8_t* gains;       // [groups, tokens], as far apart as levels
  float* scores;              // [groups, heads * rows, tokens], rows "stride" apart
  int64_t stride, groups, bases, heads, rows, size, pairs, tokens, tile, threads;
  float factor;               // of the scores
  const Gains& factors;

  int64_t tiles() const { return (tokens + tile - 1) / tile; }
  // as many in every group as keep all threads busy
  int64_t chunks() const {
    const int64_t most = std::clamp<int64_t>(HELD_ROWS / (heads * rows), 2, SPAN);
    const int64_t turns = (groups * ((tiles() + most - 1) / most) + threads - 1) / threads;
    return std::min(tiles(), (turns * threads + groups - 1) / groups);
  }
  int64_t half() const { return ((tiles() + chunks() - 1) / chunks() + 1) / 2; }

  // The greatest score of every row goes to "greatest" [groups, chunks, heads * rows], unless that is null.
  void run(float* greatest) const {
    const Pairs paired = {entries, pairs, size};
    const PairsOfLevels order(levels);
    const SpanWaves span(paired, offset_waves, tile, half());
    const int64_t inner = 2 * pairs + 1, joint = heads * rows, most = 2 * half();
    const int64_t columns = steps(levels.rank()) * STEP, room = whole(order.count) + LANES;
    // new memory at every step would cost more than what is computed in it
    static thread_local Numbers held_shifts, held_coefficients;
    static thread_local Zeros<int32_t> held_pairs;
    static thread_local Maps maps;
    float *shifts = held_shifts.room(most * joint * tile), *coefficients = held_coefficients.room(most * columns + LANES);
    int32_t* coded_pairs = held_pairs.room(most * joint * room);
    Numbers own(joint * size), along(joint * inner), moved(joint * inner);
    Zeros<int32_t> unpacked(order.count * STEP), sums(joint * STEP);
    std::vector<Coded> coded(most * joint);
    for (int64_t i = 0; i < most * joint; i++)
      coded[i] = {coefficients + i / joint * columns, coded_pairs + i * room};
    TurnedQuery turned(paired);
    SpanProducts products(span, turned, half());
    std::vector<uint8_t> held;
    maps.group = -1;
    int64_t before = -1;
#pragma omp for schedule(dynamic) nowait
    for (int64_t chunk = 0; chunk < groups * chunks(); chunk++) {
      const int64_t group = chunk / chunks(), first = chunk % chunks() * most;
      const int64_t count = std::clamp<int64_t>(tiles() - first, 0, most);
      maps.read(paired, heads, levels, group % bases, basis, scale, mean);
      for (int64_t row = 0; row < joint && group != before; row++) {
        float* query = own.data() + row * size;
        paired.read(queries + (group * joint + row) * size, query);
        for (int64_t k = 0; k < size; k++) query[k] *= factor;
        paired.meet(query, maps.mean.data() + row / rows * size, along.data() + row * inner);
      }
      before = group;
      for (int64_t i = 0; i < count; i++) {
        for (int64_t row = 0; row < joint; row++)
          paired.shift(along.data() + row * inner, waves + (first + i) * inner, moved.data() + row * inner);
        in_blocks<ROWS_OF_TWO>(
            joint, ProductWithWaves{moved.data(), pairs, offset_waves, tile, shifts + i * joint * tile});
      }
      for (int64_t row = 0; row < joint && count > 0; row++) {
        const int64_t head = row / rows;
        turned.turn(own.data() + row * size, waves + first * inner, span, maps.longest[head]);
        const int32_t* map = maps.pairs.data() + head * maps.halves * columns;
        products.most = Floats{};
        for (int64_t c = 0; c < columns; c += STEP)
          products.run(map + c * maps.halves, maps.scales.data() + c, coefficients + c, columns);
        const float greatest = greatest_of(products.most);
        for (int64_t i = 0; i < count; i++) coded[i * joint + row].round(order, greatest, turned.unit);
      }
      const int64_t stop = std::min(tokens, (first + count) * tile);
      float* out = scores + group * joint * stride;
      for (int64_t t = first * tile; t < stop; t += STEP) {
        const int64_t here = std::min(STEP, stop - t), row = (t / tile - first) * joint;
        Levels these = levels.of_group(group).from(t);
        if (here < STEP) these = these.filled(here, STEP, held);
        UnpackedLevels{these, unpacked.data()}.read();
        in_blocks<ROWS_OF_TWO>(joint, Product{coded[row].pairs, room, order.count, unpacked.data(), sums.data()});
        float gain[STEP] = {};
        for (int64_t i = 0; i < here; i++) gain[i] = factors.of[gains[group * levels.stride + t + i]];
        for (int64_t m = 0; m < joint; m++) {
          float few[STEP], *to = out + m * stride + t;
          coded[row + m].scores(sums.data() + m * STEP, gain, shifts + (row + m) * tile + t % tile,
                                here < STEP ? few : to);
          if (here < STEP) std::copy_n(few, here, to);
        }
      }
      for (int64_t m = 0; greatest != nullptr && m < joint; m++)
        greatest[chunk * joint + m] = maximum(out + m * stride + first * tile, stop - first * tile);
    }
  }
};
