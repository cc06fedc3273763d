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

// Mean and inverse deviation of a row. The mean's rounding is multiplied by as much as 1 / √eps:
// what is left of it is added. Squares of floats that overflow are summed as doubles.
template <class C>
void row_statistics(const C* x, int64_t count, double eps, C* mean, C* inverse) {
  const auto mean_from = [&](C origin) {
    const auto distance = [&](int64_t c) FASTMIX_LAMBDA { return x[c] - origin; };
    return static_cast<C>(origin + sum_over<C>(count, distance) / count);
  };
  C middle = mean_from(mean_from(0));
  double squares = sum_over<C>(
      count, [&](int64_t c) FASTMIX_LAMBDA { return (x[c] - middle) * (x[c] - middle); });
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
  double sum = 0, squares = 0, total = 0, along = 0;
  for (int64_t c = 0; c < count; ++c) sum += x[c];
  const double mean = sum / count;
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
void norm_backward(const C* x, const C* grad_normed, C mean, C inverse, double eps, const C* scale,
                   C* by_scale, C* by_shift, C* normal, C* grad, int64_t count) {
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

// In double for floats: with 1 - erf(x) = e^{-x²} P(1 / (1 + x/2)) for x in [0, 6], P a least
// squares fit of degree 9 whose error, 9e-11, is below float's rounding.
FASTMIX_INLINE float error_function(float x) {
  double size = x < 0 ? -static_cast<double>(x) : static_cast<double>(x);
  size = size > 6 ? 6 : size;
  const double t = 1 / (1 + 0.5 * size);
  double p = 0.0036616052;
  p = p * t - 0.0807554102486;
  p = p * t + 0.444352678407;
  p = p * t - 1.08649029159;
  p = p * t + 1.23832176417;
  p = p * t - 0.566489611628;
  p = p * t + 0.549662614631;
  p = p * t + 0.205253623037;
  p = p * t + 0.293174672709;
  p = p * t - 0.000691644770831;
  const double e = 1 - p * exp_below_zero(-size * size);
  return static_cast<float>(x < 0 ? -e : e);
}

FASTMIX_INLINE double error_function(double x) { return erf(x); }

constexpr double kRootHalf = 0.70710678118654752440, kGauss = 0.39894228040143267794;

template <class C>
struct Point {
  C value, slope;
};

template <class C>
FASTMIX_INLINE Point<C> point(Activation activation, C x) {
  switch (activation) {
    case Activation::tanh: {
      const C value = hyperbolic_tangent(x);
      return {value, C(1) - value * value};
    }
    case Activation::sigmoid: {
      const C value = sigmoid(x);
      return {value, value * (C(1) - value)};
    }
    case Activation::gelu: {
      const C part = C(0.5) * (C(1) + error_function(x * C(kRootHalf)));
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
