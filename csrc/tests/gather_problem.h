// Batches gathered from a table: a random problem, and what both back ends should make of it.
#pragma once

#include <algorithm>
#include <numeric>

#include "tests/testing.h"

namespace sae_fast::testing {

struct GatherProblem {
  GatherProblem(Random& random, DType type)
      : d_in(random.integer(0, 1) == 0 ? random.integer(1, 70) : 8 * random.integer(1, 40)),
        count(random.integer(0, 80)),
        spare(random.integer(0, 3)),
        source(random.numbers(random.integer(1, 30) * d_in, Numbers::kIntegersAndSpecials), type),
        scale(static_cast<float>(random.number(Numbers::kNormal))) {
    const auto source_rows = static_cast<int64_t>(source.values.size()) / d_in;
    for (int64_t i = 0; i < count; ++i) rows.push_back(random.integer(0, source_rows - 1));
    if (random.integer(0, 1) == 1) mean = random.numbers(d_in, Numbers::kNormal);
    if (random.integer(0, 1) == 1) {
      places.resize(static_cast<size_t>(count + spare));
      std::iota(places.begin(), places.end(), 0);
      for (size_t i = places.size(); i > 1; --i) {
        std::swap(places[i - 1], places[static_cast<size_t>(random.integer(0, i - 1))]);
      }
      places.resize(static_cast<size_t>(count));
    }
  }

  const int64_t* places_or_null() const { return places.empty() ? nullptr : places.data(); }
  const float* mean_or_null() const { return mean.empty() ? nullptr : mean.data(); }

  std::vector<float> untouched() const {
    return std::vector<float>(static_cast<size_t>((count + spare) * d_in), 777.0f);
  }

  void check_result(const std::vector<float>& out) const {
    std::vector<float> wanted = untouched();
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t place = places.empty() ? static_cast<int64_t>(i) : places[i];
      for (int64_t d = 0; d < d_in; ++d) {
        const float value = source.values[static_cast<size_t>(rows[i] * d_in + d)];
        const float centred = mean.empty() ? value : value - mean[static_cast<size_t>(d)];
        wanted[static_cast<size_t>(place * d_in + d)] = centred * scale;
      }
    }
    for (size_t i = 0; i < wanted.size(); ++i) {
      check(same(out[i], wanted[i]), "gather_rows: element %zu is %.9g, not %.9g", i,
            static_cast<double>(out[i]), static_cast<double>(wanted[i]));
    }
  }

  int64_t d_in, count, spare;
  Matrix source;
  float scale;
  std::vector<int64_t> rows, places;
  std::vector<float> mean;
};

}  // namespace sae_fast::testing
