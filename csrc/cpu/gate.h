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
template <class C>
struct Exponential {
  C power, part;  // 2^k, and e^r - 1
};

FASTMIX_INLINE Exponential<float> exponential(float x) {
  x = x < -88.0f ? -88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
  float r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return {power, p * r};
}

FASTMIX_INLINE Exponential<double> exponential(double x) {
  x = x < -709.0 ? -709.0 : x;
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const double k = shifted - 6755399441055744.0;
  double r = x - k * 0.693147180369123816490;
  r = r - k * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  uint64_t bits;
  memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;
  double power;
  memcpy(&power, &bits, 8);
  return {power, p * r};
}

template <class C>
FASTMIX_INLINE C exp_below_zero(C x) {
  const Exponential<C> e = exponential(x);
  return e.power + e.power * e.part;
}

// e^x - 1
template <class C>
FASTMIX_INLINE C expm1_below_zero(C x) {
  const Exponential<C> e = exponential(x);
  return (e.power - C(1)) + e.power * e.part;
}

// Beyond `small` and `large` squares would leave the range of normal numbers, and ½ over a length
// below `least` that of all numbers.
template <class C>
struct Range;
template <>
struct Range<float> {
  static constexpr float small = 1e-15f, large = 1e15f, up = 0x1p100f, down = 0x1p-100f,
                         least = 0x1p-128f, most = 0x1.fffffep127f;
  static FASTMIX_INLINE float root(float x) { return __builtin_sqrtf(x); }
};
template <>
struct Range<double> {
  static constexpr double small = 1e-140, large = 1e140, up = 0x1p800, down = 0x1p-800,
                          least = 0x1p-1024, most = 0x1.fffffffffffffp1023;
  static FASTMIX_INLINE double root(double x) { return __builtin_sqrt(x); }
};

template <class C>
struct Polar {
  C re, im;  // z in a range where its square is safe
  C length;  // its length there, 1 at z = 0
  C size;    // |z|
  C e;       // e^{-|z|}
  bool zero, safe;
};

// Branch-free, so that it vectorises. Where z is not `safe`, that is, where its square would leave
// the normal range, which is rare, only `careful` is right.
template <bool careful, class C>
FASTMIX_INLINE Polar<C> polar(C re, C im) {
  using R = Range<C>;
  const C square = re * re + im * im;
  const bool safe = (square > R::small * R::small) & (square < R::large * R::large);
  if constexpr (!careful) {
    const C length = R::root(square);
    return {re, im, length, length, exp_below_zero(-length), false, safe};
  }
  const C x = re < 0 ? -re : re, y = im < 0 ? -im : im, most = x < y ? y : x;
  const bool infinite = most > R::most;
  const C scale = most < R::small ? R::up : infinite ? C(1) : most > R::large ? R::down : C(1);
  const C back = infinite ? most : most < R::small ? R::down : most > R::large ? R::up : C(1);
  // The direction of an infinite z is an axis, or a diagonal if both parts are infinite.
  re = !infinite ? re : x > R::most ? (re < 0 ? C(-1) : C(1)) : re * 0;
  im = !infinite ? im : y > R::most ? (im < 0 ? C(-1) : C(1)) : im * 0;
  const bool zero = (re == 0) & (im == 0);
  re *= scale;
  im *= scale;
  const C length = R::root(re * re + im * im), size = length * back;
  return {re, im, zero ? C(1) : length, size, exp_below_zero(-size), zero, safe};
}

// Returns whether every z was safe. `careful` leaves the results of safe z as they are, so that no
// result depends on its neighbours.
template <bool careful, class C>
bool activate(const C* __restrict z, C* __restrict re, C* __restrict im, int64_t count) {
  int safe = 1;
  for (int64_t c = 0; c < count; ++c) {
    const Polar<C> p = polar<careful>(z[2 * c], z[2 * c + 1]);
    const C share = C(1) / (p.length * (C(1) + p.e));
    const bool keep = careful & p.safe;
    re[c] = keep ? re[c] : p.zero ? C(0.5) : p.re * share;
    im[c] = keep ? im[c] : p.im * share;
    safe &= p.safe;
  }
  return safe;
}

// z: count pairs of real and imaginary part → a
template <class C>
void activate(const C* z, C* re, C* im, int64_t count) {
  if (!activate<false>(z, re, im, count)) activate<true>(z, re, im, count);
}

template <bool careful, class C>
bool activate_backward(const C* __restrict z, const C* __restrict re, const C* __restrict im,
                       C* __restrict grad, int64_t count) {
  int safe = 1;
  for (int64_t c = 0; c < count; ++c) {
    const Polar<C> p = polar<careful>(z[2 * c], z[2 * c + 1]);
    const C share = C(1) / (p.length * (C(1) + p.e));
    const C sigmoid = share * p.length, inverse = share + share * p.e;
    const C unit_re = p.re * inverse, unit_im = p.im * inverse;
    const C along = (unit_re * re[c] + unit_im * im[c]) * (p.e * sigmoid * sigmoid);
    const C turn = unit_re * im[c] - unit_im * re[c];
    C across = turn * share;
    if constexpr (careful) {  // ends at the largest power of two where it would leave the range
      const C least = (turn < 0 ? -turn : turn) * Range<C>::least;
      const C size = p.size < least ? least : p.size;
      across = size == 0 ? C(0) : turn * sigmoid / size;
    }
    const bool keep = careful & p.safe;
    grad[2 * c] = keep ? grad[2 * c] : unit_re * along - unit_im * across;
    grad[2 * c + 1] = keep ? grad[2 * c + 1] : unit_im * along + unit_re * across;
    safe &= p.safe;
  }
  return safe;
}

// Gradient of a → of z. Along z the slope is σ'(|z|), across it σ(|z|) / |z|; 0 at z = 0.
template <class C>
void activate_backward(const C* z, const C* re, const C* im, C* grad, int64_t count) {
  if (!activate_backward<false>(z, re, im, grad, count))
    activate_backward<true>(z, re, im, grad, count);
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif
