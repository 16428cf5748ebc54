// Tokens as they come to packed levels and gains, and the energy that is lost: keys are turned back by the position of
// their tile's centre, the mean is taken off, and what is left is projected and coded. HeadGroups.add says the same in
// operations of torch.

#include "codes.h"

namespace {

// Products of a matrix with tokens, [inner, STEP]: the first "vectors" of their vectors.
template <int64_t vectors>
struct Product {
  const float* matrix;
  int64_t row, column;  // strides
  int64_t inner;
  const float* from;
  float* to;

  template <int64_t M>
  void at(int64_t start) const {
    Floats sums[M][vectors];
    for (int64_t m = 0; m < M; m++)
      for (int64_t v = 0; v < vectors; v++) sums[m][v] = Floats{};
    for (int64_t k = 0; k < inner; k++)
      for (int64_t v = 0; v < vectors; v++) {
        const Floats x = load(from + k * STEP + v * LANES);
        for (int64_t m = 0; m < M; m++) sums[m][v] += matrix[(start + m) * row + k * column] * x;
      }
    for (int64_t m = 0; m < M; m++)
      for (int64_t v = 0; v < vectors; v++) store(to + (start + m) * STEP + v * LANES, sums[m][v]);
  }
};

void multiply(const float* matrix, int64_t row, int64_t column, int64_t rows, int64_t inner, const float* from, float* to,
              int64_t tokens) {
  if (tokens > LANES)
    in_blocks<ROWS_OF_TWO>(rows, Product<2>{matrix, row, column, inner, from, to});
  else
    in_blocks<ROWS_OF_TWO>(rows, Product<1>{matrix, row, column, inner, from, to});
}

void scaled(const int8_t* x, const float* factors, int64_t count, float* __restrict to) {
  for (int64_t j = 0; j < count; j++) to[j] = float(x[j]) * factors[j];
}

double dot(const float* x, const float* y, int64_t rows, int64_t tokens) {
  double found = 0;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t t = 0; t < tokens; t++) found += x[i * STEP + t] * y[i * STEP + t];
  return found;
}

// Turns keys, [size, STEP], back by the position of their tile's centre, and takes off the mean in the tile's frame.
struct Frame {
  const int64_t* entries;  // the first and the second ones of all pairs, then those that stay
  int64_t pairs, size;
  const float* offset_waves;  // [2 pairs + 1, tile]
  int64_t tile;

  void enter(float* keys, const float* mean, const float* waves, int64_t offset) const {
    for (int64_t j = 0; j < pairs; j++) {
      float *first = keys + entries[j] * STEP, *second = keys + entries[pairs + j] * STEP;
      const float a = mean[entries[j]], b = mean[entries[pairs + j]], c = waves[j], s = waves[pairs + j];
      const float *cosines = offset_waves + j * tile + offset, *sines = offset_waves + (pairs + j) * tile + offset;
      for (int64_t t = 0; t < STEP; t++) {
        const float left = first[t], right = second[t];
        first[t] = left * c + right * s - (a * cosines[t] - b * sines[t]);
        second[t] = right * c - left * s - (b * cosines[t] + a * sines[t]);
      }
    }
    for (int64_t j = 2 * pairs; j < size; j++)
      for (int64_t t = 0; t < STEP; t++) keys[entries[j] * STEP + t] -= mean[entries[j]];
  }
};

// What tokens of one group are projected by.
struct Projection {
  const float* analysis;  // [rank, width]; null solves for coefficients in some steps
  const float* basis;     // [width, rank]
  const float* metric;    // [width, width]; null is the identity
  const float* weights;   // squared norms of the basis' columns in the metric
  int64_t width, rank;

  // The rows multiplied by the metric: themselves, or in "room".
  const float* measured(const float* rows, float* room, int64_t tokens) const {
    if (metric == nullptr) return rows;
    multiply(metric, width, 1, width, width, rows, room, tokens);
    return room;
  }

  // What the coefficients do not hold of the rows.
  void left(const float* rows, const float* coefficients, float* to, int64_t tokens) const {
    multiply(basis, rank, 1, width, rank, coefficients, to, tokens);
    for (int64_t i = 0; i < width * STEP; i++) to[i] = rows[i] - to[i];
  }

  // The columns are nearly orthogonal: Jacobi's iteration with their squared norms gains two digits per step.
  void coefficients(const float* rows, float* found, float* rest, float* room, float* change, int64_t steps,
                    int64_t tokens) const {
    if (analysis != nullptr) return multiply(analysis, width, 1, rank, width, rows, found, tokens);
    std::fill_n(found, rank * STEP, 0.0f);
    for (int64_t step = 0; step < steps; step++) {
      if (step) left(rows, found, rest, tokens);
      multiply(basis, 1, rank, rank, width, measured(step ? rest : rows, room, tokens), change, tokens);
      for (int64_t i = 0; i < rank; i++)
        for (int64_t t = 0; t < STEP; t++) found[i * STEP + t] += change[i * STEP + t] / weights[i];
    }
  }
};

}  // namespace

extern "C" void compress_tokens(
    const float* rows,          // [batch, heads of all groups, tokens, size], as strides say
    const int64_t* strides,     // of batch, heads and tokens
    const float* waves,         // [tiles, 2 pairs + 1], of the tiles' centres; null takes rows as they are
    const float* offset_waves,  // [2 pairs + 1, tile]
    const int64_t* entries,     // [size], see Frame
    const float* mean,          // [bases, groups, heads * size]
    const float* analysis,      // [bases, groups, rank, heads * size], or null
    const int8_t* basis,        // [bases, groups, heads * size, rank]
    const float* scale,         // [bases, groups, rank]
    const float* metric,        // [groups, heads * size, heads * size], or null
    const float* weights,       // [weightings, groups, rank]
    uint8_t* const* parts,      // levels by width [batch, groups, rows of bytes, tokens], gains [batch, groups, tokens]
    const int64_t* counts,      // rows of bytes by width, and directions with 3 bits
    double* energies,           // [batch, groups, 2]: what is lost, and all
    int64_t batch, int64_t groups, int64_t bases, int64_t weightings, int64_t heads, int64_t size, int64_t pairs,
    int64_t start, int64_t tokens, int64_t tile, int64_t pitch, int64_t steps, int64_t look_from, int64_t look_to,
    int64_t least_gain, int64_t gains, int64_t threads) {
  const Gains factors(least_gain);
  const Frame frame = {entries, pairs, size, offset_waves, tile};
  const int64_t rank = Levels(parts, counts, pitch).directions(), width = heads * size;
  const int64_t stop = start + tokens, first = start / STEP, last = (stop + STEP - 1) / STEP;
  std::fill_n(energies, batch * groups * 2, 0.0);
#pragma omp parallel num_threads(threads)
  {
    // kept from call to call: new pages take longer than all else
    static thread_local Numbers held[6];
    const int64_t sizes[] = {width * STEP, width * STEP, width * STEP, rank * STEP, rank * STEP, width * rank};
    for (int k = 0; k < 6; k++) held[k].room(sizes[k]);
    float *x = held[0].data(), *rest = held[1].data(), *room = held[2].data(), *found = held[3].data();
    float *change = held[4].data(), *columns = held[5].data();
    int64_t own = -1;
#pragma omp for collapse(2) schedule(static)
    for (int64_t each = 0; each < batch * groups; each++)
      for (int64_t step = first; step < last; step++) {
        const int64_t group = each % groups, row = each / groups;
        const int64_t base = row % bases * groups + group, begin = std::max(start, step * STEP);
        const int64_t here = std::min(stop, (step + 1) * STEP) - begin, at = begin - start;  // all in one tile
        if (own != base) {
          own = base;
          for (int64_t i = 0; i < width; i++)
            scaled(basis + (base * width + i) * rank, scale + base * rank, rank, columns + i * rank);
        }
        for (int64_t h = 0; h < heads; h++) {
          const float* from = rows + row * strides[0] + (group * heads + h) * strides[1] + at * strides[2];
          float* to = x + h * size * STEP;
          for (int64_t t = 0; t < here; t++)
            for (int64_t j = 0; j < size; j++) to[j * STEP + t] = from[t * strides[2] + j];
          const float* about = mean + base * width + h * size;
          if (waves != nullptr)
            frame.enter(to, about, waves + begin / tile * (2 * pairs + 1), begin % tile);
          else
            for (int64_t j = 0; j < size; j++)
              for (int64_t t = 0; t < STEP; t++) to[j * STEP + t] -= about[j];
        }
        const Projection projection = {
            analysis == nullptr ? nullptr : analysis + base * rank * width, columns,
            metric == nullptr ? nullptr : metric + group * width * width,
            weights + (row % weightings * groups + group) * rank, width, rank};
        projection.coefficients(x, found, rest, room, change, steps, here);
        Tokens{found, projection.weights}.code(Parts(parts, counts, each, pitch), factors, gains, begin, here);
        if (at >= look_from && at + here <= look_to) {
          projection.left(x, found, rest, here);
          const double lost = dot(rest, projection.measured(rest, room, here), width, here);
          const double all = dot(x, projection.measured(x, room, here), width, here);
#pragma omp atomic
          energies[2 * each] += lost;
#pragma omp atomic
          energies[2 * each + 1] += all;
        }
      }
  }
}
