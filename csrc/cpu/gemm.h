// Small matrix products in cache, for kernels: C (+)= A · B.

#pragma once

#include "rows.h"

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

// A register block: rows of C that are computed at once, and vectors of each.
constexpr int kRows = 6;
constexpr int kVectors = kRegister == 64 ? 4 : 2;

template <class C>
INLINE int64_t padded(int64_t count) {
  return (count + Simd<C>::lanes - 1) / Simd<C>::lanes * Simd<C>::lanes;
}

// A (m, k) with any strides, so transposed as well, and of any type that C is computed for.
template <class A>
struct Left {
  const A* data;
  int64_t row, column;
};

// Rows of whole vectors.
template <class C>
struct Rows {
  C* data;
  int64_t row;
};

template <class C, int rows, int vectors, class A>
INLINE void gemm_block(int64_t k, Left<A> a, const C* b, int64_t b_row, C* c, int64_t c_row,
                       bool add) {
  using V = typename Simd<C>::Vector;
  V sum[rows][vectors] = {};
  for (int64_t at = 0; at < k; ++at) {
    V right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = load<V>(b + at * b_row + j * Simd<C>::lanes);
    for (int i = 0; i < rows; ++i) {
      const C left = load<C>(a.data + i * a.row + at * a.column);
      for (int j = 0; j < vectors; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) {
      C* to = c + i * c_row + j * Simd<C>::lanes;
      store(to, add ? load<V>(to) + sum[i][j] : sum[i][j]);
    }
}

// Row i of A is used from column i + low up to before column i + high: a triangle or a band.
// Nothing outside is read, so nothing there can spoil a result.
struct Band {
  int64_t low, high;
};
constexpr int64_t kFar = int64_t(1) << 40;
constexpr Band kFull{-kFar, kFar}, kLower{-kFar, 1}, kUpper{0, kFar};

// One row of C += columns first … end-1 of A times those rows of B.
template <class C, class A>
INLINE void gemm_row(int64_t first, int64_t end, const A* a, int64_t a_column, const C* b,
                     int64_t b_row, C* c, int64_t n) {
  for (int64_t at = first; at < end; ++at)
    each_vector<C>(n, [&](auto zero, int64_t j) LAMBDA {
      using V = decltype(zero);
      store(c + j, load<V>(c + j) + load<C>(a + at * a_column) * load<V>(b + at * b_row + j));
    });
}

template <class C, int rows, int vectors, class A>
INLINE void gemm_rows(int64_t i, int64_t k, Left<A> a, const C* b, int64_t b_row, C* c,
                      int64_t c_row, bool add, Band band) {
  // What all rows of the block share; then what each has before and after that.
  int64_t first = larger(0, i + rows - 1 + band.low), end = smaller(k, i + band.high);
  if (end < first) first = end = smaller(k, larger(0, first));
  const Left<A> shared{a.data + i * a.row + first * a.column, a.row, a.column};
  gemm_block<C, rows, vectors>(end - first, shared, b + first * b_row, b_row, c + i * c_row,
                               c_row, add);
  if (band.low == -kFar && band.high == kFar) return;
  for (int64_t r = i; r < i + rows; ++r) {
    const A* row = a.data + r * a.row;
    gemm_row<C>(larger(0, r + band.low), smaller(first, r + band.high), row, a.column, b, b_row,
                c + r * c_row, vectors * Simd<C>::lanes);
    gemm_row<C>(larger(end, r + band.low), smaller(k, r + band.high), row, a.column, b, b_row,
                c + r * c_row, vectors * Simd<C>::lanes);
  }
}

template <class C, int vectors, class A>
INLINE void gemm_columns(int64_t m, int64_t k, Left<A> a, const C* b, int64_t b_row, C* c,
                         int64_t c_row, bool add, Band band) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows)
    gemm_rows<C, kRows, vectors>(i, k, a, b, b_row, c, c_row, add, band);
  for (; i + 2 <= m; i += 2) gemm_rows<C, 2, vectors>(i, k, a, b, b_row, c, c_row, add, band);
  for (; i < m; ++i) gemm_rows<C, 1, vectors>(i, k, a, b, b_row, c, c_row, add, band);
}

// Products that are summed one after the other; the sums of so many are added up. Rounding
// errors grow with both, and B's rows stay in cache.
constexpr int64_t kDepth = 128;

// C (m, n) = A (m, k) · B (k, n), or += it. n is a whole number of vectors.
template <class C, class A = C>
void gemm(int64_t m, int64_t n, int64_t k, Left<A> a, Rows<const C> b, Rows<C> c, bool add,
          Band band) {
  constexpr int64_t lanes = Simd<C>::lanes;
  int64_t at = 0;
  do {
    const int64_t depth = smaller(kDepth, k - at);
    const Left<A> left{a.data + at * a.column, a.row, a.column};
    const C* right = b.data + at * b.row;
    const Band part{band.low == -kFar ? -kFar : band.low - at,
                    band.high == kFar ? kFar : band.high - at};
    int64_t j = 0;
    for (; j + kVectors * lanes <= n; j += kVectors * lanes)
      gemm_columns<C, kVectors>(m, depth, left, right + j, b.row, c.data + j, c.row, add, part);
    for (; j < n; j += lanes)
      gemm_columns<C, 1>(m, depth, left, right + j, b.row, c.data + j, c.row, add, part);
    add = true;
    at += depth;
  } while (at < k);
}

// A square of as many rows as lanes: every step exchanges one bit of the row's number with
// that bit of the lane's.
template <class C, int s = 1>
INLINE void turn(typename Simd<C>::Vector* rows) {
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

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif
