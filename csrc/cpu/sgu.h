// What the spatial gating units share: layer norm, activation, product with res.

#pragma once

#include "gate.h"
#include "matrix_unit.h"

namespace fastmix {

// `outside`: the caller applies a function of their own, and the product with res after it.
enum class Activation : int8_t { outside, identity, tanh, sigmoid, gelu, silu };
constexpr const char* kActivationNames[] = {"outside", "identity", "tanh",
                                            "sigmoid", "gelu",     "silu"};

}  // namespace fastmix

#ifdef FASTMIX_CPU

#include <math.h>

namespace fastmix::FASTMIX_CPU {
namespace {

struct Moments {
  double sum, squares;
};

// Σ (x - origin) and Σ (x - origin)²
template <class C>
Moments moments(const C* x, int64_t count, C origin) {
  using V = typename Simd<C>::Vector;
  constexpr int64_t lanes = Simd<C>::lanes;
  V part[2] = {}, square[2] = {};
  double rest = 0, rest_square = 0;
  int64_t c = 0;
  for (; c + 2 * lanes <= count; c += 2 * lanes)
    for (int j = 0; j < 2; ++j) {
      const V distance = load<V>(x + c + j * lanes) - origin;
      part[j] += distance;
      square[j] += distance * distance;
    }
  for (; c < count; ++c) {
    const C distance = x[c] - origin;
    rest += distance;
    rest_square += distance * distance;
  }
  return {total(part[0]) + total(part[1]) + rest,
          total(square[0]) + total(square[1]) + rest_square};
}

// Mean and inverse deviation of a row. The mean's rounding is multiplied by as much as 1 / √eps:
// what is left of it is added, and taken out of the squares unless it makes up much of them.
// Squares of floats that overflow are summed as doubles.
template <class C>
void row_statistics(const C* x, int64_t count, double eps, C* mean, C* inverse) {
  const C first =
      static_cast<C>(sum_over<C>(count, [&](int64_t c) FASTMIX_LAMBDA { return x[c]; }) / count);
  const Moments around = moments(x, count, first);
  const double left = around.sum * around.sum / count;
  C middle = static_cast<C>(first + around.sum / count);
  double squares =
      left <= around.squares / 64 ? around.squares - left : moments(x, count, middle).squares;
  if (!(squares < HUGE_VAL)) {
    double sum = 0;
    for (int64_t c = 0; c < count; ++c) sum += x[c];
    squares = 0;
    for (int64_t c = 0; c < count; ++c) {
      const double distance = x[c] - sum / count;
      squares += distance * distance;
    }
    middle = static_cast<C>(sum / count);
  }
  *mean = middle;
  *inverse = static_cast<C>(1 / sqrt(squares / count + eps));
}

// norm_backward in doubles: of few channels, differences are left whose digits floats lose.
template <class C>
void norm_backward_of_few(const C* x, const C* grad_normed, double eps, const C* scale, C* by_scale,
                          C* by_shift, C* grad, int64_t count) {
  if (count == 0) return;
  // From the first of them on: the mean of equal doubles is one of them, too.
  const double first = x[0];
  double sum = 0, squares = 0, total = 0, along = 0;
  for (int64_t c = 0; c < count; ++c) sum += x[c] - first;
  double mean = first + sum / count;
  if (!(mean - mean == 0)) {  // distances of doubles may overflow where their sum does not
    sum = 0;
    for (int64_t c = 0; c < count; ++c) sum += x[c];
    mean = sum / count;
  }
  for (int64_t c = 0; c < count; ++c) squares += (x[c] - mean) * (x[c] - mean);
  const double inverse = 1 / sqrt(squares / count + eps);
  for (int64_t c = 0; c < count; ++c) {
    const double normal = (x[c] - mean) * inverse;
    by_scale[c] += static_cast<C>(grad_normed[c] * normal);
    by_shift[c] += grad_normed[c];
    total += static_cast<double>(grad_normed[c]) * scale[c];
    along += static_cast<double>(grad_normed[c]) * scale[c] * normal;
  }
  for (int64_t c = 0; c < count; ++c) {
    const double normal = (x[c] - mean) * inverse,
                 own = static_cast<double>(grad_normed[c]) * scale[c];
    grad[c] = static_cast<C>(inverse * (own - total / count - normal * (along / count)));
  }
}

// The gradient of x from that of the row it is normalised to; adds to those of scale and shift.
template <class C>
void norm_backward(const C* __restrict x, const C* __restrict grad_normed, C mean, C inverse,
                   double eps, const C* __restrict scale, C* __restrict by_scale,
                   C* __restrict by_shift, C* __restrict normal, C* __restrict grad,
                   int64_t count) {
  if (count < 16)
    return norm_backward_of_few(x, grad_normed, eps, scale, by_scale, by_shift, grad, count);
  for (int64_t c = 0; c < count; ++c) {
    normal[c] = (x[c] - mean) * inverse;
    by_scale[c] += grad_normed[c] * normal[c];
    by_shift[c] += grad_normed[c];
    grad[c] = grad_normed[c] * scale[c];
  }
  const double total = sum_over<C>(count, [&](int64_t c) FASTMIX_LAMBDA { return grad[c]; });
  const double along =
      sum_over<C>(count, [&](int64_t c) FASTMIX_LAMBDA { return grad[c] * normal[c]; });
  const C mean_grad = static_cast<C>(total / count),
          mean_grad_normal = static_cast<C>(along / count);
  for (int64_t c = 0; c < count; ++c)
    grad[c] = inverse * (grad[c] - mean_grad - normal[c] * mean_grad_normal);
}

template <class C>
FASTMIX_INLINE C sigmoid(C x) {
  const C e = exp_below_zero(x < 0 ? x : -x), s = C(1) / (C(1) + e);
  return x < 0 ? e * s : s;
}

template <class C>
FASTMIX_INLINE C hyperbolic_tangent(C x) {
  const C size = x < 0 ? -x : x, less = expm1_below_zero(C(-2) * size);
  const C t = less / (C(-2) - less);
  return x < 0 ? -t : t;
}

constexpr double kRootHalf = 0.70710678118654752440, kGauss = 0.39894228040143267794;

// The normal distribution's share below x, ½ erfc(-x / √2): ½ (1 + erf(x / √2)) has no digits of
// float below -5. In double for floats: erfc(s) = e^{-s²} P(1 / (1 + s/2)), P a fit of degree 10
// whose relative error for s in [0, 9.5], 5e-9, is below float's rounding; beyond, erfc(s) is below
// its range.
FASTMIX_INLINE float normal_share(float x) {
  double s = (x < 0 ? -static_cast<double>(x) : static_cast<double>(x)) * kRootHalf;
  s = s > 11 ? 11 : s;
  const double t = 1 / (1 + 0.5 * s);
  double p = 0.0292141342334;
  p = p * t - 0.218252705874;
  p = p * t + 0.661492910419;
  p = p * t - 0.996312903965;
  p = p * t + 0.711066222693;
  p = p * t - 0.268119720706;
  p = p * t + 0.291856396888;
  p = p * t + 0.221636378663;
  p = p * t + 0.285594430157;
  p = p * t + 0.281815083376;
  p = p * t + 9.76927041203e-06;
  const double beyond = 0.5 * p * exp_below_zero(-s * s);
  return static_cast<float>(x < 0 ? beyond : 1 - beyond);
}

FASTMIX_INLINE double normal_share(double x) { return 0.5 * erfc(-x * kRootHalf); }

template <class C>
struct Point {
  C value, slope;
};

template <class C>
FASTMIX_INLINE Point<C> point(Activation activation, C x) {
  switch (activation) {
    // 1 - tanh² and 1 - σ are formed of e^{-2|x|} and e^{-|x|}: near 1 a difference has no digits.
    case Activation::tanh: {
      const C value = hyperbolic_tangent(x);
      const C e = exp_below_zero(x < 0 ? C(2) * x : C(-2) * x), share = C(1) / (C(1) + e);
      return {value, C(4) * e * share * share};
    }
    case Activation::sigmoid: {
      const C e = exp_below_zero(x < 0 ? x : -x), share = C(1) / (C(1) + e);
      return {x < 0 ? e * share : share, e * share * share};
    }
    case Activation::gelu: {
      const C part = normal_share(x);
      return {x * part, part + x * C(kGauss) * exp_below_zero(C(-0.5) * x * x)};
    }
    case Activation::silu: {
      const C part = sigmoid(x);
      return {x * part, part * (C(1) + x * (C(1) - part))};
    }
    default: return {x, C(1)};
  }
}

template <Activation which, class C>
void gate_rows(const C* __restrict mixed, const C* __restrict res, C* __restrict out,
               int64_t count) {
  for (int64_t c = 0; c < count; ++c) out[c] = point(which, mixed[c]).value * res[c];
}

template <Activation which, class C>
void gate_rows_backward(const C* __restrict mixed, const C* __restrict res,
                        const C* __restrict grad, C* __restrict grad_mixed, C* __restrict grad_res,
                        int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    const Point<C> p = point(which, mixed[c]);
    grad_mixed[c] = grad[c] * res[c] * p.slope;
    grad_res[c] = grad[c] * p.value;
  }
}

// out = activation(mixed) · res
template <class C>
void apply_gate(Activation activation, const C* mixed, const C* res, C* out, int64_t count) {
  switch (activation) {
    case Activation::tanh: return gate_rows<Activation::tanh>(mixed, res, out, count);
    case Activation::sigmoid: return gate_rows<Activation::sigmoid>(mixed, res, out, count);
    case Activation::gelu: return gate_rows<Activation::gelu>(mixed, res, out, count);
    case Activation::silu: return gate_rows<Activation::silu>(mixed, res, out, count);
    default: return gate_rows<Activation::identity>(mixed, res, out, count);
  }
}

// Gradients of mixed and res.
template <class C>
void apply_gate_backward(Activation activation, const C* mixed, const C* res, const C* grad,
                         C* grad_mixed, C* grad_res, int64_t count) {
  const auto run = [&](auto rows) { rows(mixed, res, grad, grad_mixed, grad_res, count); };
  switch (activation) {
    case Activation::tanh: return run(gate_rows_backward<Activation::tanh, C>);
    case Activation::sigmoid: return run(gate_rows_backward<Activation::sigmoid, C>);
    case Activation::gelu: return run(gate_rows_backward<Activation::gelu, C>);
    case Activation::silu: return run(gate_rows_backward<Activation::silu, C>);
    default: return run(gate_rows_backward<Activation::identity, C>);
  }
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif
