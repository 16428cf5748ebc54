// Scores of keys in the frames of their tiles: a query is turned back to each tile, and multiplied by the basis and
// then by the levels of the tile's tokens. HeadGroups.tile_scores says the same in operations of torch.

#pragma once

#include <numeric>

#include "level_scores.h"

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
  int64_t stride, groups, bases, heads, rows, size, pairs, tokens, tile;
  float factor;               // of the scores
  const Gains& factors;

  // of integer queries, so that no sum of products with the basis overflows
  float query_limit() const { return std::min(MOST, MOST_SUM / (127 * size)); }
  int64_t at_once() const { return std::max<int64_t>(1, ROWS / rows); }
  int64_t tiles() const { return (tokens + tile - 1) / tile; }
  int64_t chunks() const { return (tiles() + at_once() - 1) / at_once(); }

  // The greatest score of every row goes to "greatest" [groups, chunks, heads * rows], unless that is null.
  void run(float* greatest) const {
    const Pairs paired = {entries, pairs, size};
    const PairsOfLevels order(levels);
    const int64_t rank = levels.rank(), inner = 2 * pairs + 1, joint = heads * rows, all = at_once() * joint;
    const int64_t columns = steps(rank) * STEP, halves = whole(size) / 2, room = whole(order.count) + LANES;
    Numbers own(joint * size), along(at_once() * rows * inner), shifts(all * tile);
    Numbers coefficients(all * columns + LANES);
    Zeros<int32_t> turned_pairs(at_once() * rows * halves), coded_pairs(all * room);
    std::vector<float> grains(joint);  // of a query's integers
    std::vector<int64_t> places(at_once() * rows), in_order(joint);
    std::iota(in_order.begin(), in_order.end(), 0);
    Zeros<int32_t> unpacked(order.count * STEP), sums(joint * STEP);
    std::vector<Coded> coded(all);
    for (int64_t row = 0; row < all; row++)
      coded[row] = {coefficients.data() + row * columns, coded_pairs.data() + row * room};
    std::vector<uint8_t> held;
    Maps maps;
    int64_t before = -1;
#pragma omp for schedule(static) nowait
    for (int64_t chunk = 0; chunk < groups * chunks(); chunk++) {
      const int64_t group = chunk / chunks(), first = chunk % chunks() * at_once();
      const int64_t count = std::min(at_once(), tiles() - first);
      maps.read(paired, heads, levels, group % bases, basis, scale, mean);
      for (int64_t row = 0; row < joint && group != before; row++) {
        float* query = own.data() + row * size;
        paired.read(queries + (group * joint + row) * size, query);
        for (int64_t k = 0; k < size; k++) query[k] *= factor;
        grains[row] = paired.most(query) / query_limit();
      }
      before = group;
      for (int64_t h = 0; h < heads; h++) {
        for (int64_t r = 0; r < rows; r++) {
          const int64_t row = h * rows + r;
          const float times = grains[row] > 0 ? 1 / grains[row] : 0;
          for (int64_t i = 0; i < count; i++) {
            const int64_t k = i * rows + r;
            paired.turn_back(own.data() + row * size, waves + (first + i) * inner, maps.mean.data() + h * size, times,
                             (int16_t*)(turned_pairs.data() + k * halves), along.data() + k * inner);
            places[k] = i * joint + row;
          }
        }
        const int32_t* map = maps.pairs.data() + h * halves * columns;
        int32_t* products = (int32_t*)coefficients.data();
        in_blocks<ROWS_OF_TWO>(
            count * rows, ProductWithWaves{along.data(), pairs, offset_waves, tile, shifts.data(), places.data()});
        for (int64_t c = 0; c < columns; c += STEP, map += halves * STEP)
          in_blocks<ROWS_OF_TWO>(
              count * rows, Product{turned_pairs.data(), halves, halves, map, products + c, columns, places.data()});
        for (int64_t k = 0; k < count * rows; k++) coded[places[k]].scale(maps, order);
        for (int64_t k = 0; k < count * rows; k++) coded[places[k]].round(order, grains[h * rows + k % rows]);
      }
      const int64_t stop = std::min(tokens, (first + count) * tile);
      float* out = scores + group * joint * stride;
      for (int64_t t = first * tile; t < stop; t += STEP) {
        const int64_t here = std::min(STEP, stop - t), row = (t / tile - first) * joint;
        Levels these = levels.of_group(group).from(t);
        if (here < STEP) these = these.filled(here, STEP, held);
        UnpackedLevels{these, unpacked.data()}.read();
        in_blocks<ROWS_OF_TWO>(
            joint, Product{coded[row].pairs, room, order.count, unpacked.data(), sums.data(), STEP, in_order.data()});
        float gain[STEP] = {};
        for (int64_t i = 0; i < here; i++) gain[i] = factors.of[gains[group * levels.stride + t + i]];
        for (int64_t m = 0; m < joint; m++) {
          float few[STEP], *to = out + m * stride + t;
          coded[row + m].scores(sums.data() + m * STEP, gain, shifts.data() + (row + m) * tile + t % tile,
                                here < STEP ? few : to);
          if (here < STEP) std::copy_n(few, here, to);
        }
      }
      for (int64_t m = 0; greatest != nullptr && m < joint; m++)
        greatest[chunk * joint + m] = maximum(out + m * stride + first * tile, stop - first * tile);
    }
  }
};
