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
// cell_sums: float64 sums of the rows of each cell, in the order that kmeans.py defines.
//
// Rows (or columns) are split over threads; each is computed alone, so their number changes nothing.
// Must be compiled without contraction of floating-point expressions (-ffp-contract=off).

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kVectors = 4;
constexpr int64_t kTile = kLanes * kVectors;
constexpr int64_t kMicroRows = 6;  // 6 x 4 accumulators, 4 centroid vectors, 1 row: of 32 registers
constexpr int64_t kMostBlockRows = 48;
constexpr int64_t kScoreBytes = 1 << 19;  // half of a usual level-2 cache
constexpr int64_t kLeastWorkPerThread = 1 << 22;
constexpr double kUp = 1 + 1e-6;  // rounds a double norm up when it becomes a float
constexpr float kTiny = 1e-30f;

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

// The canonical squared distance: fold_sum of base.py, in the same order.
float canonical_distance(const float* __restrict x_D, const float* __restrict c_D, int64_t dim,
                         double* __restrict terms_D) {
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(x_D[d]) - static_cast<double>(c_D[d]);
    terms_D[d] = difference * difference;
  }
  for (int64_t width = dim; width > 1;) {
    int64_t cut = 1;
    while (2 * cut < width) cut *= 2;
    const double* __restrict upper = terms_D + cut;
    for (int64_t d = 0; d < width - cut; ++d) terms_D[d] += upper[d];
    width = cut;
  }
  return static_cast<float>(terms_D[0]);
}

// Run one part per thread; a thread that cannot be started is run here.
template <typename Part>
void run_parts(int64_t num_parts, const Part& part) {
  std::vector<std::thread> threads;
  int64_t started = 1;
  try {
    for (; started < num_parts; ++started) threads.emplace_back(part, started);
  } catch (const std::system_error&) {
    for (int64_t left = started; left < num_parts; ++left) part(left);
  }
  part(0);
  for (std::thread& thread : threads) thread.join();
}

int64_t parts_for(int64_t work, int64_t num_threads, int64_t most) {
  return std::max<int64_t>(1, std::min({num_threads, work / kLeastWorkPerThread, most}));
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
        terms_D_(set.dim) {}

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

 private:
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

  float distance(const float* x_D, int64_t candidate) {
    return canonical_distance(x_D, set_.centroids_KD + candidate * set_.dim, set_.dim, terms_D_.data());
  }

  const Centroids& set_;
  int64_t pairs_, num_tiles_, width_, block_rows_;
  std::vector<uint32_t> rounded_;
  std::vector<Norms> norms_;
  std::vector<float> scores_, peaks_, bounds_T_;
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
