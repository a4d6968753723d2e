// What the kernels of this package share: canonical and rough distances, and threads.
//
// Must be compiled without contraction of floating-point expressions (-ffp-contract=off).

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kLeastWorkPerThread = 1 << 22;
constexpr float kTiny = 1e-30f;

constexpr int64_t kHalfLanes = 8;

inline __m512d square_of(const float* x_D, const float* c_D, int64_t left) {
  const __mmask8 mask = left >= kHalfLanes ? 0xff : (1u << left) - 1;
  const __m512d x = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, x_D));
  const __m512d difference = _mm512_sub_pd(x, _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, c_D)));
  return _mm512_mul_pd(difference, difference);
}

// The canonical squared distance: fold_sum of base.py, in the same order. Columns past the last are
// zero, and adding zero to a square changes no bit. The work space holds dim rounded up to 8.
inline float canonical_distance(const float* __restrict x_D, const float* __restrict c_D, int64_t dim,
                         double* __restrict terms_D) {
  int64_t width = (dim + kHalfLanes - 1) / kHalfLanes * kHalfLanes;
  for (int64_t d = 0; d < width; d += kHalfLanes)
    _mm512_storeu_pd(terms_D + d, square_of(x_D + d, c_D + d, dim - d));
  while (width > kHalfLanes) {
    int64_t cut = kHalfLanes;
    while (2 * cut < width) cut *= 2;
    for (int64_t d = 0; d < width - cut; d += kHalfLanes)
      _mm512_storeu_pd(terms_D + d, _mm512_add_pd(_mm512_loadu_pd(terms_D + d), _mm512_loadu_pd(terms_D + cut + d)));
    width = cut;
  }
  const __m512d last = _mm512_loadu_pd(terms_D);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(last), _mm512_extractf64x4_pd(last, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return static_cast<float>(_mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two))));
}

inline int64_t terms_size(int64_t dim) { return (dim + kHalfLanes - 1) / kHalfLanes * kHalfLanes; }

// Run one part per thread; a thread that cannot be started is run here.
template <typename Part>
inline void run_parts(int64_t num_parts, const Part& part) {
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

inline int64_t parts_for(int64_t work, int64_t num_threads, int64_t most) {
  return std::max<int64_t>(1, std::min({num_threads, work / kLeastWorkPerThread, most}));
}

// A vector whose canonical distance is known, and the order of the rule.
struct Decided {
  float distance;
  int64_t number;
  bool operator<(const Decided& other) const {
    return distance != other.distance ? distance < other.distance : number < other.number;
  }
};

// One whose distance is known roughly, and where it stands.
struct Rough {
  float distance;
  int32_t place;
  bool operator<(const Rough& other) const { return distance < other.distance; }
};

inline __mmask16 lanes_of(int64_t left) { return left >= kLanes ? 0xffff : (1u << left) - 1; }

// The squared distance in float32, off by less than rough_of(dim) times either.
inline float rough_distance(const float* x_D, const float* c_D, int64_t dim) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const __mmask16 mask = lanes_of(dim - d);
    const __m512 difference = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x_D + d), _mm512_maskz_loadu_ps(mask, c_D + d));
    __m512& sum = sums[d / kLanes % 2];
    sum = _mm512_fmadd_ps(difference, difference, sum);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

inline void prefetch(const float* c_D, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kLanes) _mm_prefetch(c_D + d, _MM_HINT_T0);
}

inline float rough_of(int64_t dim) { return static_cast<float>((dim + 8) * 0x1p-23); }

// Of vectors whose rough distances are up to `distance` and beyond this, the former are surely nearer.
inline float beyond(float distance, int64_t dim) { return distance * (1 + 3 * rough_of(dim)) + kTiny; }

// Drop what is surely not among the k nearest, of k or more; return the distance beyond which it lies.
inline float keep_nearest(std::vector<Rough>& measured, int64_t k, int64_t dim) {
  std::nth_element(measured.begin(), measured.begin() + (k - 1), measured.end());
  const float limit = beyond(measured[k - 1].distance, dim);
  const auto is_out = [limit](const Rough& one) { return one.distance > limit; };
  measured.erase(std::remove_if(measured.begin() + k, measured.end(), is_out), measured.end());
  return limit;
}

// Let the rule order what is left, into the k places of a row; -1 and infinity where there are too few.
template <typename VectorOf, typename NumberOf>
void decide_nearest(const std::vector<Rough>& measured, const float* x_D, int64_t dim, int64_t k,
                    const VectorOf& vector_of, const NumberOf& number_of, std::vector<double>& terms_D,
                    std::vector<Decided>& decided, int64_t* numbers_k, float* distances_k) {
  decided.clear();
  for (const Rough& one : measured)
    decided.push_back({canonical_distance(x_D, vector_of(one.place), dim, terms_D.data()), number_of(one.place)});
  std::sort(decided.begin(), decided.end());
  const int64_t count = static_cast<int64_t>(decided.size());
  for (int64_t i = 0; i < k; ++i) {
    numbers_k[i] = i < count ? decided[i].number : -1;
    distances_k[i] = i < count ? decided[i].distance : std::numeric_limits<float>::infinity();
  }
}

}  // namespace
