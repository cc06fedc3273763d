// Exponentials, and the gate of gate_loop from its logits: a = σ(|z|) · z / |z|, ½ at z = 0. Where
// |z| is infinite a is z's direction, and the gradient of z is 0.

#pragma once

#include "rows.h"

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

// e^x = 2^k (1 + part) for x ≤ 0, to about an ulp; what is below the range of normal numbers
// becomes 0, whose exponent's bits are those of the k of -88 (-709). x = k ln 2 + r: adding
// 1.5 · 2^23 (2^52) rounds k to an integer in the low bits.
template <class V>
struct Exponential {
  V power, part;  // 2^k, and e^r - 1
};

// The terms of a Taylor series of e^r - 1, over r, that a number's digits ask for; and the rest.
template <class C>
struct Series;
template <>
struct Series<float> {
  static constexpr float terms[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24,
                                    1.0f / 6,    0.5f,       1.0f};
  static constexpr float least = -88, inverse = 1.44269504f, whole = 12582912, high = 0.693359375f,
                         low = -2.12194440e-4f;
  static constexpr int bias = 127, shift = 23;
};
template <>
struct Series<double> {
  static constexpr double terms[] = {1.0 / 6227020800,
                                     1.0 / 479001600,
                                     1.0 / 39916800,
                                     1.0 / 3628800,
                                     1.0 / 362880,
                                     1.0 / 40320,
                                     1.0 / 5040,
                                     1.0 / 720,
                                     1.0 / 120,
                                     1.0 / 24,
                                     1.0 / 6,
                                     0.5,
                                     1.0};
  static constexpr double least = -709, inverse = 1.4426950408889634, whole = 6755399441055744,
                          high = 0.693147180369123816490, low = 1.90821492927058770002e-10;
  static constexpr int bias = 1023, shift = 52;
};

template <class V>
FASTMIX_INLINE Exponential<V> exponential(V x) {
  using C = NumberOf<V>;
  using S = Series<C>;
  x = largest(V{} + S::least, x);
  const V shifted = x * S::inverse + S::whole, k = shifted - S::whole;
  V r = x - k * S::high;
  r = r - k * S::low;
  V p = V{} + S::terms[0];
  for (unsigned i = 1; i < sizeof S::terms / sizeof(C); ++i) p = p * r + S::terms[i];
  typename Parts<V>::Bits bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + S::bias) << S::shift;
  V power;
  memcpy(&power, &bits, sizeof power);
  return {power, p * r};
}

template <class V>
FASTMIX_INLINE V exp_below_zero(V x) {
  const Exponential<V> e = exponential(x);
  return e.power + e.power * e.part;
}

// e^x - 1
template <class C>
FASTMIX_INLINE C expm1_below_zero(C x) {
  const Exponential<C> e = exponential(x);
  return (e.power - C(1)) + e.power * e.part;
}

// Beyond `small` and `large` squares would leave the range of normal numbers, unless numbers are
// multiplied by `up` or `down` twice before. 2 `limit` is beyond the range of all numbers.
template <class C>
struct Range;
template <>
struct Range<float> {
  static constexpr float small = 1e-15f, large = 1e15f, up = 0x1p48f, down = 0x1p-48f,
                         limit = 0x1p127f, most = 0x1.fffffep127f;
};
template <>
struct Range<double> {
  static constexpr double small = 1e-140, large = 1e140, up = 0x1p400, down = 0x1p-400,
                          limit = 0x1p1023, most = 0x1.fffffffffffffp1023;
};

FASTMIX_INLINE float root(float x) { return __builtin_sqrtf(x); }
FASTMIX_INLINE double root(double x) { return __builtin_sqrt(x); }

template <class V>
FASTMIX_INLINE V root(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(NumberOf<V>) == 4) return (V)_mm512_sqrt_ps((__m512)x);
  else return (V)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX__)
  if constexpr (sizeof(NumberOf<V>) == 4) return (V)_mm256_sqrt_ps((__m256)x);
  else return (V)_mm256_sqrt_pd((__m256d)x);
#elif defined(__aarch64__)
  if constexpr (sizeof(NumberOf<V>) == 4) return (V)vsqrtq_f32((float32x4_t)x);
  else return (V)vsqrtq_f64((float64x2_t)x);
#else
  V roots;
  for (unsigned i = 0; i < sizeof x / sizeof x[0]; ++i) roots[i] = root(x[i]);
  return roots;
#endif
}

// 1 / x of a normal number whose inverse is one. AVX-512 divides as slowly as it takes roots, and
// both wait for one unit: an estimate of 14 bits, made twice as long by Newton's method, does not.
template <class V>
FASTMIX_INLINE V inverse(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof x == 64 && sizeof(NumberOf<V>) == 4) {
    const V estimate = (V)_mm512_rcp14_ps((__m512)x);
    return estimate + estimate * (1 - x * estimate);
  }
#endif
  return 1 / x;
}

// Whether every number lies between `low` and `high`.
template <class V>
FASTMIX_INLINE bool between(V x, NumberOf<V> low, NumberOf<V> high) {
  if constexpr (!kVector<V>) {
    return (x > low) & (x < high);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(NumberOf<V>) == 4)
      return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask((__m512)x, (__m512)(V{} + low), _CMP_GT_OQ),
                                     (__m512)x, (__m512)(V{} + high), _CMP_LT_OQ) == 0xffff;
    else
      return _mm512_mask_cmp_pd_mask(
                 _mm512_cmp_pd_mask((__m512d)x, (__m512d)(V{} + low), _CMP_GT_OQ), (__m512d)x,
                 (__m512d)(V{} + high), _CMP_LT_OQ) == 0xff;
#elif defined(__AVX__)
    const auto fits = (x > low) & (x < high);
    if constexpr (sizeof(NumberOf<V>) == 4) return _mm256_movemask_ps((__m256)fits) == 0xff;
    else return _mm256_movemask_pd((__m256d)fits) == 0xf;
#else
    const auto fits = (x > low) & (x < high);
    auto all = fits[0];
    for (unsigned i = 1; i < sizeof x / sizeof x[0]; ++i) all &= fits[i];
    return all;
#endif
  }
}

// Of a logit z, or a vector of them: |z|, e^{-|z|} and σ(|z|) / |z|.
template <class V>
struct Polar {
  V length, e, share;
};

template <class V>
FASTMIX_INLINE V square(Complex<V> z) {
  return z.re * z.re + z.im * z.im;
}

// Right only where z is `safe`.
template <class V>
FASTMIX_INLINE Polar<V> polar(Complex<V> z) {
  const V length = root(square(z)), e = exp_below_zero(-length);
  return {length, e, inverse(length * (1 + e))};
}

// The same where e^{-|z|} is known.
template <class V>
FASTMIX_INLINE Polar<V> polar(Complex<V> z, V e) {
  const V length = root(square(z));
  return {length, e, inverse(length * (1 + e))};
}

template <class V>
FASTMIX_INLINE bool safe(Complex<V> z) {
  using R = Range<NumberOf<V>>;
  return between(square(z), R::small * R::small, R::large * R::large);
}

// A z whose square would leave the normal range, which is rare, or a vector of any.
template <class V>
struct Careful {
  typedef decltype(V{} == V{}) Mask;
  Complex<V> z;     // where its square is safe
  V half;           // its factor is half²; 0 where z is infinite
  V length;         // its length there, 1 at z = 0
  V size, e;        // |z| and e^{-|z|}
  V share;          // σ(|z|) / length
  Mask zero, keep;  // keep: the square of z itself is safe

  explicit Careful(Complex<V> given) {
    using R = Range<NumberOf<V>>;
    const V one = V{} + 1, large = V{} + R::large, small = V{} + R::small, most = V{} + R::most;
    const V own = square(given);
    keep = (own > small * small) & (own < large * large);
    V re = given.re, im = given.im;
    const V x = re < 0 ? -re : re, y = im < 0 ? -im : im, larger = x < y ? y : x;
    half = larger < small   ? V{} + R::up
           : larger > most  ? one
           : larger > large ? V{} + R::down
                            : one;
    const V scale = half * half, back = larger > most ? larger : 1 / scale;
    half = larger > most ? V{} : half;
    // The direction of an infinite z is an axis, or a diagonal if both parts are infinite.
    re = larger > most ? (x > most ? (re < 0 ? -one : one) : re * 0) : re;
    im = larger > most ? (y > most ? (im < 0 ? -one : one) : im * 0) : im;
    zero = (re == 0) & (im == 0);
    z = {re * scale, im * scale};
    length = root(square(z));
    size = length * back;
    length = zero ? one : length;
    e = exp_below_zero(-size);
    share = 1 / (length * (1 + e));
  }
};

// Puts right the gates of those z whose square is not safe. The others stay as they are, so that
// no result depends on its neighbours. Takes values, so that they stay in registers elsewhere.
template <class V>
__attribute__((noinline)) Complex<V> repaired_gate(V z_re, V z_im, V re, V im) {
  const Careful<V> p({z_re, z_im});
  return {p.keep   ? re
          : p.zero ? V{} + NumberOf<V>(0.5)
                   : p.z.re * p.share,
          p.keep ? im : p.z.im * p.share};
}

// x · half / length · half. It ends at a power of two, with the sign it has, where it would leave
// the range of numbers.
template <class V>
FASTMIX_INLINE V over_length(V x, V half, V length) {
  using R = Range<NumberOf<V>>;
  const V most = V{} + R::most, limit = V{} + R::limit, y = x * half / length * half;
  const V ended = y > most ? limit : y < -most ? -limit : y;
  return x - x == 0 ? ended : y;
}

// The same for gradients of z, from those of the gates.
template <class V>
__attribute__((noinline)) Complex<V> repaired_gradient(V z_re, V z_im, V grad_re, V grad_im, V re,
                                                       V im) {
  const Careful<V> p({z_re, z_im});
  const V sigmoid = p.share * p.length, inverse = p.share + p.share * p.e;
  const V unit_re = p.z.re * inverse, unit_im = p.z.im * inverse;
  const V along = (unit_re * grad_re + unit_im * grad_im) * (p.e * sigmoid * sigmoid);
  const V turn = p.zero ? V{} : (unit_re * grad_im - unit_im * grad_re) * sigmoid;
  const V across_re = over_length(unit_im * turn, p.half, p.length);
  const V across_im = over_length(unit_re * turn, p.half, p.length);
  return {p.keep ? re : unit_re * along - across_re, p.keep ? im : unit_im * along + across_im};
}

// The gate of z, and the gradient of a gate → of z. `polar` need be right only where z is safe.
template <class V>
FASTMIX_INLINE Complex<V> gate(Complex<V> z, const Polar<V>& polar) {
  const Complex<V> a{z.re * polar.share, z.im * polar.share};
  return __builtin_expect(safe(z), 1) ? a : repaired_gate(z.re, z.im, a.re, a.im);
}

// Along z the slope is σ'(|z|), across it σ(|z|) / |z|; 0 at z = 0.
template <class V>
FASTMIX_INLINE Complex<V> gate_gradient(Complex<V> z, const Polar<V>& polar, Complex<V> grad) {
  const V share = polar.share, sigmoid = share * polar.length, inverse = share + share * polar.e;
  const V unit_re = z.re * inverse, unit_im = z.im * inverse;
  const V along = (unit_re * grad.re + unit_im * grad.im) * (polar.e * sigmoid * sigmoid);
  // A share may be large, a part small: theirs is the last product, or only one leaves the range.
  const V turn = unit_re * grad.im - unit_im * grad.re;
  const V re = unit_re * along - unit_im * turn * share,
          im = unit_im * along + unit_re * turn * share;
  return __builtin_expect(safe(z), 1) ? Complex<V>{re, im}
                                      : repaired_gradient(z.re, z.im, grad.re, grad.im, re, im);
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif
