// The fused filter and the exact sums behind qarm_feast.quantizers, for AVX-512 with bf16.
//
// search: the nearest centroid of each row by the canonical rule of search.py. A product of
// vectors rounded to bfloat16 leaves the few centroids that a proven bound cannot exclude, and the
// rule decides among those. With m the centre, x' = x - m and c' = c - m, the score is
// s = x'.c' - |c'|^2 / 2: the greater, the nearer. Let x^ and c^ be the rounded vectors. The
// computed score is off by at most
//     |x' - x^| |c'| + |x^| |c' - c^| + gamma (|x'|^2 + |c'|^2) + kTiny,
// where both differences are measured, in double, and gamma covers every float32 step: products of
// two bfloat16 are exact in float32; D additions and the bias, each off by at most two units
// (processors differ in how they round inside the instruction); the float32 steps of centring, of
// the bound itself, and the final rounding of the distance. kTiny covers what is flushed to zero.
// Bounds are taken per tile of 64 centroids, so a huge centroid loosens the filter for its tile.
//
// search_top: the k nearest of each row, by the same rule.
// A product of vectors rounded to 8-bit integers, each with a scale of its own, leaves the
// candidates. Integer products are exact, so the bound above holds with x^ and c^ so rounded. Per
// row a floor rises: no vector whose score plus its bound lies below it can be among the k nearest.
//
// choose: the k nearest of each row, in no order, for a k that is a large share of all.
// Scores well above or below the k-th are settled by the bound alone, most others by a float32 distance
// with a bound of its own; the rule decides the rest.
//
// cell_sums: float64 sums of the rows of each cell, in the order that kmeans.py defines.
//
// Rows (or columns) are split over threads; each is computed alone, so their number changes nothing.
// Must be compiled without contraction of floating-point expressions (-ffp-contract=off).

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "native_distance.h"

namespace {

constexpr int64_t kVectors = 4;
constexpr int64_t kTile = kLanes * kVectors;
constexpr int64_t kMicroRows = 6;  // 6 x 4 accumulators, 4 centroid vectors, 1 row: of 32 registers
constexpr int64_t kMostBlockRows = 48;
constexpr int64_t kScoreBytes = 1 << 19;  // half of a usual level-2 cache
constexpr double kUp = 1 + 1e-6;  // rounds a double norm up when it becomes a float

double gamma_of(int64_t dim) { return (2 * dim + 64) * 0x1p-23; }

int64_t num_pairs(int64_t dim) { return (dim + 1) / 2; }

struct Norms {
  double vector;    // |x'|, rounded up
  double rounded;   // |x^|
  double error;     // |x' - x^|
};

// Centre one vector and round it to bfloat16; hats has an even length, the odd end is zero.
Norms round_vector(const float* x_D, const float* centre_D, int64_t dim, uint16_t* hats) {
  __m512d rounded = _mm512_setzero_pd();
  __m512d error = _mm512_setzero_pd();
  for (int64_t d = 0; d < dim; d += kLanes) {
    const __mmask16 mask = dim - d >= kLanes ? 0xffff : (1u << (dim - d)) - 1;
    const __m512 x = _mm512_maskz_loadu_ps(mask, x_D + d);
    const __m512 centre = _mm512_maskz_loadu_ps(mask, centre_D + d);
    const __m256bh hat = _mm512_cvtneps_pbh(_mm512_sub_ps(x, centre));
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)hat), 16);
    const __m512 wide = _mm512_castsi512_ps(bits);
    _mm256_mask_storeu_epi16(hats + d, mask, (__m256i)hat);
    for (int half = 0; half < 2; ++half) {
      const __m512d hat8 = _mm512_cvtps_pd(half ? _mm512_extractf32x8_ps(wide, 1) : _mm512_castps512_ps256(wide));
      const __m512d x8 = _mm512_cvtps_pd(half ? _mm512_extractf32x8_ps(x, 1) : _mm512_castps512_ps256(x));
      const __m512d m8 = _mm512_cvtps_pd(half ? _mm512_extractf32x8_ps(centre, 1) : _mm512_castps512_ps256(centre));
      const __m512d off = _mm512_sub_pd(_mm512_sub_pd(x8, m8), hat8);
      rounded = _mm512_fmadd_pd(hat8, hat8, rounded);
      error = _mm512_fmadd_pd(off, off, error);
    }
  }
  if (dim % 2) hats[dim] = 0;
  Norms norms;
  norms.rounded = std::sqrt(_mm512_reduce_add_pd(rounded)) * kUp;
  norms.error = std::sqrt(_mm512_reduce_add_pd(error)) * kUp;
  norms.vector = norms.rounded + norms.error;
  return norms;
}

}  // namespace

extern "C" {

// One set of centroids. All arrays belong to the caller; T tiles = ceil(K / 64), P = ceil(D / 2).
struct Centroids {
  int64_t num_centroids;
  int64_t dim;
  const float* centroids_KD;
  const float* centre_D;
  uint32_t* packed;     // [T, P, 64]: two bfloat16 of one centroid in each word
  float* bias;          // [T * 64]: -|c'|^2 / 2, minus infinity past the last centroid
  float* norm_T;        // largest |c'| of a tile
  float* error_T;       // largest |c' - c^|
  float* slack_T;       // largest gamma |c'|^2
};

void prepare(const Centroids* set) {
  const int64_t pairs = num_pairs(set->dim), count = set->num_centroids;
  const int64_t num_tiles = (count + kTile - 1) / kTile;
  const double gamma = gamma_of(set->dim);
  std::vector<uint16_t> hats(2 * pairs);
  std::fill(set->packed, set->packed + num_tiles * pairs * kTile, 0);
  std::fill(set->bias, set->bias + num_tiles * kTile, -std::numeric_limits<float>::infinity());
  std::fill(set->norm_T, set->norm_T + num_tiles, 0.0f);
  std::fill(set->error_T, set->error_T + num_tiles, 0.0f);
  std::fill(set->slack_T, set->slack_T + num_tiles, 0.0f);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t tile = k / kTile, column = k % kTile;
    const float* c_D = set->centroids_KD + k * set->dim;
    const Norms norms = round_vector(c_D, set->centre_D, set->dim, hats.data());
    double square = 0;
    for (int64_t d = 0; d < set->dim; ++d) {
      const double centred = static_cast<double>(c_D[d]) - static_cast<double>(set->centre_D[d]);
      square += centred * centred;
    }
    set->bias[k] = static_cast<float>(-square / 2);
    for (int64_t p = 0; p < pairs; ++p) {
      set->packed[(tile * pairs + p) * kTile + column] =
          static_cast<uint32_t>(hats[2 * p]) | static_cast<uint32_t>(hats[2 * p + 1]) << 16;
    }
    const auto raise = [](float* to, double value) { *to = std::max(*to, static_cast<float>(value * kUp)); };
    raise(set->norm_T + tile, norms.vector);
    raise(set->error_T + tile, norms.error);
    raise(set->slack_T + tile, gamma * norms.vector * norms.vector);
  }
}

}  // extern "C"

namespace {

// Scores of R rows and one tile, and their greatest over the tile's four vectors, lane by lane.
template <int64_t R>
void score_tile(const uint32_t* rows, const uint32_t* packed, const float* bias, int64_t pairs,
                float* scores, float* peaks, int64_t row_width) {
  __m512 sums[R][kVectors];
  for (int64_t r = 0; r < R; ++r)
    for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = _mm512_loadu_ps(bias + v * kLanes);
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh c[kVectors];
    for (int64_t v = 0; v < kVectors; ++v)
      c[v] = (__m512bh)_mm512_loadu_si512(packed + p * kTile + v * kLanes);
    for (int64_t r = 0; r < R; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(rows[r * pairs + p]));
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, c[v]);
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < kVectors; ++v)
      _mm512_storeu_ps(scores + r * row_width + v * kLanes, sums[r][v]);
    const __m512 low = _mm512_max_ps(sums[r][0], sums[r][1]);
    const __m512 high = _mm512_max_ps(sums[r][2], sums[r][3]);
    _mm512_storeu_ps(peaks + r * (row_width / kVectors), _mm512_max_ps(low, high));
  }
}

using ScoreTile = void (*)(const uint32_t*, const uint32_t*, const float*, int64_t, float*, float*, int64_t);
constexpr ScoreTile kScoreTile[kMicroRows + 1] = {
    nullptr, score_tile<1>, score_tile<2>, score_tile<3>, score_tile<4>, score_tile<5>, score_tile<6>};

std::pair<float, float> range_of(const float* values, int64_t count) {
  __m512 low = _mm512_set1_ps(values[0]), high = low;
  for (int64_t i = 0; i < count; i += kLanes) {
    low = _mm512_min_ps(low, _mm512_mask_loadu_ps(low, lanes_of(count - i), values + i));
    high = _mm512_max_ps(high, _mm512_mask_loadu_ps(high, lanes_of(count - i), values + i));
  }
  return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
}

// A sum, moved on by more than its own rounding.
float moved(float value, float step) {
  return value + step * (1 + 1e-6f) + std::copysign(std::fabs(value) * 1e-6f, step);
}

// How many values are at least `limit`.
int64_t count_from(const float* values, int64_t count, float limit) {
  int64_t found = 0;
  const __m512 limits = _mm512_set1_ps(limit);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes_of(count - i), values + i);
    found += __builtin_popcount(_mm512_mask_cmp_ps_mask(lanes_of(count - i), value, limits, _CMP_GE_OQ));
  }
  return found;
}

// The k-th greatest value: halving the range leaves few. `picked` is work space.
float kth_greatest(const float* values, int64_t count, int64_t k, std::vector<float>& picked) {
  constexpr int64_t kFew = 2 * kLanes;
  constexpr int kMostHalvings = 32;
  auto [low, top] = range_of(values, count);
  float high = std::numeric_limits<float>::infinity();
  int64_t above = 0, from_low = count;  // values from `high` on, and from `low` on
  for (int halving = 0; halving < kMostHalvings && from_low - above > kFew; ++halving) {
    const float middle = low / 2 + top / 2;
    const int64_t from_middle = count_from(values, count, middle);
    if (from_middle >= k) {
      low = middle;
      from_low = from_middle;
    } else {
      high = top = middle;
      above = from_middle;
    }
  }
  picked.clear();
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes_of(count - i), values + i);
    unsigned left = _mm512_mask_cmp_ps_mask(lanes_of(count - i), value, _mm512_set1_ps(low), _CMP_GE_OQ);
    left &= _mm512_cmp_ps_mask(value, _mm512_set1_ps(high), _CMP_LT_OQ);
    for (; left; left &= left - 1) picked.push_back(values[i + __builtin_ctz(left)]);
  }
  std::nth_element(picked.begin(), picked.begin() + (k - above - 1), picked.end(), std::greater<float>());
  return picked[k - above - 1];
}

// What one thread needs to search its rows.
class Searcher {
 public:
  Searcher(const Centroids& set, int64_t num_rows)
      : set_(set),
        pairs_(num_pairs(set.dim)),
        num_tiles_((set.num_centroids + kTile - 1) / kTile),
        width_(num_tiles_ * kTile),
        block_rows_(std::min(block_rows(width_), num_rows)),
        rounded_(block_rows_ * pairs_),
        norms_(block_rows_),
        scores_(block_rows_ * width_),
        peaks_(block_rows_ * width_ / kVectors),
        bounds_T_(num_tiles_),
        terms_D_(terms_size(set.dim)) {}

  void search(float* x_ND, int64_t num_rows, int64_t* codes_N, bool subtract) {
    for (int64_t start = 0; start < num_rows; start += block_rows_) {
      const int64_t rows = std::min(block_rows_, num_rows - start);
      float* x_BD = x_ND + start * set_.dim;
      score_block(x_BD, rows);
      for (int64_t row = 0; row < rows; ++row) {
        float* x_D = x_BD + row * set_.dim;
        const int64_t code = decide(x_D, row);
        codes_N[start + row] = code;
        if (!subtract) continue;
        const float* c_D = set_.centroids_KD + code * set_.dim;
        for (int64_t d = 0; d < set_.dim; ++d) x_D[d] -= c_D[d];
      }
    }
  }

  // One product serves every k; the codes of the rows from `first` on.
  void choose(const float* x_ND, int64_t first, int64_t num_rows, const int64_t* sizes, int64_t num_sizes,
              int64_t* const* codes) {
    for (int64_t start = first; start < first + num_rows; start += block_rows_) {
      const int64_t rows = std::min(block_rows_, first + num_rows - start);
      score_block(x_ND + start * set_.dim, rows);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < num_sizes; ++i)
          choose_row(x_ND + (start + row) * set_.dim, row, sizes[i], codes[i] + (start + row) * sizes[i]);
    }
  }

 private:
  // With t the k-th greatest score, what lies more than twice the bound above t is surely taken, what
  // lies as much below it is surely not; distances decide the rest.
  void choose_row(const float* x_D, int64_t row, int64_t k, int64_t* codes_k) {
    const int64_t count = set_.num_centroids;
    const float* scores = &scores_[row * width_];
    set_bounds(norms_[row]);
    const float bound = *std::max_element(bounds_T_.begin(), bounds_T_.end());
    const float kth = kth_greatest(scores, count, k, picked_);
    const __m512 ceiling = _mm512_set1_ps(moved(kth, 2 * bound)), floor = _mm512_set1_ps(moved(kth, -2 * bound));
    int64_t taken = 0;
    open_.clear();
    taken_.resize(count + kLanes);
    __m512i codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t first = 0; first < count; first += kLanes) {
      const __m512 score = _mm512_loadu_ps(scores + first);
      const __mmask16 sure = _mm512_mask_cmp_ps_mask(lanes_of(count - first), score, ceiling, _CMP_GT_OQ);
      const __mmask16 high = _mm512_mask_cmp_ps_mask(lanes_of(count - first), score, floor, _CMP_GE_OQ);
      // Without a branch: about every fourth lane is taken, which no processor could foresee.
      _mm512_storeu_si512(&taken_[taken], _mm512_maskz_compress_epi32(sure, codes));
      taken += __builtin_popcount(sure);
      for (unsigned left = high & ~sure; left; left &= left - 1) {
        const int32_t code = static_cast<int32_t>(first + __builtin_ctz(left));
        open_.push_back({0, code});
        prefetch(centroid(code), set_.dim);
      }
      codes = _mm512_add_epi32(codes, _mm512_set1_epi32(kLanes));
    }
    std::copy_n(taken_.begin(), taken, codes_k);
    for (Rough& open : open_) open.distance = rough_distance(x_D, centroid(open.place), set_.dim);
    order_open(x_D, k - taken);
    for (int64_t i = 0; taken < k; ++i) codes_k[taken++] = open_[i].place;
  }

  // Put the k nearest of the open ones first.
  void order_open(const float* x_D, int64_t k) {
    if (k == 0 || k == static_cast<int64_t>(open_.size())) return;
    std::nth_element(open_.begin(), open_.begin() + (k - 1), open_.end());
    const float last = open_[k - 1].distance, limit = beyond(last, set_.dim);
    const auto is_nearer = [&](const Rough& open) { return beyond(open.distance, set_.dim) < last; };
    const auto is_undecided = [&](const Rough& open) { return open.distance <= limit; };
    const auto first = std::partition(open_.begin(), open_.begin() + k, is_nearer);
    const auto end = std::partition(open_.begin() + k, open_.end(), is_undecided);
    if (end == open_.begin() + k) return;
    for (auto open = first; open != end; ++open) open->distance = distance(x_D, open->place);
    std::sort(first, end, [](const Rough& a, const Rough& b) {
      return a.distance != b.distance ? a.distance < b.distance : a.place < b.place;
    });
  }

  static int64_t block_rows(int64_t width) {
    const int64_t fitting = kScoreBytes / (width * static_cast<int64_t>(sizeof(float)));
    return std::clamp(fitting / kMicroRows * kMicroRows, kMicroRows, kMostBlockRows);
  }

  void score_block(const float* x_BD, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      norms_[row] = round_vector(x_BD + row * set_.dim, set_.centre_D, set_.dim,
                                 reinterpret_cast<uint16_t*>(&rounded_[row * pairs_]));
    }
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      for (int64_t row = 0; row < rows; row += kMicroRows) {
        kScoreTile[std::min(kMicroRows, rows - row)](
            &rounded_[row * pairs_], set_.packed + tile * pairs_ * kTile, set_.bias + tile * kTile, pairs_,
            &scores_[row * width_ + tile * kTile], &peaks_[(row * width_ + tile * kTile) / kVectors], width_);
      }
    }
  }

  int64_t decide(const float* x_D, int64_t row) {
    const float* peaks = &peaks_[row * width_ / kVectors];
    const float* scores = &scores_[row * width_];
    set_bounds(norms_[row]);
    __m512 floor = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      const __m512 peak = _mm512_loadu_ps(peaks + tile * kLanes);
      floor = _mm512_max_ps(floor, _mm512_sub_ps(peak, _mm512_set1_ps(bounds_T_[tile])));
    }
    // No centroid whose score plus its bound is below this can be the nearest.
    floor = _mm512_set1_ps(_mm512_reduce_max_ps(floor));
    int64_t best = -1, only = -1;
    float best_distance = std::numeric_limits<float>::infinity();
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      const __m512 limit = _mm512_sub_ps(floor, _mm512_set1_ps(bounds_T_[tile]));
      if (!_mm512_cmp_ps_mask(_mm512_loadu_ps(peaks + tile * kLanes), limit, _CMP_GE_OQ)) continue;
      for (int64_t vector = 0; vector < kVectors; ++vector) {
        const int64_t first = tile * kTile + vector * kLanes;
        unsigned left = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + first), limit, _CMP_GE_OQ);
        for (; left; left &= left - 1) {
          const int64_t candidate = first + __builtin_ctz(left);
          if (best < 0 && only < 0) {
            only = candidate;  // needs no distance as long as it is the only one
            continue;
          }
          if (only >= 0) {
            best = only;
            best_distance = distance(x_D, only);
            only = -1;
          }
          const float candidate_distance = distance(x_D, candidate);
          // Candidates ascend: of equal distances the lower index stays.
          if (candidate_distance < best_distance) {
            best = candidate;
            best_distance = candidate_distance;
          }
        }
      }
    }
    return only >= 0 ? only : best;
  }

  void set_bounds(const Norms& norms) {
    const float error = static_cast<float>(norms.error * kUp), rounded = static_cast<float>(norms.rounded * kUp);
    const float own = static_cast<float>(gamma_of(set_.dim) * norms.vector * norms.vector * kUp) + kTiny;
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      bounds_T_[tile] = error * set_.norm_T[tile] + rounded * set_.error_T[tile] + set_.slack_T[tile] + own;
    }
  }

  const float* centroid(int64_t number) const { return set_.centroids_KD + number * set_.dim; }

  float distance(const float* x_D, int64_t candidate) {
    return canonical_distance(x_D, centroid(candidate), set_.dim, terms_D_.data());
  }

  const Centroids& set_;
  int64_t pairs_, num_tiles_, width_, block_rows_;
  std::vector<uint32_t> rounded_;
  std::vector<Norms> norms_;
  std::vector<float> scores_, peaks_, bounds_T_, picked_;
  std::vector<Rough> open_;
  std::vector<int32_t> taken_;
  std::vector<double> terms_D_;
};

}  // namespace

extern "C" {

void search(const Centroids* set, float* x_ND, int64_t num_rows, int64_t* codes_N, int64_t subtract,
            int64_t num_threads) {
  const int64_t work = num_rows * set->num_centroids * set->dim;
  const int64_t parts = parts_for(work, num_threads, num_rows / kMostBlockRows);
  run_parts(parts, [=](int64_t part) {
    const int64_t first = num_rows * part / parts, last = num_rows * (part + 1) / parts;
    Searcher(*set, last - first).search(x_ND + first * set->dim, last - first, codes_N + first, subtract != 0);
  });
}

// The k nearest of each row, in no order, for several k.
void choose(const Centroids* set, const float* x_ND, int64_t num_rows, const int64_t* sizes, int64_t num_sizes,
            int64_t* const* codes, int64_t num_threads) {
  const int64_t parts = parts_for(num_rows * set->num_centroids * set->dim, num_threads, num_rows);
  run_parts(parts, [=](int64_t part) {
    const int64_t first = num_rows * part / parts, last = num_rows * (part + 1) / parts;
    Searcher(*set, last - first).choose(x_ND, first, last - first, sizes, num_sizes, codes);
  });
}

// Add the rows of each cell to sums_KD, zero before: within blocks of block_rows rows in row order,
// then block after block. Threads take columns, so each sum has one order.
void cell_sums(const float* x_ND, int64_t num_rows, int64_t dim, const int64_t* codes_N, int64_t num_cells,
               int64_t block_rows, double* sums_KD, int64_t num_threads) {
  const int64_t parts = parts_for(num_rows * dim, num_threads, dim / kLanes);
  run_parts(parts, [=](int64_t part) {
    const int64_t first = dim * part / parts, width = dim * (part + 1) / parts - first;
    std::vector<double> block_sums(num_cells * width);
    for (int64_t start = 0; start < num_rows; start += block_rows) {
      std::fill(block_sums.begin(), block_sums.end(), 0.0);
      for (int64_t row = start; row < std::min(num_rows, start + block_rows); ++row) {
        const float* x_D = x_ND + row * dim + first;
        double* to = &block_sums[codes_N[row] * width];
        for (int64_t d = 0; d < width; ++d) to[d] += static_cast<double>(x_D[d]);
      }
      for (int64_t cell = 0; cell < num_cells; ++cell)
        for (int64_t d = 0; d < width; ++d) sums_KD[cell * dim + first + d] += block_sums[cell * width + d];
    }
  });
}

}  // extern "C"

extern "C" {

// Vectors rounded to 8 bits. All arrays belong to the caller; T tiles = ceil(P / 64), Q = ceil(D / 4).
struct Vectors {
  int64_t num_vectors;
  int64_t dim;
  const float* vectors_PD;
  const float* centre_D;
  uint32_t* packed;     // [T, Q, 64]: four 8-bit integers of one vector in each word
  int32_t* offset;      // [T * 64]: -128 times the sum of a vector's integers
  float* scale;         // [T * 64]
  float* bias;          // [T * 64]: -|c'|^2 / 2, minus infinity past the last vector
  float* norm_T;        // largest |c'| of a tile
  float* error_T;       // largest |c' - c^|
  float* slack_T;       // largest gamma |c'|^2
};

}  // extern "C"

namespace {

constexpr int64_t kTopBlockRows = 2048;
constexpr int64_t kQuad = 4;
constexpr float kLeastPeak = 1e-25f;  // what is smaller everywhere is rounded to zero, its error known

int64_t num_quads(int64_t dim) { return (dim + kQuad - 1) / kQuad; }

struct Scaled {
  Norms norms;
  double square;  // |x'|^2
  float scale;
  int32_t sum;    // of the integers
};

// Centre one vector and round it to 8-bit integers times a scale; steps has a length that 4 divides.
Scaled scale_vector(const float* x_D, const float* centre_D, int64_t dim, int8_t* steps) {
  Scaled scaled{};
  float peak = 0;
  for (int64_t d = 0; d < dim; ++d) peak = std::max(peak, std::fabs(x_D[d] - centre_D[d]));
  scaled.scale = peak < kLeastPeak ? 0.0f : peak / 127;
  const float factor = peak < kLeastPeak ? 0.0f : 127 / peak;
  double rounded = 0, error = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float step = std::nearbyint((x_D[d] - centre_D[d]) * factor);
    steps[d] = static_cast<int8_t>(std::clamp(step, -127.0f, 127.0f));
    const double x = static_cast<double>(x_D[d]) - static_cast<double>(centre_D[d]);
    const double hat = static_cast<double>(scaled.scale) * steps[d];
    rounded += hat * hat;
    error += (x - hat) * (x - hat);
    scaled.square += x * x;
    scaled.sum += steps[d];
  }
  std::fill(steps + dim, steps + kQuad * num_quads(dim), 0);
  scaled.norms.rounded = std::sqrt(rounded) * kUp;
  scaled.norms.error = std::sqrt(error) * kUp;
  scaled.norms.vector = std::sqrt(scaled.square) * kUp;
  return scaled;
}

// Unsigned bytes of x times signed bytes of c, added in fours. Written as an instruction: some
// compilers copy the sum through memory around the intrinsic, which halves the speed.
inline void add_products(__m512i& sum, __m512i x, __m512i c) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(c));
}

struct Candidate {
  float lower, upper;  // of the score
  int32_t slot;
};

// What every tile needs of a row, side by side: the rows share the cache with a tile.
struct RowBounds {
  float scale, error, rounded, own, floor;
};

struct TopRow {
  double square;  // |x'|^2
  std::vector<Candidate> candidates;
  std::vector<Rough> measured;  // the k nearest so far, and what may be as near
};

// One tile, as the scoring wants it.
struct TileView {
  const uint32_t* packed;
  const int32_t* offset;
  const float* scale;
  const float* bias;
  int64_t first_slot;
  float norm, error, slack;
};

// The integer products of R rows and V vectors of 16 lanes. On its own, so that the sums stay in
// registers.
template <int64_t R, int64_t V>
__attribute__((noinline)) void multiply(const uint32_t* const* bytes, const TileView& tile, int64_t quads, int32_t* products) {
  __m512i sums[R][V];
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) sums[r][v] = _mm512_loadu_si512(tile.offset + v * kLanes);
  for (int64_t q = 0; q < quads; ++q) {
    __m512i c[V];
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) c[v] = _mm512_loadu_si512(tile.packed + q * kTile + v * kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(bytes[r][q]));
#pragma GCC unroll 4
      for (int64_t v = 0; v < V; ++v) add_products(sums[r][v], x, c[v]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) _mm512_store_si512(products + (r * V + v) * kLanes, sums[r][v]);
}

inline __m512 scores_of(const int32_t* products, float row_scale, const TileView& tile, int64_t v) {
  const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row_scale), _mm512_loadu_ps(tile.scale + v * kLanes));
  const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(products));
  return _mm512_fmadd_ps(product, scale, _mm512_loadu_ps(tile.bias + v * kLanes));
}

__attribute__((noinline)) void keep(TopRow& row, unsigned hits, __m512 scores, float bound, int32_t first_slot) {
  alignas(64) float score[kLanes];
  _mm512_store_ps(score, scores);
  for (; hits; hits &= hits - 1) {
    const int lane = __builtin_ctz(hits);
    row.candidates.push_back({score[lane] - bound, score[lane] + bound, first_slot + lane});
  }
}

// Score R rows and V vectors of 16 lanes; what reaches a row's floor becomes its candidate.
// Returns whether a row has a new one.
template <int64_t R, int64_t V>
bool scan_tile(const RowBounds* const* bounds, TopRow* const* rows, const uint32_t* const* bytes,
               const TileView& tile, int64_t quads) {
  alignas(64) int32_t products[R * V * kLanes];
  multiply<R, V>(bytes, tile, quads, products);
  bool is_any = false;
  for (int64_t r = 0; r < R; ++r) {
    const RowBounds& row = *bounds[r];
    const float bound = row.error * tile.norm + row.rounded * tile.error + tile.slack + row.own;
    // Lanes past the last vector are minus infinity, which no limit lets in.
    const float limit = std::max(row.floor - bound, -std::numeric_limits<float>::max());
    __mmask16 hits[V];
    unsigned any = 0;
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) {
      const __m512 score = scores_of(products + (r * V + v) * kLanes, row.scale, tile, v);
      hits[v] = _mm512_cmp_ps_mask(score, _mm512_set1_ps(limit), _CMP_GE_OQ);
      any |= hits[v];
    }
    if (__builtin_expect(!any, 1)) continue;
    is_any = true;
    for (int64_t v = 0; v < V; ++v)
      if (hits[v]) keep(*rows[r], hits[v], scores_of(products + (r * V + v) * kLanes, row.scale, tile, v), bound,
                        static_cast<int32_t>(tile.first_slot + v * kLanes));
  }
  return is_any;
}

using ScanTile = bool (*)(const RowBounds* const*, TopRow* const*, const uint32_t* const*, const TileView&, int64_t);

template <int64_t R>
constexpr std::array<ScanTile, kVectors> scans_of() {
  return {scan_tile<R, 1>, scan_tile<R, 2>, scan_tile<R, 3>, scan_tile<R, 4>};
}

constexpr std::array<std::array<ScanTile, kVectors>, kMicroRows> kScanTile = {
    scans_of<1>(), scans_of<2>(), scans_of<3>(), scans_of<4>(), scans_of<5>(), scans_of<6>()};

// What one thread needs to find the k nearest of its rows.
class TopSearcher {
 public:
  TopSearcher(const Vectors& set, int64_t k, int64_t num_rows)
      : set_(set),
        k_(k),
        quads_(num_quads(set.dim)),
        most_(std::max<size_t>(16 * k, 4 * kTile)),
        bytes_(std::min(num_rows, kTopBlockRows) * quads_),
        bounds_(std::min(num_rows, kTopBlockRows)),
        rows_(std::min(num_rows, kTopBlockRows)),
        terms_D_(terms_size(set.dim)) {}

  void search(const float* x_ND, int64_t num_rows, int64_t* numbers_Nk, float* distances_Nk) {
    for (int64_t start = 0; start < num_rows; start += kTopBlockRows) {
      const int64_t rows = std::min(kTopBlockRows, num_rows - start);
      x_BD_ = x_ND + start * set_.dim;
      for (int64_t row = 0; row < rows; ++row) begin(row);
      scan(rows);
      for (int64_t row = 0; row < rows; ++row) {
        raise_floor(row);
        decide(row, numbers_Nk + (start + row) * k_, distances_Nk + (start + row) * k_);
      }
    }
  }

 private:
  void begin(int64_t row) {
    int8_t* steps = reinterpret_cast<int8_t*>(&bytes_[row * quads_]);
    const Scaled scaled = scale_vector(x_BD_ + row * set_.dim, set_.centre_D, set_.dim, steps);
    // The instruction takes x unsigned; the lists' offsets take the 128 away again.
    for (int64_t d = 0; d < quads_ * kQuad; ++d) steps[d] = static_cast<int8_t>(steps[d] ^ 0x80);
    TopRow& top = rows_[row];
    bounds_[row] = {scaled.scale, static_cast<float>(scaled.norms.error * kUp),
                    static_cast<float>(scaled.norms.rounded * kUp),
                    static_cast<float>(gamma_of(set_.dim) * scaled.square * kUp) + kTiny,
                    -std::numeric_limits<float>::infinity()};
    top.square = scaled.square;
    top.candidates.clear();
    top.measured.clear();
  }

  // Tile by tile, so that the rows share one while it is in the cache.
  void scan(int64_t num_rows) {
    const int64_t num_tiles = (set_.num_vectors + kTile - 1) / kTile;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t first = tile * kTile;
      const TileView view{set_.packed + first * quads_, set_.offset + first, set_.scale + first,
                          set_.bias + first, first, set_.norm_T[tile], set_.error_T[tile], set_.slack_T[tile]};
      // The next tile comes from memory while this one is in use.
      for (int64_t word = 0; word < quads_ * kTile; word += kLanes)
        _mm_prefetch(view.packed + quads_ * kTile + word, _MM_HINT_T1);
      const int64_t vectors = std::min(kVectors, (set_.num_vectors - first + kLanes - 1) / kLanes);
      for (int64_t start = 0; start < num_rows; start += kMicroRows)
        scan_rows(start, std::min(kMicroRows, num_rows - start), view, vectors);
    }
  }

  void scan_rows(int64_t start, int64_t count, const TileView& view, int64_t vectors) {
    const RowBounds* bounds[kMicroRows];
    TopRow* rows[kMicroRows];
    const uint32_t* bytes[kMicroRows];
    for (int64_t r = 0; r < count; ++r) {
      bounds[r] = &bounds_[start + r];
      rows[r] = &rows_[start + r];
      bytes[r] = &bytes_[(start + r) * quads_];
    }
    if (!kScanTile[count - 1][vectors - 1](bounds, rows, bytes, view, quads_)) return;
    for (int64_t r = 0; r < count; ++r)
      if (rows[r]->candidates.size() >= most_) thin_out(start + r);
  }

  void thin_out(int64_t row) {
    raise_floor(row);
    measure_likeliest(row);
    // The bound alone cannot thin out many that are about equally near.
    if (rows_[row].candidates.size() > most_ / 2) measure(row, rows_[row].candidates.size());
  }

  // The k-th greatest lower end of a score is a floor; drop what cannot reach it.
  void raise_floor(int64_t row) {
    const std::vector<Candidate>& candidates = rows_[row].candidates;
    if (static_cast<int64_t>(candidates.size()) < k_) return;
    lowers_.clear();
    for (const Candidate& candidate : candidates) lowers_.push_back(candidate.lower);
    std::nth_element(lowers_.begin(), lowers_.begin() + (k_ - 1), lowers_.end(), std::greater<float>());
    bounds_[row].floor = std::max(bounds_[row].floor, lowers_[k_ - 1]);
    drop(row);
  }

  void drop(int64_t row) {
    std::vector<Candidate>& candidates = rows_[row].candidates;
    const float floor = bounds_[row].floor;
    const auto is_out = [floor](const Candidate& candidate) { return candidate.upper < floor; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), is_out), candidates.end());
  }

  // The k likeliest come first: their distances exclude about half of the others.
  void measure_likeliest(int64_t row) {
    std::vector<Candidate>& candidates = rows_[row].candidates;
    if (static_cast<int64_t>(candidates.size()) <= k_) return;
    const auto is_likelier = [](const Candidate& a, const Candidate& b) { return a.lower < b.lower; };
    std::nth_element(candidates.begin(), candidates.end() - k_, candidates.end(), is_likelier);
    measure(row, k_);
    drop(row);
  }

  // Replace the last candidates by their rough distances, and keep of these what may be among the k.
  void measure(int64_t row, size_t count) {
    TopRow& top = rows_[row];
    const size_t first = top.candidates.size() - count;
    for (size_t i = first; i < top.candidates.size(); ++i) {
      prefetch(vector_of(top.candidates[i].slot), set_.dim);
    }
    for (size_t i = first; i < top.candidates.size(); ++i) {
      const int32_t slot = top.candidates[i].slot;
      top.measured.push_back({rough_distance(x_BD_ + row * set_.dim, vector_of(slot), set_.dim), slot});
    }
    top.candidates.resize(first);
    if (static_cast<int64_t>(top.measured.size()) < k_) return;
    const float limit = keep_nearest(top.measured, k_, set_.dim);
    // Of a vector beyond the limit the score is below (|x'|^2 - d^2) / 2; gamma covers the roundings.
    const double last = limit;
    const double floor = (top.square - last) / 2 - gamma_of(set_.dim) * (top.square + last) - kTiny;
    bounds_[row].floor = std::max(bounds_[row].floor, static_cast<float>(floor - std::fabs(floor) * 1e-6));
  }

  void decide(int64_t row, int64_t* numbers_k, float* distances_k) {
    measure_likeliest(row);
    measure(row, rows_[row].candidates.size());
    decide_nearest(
        rows_[row].measured, x_BD_ + row * set_.dim, set_.dim, k_, [this](int64_t slot) { return vector_of(slot); },
        [](int64_t slot) { return slot; }, terms_D_, decided_, numbers_k, distances_k);
  }

  const float* vector_of(int64_t slot) const { return set_.vectors_PD + slot * set_.dim; }

  const Vectors& set_;
  int64_t k_, quads_;
  size_t most_;
  std::vector<uint32_t> bytes_;
  std::vector<RowBounds> bounds_;
  std::vector<TopRow> rows_;
  std::vector<float> lowers_;
  std::vector<Decided> decided_;
  std::vector<double> terms_D_;
  const float* x_BD_ = nullptr;
};

}  // namespace

extern "C" {

void prepare_top(const Vectors* set) {
  const int64_t quads = num_quads(set->dim), num_tiles = (set->num_vectors + kTile - 1) / kTile;
  const double gamma = gamma_of(set->dim);
  std::vector<int8_t> steps(quads * kQuad);
  std::fill(set->packed, set->packed + num_tiles * quads * kTile, 0);
  std::fill(set->offset, set->offset + num_tiles * kTile, 0);
  std::fill(set->scale, set->scale + num_tiles * kTile, 0.0f);
  std::fill(set->bias, set->bias + num_tiles * kTile, -std::numeric_limits<float>::infinity());
  for (float* bounds_T : {set->norm_T, set->error_T, set->slack_T}) std::fill(bounds_T, bounds_T + num_tiles, 0.0f);
  for (int64_t slot = 0; slot < set->num_vectors; ++slot) {
    const int64_t tile = slot / kTile, column = slot % kTile;
    const Scaled scaled = scale_vector(set->vectors_PD + slot * set->dim, set->centre_D, set->dim, steps.data());
    set->offset[slot] = -128 * scaled.sum;
    set->scale[slot] = scaled.scale;
    set->bias[slot] = static_cast<float>(-scaled.square / 2);
    for (int64_t q = 0; q < quads; ++q)
      std::memcpy(&set->packed[(tile * quads + q) * kTile + column], &steps[q * kQuad], kQuad);
    const auto raise = [](float* to, double value) { *to = std::max(*to, static_cast<float>(value * kUp)); };
    raise(set->norm_T + tile, scaled.norms.vector);
    raise(set->error_T + tile, scaled.norms.error);
    raise(set->slack_T + tile, gamma * scaled.square);
  }
}

void search_top(const Vectors* set, const float* x_ND, int64_t num_rows, int64_t k, int64_t* numbers_Nk,
                float* distances_Nk, int64_t num_threads) {
  const int64_t parts = parts_for(num_rows * set->num_vectors * set->dim, num_threads, num_rows);
  run_parts(parts, [=](int64_t part) {
    const int64_t first = num_rows * part / parts, last = num_rows * (part + 1) / parts;
    TopSearcher(*set, k, last - first)
        .search(x_ND + first * set->dim, last - first, numbers_Nk + first * k, distances_Nk + first * k);
  });
}

}  // extern "C"
