// y_t = Σ_{j ≤ t} kernel_j · x_{t-j}, by transforms in the tensors' own layout.
//
// A SIMD lane holds a channel. A sequence of N real numbers is taken as a polynomial modulo
// z^N = i. The coefficients N … 2N-1 of a product come out as imaginary parts, so its real
// part is the causal convolution: from N complex points, with no zeros to pad.
//
// The transform finds the polynomial's values at the N roots of z^N = i: it splits z^L = c
// into z^(L/R) = r_0 … r_{R-1} until a point is left. The twiddles are powers of r, the same
// for a whole block. Points come out in digit-reversed order, in which the inverse takes
// them, block by block, depth first: at the leaves, eight points are transformed, multiplied
// and taken back in registers.
//
// The kernel's gradient is summed over channels in the spectrum, with one inverse per head.

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

struct FftConv {
  FftPlan plan;
  int64_t b, n, h, d, lags;
  int64_t stretch;  // steps that one transform yields: n, or less if lags are few
  // A unit of work is `group` channels of a head; or, where many heads fit into a vector,
  // all channels of `heads` of them, whose kernels then lie in lanes as well.
  bool kernels_in_lanes;
  int64_t heads, group, groups;
  bool shared;     // one kernel for the whole batch
  bool streaming;  // `out` is large and its rows start at whole cache lines
  Source x, kernel, grad;
  Sink out, grad_kernel;
  void* spectra;  // of each kernel: 8 real parts, 8 imaginary parts, …
  void* sums;     // (b, h, groups): spectra of the kernels' gradients
};

}  // namespace fastmix

FASTMIX_KERNEL(fft_conv_spectra, fastmix::FftConv)
FASTMIX_KERNEL(fft_conv_forward, fastmix::FftConv)
FASTMIX_KERNEL(fft_conv_backward, fastmix::FftConv)
FASTMIX_KERNEL(fft_conv_lags, fastmix::FftConv)
FASTMIX_KERNEL(fft_conv_direct, fastmix::FftConv)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

template <class C>
using Vector = typename Simd<C>::Vector;

// A row of a buffer: the real parts of a vector of channels, then the imaginary parts.
template <class C>
constexpr int64_t kRow = 2 * Simd<C>::lanes;

// Columns that two levels are taken through at a time, in a tile of 64 rows; divides kLeaf.
constexpr int64_t kColumns = kRegister == 64 ? 4 : 8;
constexpr int64_t kNear = 32 << 10;  // bytes of a block that takes its levels one by one

// bfloat16 as the upper halves of 32 bits.
typedef uint16_t Halves __attribute__((vector_size(kRegister / 2)));
typedef uint32_t Words __attribute__((vector_size(kRegister)));

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

  INLINE void prefetch(int64_t t) const {
    if (t < n) __builtin_prefetch(at[0] + t * step, 0, 2);
  }

  INLINE Vector<C> operator()(int64_t t) const {
    if (t < first || t >= n) return Vector<C>{};
    const char* p = at[0] + t * step;
    if (adjacent && count == Simd<C>::lanes) {
      if (type == type_of<C>()) return load<Vector<C>>(p);
      if constexpr (sizeof(C) == 4) {
        if (type == Type::bf16)
          return (Vector<C>)(__builtin_convertvector(load<Halves>(p), Words) << 16);
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

// Channels c0 … of a tensor like x.
template <class C>
Lanes<C> channels(const FftConv& f, const Source& s, int64_t b, int64_t c0, int64_t count) {
  return lanes_of<C>(s, f.n, count, [&](int64_t i) {
    return address(s, b, 0, (c0 + i) / f.d, (c0 + i) % f.d);
  });
}

// Kernels b · h + head from `first` on, each in `repeat` lanes.
template <class C>
Lanes<C> kernels(const FftConv& f, int64_t first, int64_t count, int64_t repeat) {
  return lanes_of<C>(f.kernel, f.lags, count * repeat, [&](int64_t i) {
    const int64_t index = first + i / repeat;
    return address(f.kernel, index / f.h, 0, index % f.h, 0);
  });
}

// Writes channels c0 … of the output.
template <class C>
struct Channels {
  const FftConv& f;
  int64_t b, c0, count;

  INLINE void operator()(int64_t t, Vector<C> v) const {
    const int64_t at = (b * f.n + t) * f.out.channels + c0;
    if (count == Simd<C>::lanes) {
      if (f.out.type == type_of<C>()) {
        C* to = static_cast<C*>(f.out.data) + at;
        return f.streaming ? stream(to, v) : store(to, v);
      }
      if constexpr (sizeof(C) == 4) {
        if (f.out.type == Type::bf16) {
          const Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
          return store(static_cast<uint16_t*>(f.out.data) + at,
                       __builtin_convertvector(v == v ? rounded : Words{} + 0x7fc0, Halves));
        }
      }
    }
    C values[Simd<C>::lanes];
    store(values, v);
    write(f.out, b, t, c0, count, values);
  }
};

// ---- Transforms ----

template <class V, class C>
INLINE Complex<V> times(Complex<V> a, C re, C im) {
  return {a.re * re - a.im * im, a.im * re + a.re * im};
}

template <class V, class C>
INLINE Complex<V> load_row(const C* p) {
  return {load<V>(p), load<V>(p + kRow<C> / 2)};
}

template <class V, class C>
INLINE void store_row(C* p, Complex<V> a) {
  store(p, a.re);
  store(p + kRow<C> / 2, a.im);
}

// a + b and a - b.
template <class V>
INLINE void cross(Complex<V>& a, Complex<V>& b) {
  const Complex<V> sum = {a.re + b.re, a.im + b.im}, rest = {a.re - b.re, a.im - b.im};
  a = sum;
  b = rest;
}

// a · sign i
template <int sign, class V>
INLINE Complex<V> turned(Complex<V> a) {
  if constexpr (sign > 0) return {-a.im, a.re};
  return {a.im, -a.re};
}

// a_j ← Σ_k a_k e^(sign 2πi jk/R)
template <int R, int sign, class V>
INLINE void dft(Complex<V>* a) {
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
INLINE void split(Complex<V>* a, const C* w) {
  for (int k = 1; k < R; ++k) a[k] = times(a[k], w[2 * k - 2], w[2 * k - 1]);
  dft<R, 1>(a);
}

// And back, times R.
template <int R, class V, class C>
INLINE void join(Complex<V>* a, const C* w) {
  dft<R, -1>(a);
  for (int k = 1; k < R; ++k) a[k] = times(a[k], w[2 * k - 2], -w[2 * k - 1]);
}

// Rows that lie `step` apart.
template <class C>
struct Rows {
  C* at;
  int64_t step;

  INLINE C* operator()(int64_t i) const { return at + i * step * kRow<C>; }
  INLINE Rows from(int64_t i, int64_t stride) const { return {(*this)(i), step * stride}; }
};

// Splits sets of R rows, a column each, from one place to another; or joins them back.
template <int R, bool inverse, class C>
INLINE void butterflies(Rows<C> from, Rows<C> to, int64_t columns, const C* w) {
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
INLINE const C* twiddles(const FftPlan& p, int level, int64_t block) {
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

// The first step, from real numbers, and the level after it. The matrix is multiplied out,
// which takes no longer than to read them.
template <int R, class C>
void enter(const FftPlan& p, const Lanes<C>& in, C* at, C* tile) {
  using V = Vector<C>;
  const C* matrix = static_cast<const C*>(p.table);
  const int64_t inner = p.radix[0], apart = p.length / R / inner;
  const Rows<C> near{tile, kColumns};
  for (int64_t t = 0; t < apart; t += kColumns, at += kColumns * kRow<C>) {
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t i = 0; i < kColumns; ++i) {
        V a[R];
        for (int q = 0; q < R; ++q) {
          const int64_t step = (q * inner + k) * apart + t + i;
          a[q] = in(step);
          in.prefetch(step + kColumns);
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
      pass<false>(inner, near.from(j * inner, 1), Rows<C>{at, apart}.from(j * inner, 1),
                  kColumns, twiddles<C>(p, 0, j));
  }
}

// And back, real parts only: out(t, values) for the first n.
template <int R, class C, class Out>
void leave(const FftPlan& p, C* at, C* tile, int64_t n, const Out& out) {
  using V = Vector<C>;
  const C* matrix = static_cast<const C*>(p.table);
  const int64_t inner = p.radix[0], apart = p.length / R / inner;
  const Rows<C> near{tile, kColumns};
  for (int64_t t = 0; t < apart; t += kColumns, at += kColumns * kRow<C>) {
    for (int64_t j = 0; j < R; ++j)
      pass<true>(inner, near.from(j * inner, 1), Rows<C>{at, apart}.from(j * inner, 1),
                 kColumns, twiddles<C>(p, 0, j));
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t i = 0; i < kColumns; ++i) {
        Complex<V> a[R];
        for (int j = 0; j < R; ++j) a[j] = load_row<V>(near(j * inner + k) + i * kRow<C>);
        for (int q = 0; q < R; ++q) {
          V sum = a[0].re * matrix[2 * q] + a[0].im * matrix[2 * q + 1];
          for (int j = 1; j < R; ++j)
            sum += a[j].re * matrix[2 * (j * R + q)] + a[j].im * matrix[2 * (j * R + q) + 1];
          const int64_t step = (q * inner + k) * apart + t + i;
          if (step < n) out(step, sum);
        }
      }
  }
}

// Transforms `in`, does the leaves and hands the first buffer's inverse to out(t, values).
template <int R, class C, class Leaf, class Out>
void transform(const FftPlan& p, const Lanes<C>* in, C* const* at, C* tile, int64_t n,
               const Leaf& leaf, const Out& out) {
  for (int i = 0; i < Leaf::inputs; ++i) enter<R>(p, in[i], at[i], tile);
  const int64_t blocks = R * p.radix[0], rows = p.length / blocks;
  for (int64_t j = 0; j < blocks; ++j) {
    C* part[3];
    for (int i = 0; i < Leaf::buffers; ++i) part[i] = at[i] + j * rows * kRow<C>;
    descend(p, 1, j, part, rows, tile, leaf);
  }
  if constexpr (Leaf::outputs > 0) leave<R>(p, at[0], tile, n, out);
}

template <class C, class Leaf, class Out>
void transform(const FftPlan& p, const Lanes<C>* in, C* const* at, C* tile, int64_t n,
               const Leaf& leaf, const Out& out) {
  switch (p.first) {
    case 4: return transform<4>(p, in, at, tile, n, leaf, out);
    case 5: return transform<5>(p, in, at, tile, n, leaf, out);
    case 6: return transform<6>(p, in, at, tile, n, leaf, out);
    default: return transform<7>(p, in, at, tile, n, leaf, out);
  }
}

// ---- Leaves ----

template <class V, class C>
INLINE void open_leaf(Complex<V>* a, const C* at, const C* w) {
  for (int k = 0; k < kLeaf; ++k) a[k] = load_row<V>(at + k * kRow<C>);
  split<kLeaf>(a, w);
}

template <class V, class C>
INLINE void close_leaf(Complex<V>* a, C* at, const C* w) {
  join<kLeaf>(a, w);
  for (int k = 0; k < kLeaf; ++k) store_row(at + k * kRow<C>, a[k]);
}

template <int count, int... I>
struct Indices : Indices<count - 1, count - 1, I...> {};
template <int... I>
struct Indices<0, I...> {};

// From a and b, sums of lanes i and i + s where bit s of i is 0: of a there, of b where 1.
template <int s, class V, int... I>
INLINE V folded(V a, V b, Indices<0, I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(a, b, (I & s ? lanes + I - s : I)...) +
         __builtin_shufflevector(a, b, (I & s ? lanes + I : I + s)...);
}

// The sums over lanes of as many vectors as there are lanes.
template <class C, int s = 1>
INLINE Vector<C> lane_sums(const Vector<C>* v) {
  constexpr int lanes = Simd<C>::lanes;
  if constexpr (s == lanes) return *v;
  else {
    Vector<C> halves[lanes / s / 2];
    for (int i = 0; i < lanes / s / 2; ++i)
      halves[i] = folded<s>(v[2 * i], v[2 * i + 1], Indices<lanes>());
    return lane_sums<C, 2 * s>(halves);
  }
}

// x · kernel; or grad · conj kernel, and the sums of grad · conj x. The kernel's spectrum is
// the same for all lanes or lies in the last buffer.
template <class C, bool backward, bool in_lanes>
struct Product {
  static constexpr int inputs = 1 + backward + in_lanes, outputs = 1, buffers = inputs;
  const C* spectrum;
  C scale;
  C* sums;
  int64_t heads, d, sums_step;

  INLINE void operator()(int64_t block, C* const* at, const C* w) const {
    using V = Vector<C>;
    constexpr int lanes = Simd<C>::lanes;
    Complex<V> a[kLeaf], other[kLeaf];
    open_leaf(a, at[0], w);
    if constexpr (backward) {
      open_leaf(other, at[1], w);
      V products[2 * kLeaf];
      for (int k = 0; k < kLeaf; ++k) {
        products[k] = a[k].re * other[k].re + a[k].im * other[k].im;
        products[k + kLeaf] = a[k].im * other[k].re - a[k].re * other[k].im;
      }
      C* to = sums + block * 2 * kLeaf;
      if constexpr (!in_lanes) {
        for (int k = 0; k < 2 * kLeaf; k += lanes)
          store(to + k, load<V>(to + k) + lane_sums<C>(products + k));
      } else {
        C numbers[2 * kLeaf][lanes];
        for (int k = 0; k < 2 * kLeaf; ++k) store(numbers[k], products[k]);
        for (int64_t head = 0; head < heads; ++head, to += sums_step)
          for (int k = 0; k < 2 * kLeaf; ++k)
            for (int64_t i = 0; i < d; ++i) to[k] += numbers[k][head * d + i];
      }
    }
    if constexpr (in_lanes) {
      open_leaf(other, at[inputs - 1], w);
      for (int k = 0; k < kLeaf; ++k) {
        const V re = other[k].re * scale, im = other[k].im * (backward ? -scale : scale);
        a[k] = times(a[k], re, im);
      }
    } else {
      const C* s = spectrum + block * 2 * kLeaf;
      for (int k = 0; k < kLeaf; ++k)
        a[k] = times(a[k], s[k], backward ? -s[k + kLeaf] : s[k + kLeaf]);
    }
    close_leaf(a, at[0], w);
  }
};

// Each lane's spectrum over N, to its own place.
template <class C>
struct Spectra {
  static constexpr int inputs = 1, outputs = 0, buffers = 1;
  C* to;
  int64_t count, length;

  void operator()(int64_t block, C* const* at, const C* w) const {
    Complex<Vector<C>> a[kLeaf];
    open_leaf(a, at[0], w);
    for (int64_t i = 0; i < count; ++i)
      for (int k = 0; k < kLeaf; ++k) {
        C* p = to + i * 2 * length + block * 2 * kLeaf + k;
        p[0] = a[k].re[i] / length;
        p[kLeaf] = a[k].im[i] / length;
      }
  }
};

// Puts the sum of several spectra into each lane.
template <class C>
struct Sums {
  static constexpr int inputs = 0, outputs = 1, buffers = 1;
  const C* from;
  int64_t count, length, step, inner, inner_step, outer, outer_step;

  void operator()(int64_t block, C* const* at, const C* w) const {
    constexpr int lanes = Simd<C>::lanes;
    C numbers[2 * kLeaf][lanes] = {};
    for (int64_t i = 0; i < count; ++i)
      for (int64_t o = 0; o < outer; ++o)
        for (int64_t j = 0; j < inner; ++j) {
          const C* p = from + i * step + o * outer_step + j * inner_step + block * 2 * kLeaf;
          for (int k = 0; k < 2 * kLeaf; ++k) numbers[k][i] += p[k];
        }
    Complex<Vector<C>> a[kLeaf];
    for (int k = 0; k < kLeaf; ++k) {
      a[k].re = load<Vector<C>>(numbers[k]) / C(length);
      a[k].im = load<Vector<C>>(numbers[k + kLeaf]) / C(length);
    }
    close_leaf(a, at[0], w);
  }
};

// ---- Units of work ----

struct Unit {
  int64_t b, head, heads, group, c0, count;
};

Unit unit_of(const FftConv& f, int64_t index) {
  const int64_t sets = (f.h + f.heads - 1) / f.heads;
  Unit u;
  u.group = index % f.groups;
  u.head = index / f.groups % sets * f.heads;
  u.b = index / f.groups / sets;
  u.heads = smaller(f.heads, f.h - u.head);
  u.c0 = u.head * f.d + u.group * f.group;
  u.count = f.kernels_in_lanes ? u.heads * f.d : smaller(f.group, f.d - u.group * f.group);
  return u;
}

// Calls g(c0, count) for every vector of a unit's channels.
template <class C, class G>
INLINE void each_lanes(const Unit& u, G g) {
  for (int64_t c = 0; c < u.count; c += Simd<C>::lanes)
    g(u.c0 + c, smaller(Simd<C>::lanes, u.count - c));
}

template <class C>
struct Buffers {
  Scratch scratch;
  C *at[3], *tile;

  Buffers(int count, int64_t rows) {
    for (int i = 0; i < count; ++i) at[i] = scratch.take<C>(rows * kRow<C>);
    tile = scratch.take<C>(64 * kColumns * kRow<C>);
  }
};

// The place of a unit's first kernel among all.
INLINE int64_t kernel_index(const FftConv& f, const Unit& u) {
  return (f.shared ? 0 : u.b * f.h) + u.head;
}

template <class C>
void spectra(const FftConv& f, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<C>::lanes;
  const int64_t length = f.plan.length, all = (f.shared ? 1 : f.b) * f.h;
  Buffers<C> buffers(1, length);
  for (int64_t i = begin * lanes; i < smaller(end * lanes, all); i += lanes) {
    const int64_t count = smaller(lanes, all - i);
    const Lanes<C> in = kernels<C>(f, i, count, 1);
    transform(f.plan, &in, buffers.at, buffers.tile, 0,
              Spectra<C>{static_cast<C*>(f.spectra) + i * 2 * length, count, length}, nullptr);
  }
}

template <class C, bool backward, bool in_lanes>
void units(const FftConv& f, int64_t begin, int64_t end) {
  using Leaf = Product<C, backward, in_lanes>;
  const int64_t length = f.plan.length;
  Buffers<C> buffers(Leaf::buffers, length);
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit_of(f, i);
    Leaf leaf{};
    if (!in_lanes) leaf.spectrum = static_cast<C*>(f.spectra) + kernel_index(f, u) * 2 * length;
    leaf.scale = C(1) / length;
    leaf.heads = u.heads;
    leaf.d = f.d;
    leaf.sums_step = f.groups * 2 * length;
    if (backward) {
      leaf.sums = static_cast<C*>(f.sums) +
                  ((u.b * f.h + u.head) * f.groups + u.group) * 2 * length;
      memset(leaf.sums, 0, u.heads * 2 * length * sizeof(C));
    }
    each_lanes<C>(u, [&](int64_t c0, int64_t count) {
      const Lanes<C> x = channels<C>(f, f.x, u.b, c0, count);
      const Lanes<C> grad = backward ? channels<C>(f, f.grad, u.b, c0, count) : x;
      const Channels<C> out{f, u.b, c0, count};
      Lanes<C> in[3];
      if (in_lanes) in[1 + backward] = kernels<C>(f, kernel_index(f, u), u.heads, f.d);
      for (int64_t start = 0; start < f.n; start += f.stretch) {
        // y needs the lags before a stretch, dx and the kernel's gradient those after it.
        const int64_t stop = smaller(start + f.stretch, f.n);
        const int64_t before = backward || f.stretch == f.n ? 0 : f.lags - 1;
        in[0] = backward ? grad.window(start, f.n) : x.window(start - before, f.n);
        if (backward) in[1] = x.window(start, stop);
        transform(f.plan, in, buffers.at, buffers.tile, before + stop - start, leaf,
                  [&](int64_t t, Vector<C> v) LAMBDA {
                    if (t >= before) out(start + t - before, v);
                  });
      }
    });
  }
  if (f.streaming) streamed();
}

template <class C, bool backward>
void convolve(const FftConv& f, int64_t begin, int64_t end) {
  f.kernels_in_lanes ? units<C, backward, true>(f, begin, end)
                     : units<C, backward, false>(f, begin, end);
}

template <class C>
void lags(const FftConv& f, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<C>::lanes;
  const int64_t spectrum = 2 * f.plan.length, all = (f.shared ? 1 : f.b) * f.h;
  Buffers<C> buffers(1, f.plan.length);
  for (int64_t first = begin * lanes; first < smaller(end * lanes, all); first += lanes) {
    const int64_t count = smaller(lanes, all - first), step = f.groups * spectrum;
    const auto put = [&](int64_t lag, Vector<C> v) {
      C values[lanes];
      store(values, v);
      for (int64_t i = 0, run; i < count; i += run) {
        const int64_t head = (first + i) % f.h;
        run = smaller(count - i, f.h - head);
        write(f.grad_kernel, (first + i) / f.h, lag, head, run, values + i);
      }
    };
    transform(f.plan, static_cast<const Lanes<C>*>(nullptr), buffers.at, buffers.tile, f.lags,
              Sums<C>{static_cast<C*>(f.sums) + first * step, count, f.plan.length, step,
                      f.groups, spectrum, f.shared ? f.b : 1, f.h * step}, put);
    for (int64_t lag = f.lags; lag < f.grad_kernel.n_size; ++lag) put(lag, Vector<C>{});
  }
}

// ---- Few lags: the products themselves ----

template <class C>
void direct(const FftConv& f, int64_t begin, int64_t end) {
  using V = Vector<C>;
  constexpr int64_t lanes = Simd<C>::lanes, steps = 128, at_once = 8;
  Scratch scratch;
  C* kernel = scratch.take<C>(f.lags * lanes);
  C* rows = scratch.take<C>((steps + f.lags) * lanes);
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit_of(f, i);
    each_lanes<C>(u, [&](int64_t c0, int64_t count) {
      const auto k = f.kernels_in_lanes ? kernels<C>(f, kernel_index(f, u), u.heads, f.d)
                                        : kernels<C>(f, kernel_index(f, u), 1, count);
      for (int64_t j = 0; j < f.lags; ++j) store(kernel + j * lanes, k(j));
      const Lanes<C> x = channels<C>(f, f.x, u.b, c0, count);
      const Channels<C> out{f, u.b, c0, count};
      for (int64_t start = 0; start < f.n; start += steps) {
        const int64_t stop = smaller(start + steps, f.n), from = larger(0, start - f.lags + 1);
        for (int64_t s = from; s < stop; ++s) store(rows + (s - from) * lanes, x(s));
        for (int64_t t = start; t < stop; t += at_once) {
          V y[at_once] = {};
          const int64_t last = smaller(t + at_once, stop);
          for (int64_t s = larger(from, t - f.lags + 1); s < last; ++s) {
            const V in = load<V>(rows + (s - from) * lanes);
            const int64_t lag = t - s;  // of y[0]
            if (lag >= 0 && lag + at_once <= f.lags) {
              for (int r = 0; r < at_once; ++r) y[r] += in * load<V>(kernel + (lag + r) * lanes);
            } else {
              for (int r = 0; r < at_once; ++r)
                if (lag + r >= 0 && lag + r < f.lags)
                  y[r] += in * load<V>(kernel + (lag + r) * lanes);
            }
          }
          for (int64_t r = 0; r < last - t; ++r) out(t + r, y[r]);
        }
      }
    });
  }
  if (f.streaming) streamed();
}

}  // namespace

void fft_conv_spectra(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? spectra<double>(f, begin, end) : spectra<float>(f, begin, end);
}

void fft_conv_lags(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? lags<double>(f, begin, end) : lags<float>(f, begin, end);
}

void fft_conv_forward(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? convolve<double, false>(f, begin, end)
                        : convolve<float, false>(f, begin, end);
}

void fft_conv_backward(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? convolve<double, true>(f, begin, end)
                        : convolve<float, true>(f, begin, end);
}

void fft_conv_direct(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? direct<double>(f, begin, end) : direct<float>(f, begin, end);
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include <cmath>
#include <complex>

#include "tensors.h"

namespace fastmix {
namespace {

constexpr int64_t kFewLags = 24;    // products per step up to which transforms do not pay
constexpr int64_t kFitting = 2048;  // steps whose transform stays near the core

// The smallest {4, 5, 6, 7} · 2^a that is at least n, and its table.
FftPlan plan_for(int64_t n, std::vector<double>& table) {
  FftPlan p{};
  p.length = INT64_MAX;
  int bits = 0;
  for (int64_t first = 4; first < 8; ++first) {
    int a = 4;
    while (first << a < n) ++a;
    if (first << a < p.length) {
      p.length = first << a;
      p.first = first;
      bits = a;
    }
  }
  for (int left = bits - 3, taken; left > 0; left -= taken) {
    taken = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
    p.radix[p.levels++] = 1 << taken;
  }
  p.radix[p.levels++] = kLeaf;

  const double turn = 2 * std::acos(-1.0);
  std::vector<double> angles;  // of the blocks' c in z^L = c, in turns
  for (int64_t j = 0; j < p.first; ++j) {
    angles.push_back((0.25 + j) / p.first);
    for (int64_t k = 0; k < p.first; ++k) {
      table.push_back(std::cos(turn * angles[j] * k));
      table.push_back(std::sin(turn * angles[j] * k));
    }
  }
  for (int level = 0; level < p.levels; ++level) {
    const int radix = p.radix[level];
    p.twiddles[level] = table.size();
    std::vector<double> next;
    for (double angle : angles) {
      const std::complex<double> r = std::polar(1.0, turn * angle / radix);
      std::complex<double> powers[kLeaf] = {1.0, r};
      for (int k = 1; k < radix; ++k) {
        if (k > 1) powers[k] = powers[k / 2] * powers[k - k / 2];
        table.push_back(powers[k].real());
        table.push_back(powers[k].imag());
      }
      for (int j = 0; j < radix; ++j) next.push_back((angle + j) / radix);
    }
    angles = std::move(next);
  }
  return p;
}

Source kernel_source(const Tensor& kernel) {
  if (kernel.dim() == 3) return source(kernel);
  return {kernel.const_data_ptr(), type_of(kernel.scalar_type()), 0, kernel.stride(0),
          kernel.stride(1), 1, 1};
}

// What forward and backward share: the sizes, how work is cut, the plan and its table.
struct Call {
  FftConv f{};
  int64_t lanes, units, kernel_units;
  std::vector<double> table;
  std::vector<float> narrow;

  Call(const Tensor& x, const Tensor& kernel) {
    f.b = x.size(0);
    f.n = x.size(1);
    f.h = x.size(2);
    f.d = x.size(3);
    f.lags = std::min(f.n, kernel.size(-2));
    f.shared = kernel.dim() == 2;
    f.x = source(x);
    f.kernel = kernel_source(kernel);
    lanes = (16 << instruction_set()) / (is_double(x) ? 8 : 4);
    f.kernels_in_lanes = 2 * f.d <= lanes;
    f.heads = f.kernels_in_lanes ? lanes / f.d : 1;
    f.group = f.kernels_in_lanes ? f.d : 16;
    f.groups = (f.d + f.group - 1) / f.group;
    units = f.b * ((f.h + f.heads - 1) / f.heads) * f.groups;
    kernel_units = ((f.shared ? 1 : f.b) * f.h + lanes - 1) / lanes;
  }

  // Streams where every vector is a whole cache line.
  void writes(const Tensor& out) {
    f.out = sink(out, f.n, f.h * f.d);
    const bool full = f.kernels_in_lanes ? lanes % f.d == 0 && f.h % f.heads == 0
                                         : f.d % lanes == 0;
    f.streaming = instruction_set() == 2 && full && f.out.streaming &&
                  reinterpret_cast<uintptr_t>(f.out.data) % 64 == 0;
  }

  void plan() {
    const bool whole = f.n < 2 * kFitting || f.n < 16 * f.lags;
    f.plan = plan_for(whole ? f.n : std::max(kFitting, 4 * f.lags), table);
    f.stretch = whole ? f.n : f.plan.length - f.lags + 1;
    narrow.assign(table.begin(), table.end());
    f.plan.table = f.x.type == Type::f64 ? static_cast<const void*>(table.data()) : narrow.data();
  }
};

// The kernels' spectra, unless each unit makes its own.
Tensor transformed(Call& call, const Tensor& x) {
  FftConv& f = call.f;
  if (f.kernels_in_lanes) return nothing(x);
  Tensor spectra = fresh(x, {(f.shared ? 1 : f.b) * f.h, 2 * f.plan.length}, wide(x));
  f.spectra = spectra.mutable_data_ptr();
  spread(FASTMIX_KERNELS(fft_conv_spectra), f, call.kernel_units);
  return spectra;
}

Tensor fft_conv(const Tensor& x, const Tensor& kernel) {
  Tensor out = fresh(x);
  if (x.numel() == 0) return out;
  Call call(x, kernel);
  call.writes(out);
  if (call.f.lags - call.f.lags * call.f.lags / (2 * call.f.n) <= kFewLags) {
    spread(FASTMIX_KERNELS(fft_conv_direct), call.f, call.units);
    return out;
  }
  call.plan();
  const Tensor spectra = transformed(call, x);
  spread(FASTMIX_KERNELS(fft_conv_forward), call.f, call.units);
  return out;
}

std::tuple<Tensor, Tensor> fft_conv_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& kernel) {
  Tensor grad_x = fresh(x), grad_kernel = fresh(kernel);
  if (x.numel() == 0) {
    assign(grad_kernel, std::vector<double>(grad_kernel.numel()));
    return {grad_x, grad_kernel};
  }
  Call call(x, kernel);
  FftConv& f = call.f;
  f.grad = source(grad);
  call.writes(grad_x);
  f.grad_kernel = sink(grad_kernel, kernel.size(-2), f.h);
  call.plan();
  const Tensor sums = fresh(x, {f.b, f.h, f.groups, 2 * f.plan.length}, wide(x)),
               spectra = transformed(call, x);
  f.sums = sums.mutable_data_ptr();
  spread(FASTMIX_KERNELS(fft_conv_backward), f, call.units);
  spread(FASTMIX_KERNELS(fft_conv_lags), f, call.kernel_units);
  return {grad_x, grad_kernel};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("fft_conv", TORCH_BOX(&fft_conv));
  m.impl("fft_conv_backward", TORCH_BOX(&fft_conv_backward));
}

}  // namespace fastmix

#endif
