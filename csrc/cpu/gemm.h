// Small matrix products in cache, for kernels: C (+)= A · B.

#pragma once

#include "rows.h"

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

// A register block: rows of C that are computed at once, and vectors of each.
constexpr int kRows = 6;
constexpr int kVectors = kRegisters == 32 ? 4 : 2;

template <class C>
FASTMIX_INLINE int64_t padded(int64_t count) {
  return (count + Simd<C>::lanes - 1) / Simd<C>::lanes * Simd<C>::lanes;
}

// A (m, k) with any strides, so transposed as well, and of any type that C is computed for.
template <class A>
struct Left {
  const A* data;
  int64_t row, column;
};

// RowMajor of whole vectors.
template <class C>
struct RowMajor {
  C* data;
  int64_t row;
};

// A square of as many rows as lanes: every step exchanges one bit of the row's number with
// that bit of the lane's.
template <class C, int s = 1>
FASTMIX_INLINE void turn(typename Simd<C>::Vector* rows) {
  constexpr int lanes = Simd<C>::lanes;
  if constexpr (s < lanes) {
    for (int i = 0; i < lanes; ++i)
      if (!(i & s)) exchange<s>(rows[i], rows[i + s], Indices<lanes>());
    turn<C, 2 * s>(rows);
  }
}

// (m, n) → (n, m)
template <class C>
void transpose(int64_t m, int64_t n, const C* from, int64_t from_row, C* to, int64_t to_row) {
  using V = typename Simd<C>::Vector;
  constexpr int64_t lanes = Simd<C>::lanes;
  const int64_t squares_m = m / lanes * lanes, squares_n = n / lanes * lanes;
  for (int64_t i = 0; i < squares_m; i += lanes)
    for (int64_t j = 0; j < squares_n; j += lanes) {
      V rows[lanes];
      for (int r = 0; r < lanes; ++r) rows[r] = load<V>(from + (i + r) * from_row + j);
      turn<C>(rows);
      for (int r = 0; r < lanes; ++r) store(to + (j + r) * to_row + i, rows[r]);
    }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = i < squares_m ? squares_n : 0; j < n; ++j)
      to[j * to_row + i] = from[i * from_row + j];
}

// Row i of A is used from column i + low up to before column i + high: a triangle or a band.
// Nothing outside is used, so nothing there can spoil a result.
struct Band {
  int64_t low, high;
};
constexpr int64_t kFar = int64_t(1) << 40;
constexpr Band kFull{-kFar, kFar}, kLower{-kFar, 1}, kUpper{0, kFar};

// Where products go: each row is scaled by its factor, if there are factors, and added to C's or
// put in its place.
template <class C>
struct Into {
  bool add;
  const C* scale;
};

// `rows` rows of C from row i of A on.
template <class C, int rows, int vectors, class A>
FASTMIX_INLINE void gemm_block(int64_t i, int64_t k, Left<A> a, const C* b, int64_t b_row, C* c,
                               int64_t c_row, Into<C> into, Band band) {
  using V = typename Simd<C>::Vector;
  V sum[rows][vectors] = {};
  const A* const left = a.data + i * a.row;
  const auto products = [&](int64_t at, auto uses) FASTMIX_LAMBDA {
    V right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = load<V>(b + at * b_row + j * Simd<C>::lanes);
    for (int r = 0; r < rows; ++r)
      if (uses(r)) {
        const C factor = load<C>(left + r * a.row + at * a.column);
        for (int j = 0; j < vectors; ++j) sum[r][j] += factor * right[j];
      }
  };
  // What all rows share lies between columns that only some of them use.
  const int64_t start = larger(0, i + band.low), stop = smaller(k, i + rows - 1 + band.high);
  const int64_t first = smaller(k, larger(0, i + rows - 1 + band.low));
  const int64_t end = larger(first, smaller(k, i + band.high));
  const auto some = [&](int64_t from, int64_t to) FASTMIX_LAMBDA {
    for (int64_t at = from; at < to; ++at) {
      const int64_t column = at - i;
      products(at, [&](int r)
                       FASTMIX_LAMBDA { return column - r >= band.low && column - r < band.high; });
    }
  };
  some(start, first);
  for (int64_t at = first; at < end; ++at) products(at, [](int) FASTMIX_LAMBDA { return true; });
  some(end, stop);
  for (int r = 0; r < rows; ++r) {
    const C by = into.scale ? into.scale[i + r] : C(1);
    for (int j = 0; j < vectors; ++j) {
      C* to = c + (i + r) * c_row + j * Simd<C>::lanes;
      store(to, into.add ? load<V>(to) + by * sum[r][j] : by * sum[r][j]);
    }
  }
}

// Products that are summed one after the other; the sums of so many are added up. Rounding
// errors grow with both, and B's rows stay in cache.
constexpr int64_t kDepth = 128;

// Asks for rows of A that lie too far apart for hardware to foresee the next one.
template <class A>
FASTMIX_INLINE void prefetch_rows(int64_t i, int64_t end, int64_t k, Left<A> a) {
  for (; i < end; ++i)
    for (int64_t at = 0; at < k; at += 64 / sizeof(A))
      __builtin_prefetch(a.data + i * a.row + at, 0, 3);
}

template <int count>
struct Rows {
  constexpr int operator()() const { return count; }
};

// With few registers panels of B are narrow and many.
constexpr bool kNarrow = kRegister < 64;

template <class C, int vectors, class A>
FASTMIX_INLINE void gemm_columns(int64_t m, int64_t k, Left<A> a, const C* b, int64_t b_row, C* c,
                                 int64_t c_row, Into<C> into, Band band, bool first) {
  int64_t i = 0;
  const auto blocks = [&](auto rows, int64_t end) FASTMIX_LAMBDA {
    for (; i + rows() <= end; i += rows()) {
      if (first) prefetch_rows(i + rows(), smaller(m, i + 2 * rows()), k, a);
      gemm_block<C, rows(), vectors>(i, k, a, b, b_row, c, c_row, into, band);
    }
  };
  // Two rows of narrow vectors are so few sums that products wait for them: eight are four and
  // four.
  blocks(Rows<kRows>(), kNarrow && m % kRows == 2 ? m - 8 : m);
  if constexpr (kNarrow) blocks(Rows<4>(), m);
  blocks(Rows<2>(), m);
  blocks(Rows<1>(), m);
}

template <class C, class A>
FASTMIX_INLINE void gemm_panels(int64_t m, int64_t n, int64_t k, Left<A> a, RowMajor<const C> b,
                                RowMajor<C> c, Into<C> into, Band band) {
  constexpr int64_t lanes = Simd<C>::lanes;
  constexpr int64_t width = kVectors * lanes;
  const bool far = a.column == 1 && a.row > 4 * kDepth;
  int64_t j = 0;
  for (; j + width <= n; j += width) {
    if (kNarrow && m > 12 * kRows && b.row > width) {
      // Side by side, rows do not crowd a few places of the caches.
      C panel[kDepth * width];
      for (int64_t at = 0; at < k; ++at)
        memcpy(panel + at * width, b.data + at * b.row + j, sizeof(C) * width);
      gemm_columns<C, kVectors>(m, k, a, panel, width, c.data + j, c.row, into, band,
                                far && j == 0);
    } else {
      gemm_columns<C, kVectors>(m, k, a, b.data + j, b.row, c.data + j, c.row, into, band,
                                far && j == 0);
    }
  }
  if constexpr (kVectors > 2)
    for (; j + 2 * lanes <= n; j += 2 * lanes)
      gemm_columns<C, 2>(m, k, a, b.data + j, b.row, c.data + j, c.row, into, band, far && j == 0);
  for (; j < n; j += lanes)
    gemm_columns<C, 1>(m, k, a, b.data + j, b.row, c.data + j, c.row, into, band, far && j == 0);
}

// Rows of A that pass by every panel before the next ones do: as many as stay in the second-level
// cache meanwhile. Where A's columns lie far apart, they are turned into rows for all panels.
template <class C>
constexpr int64_t kStripRows = kNarrow ? 768 / sizeof(C) : kFar;

// C (m, n) = scale ∘ A (m, k) · B (k, n), or += it. n is a whole number of vectors; scale are
// factors of rows, or null.
template <class C, class A = C>
void gemm(int64_t m, int64_t n, int64_t k, Left<A> a, RowMajor<const C> b, RowMajor<C> c, bool add,
          Band band, const C* scale = nullptr) {
  C turned[kNarrow ? kStripRows<C> * kDepth : 1];
  for (int64_t i = 0; i < m; i += kStripRows<C>) {
    const int64_t rows = smaller(m - i, kStripRows<C>);
    Into<C> into{add, scale ? scale + i : nullptr};
    int64_t at = 0;
    do {
      const int64_t depth = smaller(kDepth, k - at);
      Left<A> left{a.data + i * a.row + at * a.column, a.row, a.column};
      const RowMajor<const C> right{b.data + at * b.row, b.row};
      const RowMajor<C> to{c.data + i * c.row, c.row};
      const Band part{band.low == -kFar ? -kFar : band.low + i - at,
                      band.high == kFar ? kFar : band.high + i - at};
      const bool used = part.low < depth && rows - 1 + part.high > 0;
      if constexpr (kNarrow && !kHalf<A>)
        if (used && a.column >= kDepth && n > kVectors * Simd<C>::lanes) {
          transpose(depth, rows, left.data, left.column, turned, kDepth);
          left = {turned, kDepth, 1};
        }
      if (used || !into.add) gemm_panels<C>(rows, n, depth, left, right, to, into, part);
      into.add = true;
      at += depth;
    } while (at < k);
  }
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif
