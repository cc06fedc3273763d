// Products by a CPU's matrix unit (AMX): C (+)= A · B, as gemm has it, where C is float and all of
// A's numbers are bfloat16's.
//
// The unit multiplies bfloat16 numbers exactly and sums in float. A float is the sum of three of
// them, its parts: the first eight digits, the next, the last. So three products leave nothing out.
//
// The unit takes numbers below 2⁻¹²⁶ for zeros; infinity leaves NaN as its other parts, and times
// another number's parts of 0 is NaN. What may have suffered from either is computed again without
// the unit.

#pragma once

#include "gemm.h"

#ifdef FASTMIX_CPU

// g++'s header; clang's has another name, and what it makes of this has not been tried. build.py
// finds out whether the assembler knows the instructions.
#if defined(__AVX512F__) && defined(__x86_64__) && __has_include(<amxtileintrin.h>) && \
    !defined(FASTMIX_NO_MATRIX_UNIT)
#define FASTMIX_MATRIX_UNIT
#endif

namespace fastmix::FASTMIX_CPU {
namespace {

#ifdef FASTMIX_MATRIX_UNIT

// Of the unit's eight tiles, 16 rows of 64 bytes, four are of sums (16, 16), two of A (16, 32) and
// two of B: 32 rows of it in pairs, (16, 16 · 2). Strips are rows of A, panels columns of B.
constexpr int64_t kSide = 16, kPairs = 2 * kSide, kTile = kSide * kPairs;
constexpr int64_t kStripTiles = 2, kPanelTiles = 4, kDepthTiles = kDepth / kPairs;
constexpr int64_t kStripPart = kDepthTiles * kStripTiles * kTile,
                  kPanelPart = kDepthTiles * kPanelTiles * kTile;
constexpr int64_t kUnitRows = kStripTiles * kSide, kUnitColumns = kPanelTiles * kSide;

#define FASTMIX_TILES __attribute__((target("amx-tile,amx-bf16")))

// While one exists, its thread's tiles are as products need them.
class Tiles {
 public:
  explicit Tiles(bool used) : used_(used) {
    if (used_) configure();
  }
  ~Tiles() {
    if (used_) release();
  }

 private:
  FASTMIX_TILES static void configure() {
    struct {
      uint8_t palette = 1, others[15] = {};
      uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  FASTMIX_TILES static void release() { _tile_release(); }

  bool used_;
};

// What A may be stored as.
template <class A>
constexpr bool kUnitTakes = false;
template <>
constexpr bool kUnitTakes<Bf16> = true;
template <>
constexpr bool kUnitTakes<float> = true;

// A strip of A, and the parts of a panel of B, tile after tile: (part, depth, row or column).
struct Operands {
  alignas(64) uint16_t a[kStripPart], b[3 * kPanelPart];
};

// sums (rows, columns of tiles) from the depth tiles first … end-1, smallest parts first.
template <int rows, int columns>
FASTMIX_TILES __attribute__((noinline)) void sum_tiles(const Operands& operands, int64_t first,
                                                       int64_t end, int64_t column, float* sums) {
  asm volatile("" : : : "memory");  // gcc does not know that a tile's load reads memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int part = 2; part >= 0; --part) {
    const uint16_t *a = operands.a + first * kStripTiles * kTile,
                   *b = operands.b + part * kPanelPart + (first * kPanelTiles + column) * kTile;
    for (int64_t at = first; at < end; ++at) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (columns > 1) {
        _tile_loadd(7, b + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (rows > 1) {
        _tile_loadd(5, a + kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (columns > 1) _tile_dpbf16ps(3, 5, 7);
      }
      a += kStripTiles * kTile;
      b += kPanelTiles * kTile;
    }
  }
  constexpr int64_t row = kUnitColumns * sizeof(float);
  float* const to = sums + column * kSide;
  _tile_stored(0, to, row);
  if constexpr (columns > 1) _tile_stored(1, to + kSide, row);
  if constexpr (rows > 1) _tile_stored(2, to + kSide * kUnitColumns, row);
  if constexpr (rows > 1 && columns > 1) _tile_stored(3, to + kSide * kUnitColumns + kSide, row);
}

typedef uint16_t Shorts __attribute__((vector_size(64)));

// The upper halves of floats: those of a, then those of b.
template <int... I>
FASTMIX_INLINE Shorts upper_halves(Words a, Words b, Indices<0, I...>) {
  return __builtin_shufflevector((Shorts)a, (Shorts)b, (2 * I + 1)...);
}

// The smallest of the numbers that are not 0, in each lane: its bits without the sign, less 1. At
// first those of infinity.
template <class Bits>
struct Least {
  static constexpr uint32_t size = sizeof(Bits{}[0]) == 2 ? 0x7fff : 0x7fffffff,
                            largest = sizeof(Bits{}[0]) == 2 ? 0x7f7f : 0x7f7fffff;
  Bits less = Bits{} + largest;

  FASTMIX_INLINE void take(Bits bits) {
    const Bits others = (bits & (Bits{} + size)) - 1;
    less = others < less ? others : less;
  }
};

// Lanes first … end-1 of those from `at` on.
FASTMIX_INLINE uint32_t lanes_of(int64_t first, int64_t end, int64_t at) {
  const uint64_t below = (uint64_t(1) << smaller(32, larger(0, end - at))) - 1,
                 before = (uint64_t(1) << smaller(32, larger(0, first - at))) - 1;
  return static_cast<uint32_t>(below & ~before);
}

// The part of a strip's row that is used.
struct Used {
  int64_t first, end;

  Used(int64_t r, int64_t depth, Band band)
      : first(larger(0, r + band.low)), end(smaller(depth, r + band.high)) {}
};

FASTMIX_INLINE float number_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The depth tiles first … end-1 of a strip, with zeros outside the band and up to whole tiles.
// Returns their smallest number but 0. `whole`: nothing is outside.
template <bool whole, class A>
float pack_strip(int64_t rows, int64_t depth, int64_t first, int64_t end, Left<A> a, Band band,
                 uint16_t* strip) {
  Least<Shorts> least;
  for (int64_t r = 0; r < (rows + kSide - 1) / kSide * kSide; ++r) {
    const Used used(r, r < rows ? depth : 0, band);
    uint16_t* to = strip + first * kStripTiles * kTile + r / kSide * kTile + r % kSide * kPairs;
    const A* from = a.data + r * a.row + first * kPairs;
    for (int64_t at = first; at < end; ++at, from += kPairs, to += kStripTiles * kTile) {
      const uint32_t lanes = whole ? ~0u : lanes_of(used.first, used.end, at * kPairs);
      Shorts x;
      if constexpr (kHalf<A>) {
        x = (Shorts)_mm512_maskz_loadu_epi16(lanes, from);
      } else {
        const auto low = static_cast<uint16_t>(lanes), high = static_cast<uint16_t>(lanes >> 16);
        x = upper_halves((Words)_mm512_maskz_loadu_ps(low, from),
                         (Words)_mm512_maskz_loadu_ps(high, from + kSide), Indices<kPairs>());
      }
      least.take(x);
      store(to, x);
    }
  }
  const Words both = (Words)least.less, low = both << 16, high = both & 0xffff0000;
  return number_of(_mm512_reduce_min_epu32((__m512i)(low < high ? low : high)) + 0x10000);
}

// A panel's parts, with zeros up to whole tiles. Returns its smallest number but 0.
template <int column_tiles>
float pack_panel(int64_t depth, RowMajor<const float> b, uint16_t* parts) {
  Least<Words> least;
  const auto put = [&](int64_t at, Floats x, Floats y, int j) FASTMIX_LAMBDA {
    uint16_t* to = parts + (at / kPairs * kPanelTiles + j) * kTile + at % kPairs * kSide;
    for (int part = 0; part < 3; ++part, to += kPanelPart) {
      const Words upper = (Words)y & 0xffff0000;
      store(to, (Words)x >> 16 | upper);
      x -= (Floats)((Words)x & 0xffff0000);
      y -= (Floats)upper;
    }
  };
  for (int64_t at = 0; at < depth; at += 2) {
    const float* from = b.data + at * b.row;
    const bool two = at + 1 < depth;
    for (int j = 0; j < column_tiles; ++j, from += kSide) {
      const Floats x = load<Floats>(from), y = two ? load<Floats>(from + b.row) : Floats{};
      least.take((Words)x);
      least.take((Words)y);
      put(at, x, y, j);
    }
  }
  for (int64_t at = (depth + 1) / 2 * 2; at % kPairs; at += 2)
    for (int j = 0; j < column_tiles; ++j) put(at, Floats{}, Floats{}, j);
  return number_of(_mm512_reduce_min_epu32((__m512i)least.less) + 1);
}

template <int column_tiles>
bool finite(int64_t rows, const float* sums) {
  Words most{};
  for (int64_t r = 0; r < rows; ++r)
    for (int j = 0; j < column_tiles; ++j) {
      const Words size = (Words)load<Floats>(sums + r * kUnitColumns + j * kSide) & 0x7fffffff;
      most = size > most ? size : most;
    }
  return _mm512_reduce_max_epu32((__m512i)most) < 0x7f800000;
}

FASTMIX_INLINE float size_of(float x) { return x < 0 ? -x : x; }

// Whether zeros in the place of numbers below 2⁻¹²⁶ cannot have changed the sums: each is large
// beside 3 · kDepth products of 2⁻¹²⁶ and the largest number of its row or column. What is 0
// because its row or its column is was not changed either.
template <class A>
__attribute__((noinline)) bool large(int64_t rows, int64_t columns, int64_t depth, Left<A> a,
                                     RowMajor<const float> b, Band band, const float* sums) {
  float most[kUnitColumns] = {};
  for (int64_t at = 0; at < depth; ++at)
    for (int64_t j = 0; j < columns; ++j) {
      const float size = size_of(b.data[at * b.row + j]);
      most[j] = size > most[j] ? size : most[j];
    }
  bool all = true;
  for (int64_t r = 0; r < rows; ++r) {
    const Used used(r, depth, band);
    float most_of_row = 0;
    for (int64_t at = used.first; at < used.end; ++at) {
      const float size = size_of(load<float>(a.data + r * a.row + at * a.column));
      most_of_row = size > most_of_row ? size : most_of_row;
    }
    for (int64_t j = 0; j < columns; ++j)
      all &= most_of_row == 0 || most[j] == 0 ||
             size_of(sums[r * kUnitColumns + j]) >= 0x1p-92f * (most_of_row + most[j] + 1);
  }
  return all;
}

// C (rows, columns) = sums, or += them.
template <int column_tiles>
void put_sums(int64_t rows, const float* sums, RowMajor<float> c, bool add) {
  for (int64_t r = 0; r < rows; ++r)
    for (int j = 0; j < column_tiles; ++j) {
      float* to = c.data + r * c.row + j * kSide;
      const Floats sum = load<Floats>(sums + r * kUnitColumns + j * kSide);
      store(to, add ? load<Floats>(to) + sum : sum);
    }
}

// The columns of A that are rows in memory, as rows.
template <class A>
FASTMIX_INLINE Left<float> turned(int64_t rows, int64_t depth, Left<A> a, float* to) {
  for (int64_t r = 0; r < rows; r += kSide)
    for (int64_t at = 0; at < depth; at += kSide) {
      const auto lanes = static_cast<uint16_t>(lanes_of(0, rows, r));
      Floats square[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        const A* from = a.data + (at + i) * a.column + r;
        if (at + i >= depth) square[i] = Floats{};
        else if constexpr (sizeof(A) == 2)
          square[i] = A::wide((Halves)_mm256_maskz_loadu_epi16(lanes, from));
        else square[i] = (Floats)_mm512_maskz_loadu_ps(lanes, from);
      }
      turn<float>(square);
      for (int64_t i = 0; i < kSide; ++i) store(to + (r + i) * kDepth + at, square[i]);
    }
  return {to, kDepth, 1};
}

// A panel of unit_gemm.
template <int column_tiles, class A>
void unit_panel(int64_t m, int64_t k, Left<A> a, RowMajor<const float> b, RowMajor<float> c,
                bool add, Band band) {
  constexpr int64_t columns = column_tiles * kSide;
  Operands operands;
  alignas(64) float rows_of_columns[kUnitRows * kDepth], sums[kUnitRows * kUnitColumns];
  for (int64_t at = 0; at < k; at += kDepth, add = true) {
    const int64_t depth = smaller(kDepth, k - at);
    const RowMajor<const float> panel{b.data + at * b.row, b.row};
    float least_b = -1;  // until the panel is packed
    for (int64_t i = 0; i < m; i += kUnitRows) {
      const int64_t rows = smaller(m - i, kUnitRows);
      const Band part{band.low == -kFar ? -kFar : band.low + i - at,
                      band.high == kFar ? kFar : band.high + i - at};
      const int64_t first = larger(0, part.low) / kPairs,
                    end = (smaller(depth, larger(0, rows - 1 + part.high)) + kPairs - 1) / kPairs;
      if (first >= end && add) continue;
      if (least_b < 0) least_b = pack_panel<column_tiles>(depth, panel, operands.b);
      const Left<A> left{a.data + i * a.row + at * a.column, a.row, a.column};
      const bool whole = rows % kSide == 0 && end * kPairs <= depth && part.low <= 1 - rows &&
                         part.high >= end * kPairs;
      const auto pack = [&](auto left) FASTMIX_LAMBDA {
        return whole ? pack_strip<true>(rows, depth, first, end, left, part, operands.a)
                     : pack_strip<false>(rows, depth, first, end, left, part, operands.a);
      };
      const float least_a =
          a.column == 1 ? pack(left) : pack(turned(rows, depth, left, rows_of_columns));
      constexpr int two = column_tiles > 1 ? 2 : 1;
      for (int column = 0; column < column_tiles; column += two)
        rows > kSide ? sum_tiles<2, two>(operands, first, end, column, sums)
                     : sum_tiles<1, two>(operands, first, end, column, sums);
      // No number, no part and no product of parts is below 2⁻¹²⁶, and so no sum is, but for 0.
      const bool no_zeros =
          least_a >= 0x1p-126f && least_b >= 0x1p-103f && least_a * least_b >= 0x1p-80f;
      const RowMajor<float> to{c.data + i * c.row, c.row};
      if (finite<column_tiles>(rows, sums) &&
          (no_zeros || large(rows, columns, depth, left, panel, part, sums)))
        put_sums<column_tiles>(rows, sums, to, add);
      else gemm_panels(rows, columns, depth, left, panel, to, {add, nullptr}, part);
    }
  }
}

template <class A>
void unit_gemm(int64_t m, int64_t n, int64_t k, Left<A> a, RowMajor<const float> b,
               RowMajor<float> c, bool add, Band band) {
  int64_t j = 0;
  for (; j + 4 * kSide <= n; j += 4 * kSide)
    unit_panel<4>(m, k, a, {b.data + j, b.row}, {c.data + j, c.row}, add, band);
  for (; j + 2 * kSide <= n; j += 2 * kSide)
    unit_panel<2>(m, k, a, {b.data + j, b.row}, {c.data + j, c.row}, add, band);
  if (j < n) unit_panel<1>(m, k, a, {b.data + j, b.row}, {c.data + j, c.row}, add, band);
}

#else

struct Tiles {
  explicit Tiles(bool) {}
};

#endif

// gemm, by the matrix unit if `unit`: where there is one, its thread has Tiles, A's numbers are
// bfloat16's, and its rows or its columns lie in memory without gaps. Small products gain nothing.
template <class C, class A = C>
void matrix_product(bool unit, int64_t m, int64_t n, int64_t k, Left<A> a, RowMajor<const C> b,
                    RowMajor<C> c, bool add, Band band) {
#ifdef FASTMIX_MATRIX_UNIT
  if constexpr (kUnitTakes<A> && sizeof(C) == sizeof(float))
    if (unit && m >= 128 && k >= 128) return unit_gemm(m, n, k, a, b, c, add, band);
#endif
  gemm<C, A>(m, n, k, a, b, c, add, band);
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif
