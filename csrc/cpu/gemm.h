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

// A (m, k) with any strides, so transposed as well.
template <class C>
struct Left {
  const C* data;
  int64_t row, column;
};

// Rows of whole vectors.
template <class C>
struct Rows {
  C* data;
  int64_t row;
};

template <class C, int rows, int vectors>
INLINE void gemm_block(int64_t k, Left<C> a, const C* b, int64_t b_row, C* c, int64_t c_row,
                       bool add) {
  using V = typename Simd<C>::Vector;
  V sum[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j)
      sum[i][j] = add ? load<V>(c + i * c_row + j * Simd<C>::lanes) : V{};
  for (int64_t at = 0; at < k; ++at) {
    V right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = load<V>(b + at * b_row + j * Simd<C>::lanes);
    for (int i = 0; i < rows; ++i) {
      const C left = a.data[i * a.row + at * a.column];
      for (int j = 0; j < vectors; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) store(c + i * c_row + j * Simd<C>::lanes, sum[i][j]);
}

template <class C, int vectors>
INLINE void gemm_columns(int64_t m, int64_t k, Left<C> a, const C* b, int64_t b_row, C* c,
                         int64_t c_row, bool add, int64_t reach) {
  int64_t i = 0;
  const auto block = [&](auto rows) LAMBDA {
    constexpr int count = sizeof(rows);
    for (; i + count <= m; i += count)
      gemm_block<C, count, vectors>(smaller(k, i + count + reach),
                                    {a.data + i * a.row, a.row, a.column}, b, b_row,
                                    c + i * c_row, c_row, add);
  };
  struct One { char x[1]; };
  struct Two { char x[2]; };
  struct All { char x[kRows]; };
  block(All());
  block(Two());
  block(One());
}

// C (m, n) = A (m, k) · B (k, n), or += it. n is a whole number of vectors. With a `reach`,
// row i of A is taken to be zero from column i + kRows + reach on (at the latest): what a
// triangle has there is never read.
template <class C>
void gemm(int64_t m, int64_t n, int64_t k, Left<C> a, Rows<const C> b, Rows<C> c, bool add,
          int64_t reach) {
  constexpr int64_t lanes = Simd<C>::lanes;
  int64_t j = 0;
  for (; j + kVectors * lanes <= n; j += kVectors * lanes)
    gemm_columns<C, kVectors>(m, k, a, b.data + j, b.row, c.data + j, c.row, add, reach);
  for (; j < n; j += lanes)
    gemm_columns<C, 1>(m, k, a, b.data + j, b.row, c.data + j, c.row, add, reach);
}

constexpr int64_t kEverything = int64_t(1) << 40;  // the reach of a full matrix

// (m, n) → (n, m)
template <class C>
INLINE void transpose(int64_t m, int64_t n, const C* from, int64_t from_row, C* to,
                      int64_t to_row) {
  for (int64_t i0 = 0; i0 < m; i0 += 16)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = i0; i < smaller(m, i0 + 16); ++i)
        to[j * to_row + i] = from[i * from_row + j];
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif
