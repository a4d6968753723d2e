// The scan of an IVF index behind its integer sketch; sketch.py defines what counts, number by number.
//
// search_sketched: of the lists that a row probes, the vectors that count, and of these the k
// nearest by the canonical rule. Everything up to the rule is arithmetic on integers, so the same
// vectors count whatever the processor, the batch or the order.
//
// A vector has an 8-bit digit per column; the first 64 give its score, all of them its full score. The
// lists lie in leaves of 16 vectors, whose digits are transposed so that one instruction takes four
// digits of all 16; a leaf has a head, its mean digits. Digits of vectors are stored with 128 added
// (the instruction wants one side unsigned), which moves every score of a row by the same amount:
// limits are taken from such scores, so nothing has to be taken away again.
//
// Rows that probe a list are scored against its heads, then leaf by leaf: 16 registers hold the
// leaf, the rows pass by. Scores go through memory and are looked at afterwards: a branch on a sum
// that is still under way would, each time it is guessed wrongly, cost the sums begun after it.
//
// Rows are split over threads; each is computed alone, so their number changes nothing.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "native_distance.h"

namespace {

constexpr int64_t kLeaf = kLanes;
constexpr int64_t kDigits = 64;            // of the score
constexpr int64_t kGroups = kDigits / 4;   // registers that hold a leaf
constexpr int64_t kLeafBytes = kLeaf * kDigits;
constexpr int64_t kMaskLanes = 32;         // 16-bit numbers in a register
constexpr int64_t kBlockRows = 2048;       // a row's number in its block takes 16 bits
constexpr int64_t kMostNearScores = 1 << 24;  // of a block of rows, unless one row alone has more
constexpr int64_t kMostHits = 1 << 22;        // before they are handed to their rows
constexpr int64_t kAhead = 16;             // distances between a vector's prefetch and its use
constexpr int32_t kAll = -(1 << 29);       // below every score; empty places of a leaf lie below it

}  // namespace

extern "C" {

// All arrays belong to the caller. L leaves, H heads' leaves (16 heads each), W = bytes of the other
// digits, a multiple of 64.
struct Sketched {
  int64_t num_lists;
  int64_t dim;
  int64_t rest_width;
  int64_t rank;
  int32_t leaf_margin, score_margin, full_margin;
  const int64_t* first_leaf_I;        // I + 1 numbers
  const int64_t* first_head_I;        // I + 1 numbers, in leaves of heads
  const uint8_t* leaves;              // [L, 16 groups, 16 vectors, 4 digits]
  const int32_t* bias;                // [L * 16]: minus half the square
  const uint8_t* heads;               // [H, 16 groups, 16 heads, 4 digits]
  const int32_t* head_bias;           // [H * 16]
  const uint8_t* rest;                // [L * 16, W]
  const float* const* vectors_I;      // the vectors of a list, [size, D]
  const int64_t* const* numbers_I;    // their numbers
  const int32_t* list_L;              // the list of a leaf
};

}  // extern "C"

namespace {

// Unsigned digits of 16 vectors times four signed digits of one row, added in fours. Written as an
// instruction: compilers load the row's digits by another one.
inline void add_products(__m512i& sum, __m512i leaf, const int8_t* row) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(leaf), "m"(*reinterpret_cast<const int32_t*>(row)));
}

// Score 16 vectors for some rows, and mark which reach the row's limit. An odd last row is scored
// twice, so one more place is written. On its own, so that the leaf stays in registers.
__attribute__((noinline)) void score_leaf(const uint8_t* leaf, const int32_t* bias, const int8_t* digits_BS,
                                          const uint16_t* rows, int64_t num_rows, const int32_t* limits_B,
                                          int32_t* scores, uint16_t* masks) {
  __m512i held[kGroups];
#pragma GCC unroll 16
  for (int64_t group = 0; group < kGroups; ++group) held[group] = _mm512_loadu_si512(leaf + group * kLeaf * 4);
  const __m512i biases = _mm512_loadu_si512(bias);
  for (int64_t i = 0; i < num_rows; i += 2) {
    const int64_t rows_2[] = {rows[i], rows[std::min(i + 1, num_rows - 1)]};
    const int8_t* first = digits_BS + rows_2[0] * kDigits;
    const int8_t* second = digits_BS + rows_2[1] * kDigits;
    // Two sums in turns hide the latency of the instruction.
    __m512i sum = biases, other = biases;
#pragma GCC unroll 16
    for (int64_t group = 0; group < kGroups; ++group) {
      add_products(sum, held[group], first + 4 * group);
      add_products(other, held[group], second + 4 * group);
    }
    _mm512_storeu_si512(scores + i * kLeaf, sum);
    _mm512_storeu_si512(scores + (i + 1) * kLeaf, other);
    masks[i] = _mm512_cmpge_epi32_mask(sum, _mm512_set1_epi32(limits_B[rows_2[0]]));
    masks[i + 1] = _mm512_cmpge_epi32_mask(other, _mm512_set1_epi32(limits_B[rows_2[1]]));
  }
}

int32_t lowered(int32_t score, int32_t margin) {
  return static_cast<int32_t>(std::max<int64_t>(kAll, static_cast<int64_t>(score) - margin));
}

int64_t count_from(const int32_t* values, int64_t count, int32_t limit) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512i value = _mm512_maskz_loadu_epi32(lanes_of(count - i), values + i);
    found += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(lanes_of(count - i), value, _mm512_set1_epi32(limit)));
  }
  return found;
}

// The k-th greatest score; kAll where there are fewer.
int32_t kth_greatest(const int32_t* values, int64_t count, int64_t k) {
  __m512i least = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
  __m512i greatest = _mm512_set1_epi32(std::numeric_limits<int32_t>::min());
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m512i value = _mm512_maskz_loadu_epi32(lanes_of(count - i), values + i);
    const __mmask16 live = _mm512_mask_cmpge_epi32_mask(lanes_of(count - i), value, _mm512_set1_epi32(kAll));
    least = _mm512_mask_min_epi32(least, live, least, value);
    greatest = _mm512_mask_max_epi32(greatest, live, greatest, value);
  }
  int64_t low = _mm512_reduce_min_epi32(least), high = _mm512_reduce_max_epi32(greatest);
  if (low > high || count_from(values, count, static_cast<int32_t>(low)) < k) return kAll;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (count_from(values, count, static_cast<int32_t>(middle)) >= k)
      low = middle;
    else
      high = middle - 1;
  }
  return static_cast<int32_t>(low);
}

// The rows of a block that probe each list: those of list i stand together, ascending.
class Probing {
 public:
  void sort(const int64_t* lists_BI, int64_t num_rows, int64_t num_probes, int64_t num_lists) {
    ends_.assign(num_lists + 2, 0);
    const int64_t count = num_rows * num_probes;
    for (int64_t i = 0; i < count; ++i) ++ends_[lists_BI[i] + 2];
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
    // Whole registers are read past the last row.
    rows_.resize(count + kMaskLanes);
    for (int64_t row = 0; row < num_rows; ++row)
      for (int64_t i = row * num_probes; i < (row + 1) * num_probes; ++i)
        rows_[ends_[lists_BI[i] + 1]++] = static_cast<uint16_t>(row);
  }

  const uint16_t* rows(int64_t list) const { return &rows_[ends_[list]]; }
  int64_t count(int64_t list) const { return ends_[list + 1] - ends_[list]; }

 private:
  std::vector<uint16_t> rows_;
  std::vector<int64_t> ends_;
};

// The masks with a bit of `bits` set: from `from` their places, or the numbers that stand there.
int64_t select(const uint16_t* masks, int64_t count, uint16_t bits, const uint16_t* from, uint16_t* selected) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kMaskLanes) {
    const __mmask32 live = count - i >= kMaskLanes ? ~0u : (1u << (count - i)) - 1;
    const __m512i mask = _mm512_loadu_si512(masks + i);
    const __mmask32 is_set = _mm512_mask_test_epi16_mask(live, mask, _mm512_set1_epi16(static_cast<int16_t>(bits)));
    _mm512_storeu_si512(selected + found, _mm512_maskz_compress_epi16(is_set, _mm512_loadu_si512(from + i)));
    found += __builtin_popcount(is_set);
  }
  return found;
}

// A vector that counts for a row.
struct Hit {
  float distance;
  int32_t slot;
  uint16_t row;
};

// Of the rows from `row` on, how many fit a block.
int64_t block_size(const Sketched& set, const int64_t* near_NM, int64_t num_near, int64_t row, int64_t last) {
  int64_t scores = 0, size = 0;
  for (; size < std::min(kBlockRows, last - row); ++size) {
    for (int64_t i = 0; i < num_near; ++i) {
      const int64_t list = near_NM[(row + size) * num_near + i];
      scores += (set.first_leaf_I[list + 1] - set.first_leaf_I[list]) * kLeaf;
    }
    if (size > 0 && scores > kMostNearScores) break;
  }
  return size;
}

// What one thread needs to search its rows.
class SketchSearcher {
 public:
  SketchSearcher(const Sketched& set, int64_t k)
      : set_(set),
        k_(k),
        places_(kBlockRows + kMaskLanes),
        masks_(kBlockRows + kMaskLanes),
        leaf_masks_(kBlockRows + kMaskLanes),
        queue_(kBlockRows + kMaskLanes),
        chosen_(kBlockRows + kMaskLanes),
        scores_((kBlockRows + 1) * kLeaf),
        leaf_limits_(kBlockRows),
        score_limits_(kBlockRows),
        full_limits_(kBlockRows),
        measured_B_(kBlockRows),
        terms_D_(terms_size(set.dim)) {
    std::iota(places_.begin(), places_.end(), 0);
  }

  // A block of rows: their digits, their vectors, the lists that they probe, the nearest of these.
  struct Block {
    const int8_t* digits;
    const int8_t* rest;
    const float* x_BD;
    const int64_t* probes_BI;
    const int64_t* near_BM;
    int64_t num_rows, num_probes, num_near;
  };

  void search(const Block& block, int64_t* numbers_Bk, float* distances_Bk) {
    block_ = block;
    set_limits();
    probing_.sort(block.probes_BI, block.num_rows, block.num_probes, set_.num_lists);
    for (int64_t row = 0; row < block.num_rows; ++row) measured_B_[row].clear();
    for (int64_t list = 0; list < set_.num_lists; ++list)
      if (probing_.count(list)) scan_list(list);
    sort_hits();
    decide(numbers_Bk, distances_Bk);
  }

 private:
  const int8_t* digits_of(int64_t row) const { return block_.digits + row * kDigits; }

  void score(int64_t leaf, const uint16_t* rows, int64_t num_rows) {
    // The next one comes from memory while this one is in use.
    const uint8_t* next = set_.leaves + (leaf + 1) * kLeafBytes;
    for (int64_t byte = 0; byte < kLeafBytes; byte += kDigits) _mm_prefetch(next + byte, _MM_HINT_T0);
    score_leaf(set_.leaves + leaf * kLeafBytes, set_.bias + leaf * kLeaf, block_.digits, rows, num_rows,
               score_limits_.data(), scores_.data(), leaf_masks_.data());
  }

  int32_t full_score(int32_t score, int64_t row, int64_t slot) const {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < set_.rest_width; d += kDigits)
      sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(set_.rest + slot * set_.rest_width + d),
                                _mm512_loadu_si512(block_.rest + row * set_.rest_width + d));
    return score + _mm512_reduce_add_epi32(sum);
  }

  // What counts for a row is told by the best scores among its nearest lists.
  void set_limits() {
    probing_.sort(block_.near_BM, block_.num_rows, block_.num_near, set_.num_lists);
    score_near_lists();
    for (int64_t row = 0; row < block_.num_rows; ++row) {
      const int32_t* scores = near_scores_.get() + near_starts_[row];
      const int64_t count = near_starts_[row + 1] - near_starts_[row];
      const int32_t best = kth_greatest(scores, count, set_.rank);
      leaf_limits_[row] = lowered(best, set_.leaf_margin);
      score_limits_[row] = lowered(best, set_.score_margin);
      find_near(row, scores);
      for (size_t i = 0; i < slots_.size(); ++i) near_full_[i] = full_score(near_full_[i], row, slots_[i]);
      const int64_t num_full = static_cast<int64_t>(near_full_.size());
      full_limits_[row] = lowered(kth_greatest(near_full_.data(), num_full, set_.rank), set_.full_margin);
    }
  }

  // All scores of the nearest lists, a row's side by side: list after list, ascending.
  void score_near_lists() {
    near_starts_.assign(block_.num_rows + 1, 0);
    sorted_near_.assign(block_.near_BM, block_.near_BM + block_.num_rows * block_.num_near);
    for (int64_t row = 0; row < block_.num_rows; ++row) {
      int64_t* near = &sorted_near_[row * block_.num_near];
      std::sort(near, near + block_.num_near);
      int64_t leaves = 0;
      for (int64_t i = 0; i < block_.num_near; ++i) leaves += set_.first_leaf_I[near[i] + 1] - set_.first_leaf_I[near[i]];
      near_starts_[row + 1] = near_starts_[row] + leaves * kLeaf;
    }
    // All of it is written below: zeros first would cost as much again.
    near_scores_.reset(new int32_t[near_starts_.back()]);
    near_ends_.assign(near_starts_.begin(), near_starts_.end() - 1);
    for (int64_t list = 0; list < set_.num_lists; ++list) {
      const uint16_t* rows = probing_.rows(list);
      const int64_t count = probing_.count(list);
      if (count == 0) continue;
      for (int64_t number = set_.first_leaf_I[list]; number < set_.first_leaf_I[list + 1]; ++number) {
        score(number, rows, count);
        for (int64_t i = 0; i < count; ++i) {
          _mm512_storeu_si512(near_scores_.get() + near_ends_[rows[i]], _mm512_loadu_si512(&scores_[i * kLeaf]));
          near_ends_[rows[i]] += kLeaf;
        }
      }
    }
  }

  // The slots of a row's nearest lists whose scores reach its limit, and these scores. What is
  // needed of them next comes from memory meanwhile.
  void find_near(int64_t row, const int32_t* scores) {
    slots_.clear();
    near_full_.clear();
    for (int64_t i = 0; i < block_.num_near; ++i) {
      const int64_t list = sorted_near_[row * block_.num_near + i];
      for (int64_t leaf = set_.first_leaf_I[list]; leaf < set_.first_leaf_I[list + 1]; ++leaf, scores += kLeaf) {
        unsigned left = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(scores), _mm512_set1_epi32(score_limits_[row]));
        for (; left; left &= left - 1) {
          const int lane = __builtin_ctz(left);
          slots_.push_back(static_cast<int32_t>(leaf * kLeaf + lane));
          near_full_.push_back(scores[lane]);
          _mm_prefetch(set_.rest + slots_.back() * set_.rest_width, _MM_HINT_T0);
        }
      }
    }
  }

  void scan_list(int64_t list) {
    const uint16_t* rows = probing_.rows(list);
    const int64_t num_rows = probing_.count(list);
    const int64_t first_leaf = set_.first_leaf_I[list], last_leaf = set_.first_leaf_I[list + 1];
    for (int64_t heads = 0; heads < set_.first_head_I[list + 1] - set_.first_head_I[list]; ++heads) {
      const int64_t held = set_.first_head_I[list] + heads;
      score_leaf(set_.heads + held * kLeafBytes, set_.head_bias + held * kLeaf, block_.digits, rows, num_rows,
                 leaf_limits_.data(), scores_.data(), masks_.data());
      const int64_t first = first_leaf + heads * kLeaf, count = std::min(kLeaf, last_leaf - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t queued = select(masks_.data(), num_rows, 1u << i, rows, queue_.data());
        if (queued) scan_leaf(first + i, queued);
      }
      measure_hits(list);
      if (num_hits_ > kMostHits) sort_hits();
    }
  }

  void scan_leaf(int64_t number, int64_t num_rows) {
    const uint8_t* next_rest = set_.rest + (number + 1) * kLeaf * set_.rest_width;
    for (int64_t byte = 0; byte < std::min(kLeafBytes, kLeaf * set_.rest_width); byte += kDigits)
      _mm_prefetch(next_rest + byte, _MM_HINT_T0);
    score(number, queue_.data(), num_rows);
    const int64_t num_chosen = select(leaf_masks_.data(), num_rows, 0xffff, places_.data(), chosen_.data());
    for (int64_t i = 0; i < num_chosen; ++i) keep(number, chosen_[i]);
  }

  void keep(int64_t number, int64_t place) {
    const uint16_t row = queue_[place];
    if (num_hits_ + kLeaf > static_cast<int64_t>(hits_.size())) hits_.resize(2 * hits_.size() + kLeaf);
    for (unsigned left = leaf_masks_[place]; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const int32_t slot = static_cast<int32_t>(number * kLeaf + lane);
      hits_[num_hits_] = {0.0F, slot, row};
      num_hits_ += full_score(scores_[place * kLeaf + lane], row, slot) >= full_limits_[row];
    }
  }

  // Measure what counts of a list, while its vectors lie side by side.
  void measure_hits(int64_t list) {
    const float* vectors = set_.vectors_I[list];
    const int64_t first_slot = set_.first_leaf_I[list] * kLeaf;
    const auto vector_of_hit = [&](int64_t i) { return vectors + (hits_[i].slot - first_slot) * set_.dim; };
    for (int64_t i = num_measured_; i < std::min(num_measured_ + kAhead, num_hits_); ++i) prefetch(vector_of_hit(i), set_.dim);
    for (int64_t i = num_measured_; i < num_hits_; ++i) {
      if (i + kAhead < num_hits_) prefetch(vector_of_hit(i + kAhead), set_.dim);
      hits_[i].distance = rough_distance(block_.x_BD + hits_[i].row * set_.dim, vector_of_hit(i), set_.dim);
    }
    num_measured_ = num_hits_;
  }

  // Hand the hits to their rows, which keep what may be among their nearest.
  void sort_hits() {
    for (int64_t i = 0; i < num_hits_; ++i) measured_B_[hits_[i].row].push_back({hits_[i].distance, hits_[i].slot});
    num_hits_ = num_measured_ = 0;
    for (int64_t row = 0; row < block_.num_rows; ++row)
      if (static_cast<int64_t>(measured_B_[row].size()) >= k_) keep_nearest(measured_B_[row], k_, set_.dim);
  }

  void decide(int64_t* numbers_Bk, float* distances_Bk) {
    for (int64_t row = 0; row < block_.num_rows; ++row)
      decide_nearest(
          measured_B_[row], block_.x_BD + row * set_.dim, set_.dim, k_,
          [this](int64_t slot) { return vector_of(slot); }, [this](int64_t slot) { return number_of(slot); }, terms_D_,
          decided_, numbers_Bk + row * k_, distances_Bk + row * k_);
  }

  const float* vector_of(int64_t slot) const {
    const int64_t list = set_.list_L[slot / kLeaf];
    return set_.vectors_I[list] + (slot - set_.first_leaf_I[list] * kLeaf) * set_.dim;
  }

  int64_t number_of(int64_t slot) const {
    const int64_t list = set_.list_L[slot / kLeaf];
    return set_.numbers_I[list][slot - set_.first_leaf_I[list] * kLeaf];
  }

  const Sketched& set_;
  int64_t k_;
  Block block_{};
  Probing probing_;
  std::vector<uint16_t> places_, masks_, leaf_masks_, queue_, chosen_;
  std::vector<int32_t> scores_, leaf_limits_, score_limits_, full_limits_, near_full_;
  std::unique_ptr<int32_t[]> near_scores_;
  std::vector<int64_t> near_starts_, near_ends_, sorted_near_;
  std::vector<Hit> hits_;
  int64_t num_hits_ = 0, num_measured_ = 0;
  std::vector<int32_t> slots_;
  std::vector<std::vector<Rough>> measured_B_;
  std::vector<Decided> decided_;
  std::vector<double> terms_D_;
};

}  // namespace

extern "C" {

void search_sketched(const Sketched* set, const int8_t* digits_NS, const int8_t* rest_NW, const float* x_ND,
                     int64_t num_rows, int64_t k, const int64_t* probes_NI, int64_t num_probes,
                     const int64_t* near_NM, int64_t num_near, int64_t* numbers_Nk, float* distances_Nk,
                     int64_t num_threads) {
  const int64_t size = set->first_leaf_I[set->num_lists] * kLeaf / std::max<int64_t>(1, set->num_lists);
  const int64_t parts = parts_for(num_rows * num_probes * size * kDigits, num_threads, num_rows);
  run_parts(parts, [=](int64_t part) {
    SketchSearcher searcher(*set, k);
    const int64_t last = num_rows * (part + 1) / parts;
    for (int64_t row = num_rows * part / parts, size; row < last; row += size) {
      size = block_size(*set, near_NM, num_near, row, last);
      const SketchSearcher::Block block{
          digits_NS + row * kDigits, rest_NW + row * set->rest_width, x_ND + row * set->dim,
          probes_NI + row * num_probes, near_NM + row * num_near, size, num_probes, num_near};
      searcher.search(block, numbers_Nk + row * k, distances_Nk + row * k);
    }
  });
}

}  // extern "C"
