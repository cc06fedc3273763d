// Transforms of channels in SIMD lanes: polynomials modulo z^N = i, at its N roots.
//
// A transform splits z^L = c into z^(L/R) = r_0 … r_{R-1} until a point is left. The twiddles
// are powers of r, the same for a whole block. Points come out in digit-reversed order, in
// which the inverse takes them, block by block, depth first.

#pragma once

#include "rows.h"

namespace fastmix {

constexpr int kLeaf = 8;

// N = first · radix[0] · … · radix[levels-1], where the last is kLeaf.
struct FftPlan {
  int64_t length, first;
  int levels, radix[24];
  const void* table;     // the first step's matrix, then r, r², … of every block
  int64_t twiddles[24];  // where those of a level begin
};

}  // namespace fastmix

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

template <class C>
using Vector = typename Simd<C>::Vector;

// Integers as wide as the numbers of a vector: a comparison's result, and a magnitude's bits.
template <class C>
using Ints = decltype(Vector<C>{} < Vector<C>{});

// |v| as bits, which are ordered as the magnitudes are: infinity beyond all numbers, NaN beyond it.
template <class C>
FASTMIX_INLINE Ints<C> magnitude(Vector<C> v) {
  return (Ints<C>)v & (~Ints<C>{} ^ (Ints<C>{} + 1) << (8 * sizeof(C) - 1));
}

template <class I>
FASTMIX_INLINE I larger_of(I a, I b) {
  return a > b ? a : b;
}

// A row of a buffer: the real parts of a vector of channels, then the imaginary parts.
template <class C>
constexpr int64_t kRow = 2 * Simd<C>::lanes;

// Columns that two levels are taken through at a time, in a tile of 64 rows; divides kLeaf.
constexpr int64_t kColumns = kRegister == 64 ? 4 : 8;
constexpr int64_t kNear = 32 << 10;  // bytes of a block that takes its levels one by one

// One number per lane and step, from anywhere: zero in lanes from `count` on and steps
// outside first … n-1.
template <class C>
struct Lanes {
  const char* at[Simd<C>::lanes];
  int64_t step, n, count;
  Type type;
  bool adjacent;
  int64_t first = 0;

  // Steps `start` on; zero from `end` on.
  Lanes window(int64_t start, int64_t end) const {
    Lanes shifted = *this;
    for (const char*& p : shifted.at) p += start * step;
    shifted.first = -start;
    shifted.n = end - start;
    return shifted;
  }

  FASTMIX_INLINE void prefetch(int64_t t) const {
    if (t < n) __builtin_prefetch(at[0] + t * step, 0, 2);
  }

  FASTMIX_INLINE Vector<C> operator()(int64_t t) const {
    if (t < first || t >= n) return Vector<C>{};
    const char* p = at[0] + t * step;
    if (adjacent && count == Simd<C>::lanes) {
      if (type == kType<C>) return load<Vector<C>>(p);
      if constexpr (sizeof(C) == 4) {
        if (type == Type::bf16) return load<Vector<C>>(reinterpret_cast<const Bf16*>(p));
        if (type == Type::f16) return load<Vector<C>>(reinterpret_cast<const F16*>(p));
      }
    }
    return gathered(t);
  }

  __attribute__((noinline)) Vector<C> gathered(int64_t t) const {
    C values[Simd<C>::lanes] = {};
    if (adjacent) {
      Reader<C>::run(at[0] + t * step, type, values, count);
    } else {
      for (int64_t i = 0; i < count; ++i) values[i] = widened<C>(at[i] + t * step, type);
    }
    return load<Vector<C>>(values);
  }
};

// `count` lanes of n steps of s; place(i) is where lane i begins.
template <class C, class Place>
Lanes<C> lanes_of(const Source& s, int64_t n, int64_t count, Place place) {
  Lanes<C> lanes{{}, s.n * bytes_of(s.type), n, count, s.type, true};
  for (int64_t i = 0; i < count; ++i) {
    lanes.at[i] = place(i);
    lanes.adjacent &= lanes.at[i] == lanes.at[0] + i * bytes_of(s.type);
  }
  return lanes;
}

// ---- Transforms ----

template <class V, class C>
FASTMIX_INLINE Complex<V> times(Complex<V> a, C re, C im) {
  return {a.re * re - a.im * im, a.im * re + a.re * im};
}

template <class V, class C>
FASTMIX_INLINE Complex<V> load_row(const C* p) {
  return {load<V>(p), load<V>(p + kRow<C> / 2)};
}

template <class V, class C>
FASTMIX_INLINE void store_row(C* p, Complex<V> a) {
  store(p, a.re);
  store(p + kRow<C> / 2, a.im);
}

// a + b and a - b.
template <class V>
FASTMIX_INLINE void cross(Complex<V>& a, Complex<V>& b) {
  const Complex<V> sum = {a.re + b.re, a.im + b.im}, rest = {a.re - b.re, a.im - b.im};
  a = sum;
  b = rest;
}

// a · sign i
template <int sign, class V>
FASTMIX_INLINE Complex<V> turned(Complex<V> a) {
  if constexpr (sign > 0) return {-a.im, a.re};
  return {a.im, -a.re};
}

// a_j ← Σ_k a_k e^(sign 2πi jk/R)
template <int R, int sign, class V>
FASTMIX_INLINE void dft(Complex<V>* a) {
  if constexpr (R == 2) {
    cross(a[0], a[1]);
  } else if constexpr (R == 4) {
    cross(a[0], a[2]);
    cross(a[1], a[3]);
    a[3] = turned<sign>(a[3]);
    cross(a[0], a[1]);
    cross(a[2], a[3]);
    const Complex<V> first = a[1];
    a[1] = a[2];
    a[2] = first;
  } else {
    static_assert(R == 8);
    Complex<V> even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
    dft<4, sign>(even);
    dft<4, sign>(odd);
    decltype(a->re[0] + 0) half = 0.70710678118654752440;
    const Complex<V> one = turned<sign>(odd[1]), three = turned<sign>(odd[3]);
    odd[1] = {(odd[1].re + one.re) * half, (odd[1].im + one.im) * half};
    odd[2] = turned<sign>(odd[2]);
    odd[3] = {(three.re - odd[3].re) * half, (three.im - odd[3].im) * half};
    for (int j = 0; j < 4; ++j) {
      a[j] = even[j];
      a[j + 4] = odd[j];
      cross(a[j], a[j + 4]);
    }
  }
}

// R points of z^L = c, a step of L/R apart, to those of every z^(L/R) = r_j. w are r, r², …
template <int R, class V, class C>
FASTMIX_INLINE void split(Complex<V>* a, const C* w) {
  for (int k = 1; k < R; ++k) a[k] = times(a[k], w[2 * k - 2], w[2 * k - 1]);
  dft<R, 1>(a);
}

// And back, times R.
template <int R, class V, class C>
FASTMIX_INLINE void join(Complex<V>* a, const C* w) {
  dft<R, -1>(a);
  for (int k = 1; k < R; ++k) a[k] = times(a[k], w[2 * k - 2], -w[2 * k - 1]);
}

// Rows that lie `step` apart.
template <class C>
struct Rows {
  C* at;
  int64_t step;

  FASTMIX_INLINE C* operator()(int64_t i) const { return at + i * step * kRow<C>; }
  FASTMIX_INLINE Rows from(int64_t i, int64_t stride) const { return {(*this)(i), step * stride}; }
};

// Splits sets of R rows, a column each, from one place to another; or joins them back.
template <int R, bool inverse, class C>
FASTMIX_INLINE void butterflies(Rows<C> from, Rows<C> to, int64_t columns, const C* w) {
  for (int64_t i = 0; i < columns; ++i, from.at += kRow<C>, to.at += kRow<C>) {
    Complex<Vector<C>> a[R];
    for (int k = 0; k < R; ++k) a[k] = load_row<Vector<C>>(inverse ? to(k) : from(k));
    inverse ? join<R>(a, w) : split<R>(a, w);
    for (int k = 0; k < R; ++k) store_row(inverse ? from(k) : to(k), a[k]);
  }
}

template <bool inverse, class C>
void pass(int radix, Rows<C> from, Rows<C> to, int64_t columns, const C* w) {
  switch (radix) {
    case 2: return butterflies<2, inverse>(from, to, columns, w);
    case 4: return butterflies<4, inverse>(from, to, columns, w);
    default: return butterflies<8, inverse>(from, to, columns, w);
  }
}

template <class C>
FASTMIX_INLINE const C* twiddles(const FftPlan& p, int level, int64_t block) {
  return static_cast<const C*>(p.table) + p.twiddles[level] + block * 2 * (p.radix[level] - 1);
}

// One level of a block of `rows`, or two at once so that it is read and written once for both.
template <bool inverse, class C>
void levels(const FftPlan& p, bool two, int level, int64_t block, C* at, int64_t rows, C* tile) {
  const int64_t outer = p.radix[level], inner = two ? p.radix[level + 1] : 1;
  const int64_t apart = rows / outer / inner;
  const C* r = twiddles<C>(p, level, block);
  if (!two) return pass<inverse>(outer, Rows<C>{at, apart}, Rows<C>{at, apart}, apart, r);
  const Rows<C> near{tile, kColumns};
  for (int64_t t = 0; t < apart; t += kColumns, at += kColumns * kRow<C>) {
    const Rows<C> far{at, apart};
    const auto outers = [&] {
      for (int64_t k = 0; k < inner; ++k)
        pass<inverse>(outer, far.from(k, inner), near.from(k, inner), kColumns, r);
    };
    if (!inverse) outers();
    for (int64_t j = 0; j < outer; ++j)
      pass<inverse>(inner, near.from(j * inner, 1), far.from(j * inner, 1), kColumns,
                    twiddles<C>(p, level + 1, block * outer + j));
    if (inverse) outers();
  }
}

// The leaf says how many buffers are transformed before it (inputs) and how many are taken
// back after it (outputs).
template <class C, class Leaf>
void descend(const FftPlan& p, int level, int64_t block, C* const* at, int64_t rows, C* tile,
             const Leaf& leaf) {
  if (level == p.levels - 1) return leaf(block, at, twiddles<C>(p, level, block));
  const bool two = level + 2 < p.levels && rows * kRow<C> * int64_t(sizeof(C)) > kNear;
  const int64_t parts = p.radix[level] * (two ? p.radix[level + 1] : 1);
  for (int i = 0; i < Leaf::inputs; ++i) levels<false>(p, two, level, block, at[i], rows, tile);
  for (int64_t j = 0; j < parts; ++j) {
    C* part[3];
    for (int i = 0; i < Leaf::buffers; ++i) part[i] = at[i] + j * (rows / parts) * kRow<C>;
    descend(p, level + 1 + two, block * parts + j, part, rows / parts, tile, leaf);
  }
  for (int i = 0; i < Leaf::outputs; ++i) levels<true>(p, two, level, block, at[i], rows, tile);
}

// The largest magnitudes of a transform's input, in as many parts of equal length as its
// first two levels have rows.
template <class C>
struct Magnitudes {
  static constexpr bool wanted = true;
  Ints<C> of[7 * 8];
  int64_t parts, steps;  // steps of a part

  FASTMIX_INLINE void start(int64_t count, int64_t each) {
    parts = count;
    steps = each;
    for (int64_t k = 0; k < count; ++k) of[k] = Ints<C>{};
  }
  FASTMIX_INLINE void take(int64_t k, const Vector<C>* v) {
    Ints<C> most = of[k];
    for (int64_t i = 0; i < kColumns; ++i) most = larger_of(most, magnitude<C>(v[i]));
    of[k] = most;
  }
};

struct NoMagnitudes {
  static constexpr bool wanted = false;
};

// The first step, from real numbers, and the level after it. The matrix is multiplied out,
// which takes no longer than to read them. A tile's numbers lie far apart: they are read
// together, so that the core waits for many at once, and asked for one tile before.
template <int R, class C, class In, class Largest>
void enter(const FftPlan& p, const In& in, C* at, C* tile, Largest& largest) {
  using V = Vector<C>;
  const C* matrix = static_cast<const C*>(p.table);
  const int64_t inner = p.radix[0], apart = p.length / R / inner;
  const Rows<C> near{tile, kColumns};
  V rows[R * 8 * kColumns];
  if constexpr (Largest::wanted) largest.start(R * inner, apart);
  for (int64_t t = 0; t < apart; t += kColumns, at += kColumns * kRow<C>) {
    for (int64_t k = 0; k < R * inner; ++k) {
      for (int64_t i = 0; i < kColumns; ++i) rows[k * kColumns + i] = in(k * apart + t + i);
      if constexpr (Largest::wanted) largest.take(k, rows + k * kColumns);
    }
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t i = 0; i < kColumns; ++i) {
        V a[R];
        for (int q = 0; q < R; ++q) {
          a[q] = rows[(q * inner + k) * kColumns + i];
          in.prefetch((q * inner + k) * apart + t + kColumns + i);
        }
        for (int j = 0; j < R; ++j) {
          Complex<V> sum = {a[0], V{}};
          for (int q = 1; q < R; ++q) {
            sum.re += a[q] * matrix[2 * (j * R + q)];
            sum.im += a[q] * matrix[2 * (j * R + q) + 1];
          }
          store_row(near(j * inner + k) + i * kRow<C>, sum);
        }
      }
    for (int64_t j = 0; j < R; ++j)
      pass<false>(inner, near.from(j * inner, 1), Rows<C>{at, apart}.from(j * inner, 1), kColumns,
                  twiddles<C>(p, 0, j));
  }
}

// The inverse of `enter`: calls out(t, values) with the real parts of the first n steps, a tile at
// a time.
template <int R, class C, class Out>
void leave(const FftPlan& p, C* at, C* tile, int64_t n, const Out& out) {
  using V = Vector<C>;
  const C* matrix = static_cast<const C*>(p.table);
  const int64_t inner = p.radix[0], apart = p.length / R / inner;
  const Rows<C> near{tile, kColumns};
  V rows[R * 8 * kColumns];
  for (int64_t t = 0; t < apart; t += kColumns, at += kColumns * kRow<C>) {
    for (int64_t j = 0; j < R; ++j)
      pass<true>(inner, near.from(j * inner, 1), Rows<C>{at, apart}.from(j * inner, 1), kColumns,
                 twiddles<C>(p, 0, j));
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t i = 0; i < kColumns; ++i) {
        Complex<V> a[R];
        for (int j = 0; j < R; ++j) a[j] = load_row<V>(near(j * inner + k) + i * kRow<C>);
        for (int q = 0; q < R; ++q) {
          V sum = a[0].re * matrix[2 * q] + a[0].im * matrix[2 * q + 1];
          for (int j = 1; j < R; ++j)
            sum += a[j].re * matrix[2 * (j * R + q)] + a[j].im * matrix[2 * (j * R + q) + 1];
          rows[(q * inner + k) * kColumns + i] = sum;
        }
      }
    for (int64_t k = 0; k < R * inner; ++k)
      for (int64_t i = 0; i < kColumns; ++i)
        if (k * apart + t + i < n) out(k * apart + t + i, rows[k * kColumns + i]);
  }
}

// Accepts whatever comes in.
struct Trusting {
  typedef NoMagnitudes Largest;
  FASTMIX_INLINE bool operator()(int, const NoMagnitudes&) const { return true; }
};

// Transforms `in`, does the leaves and hands the first buffer's inverse to out(t, values). False,
// with nothing done, where accept(i, largest magnitudes) refuses the input i.
template <int R, class C, class In, class Leaf, class Out, class Accept>
bool transform(const FftPlan& p, const In* in, C* const* at, C* tile, int64_t n, const Leaf& leaf,
               const Out& out, const Accept& accept) {
  for (int i = 0; i < Leaf::inputs; ++i) {
    typename Accept::Largest largest;
    enter<R>(p, in[i], at[i], tile, largest);
    if (!accept(i, largest)) return false;
  }
  const int64_t blocks = R * p.radix[0], rows = p.length / blocks;
  for (int64_t j = 0; j < blocks; ++j) {
    C* part[3];
    for (int i = 0; i < Leaf::buffers; ++i) part[i] = at[i] + j * rows * kRow<C>;
    descend(p, 1, j, part, rows, tile, leaf);
  }
  if constexpr (Leaf::outputs > 0) leave<R>(p, at[0], tile, n, out);
  return true;
}

template <class C, class In, class Leaf, class Out, class Accept = Trusting>
bool transform(const FftPlan& p, const In* in, C* const* at, C* tile, int64_t n, const Leaf& leaf,
               const Out& out, const Accept& accept = {}) {
  switch (p.first) {
    case 4: return transform<4>(p, in, at, tile, n, leaf, out, accept);
    case 5: return transform<5>(p, in, at, tile, n, leaf, out, accept);
    case 6: return transform<6>(p, in, at, tile, n, leaf, out, accept);
    default: return transform<7>(p, in, at, tile, n, leaf, out, accept);
  }
}

// ---- Leaves ----

template <class V, class C>
FASTMIX_INLINE void open_leaf(Complex<V>* a, const C* at, const C* w) {
  for (int k = 0; k < kLeaf; ++k) a[k] = load_row<V>(at + k * kRow<C>);
  split<kLeaf>(a, w);
}

// A leaf's points fill half of NEON's registers or more. Beside those of another leaf they wait in
// their own rows: left to the compiler, most numbers would go to and from the stack several times.
constexpr bool kSetAside = kRegister == 16;

template <class V, class C>
FASTMIX_INLINE void set_aside(const Complex<V>* a, C* at) {
  if constexpr (!kSetAside) return;
  for (int k = 0; k < kLeaf; ++k) store_row(at + k * kRow<C>, a[k]);
  __asm__ volatile("" ::: "memory");  // or they would be kept in registers all the same
}

template <class V, class C>
FASTMIX_INLINE Complex<V> taken_back(const Complex<V>* a, const C* at, int k) {
  if constexpr (kSetAside) return load_row<V>(at + k * kRow<C>);
  return a[k];
}

template <class V, class C>
FASTMIX_INLINE void close_leaf(Complex<V>* a, C* at, const C* w) {
  join<kLeaf>(a, w);
  for (int k = 0; k < kLeaf; ++k) store_row(at + k * kRow<C>, a[k]);
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif  // FASTMIX_CPU
