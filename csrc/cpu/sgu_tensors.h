// What the registrations of the spatial gating units share.

#pragma once

#include <string>

#include "sgu.h"
#include "tensors.h"

namespace fastmix {

inline Activation activation_of(const std::string& name) {
  const char* names[] = {"none", "identity", "tanh", "sigmoid", "gelu", "silu"};
  int8_t i = 0;
  while (name != names[i]) ++i;
  return static_cast<Activation>(i);
}

// Parameters as the kernels take them; it must outlive their calls.
struct Parameters {
  std::vector<double> bias, norm_weight, norm_bias;
  Tensor weight;

  Parameters(const Tensor& x, Tensor weight, const Tensor& bias, const Maybe& norm_weight,
             const Maybe& norm_bias)
      : bias(values(bias)),
        norm_weight(norm_weight ? values(*norm_weight) : std::vector<double>(x.size(2) / 2, 1.0)),
        norm_bias(norm_bias ? values(*norm_bias) : std::vector<double>(x.size(2) / 2, 0.0)),
        weight(std::move(weight)) {}
};

// What both take, into the arguments of either.
template <class Arguments>
void fill(Arguments& f, const Tensor& x, const Parameters& p, double eps, const Maybe& residual,
          const std::string& activation) {
  f.b = x.size(0);
  f.n = x.size(1);
  f.c = x.size(2) / 2;
  f.h = p.weight.size(0);
  f.activation = activation_of(activation);
  f.eps = eps;
  f.bias = p.bias.data();
  f.norm_weight = p.norm_weight.data();
  f.norm_bias = p.norm_bias.data();
  f.weight = p.weight.const_data_ptr();
  f.x = source(x);
  if (residual) f.residual = source(*residual);
}

// In causal_sgu.cpp; windowed_sgu.cpp has a use for them. They take a window's weight as well,
// (h, s, 2s), whose first half meets nothing.
Tensor causal_sgu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const Maybe& norm_weight, const Maybe& norm_bias, double eps,
                  const Maybe& residual, std::string activation);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> causal_sgu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Maybe& norm_weight, const Maybe& norm_bias, double eps, const Maybe& residual,
    std::string activation);

}  // namespace fastmix
