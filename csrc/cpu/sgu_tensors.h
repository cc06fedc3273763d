// What the registrations of the spatial gating units share.

#pragma once

#include <string.h>
#include <torch/headeronly/util/Exception.h>

#include <iterator>

#include "sgu.h"
#include "tensors.h"

namespace fastmix {

inline Activation activation_of(const char* name) {
  for (int8_t i = 0; i < static_cast<int8_t>(std::size(kActivationNames)); ++i)
    if (!strcmp(name, kActivationNames[i])) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "fastmix has no activation ", name,
                  ": a program exported by another version must be exported again");
}

}  // namespace fastmix

// An operator's string as the activation that it names. Torch's own conversion, to std::string,
// leaves a copy behind in every call (torch 2.13: `new std::string` without a delete).
template <>
struct torch::stable::detail::ToImpl<fastmix::Activation> {
  static fastmix::Activation call(StableIValue value, uint64_t, bool) {
    const StringHandle name = torch::stable::detail::to<StringHandle>(value);
    const char* text;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &text));
    const fastmix::Activation activation = fastmix::activation_of(text);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(name));
    return activation;
  }
};

namespace fastmix {

// A causal unit's weight has a row for each step, and may have a window's columns.
inline void check(const Checks& checks, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                  const OptionalTensor& residual, bool causal) {
  checks.tensor("x", x, {kAny, kAny, kAny}, kReal);
  const int64_t b = x.size(0), n = x.size(1), c = x.size(2) / 2;
  checks.tensor("x", x, {b, n, 2 * c}, kReal);
  checks.require(n > 0, "n", "at least 1", n);
  checks.tensor("weight", weight, {kAny, kAny, kAny}, kReal);
  const int64_t h = weight.size(0), rows = weight.size(1);
  const bool square = causal && weight.size(2) != 2 * rows;
  checks.tensor("weight", weight, {h, rows, square ? rows : 2 * rows}, kReal);
  checks.require(rows > 0 && (!causal || rows >= n), "the number of the weight's rows",
                 causal ? "at least n" : "at least 1", rows);
  checks.require(h > 0 && c % h == 0, "the number of heads", "a divisor of half of x's last axis",
                 h);
  checks.tensor("bias", bias, {h, rows}, kReal);
  checks.tensor("norm_weight", norm_weight, {c}, kReal);
  checks.tensor("norm_bias", norm_bias, {c}, kReal);
  checks.tensor("gate_residual", residual, {b, n, c}, only(x.scalar_type()));
}

// Parameters as the kernels take them; it must outlive their calls.
struct Parameters {
  std::vector<double> bias, norm_weight, norm_bias;
  Tensor weight;
  bool halves;  // whether the weight's numbers are bfloat16's

  Parameters(const Tensor& x, Tensor weight, bool halves, const Tensor& bias,
             const OptionalTensor& norm_weight, const OptionalTensor& norm_bias)
      : bias(values(bias)),
        norm_weight(norm_weight ? values(*norm_weight) : std::vector<double>(x.size(2) / 2, 1.0)),
        norm_bias(norm_bias ? values(*norm_bias) : std::vector<double>(x.size(2) / 2, 0.0)),
        weight(std::move(weight)), halves(halves) {}
};

// What both take, into the arguments of either.
template <class Arguments>
void fill(Arguments& args, const Tensor& x, const Parameters& p, double eps,
          const OptionalTensor& residual, Activation activation) {
  args.b = x.size(0);
  args.n = x.size(1);
  args.c = x.size(2) / 2;
  args.h = p.weight.size(0);
  args.activation = activation;
  args.eps = eps;
  args.bias = p.bias.data();
  args.norm_weight = p.norm_weight.data();
  args.norm_bias = p.norm_bias.data();
  args.weight = p.weight.const_data_ptr();
  args.unit = p.halves && matrix_unit();
  args.x = source(x);
  if (residual) args.residual = source(*residual);
}

// In causal_sgu.cpp; windowed_sgu.cpp has a use for them. They take a window's weight as well,
// (h, s, 2s), whose first half meets nothing.
Tensor causal_sgu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                  const OptionalTensor& residual, Activation activation);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> causal_sgu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
    const OptionalTensor& residual, Activation activation);

}  // namespace fastmix
