// y_t = decay · y_{t-1} + gain · x_t, one read of x and one write of y.
//
// Channels lie in SIMD lanes; a unit of work is a block of channels of one batch entry.

#include "rows.h"

namespace fastmix {

struct DecayConv {
  int64_t n, channels, block, carry_every;
  const double *decay, *gain;  // per channel; gain may be null
  Source x, initial_state;
  Sink out, state, carries;  // forward
  Source grad, grad_state, kept;
  Sink grad_x, grad_initial;
  double *grad_decay, *grad_gain;  // per batch entry and channel
};

}  // namespace fastmix

FASTMIX_KERNEL(decay_conv_forward, fastmix::DecayConv)
FASTMIX_KERNEL(decay_conv_backward, fastmix::DecayConv)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

template <class C>
void forward_unit(const DecayConv& f, int64_t b, int64_t c0) {
  const int64_t count = smaller(f.block, f.channels - c0);
  Scratch scratch;
  C* decay = scratch.take<C>(count);
  C* gain = scratch.take<C>(count);
  C* state = scratch.take<C>(count);
  C* in = scratch.take<C>(count);
  C* narrow = scratch.take<C>(count);
  for (int64_t c = 0; c < count; ++c) {
    decay[c] = static_cast<C>(f.decay[c0 + c]);
    gain[c] = f.gain ? static_cast<C>(f.gain[c0 + c]) : C(1);
    state[c] = C(0);
  }
  if (f.initial_state.present())
    memcpy(state, read(f.initial_state, b, 0, c0, count, in), count * sizeof(C));
  for (int64_t t = 0; t < f.n; ++t) {
    if (f.carry_every && t % f.carry_every == 0)
      write(f.carries, b, t / f.carry_every, c0, count, state);
    const C* __restrict x = read(f.x, b, t, c0, count, in);
    C* __restrict y = row(f.out, b, t, c0, narrow);
    if (f.gain) {
      for (int64_t c = 0; c < count; ++c) y[c] = state[c] = decay[c] * state[c] + gain[c] * x[c];
    } else {
      for (int64_t c = 0; c < count; ++c) y[c] = state[c] = decay[c] * state[c] + x[c];
    }
    write(f.out, b, t, c0, count, y);
  }
  if (f.carry_every) write(f.carries, b, f.carries.n_size - 1, c0, count, state);
  write(f.state, b, 0, c0, count, state);
}

// With g_t = grad_t + decay · g_{t+1}: dx = gain · g, dgain = Σ g x, ddecay = Σ g_t y_{t-1}.
template <class C>
void backward_unit(const DecayConv& f, int64_t b, int64_t c0) {
  const int64_t count = smaller(f.block, f.channels - c0), every = f.carry_every;
  Scratch scratch;
  C* decay = scratch.take<C>(count);
  C* gain = scratch.take<C>(count);
  C* g = scratch.take<C>(count);  // decay · g_{t+1}
  C* in = scratch.take<C>(count);
  C* grad_in = scratch.take<C>(count);
  C* narrow = scratch.take<C>(count);
  C* by_decay = scratch.take<C>(count);
  C* by_gain = scratch.take<C>(count);
  C* before = scratch.take<C>(every * count);  // y_{t-1} for the steps of a chunk
  double* grad_decay = f.grad_decay + b * f.channels + c0;
  double* grad_gain = f.grad_gain + b * f.channels + c0;
  for (int64_t c = 0; c < count; ++c) {
    decay[c] = static_cast<C>(f.decay[c0 + c]);
    gain[c] = f.gain ? static_cast<C>(f.gain[c0 + c]) : C(1);
    grad_decay[c] = grad_gain[c] = 0;
  }
  memcpy(g, read(f.grad_state, b, 0, c0, count, in), count * sizeof(C));
  for (int64_t start = (f.n - 1) / every * every; start >= 0; start -= every) {
    const int64_t end = smaller(start + every, f.n);
    memcpy(before, read(f.kept, b, start / every, c0, count, in), count * sizeof(C));
    for (int64_t t = start; t + 1 < end; ++t) {
      const C* __restrict x = read(f.x, b, t, c0, count, in);
      const C* __restrict y = before + (t - start) * count;
      C* __restrict next = before + (t + 1 - start) * count;
      for (int64_t c = 0; c < count; ++c) next[c] = decay[c] * y[c] + gain[c] * x[c];
    }
    for (int64_t c = 0; c < count; ++c) by_decay[c] = by_gain[c] = C(0);
    for (int64_t t = end - 1; t >= start; --t) {
      const C* __restrict x = read(f.x, b, t, c0, count, in);
      const C* __restrict grad = read(f.grad, b, t, c0, count, grad_in);
      const C* __restrict y = before + (t - start) * count;
      C* __restrict dx = row(f.grad_x, b, t, c0, narrow);
      for (int64_t c = 0; c < count; ++c) {
        const C now = grad[c] + g[c];
        by_decay[c] += now * y[c];
        by_gain[c] += now * x[c];
        dx[c] = gain[c] * now;
        g[c] = decay[c] * now;
      }
      write(f.grad_x, b, t, c0, count, dx);
    }
    for (int64_t c = 0; c < count; ++c) {
      grad_decay[c] += by_decay[c];
      grad_gain[c] += by_gain[c];
    }
  }
  if (f.grad_initial.data) write(f.grad_initial, b, 0, c0, count, g);
}

}  // namespace

void decay_conv_forward(const DecayConv& f, int64_t begin, int64_t end) {
  const int64_t blocks = (f.channels + f.block - 1) / f.block;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, c0 = unit % blocks * f.block;
    f.x.type == Type::f64 ? forward_unit<double>(f, b, c0) : forward_unit<float>(f, b, c0);
  }
}

void decay_conv_backward(const DecayConv& f, int64_t begin, int64_t end) {
  const int64_t blocks = (f.channels + f.block - 1) / f.block;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, c0 = unit % blocks * f.block;
    f.x.type == Type::f64 ? backward_unit<double>(f, b, c0) : backward_unit<float>(f, b, c0);
  }
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

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

// Σ over batch entries and the channels of a head: (b, h · d) → like the parameter (h,).
Tensor per_head(const std::vector<double>& sums, int64_t b, int64_t d, const Tensor& parameter) {
  const int64_t h = parameter.size(0);
  std::vector<double> total(h);
  for (int64_t i = 0; i < b * h * d; ++i) total[i / d % h] += sums[i];
  Tensor grad = fresh(parameter);
  assign(grad, total);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> decay_conv(
    const Tensor& x, const Tensor& decay, const Maybe& gain, const Maybe& initial_state,
    int64_t carry_every) {
  const int64_t b = x.size(0), n = x.size(1), h = x.size(2), d = x.size(3);
  const int64_t carries = carry_every ? (n + carry_every - 1) / carry_every + 1 : 0;
  Tensor out = fresh(x), state = fresh(x, {b, h, d}, wide(x)),
         kept = fresh(x, {b, carries, h, d}, wide(x));
  const auto decays = per_channel(decay, d), gains = per_channel(gain, d);
  DecayConv f{n, h * d, channel_block(b, h * d), carry_every,
              decays.data(), gain ? gains.data() : nullptr,
              source(x), state_source(initial_state),
              sink(out, n, h * d), sink(state, 1, h * d), sink(kept, carries, h * d)};
  spread(FASTMIX_KERNELS(decay_conv_forward), f, b * ((f.channels + f.block - 1) / f.block));
  return {out, state, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decay_conv_backward(
    const Tensor& grad, const Tensor& grad_state, const Tensor& carries, const Tensor& x,
    const Tensor& decay, const Maybe& gain, const Maybe& initial_state, int64_t carry_every) {
  const int64_t b = x.size(0), n = x.size(1), h = x.size(2), d = x.size(3);
  Tensor grad_x = fresh(x), grad_initial = initial_state ? fresh(*initial_state) : nothing(x);
  const auto decays = per_channel(decay, d), gains = per_channel(gain, d);
  std::vector<double> by_decay(b * h * d), by_gain(b * h * d);
  DecayConv f{n, h * d, channel_block(b, h * d), carry_every,
              decays.data(), gain ? gains.data() : nullptr, source(x)};
  f.grad = source(grad);
  f.grad_state = state_source(grad_state);
  f.kept = source(carries);
  f.grad_x = sink(grad_x, n, h * d);
  if (initial_state) f.grad_initial = sink(grad_initial, 1, h * d);
  f.grad_decay = by_decay.data();
  f.grad_gain = by_gain.data();
  spread(FASTMIX_KERNELS(decay_conv_backward), f, b * ((f.channels + f.block - 1) / f.block));
  return {grad_x, per_head(by_decay, b, d, decay),
          gain ? per_head(by_gain, b, d, *gain) : nothing(x), grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("decay_conv", TORCH_BOX(&decay_conv));
  m.impl("decay_conv_backward", TORCH_BOX(&decay_conv_backward));
}

}  // namespace fastmix

#endif
