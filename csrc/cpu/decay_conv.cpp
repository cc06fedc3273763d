// y_t = decay · y_{t-1} + gain · x_t, one read of x and one write of y.
//
// Channels lie in SIMD lanes. A unit of work is a stretch of time of a block of channels;
// where there are several stretches, a first pass finds the state that each contributes.

#include "rows.h"

namespace fastmix {

struct DecayConv {
  int64_t n, channels, block, stretch, stretches, carry_every;
  const double *decay, *gain;  // per channel; gain may be null
  Source x, initial_state;
  Sink out, state, carries;  // forward
  Source grad, grad_state, kept;
  Sink grad_x, grad_initial;
  double *grad_decay, *grad_gain;  // (b, stretches, channels)
  // (b, stretches, channels): what each stretch adds to its last state, then its first one;
  // in backward, the same against time.
  double* entries;
};

}  // namespace fastmix

FASTMIX_KERNEL(decay_conv_ends, fastmix::DecayConv)
FASTMIX_KERNEL(decay_conv_forward, fastmix::DecayConv)
FASTMIX_KERNEL(decay_conv_backward_ends, fastmix::DecayConv)
FASTMIX_KERNEL(decay_conv_backward, fastmix::DecayConv)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

struct Unit {
  int64_t b, s, c0, count, start, end;
  double* entry;
};

Unit unit_of(const DecayConv& f, int64_t index) {
  const int64_t blocks = (f.channels + f.block - 1) / f.block;
  Unit u;
  u.c0 = index % blocks * f.block;
  u.s = index / blocks % f.stretches;
  u.b = index / blocks / f.stretches;
  u.count = smaller(f.block, f.channels - u.c0);
  u.start = u.s * f.stretch;
  u.end = smaller(u.start + f.stretch, f.n);
  u.entry = f.entries + (u.b * f.stretches + u.s) * f.channels + u.c0;
  return u;
}

template <class C>
C* parameter(Scratch& scratch, const double* values, const Unit& u) {
  C* found = scratch.take<C>(u.count);
  for (int64_t c = 0; c < u.count; ++c) found[c] = values ? static_cast<C>(values[u.c0 + c]) : C(1);
  return found;
}

template <class C>
C* taken(Scratch& scratch, const Unit& u) {
  C* state = scratch.take<C>(u.count);
  for (int64_t c = 0; c < u.count; ++c) state[c] = static_cast<C>(u.entry[c]);
  return state;
}

void hand_over(const Unit& u, const double* state) { memcpy(u.entry, state, u.count * 8); }
void hand_over(const Unit& u, const float* state) {
  for (int64_t c = 0; c < u.count; ++c) u.entry[c] = state[c];
}

// The last state of a stretch that starts from zero; or, against time, decay · its first g.
template <class C, bool backward>
void ends(const DecayConv& f, int64_t index) {
  const Unit u = unit_of(f, index);
  if (u.s == (backward ? 0 : f.stretches - 1)) return;  // nothing follows
  Scratch scratch;
  const C* decay = parameter<C>(scratch, f.decay, u);
  const C* gain = parameter<C>(scratch, backward ? nullptr : f.gain, u);
  C* state = scratch.take<C>(u.count);
  C* wide = scratch.take<C>(u.count);
  memset(state, 0, u.count * sizeof(C));
  for (int64_t i = u.start; i < u.end; ++i) {
    const int64_t t = backward ? u.end - 1 - (i - u.start) : i;
    const C* in = read(backward ? f.grad : f.x, u.b, t, u.c0, u.count, wide);
    each_vector<C>(u.count, [&](auto zero, int64_t c) LAMBDA {
      using V = decltype(zero);
      const V a = load<V>(decay + c), s = load<V>(state + c), x = load<V>(in + c);
      store(state + c, backward ? a * (s + x) : a * s + load<V>(gain + c) * x);
    });
  }
  hand_over(u, state);
}

template <class C>
void forward(const DecayConv& f, int64_t index) {
  const Unit u = unit_of(f, index);
  Scratch scratch;
  const C* decay = parameter<C>(scratch, f.decay, u);
  const C* gain = parameter<C>(scratch, f.gain, u);
  C* state = taken<C>(scratch, u);
  C* wide = scratch.take<C>(u.count);
  for (int64_t t = u.start; t < u.end; ++t) {
    if (f.carry_every && t % f.carry_every == 0)
      write(f.carries, u.b, t / f.carry_every, u.c0, u.count, state);
    const C* x = read(f.x, u.b, t, u.c0, u.count, wide);
    each_vector<C>(u.count, [&](auto zero, int64_t c) LAMBDA {
      using V = decltype(zero);
      store(state + c, load<V>(decay + c) * load<V>(state + c) + load<V>(gain + c) * load<V>(x + c));
    });
    write(f.out, u.b, t, u.c0, u.count, state);
  }
  streamed();
  if (u.end < f.n) return;
  if (f.carry_every) write(f.carries, u.b, f.carries.n_size - 1, u.c0, u.count, state);
  write(f.state, u.b, 0, u.c0, u.count, state);
}

// With g_t = grad_t + decay · g_{t+1}: dx = gain · g, dgain = Σ g x, ddecay = Σ g_t y_{t-1}.
template <class C>
void backward(const DecayConv& f, int64_t index) {
  const Unit u = unit_of(f, index);
  const int64_t count = u.count, every = f.carry_every;
  Scratch scratch;
  const C* decay = parameter<C>(scratch, f.decay, u);
  const C* gain = parameter<C>(scratch, f.gain, u);
  C* g = taken<C>(scratch, u);  // decay · g_{t+1}
  C* wide = scratch.take<C>(count);
  C* wide_grad = scratch.take<C>(count);
  C* dx = scratch.take<C>(count);
  C* by_decay = scratch.take<C>(count);
  C* by_gain = scratch.take<C>(count);
  C* before = scratch.take<C>(every * count);  // y_{t-1} for the steps of a chunk
  const int64_t at = (u.b * f.stretches + u.s) * f.channels + u.c0;
  double *grad_decay = f.grad_decay + at, *grad_gain = f.grad_gain + at;
  memset(grad_decay, 0, count * sizeof(double));
  memset(grad_gain, 0, count * sizeof(double));
  for (int64_t start = (u.end - 1) / every * every; start >= u.start; start -= every) {
    const int64_t end = smaller(start + every, u.end);
    memcpy(before, read(f.kept, u.b, start / every, u.c0, count, wide), count * sizeof(C));
    for (int64_t t = start; t + 1 < end; ++t) {
      const C* x = read(f.x, u.b, t, u.c0, count, wide);
      const C* y = before + (t - start) * count;
      C* next = before + (t + 1 - start) * count;
      each_vector<C>(count, [&](auto zero, int64_t c) LAMBDA {
        using V = decltype(zero);
        store(next + c, load<V>(decay + c) * load<V>(y + c) + load<V>(gain + c) * load<V>(x + c));
      });
    }
    memset(by_decay, 0, count * sizeof(C));
    memset(by_gain, 0, count * sizeof(C));
    for (int64_t t = end - 1; t >= start; --t) {
      const C* x = read(f.x, u.b, t, u.c0, count, wide);
      const C* grad = read(f.grad, u.b, t, u.c0, count, wide_grad);
      const C* y = before + (t - start) * count;
      each_vector<C>(count, [&](auto zero, int64_t c) LAMBDA {
        using V = decltype(zero);
        const V now = load<V>(grad + c) + load<V>(g + c);
        store(by_decay + c, load<V>(by_decay + c) + now * load<V>(y + c));
        store(by_gain + c, load<V>(by_gain + c) + now * load<V>(x + c));
        store(g + c, load<V>(decay + c) * now);
        store(dx + c, load<V>(gain + c) * now);
      });
      write(f.grad_x, u.b, t, u.c0, count, dx);
    }
    for (int64_t c = 0; c < count; ++c) {
      grad_decay[c] += by_decay[c];
      grad_gain[c] += by_gain[c];
    }
  }
  streamed();
  if (u.start == 0 && f.grad_initial.data) write(f.grad_initial, u.b, 0, u.c0, count, g);
}

}  // namespace

void decay_conv_ends(const DecayConv& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    f.x.type == Type::f64 ? ends<double, false>(f, i) : ends<float, false>(f, i);
}

void decay_conv_backward_ends(const DecayConv& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    f.x.type == Type::f64 ? ends<double, true>(f, i) : ends<float, true>(f, i);
}

void decay_conv_forward(const DecayConv& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    f.x.type == Type::f64 ? forward<double>(f, i) : forward<float>(f, i);
}

void decay_conv_backward(const DecayConv& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    f.x.type == Type::f64 ? backward<double>(f, i) : backward<float>(f, i);
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include <cmath>

#include "tensors.h"

namespace fastmix {
namespace {

// (h,) → one value for every channel; empty without a parameter.
std::vector<double> per_channel(const Maybe& parameter, int64_t d) {
  std::vector<double> found;
  if (!parameter) return found;
  for (double value : values(*parameter)) found.insert(found.end(), d, value);
  return found;
}

// Σ over all but heads: (…, h · d) → like the parameter (h,).
Tensor per_head(const std::vector<double>& sums, int64_t d, const Tensor& parameter) {
  const size_t h = parameter.size(0);
  std::vector<double> total(h);
  for (size_t i = 0; i < sums.size(); ++i) total[i / d % h] += sums[i];
  Tensor grad = fresh(parameter);
  assign(grad, total);
  return grad;
}

DecayConv arguments(const Tensor& x, const std::vector<double>& decay,
                    const std::vector<double>& gain, std::vector<double>& entries,
                    int64_t carry_every) {
  DecayConv f{};
  const int64_t b = x.size(0);
  f.n = x.size(1);
  f.channels = x.size(2) * x.size(3);
  f.block = kBlock;
  f.stretch = stretch(b, f.n);
  f.stretches = (f.n + f.stretch - 1) / f.stretch;
  f.carry_every = carry_every;
  f.decay = decay.data();
  f.gain = gain.empty() ? nullptr : gain.data();
  f.x = source(x);
  entries.resize(b * f.stretches * f.channels);
  f.entries = entries.data();
  return f;
}

// The state that enters each stretch, from what every one adds and the state before all.
void enter(const DecayConv& f, int64_t batches, const std::vector<double>& first, bool reverse) {
  const int64_t rest = f.n - (f.stretches - 1) * f.stretch;
  double over_stretch = 1, over_rest = 1;  // decay to the power of a stretch's steps
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t c = 0; c < f.channels; ++c) {
      if (f.stretches > 1 && (c == 0 || f.decay[c] != f.decay[c - 1])) {
        over_stretch = std::pow(f.decay[c], static_cast<double>(f.stretch));
        over_rest = std::pow(f.decay[c], static_cast<double>(rest));
      }
      double state = first.empty() ? 0 : first[b * f.channels + c];
      for (int64_t i = 0; i < f.stretches; ++i) {
        const int64_t s = reverse ? f.stretches - 1 - i : i;
        double& entry = f.entries[(b * f.stretches + s) * f.channels + c];
        const double added = entry;
        entry = state;
        state = (s == f.stretches - 1 ? over_rest : over_stretch) * state + added;
      }
    }
}

int64_t units(const DecayConv& f, int64_t batches) {
  return batches * f.stretches * blocks(f.channels);
}

std::tuple<Tensor, Tensor, Tensor> decay_conv(
    const Tensor& x, const Tensor& decay, const Maybe& gain, const Maybe& initial_state,
    int64_t carry_every) {
  const int64_t b = x.size(0), n = x.size(1), h = x.size(2), d = x.size(3);
  const int64_t carries = carry_every ? (n + carry_every - 1) / carry_every + 1 : 0;
  Tensor out = fresh(x), state = fresh(x, {b, h, d}, wide(x)),
         kept = fresh(x, {b, carries, h, d}, wide(x));
  const auto decays = per_channel(decay, d), gains = per_channel(gain, d);
  std::vector<double> entries;
  DecayConv f = arguments(x, decays, gains, entries, carry_every);
  f.out = sink(out, n, h * d);
  f.state = sink(state, 1, h * d);
  f.carries = sink(kept, carries, h * d);
  if (f.stretches > 1) spread(FASTMIX_KERNELS(decay_conv_ends), f, units(f, b));
  enter(f, b, initial_state ? values(*initial_state) : std::vector<double>(), false);
  spread(FASTMIX_KERNELS(decay_conv_forward), f, units(f, b));
  return {out, state, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decay_conv_backward(
    const Tensor& grad, const Tensor& grad_state, const Tensor& carries, const Tensor& x,
    const Tensor& decay, const Maybe& gain, const Maybe& initial_state, int64_t carry_every) {
  const int64_t b = x.size(0), n = x.size(1), h = x.size(2), d = x.size(3);
  Tensor grad_x = fresh(x), grad_initial = initial_state ? fresh(*initial_state) : nothing(x);
  const auto decays = per_channel(decay, d), gains = per_channel(gain, d);
  std::vector<double> entries;
  DecayConv f = arguments(x, decays, gains, entries, carry_every);
  std::vector<double> by_decay(entries.size()), by_gain(entries.size());
  f.grad = source(grad);
  f.grad_state = state_source(grad_state);
  f.kept = source(carries);
  f.grad_x = sink(grad_x, n, h * d);
  if (initial_state) f.grad_initial = sink(grad_initial, 1, h * d);
  f.grad_decay = by_decay.data();
  f.grad_gain = by_gain.data();
  if (f.stretches > 1) spread(FASTMIX_KERNELS(decay_conv_backward_ends), f, units(f, b));
  enter(f, b, values(grad_state), true);
  spread(FASTMIX_KERNELS(decay_conv_backward), f, units(f, b));
  return {grad_x, per_head(by_decay, d, decay),
          gain ? per_head(by_gain, d, *gain) : nothing(x), grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("decay_conv", TORCH_BOX(&decay_conv));
  m.impl("decay_conv_backward", TORCH_BOX(&decay_conv_backward));
}

}  // namespace fastmix

#endif
