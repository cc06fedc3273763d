// y_t = decay · y_{t-1} + gain · x_t, one read of x and one write of y.
//
// Channels lie in SIMD lanes; threads share the work as a Chain. A chunk is read twice: for
// what it adds to the state, and then to write, while the thread's next chunk is fetched.

#include "rows.h"

namespace fastmix {

struct DecayConv {
  Chain chain;
  int64_t n, carry_every;
  const double *decay, *gain;            // per channel; gain may be null
  const double *over_chunk, *over_last;  // decay to the power of a chunk's steps
  Source x;
  Sink out, state, carries;  // forward
  Source grad, kept;
  Sink grad_x, grad_initial;
  double *grad_decay, *grad_gain;  // (b, chunks, channels)
};

}  // namespace fastmix

FASTMIX_KERNEL(decay_conv_forward, fastmix::DecayConv)
FASTMIX_KERNEL(decay_conv_backward, fastmix::DecayConv)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

// A chunk of time of a block of channels.
struct Unit : Link {
  int64_t chunk, start, end;
};

Unit unit_of(const DecayConv& args, const Link& link, bool reverse) {
  Unit u{link};
  u.chunk = reverse ? args.chain.chunks - 1 - u.order : u.order;
  u.start = u.chunk * args.chain.steps;
  u.end = smaller(u.start + args.chain.steps, args.n);
  return u;
}

// Step i of the chunk that this thread will do next, if there is one.
FASTMIX_INLINE void fetch(const Source& s, const Unit& u, int64_t i) {
  if (u.count > 0 && u.start + i < u.end) prefetch(s, u.b, u.start + i, u.c0, u.count);
}

template <class C>
C* parameter(Scratch& scratch, const double* values, const Unit& u) {
  C* row = scratch.take<C>(u.count);
  for (int64_t c = 0; c < u.count; ++c) row[c] = values ? static_cast<C>(values[u.c0 + c]) : C(1);
  return row;
}

// Advances `state` over a chunk: y forward, or with `backward` decay · g from its end to its start.
template <class T, bool backward, class C>
void walk(const DecayConv& args, const Unit& u, const C* decay, const C* gain, C* state,
          T* gathered) {
  for (int64_t i = u.start; i < u.end; ++i) {
    const int64_t t = backward ? u.end - 1 - (i - u.start) : i;
    const T* in = read(backward ? args.grad : args.x, u.b, t, u.c0, u.count, gathered);
    each_vector<C>(u.count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
      using V = decltype(zero);
      const V a = load<V>(decay + c), s = load<V>(state + c), x = load<V>(in + c);
      store(state + c, backward ? a * (s + x) : a * s + load<V>(gain + c) * x);
    });
  }
}

// Whether power · entering + added equals what walking step by step gives. It does not where
// decay^steps has overflowed, or has underflowed and meets an infinity: 0 · ∞.
template <class C>
FASTMIX_INLINE bool finite(double power, C entering, C added) {
  return (power + entering + added) * 0 == 0;
}

// The state that enters a chunk; the next chunk gets decay^steps times it, and what this one
// adds: its last state if it starts from zero.
template <class T, bool backward, class C>
C* enter(const DecayConv& args, const Unit& u, const C* decay, const C* gain, Scratch& scratch) {
  C *state = scratch.take<C>(u.count), *added = scratch.take<C>(u.count);
  T* gathered = scratch.take<T>(u.count);
  const bool followed = u.order + 1 < args.chain.chunks;
  if (followed) {
    memset(added, 0, u.count * sizeof(C));
    walk<T, backward>(args, u, decay, gain, added, gathered);
  }
  await(u);
  for (int64_t c = 0; c < u.count; ++c) state[c] = static_cast<C>(u.state[c]);
  if (followed) {
    const double* power = (u.end == args.n ? args.over_last : args.over_chunk) + u.c0;
    int plain = 1;
    for (int64_t c = 0; c < u.count; ++c) {
      u.state[c] = power[c] * u.state[c] + added[c];
      plain &= finite(power[c], state[c], added[c]);
    }
    if (!plain) {
      C* walked = scratch.take<C>(u.count);
      memcpy(walked, state, u.count * sizeof(C));
      walk<T, backward>(args, u, decay, gain, walked, gathered);
      for (int64_t c = 0; c < u.count; ++c)
        if (!finite(power[c], state[c], added[c])) u.state[c] = walked[c];
    }
  }
  pass_on(u);
  return state;
}

template <class T>
void forward(const DecayConv& args, const Unit& u, const Unit& next) {
  using C = Computed<T>;
  Scratch scratch;
  const C* decay = parameter<C>(scratch, args.decay, u);
  const C* gain = parameter<C>(scratch, args.gain, u);
  C* state = enter<T, false>(args, u, decay, gain, scratch);
  T* gathered = scratch.take<T>(u.count);
  for (int64_t t = u.start; t < u.end; ++t) {
    if (args.carry_every && t % args.carry_every == 0)
      write(args.carries, u.b, t / args.carry_every, u.c0, u.count, state);
    const T* x = read(args.x, u.b, t, u.c0, u.count, gathered);
    const Row<T> y(args.out, u.b, t, u.c0);
    fetch(args.x, next, t - u.start);
    each_vector<C>(u.count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
      using V = decltype(zero);
      const V now = load<V>(decay + c) * load<V>(state + c) + load<V>(gain + c) * load<V>(x + c);
      store(state + c, now);
      y.put(c, now);
    });
  }
  streamed();
  if (u.end < args.n) return;
  if (args.carry_every) write(args.carries, u.b, args.carries.n_size - 1, u.c0, u.count, state);
  write(args.state, u.b, 0, u.c0, u.count, state);
}

// With g_t = grad_t + decay · g_{t+1}: dx = gain · g, dgain = Σ g x, ddecay = Σ g_t y_{t-1}.
template <class T>
void backward(const DecayConv& args, const Unit& u, const Unit& next) {
  using C = Computed<T>;
  const int64_t count = u.count, every = args.carry_every;
  Scratch scratch;
  const C* decay = parameter<C>(scratch, args.decay, u);
  const C* gain = parameter<C>(scratch, args.gain, u);
  C* g = enter<T, true>(args, u, decay, gain, scratch);  // decay · g_{t+1}
  T* gathered_x = scratch.take<T>(count);
  T* gathered_grad = scratch.take<T>(count);
  C* by_decay = scratch.take<C>(count);
  C* by_gain = scratch.take<C>(count);
  C* before = scratch.take<C>(every * count);  // y_{t-1} for the steps of a chunk
  const int64_t at = (u.b * args.chain.chunks + u.chunk) * args.chain.channels + u.c0;
  double *grad_decay = args.grad_decay + at, *grad_gain = args.grad_gain + at;
  memset(grad_decay, 0, count * sizeof(double));
  memset(grad_gain, 0, count * sizeof(double));
  for (int64_t start = (u.end - 1) / every * every; start >= u.start; start -= every) {
    const int64_t end = smaller(start + every, u.end);
    read_into(args.kept, u.b, start / every, u.c0, count, before);
    for (int64_t t = start; t + 1 < end; ++t) {
      const T* x = read(args.x, u.b, t, u.c0, count, gathered_x);
      const C* y = before + (t - start) * count;
      C* next = before + (t + 1 - start) * count;
      each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
        using V = decltype(zero);
        store(next + c, load<V>(decay + c) * load<V>(y + c) + load<V>(gain + c) * load<V>(x + c));
      });
    }
    memset(by_decay, 0, count * sizeof(C));
    memset(by_gain, 0, count * sizeof(C));
    for (int64_t t = end - 1; t >= start; --t) {
      const T* x = read(args.x, u.b, t, u.c0, count, gathered_x);
      const T* grad = read(args.grad, u.b, t, u.c0, count, gathered_grad);
      const Row<T> dx(args.grad_x, u.b, t, u.c0);
      fetch(args.grad, next, u.end - 1 - t);
      const C* y = before + (t - start) * count;
      each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
        using V = decltype(zero);
        const V now = load<V>(grad + c) + load<V>(g + c);
        store(by_decay + c, load<V>(by_decay + c) + now * load<V>(y + c));
        store(by_gain + c, load<V>(by_gain + c) + now * load<V>(x + c));
        store(g + c, load<V>(decay + c) * now);
        dx.put(c, load<V>(gain + c) * now);
      });
    }
    for (int64_t c = 0; c < count; ++c) {
      grad_decay[c] += by_decay[c];
      grad_gain[c] += by_gain[c];
    }
  }
  streamed();
  if (u.start == 0 && args.grad_initial.data) write(args.grad_initial, u.b, 0, u.c0, count, g);
}

}  // namespace

void decay_conv_forward(const DecayConv& args, int64_t begin, int64_t end) {
  by_type(args.x.type, [&](auto stored) {
    each_link(args.chain, end - begin, [&](const Link& link, const Link& next) {
      forward<decltype(stored)>(args, unit_of(args, link, false), unit_of(args, next, false));
    });
  });
}

void decay_conv_backward(const DecayConv& args, int64_t begin, int64_t end) {
  by_type(args.x.type, [&](auto stored) {
    each_link(args.chain, end - begin, [&](const Link& link, const Link& next) {
      backward<decltype(stored)>(args, unit_of(args, link, true), unit_of(args, next, true));
    });
  });
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include <cmath>

#include "tensors.h"

namespace fastmix {
namespace {

constexpr Checks kDecayConvChecks{"decay_conv"};

void check(const Tensor& x, const Tensor& decay, const OptionalTensor& gain,
           const OptionalTensor& initial_state, int64_t carry_every, bool backward) {
  kDecayConvChecks.tensor("x", x, {kAny, kAny, kAny, kAny}, kReal);
  kDecayConvChecks.require(x.size(1) > 0, "n", "at least 1", x.size(1));
  kDecayConvChecks.tensor("decay", decay, {x.size(2)}, kReal);
  kDecayConvChecks.tensor("gain", gain, {x.size(2)}, kReal);
  kDecayConvChecks.tensor("initial_state", initial_state, {x.size(0), x.size(2), x.size(3)},
                          only(wide(x)));
  kDecayConvChecks.carries(carry_every, backward);
}

// (h,) → one value for every channel; empty without a parameter.
std::vector<double> per_channel(const OptionalTensor& parameter, int64_t d) {
  std::vector<double> repeated;
  if (!parameter) return repeated;
  for (double value : values(*parameter)) repeated.insert(repeated.end(), d, value);
  return repeated;
}

// A call's parameters and chain, and its arguments, which point into them.
struct DecayConvCall : ChainStorage {
  std::vector<double> decay, gain, over_chunk, over_last;
  DecayConv args{};

  DecayConvCall(const Tensor& x, const Tensor& decay_of_head, const OptionalTensor& gain_of_head,
                std::vector<double> first, int64_t carry_every)
      : ChainStorage(x.size(0), x.size(1), x.size(2) * x.size(3), std::move(first)),
        decay(per_channel(decay_of_head, x.size(3))), gain(per_channel(gain_of_head, x.size(3))),
        over_chunk(decay), over_last(decay) {
    args.n = x.size(1);
    const double steps = chain.steps, rest = args.n - (chain.chunks - 1) * chain.steps;
    for (size_t c = 0; c < decay.size(); ++c) {
      const bool same = c > 0 && decay[c] == decay[c - 1];
      over_chunk[c] = same ? over_chunk[c - 1] : std::pow(decay[c], steps);
      over_last[c] = same ? over_last[c - 1] : std::pow(decay[c], rest);
    }
    args.chain = chain;
    args.carry_every = carry_every;
    args.decay = decay.data();
    args.gain = gain.empty() ? nullptr : gain.data();
    args.over_chunk = over_chunk.data();
    args.over_last = over_last.data();
    args.x = source(x);
  }
};

std::tuple<Tensor, Tensor, Tensor> decay_conv(const Tensor& x, const Tensor& decay,
                                              const OptionalTensor& gain,
                                              const OptionalTensor& initial_state,
                                              int64_t carry_every) {
  check(x, decay, gain, initial_state, carry_every, false);
  const int64_t b = x.size(0), n = x.size(1), h = x.size(2), d = x.size(3);
  const int64_t carries = carry_count(n, carry_every);
  Tensor out = fresh(x), state = fresh(x, {b, h, d}, wide(x)),
         kept = fresh(x, {b, carries, h, d}, wide(x));
  DecayConvCall call(x, decay, gain, initial_state ? values(*initial_state) : std::vector<double>(),
                     carry_every);
  DecayConv& args = call.args;
  args.out = sink(out, n, h * d);
  args.state = sink(state, 1, h * d);
  args.carries = sink(kept, carries, h * d);
  spread(FASTMIX_KERNELS(decay_conv_forward), args, call.units(), 1.0 * x.numel());
  return {out, state, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decay_conv_backward(
    const Tensor& grad, const Tensor& grad_state, const Tensor& carries, const Tensor& x,
    const Tensor& decay, const OptionalTensor& gain, const OptionalTensor& initial_state,
    int64_t carry_every) {
  check(x, decay, gain, initial_state, carry_every, true);
  const int64_t b = x.size(0), n = x.size(1), h = x.size(2), d = x.size(3);
  kDecayConvChecks.tensor("grad_out", grad, {b, n, h, d}, kReal);
  kDecayConvChecks.tensor("grad_state", grad_state, {b, h, d}, kReal);
  kDecayConvChecks.tensor("carries", carries, {b, carry_count(n, carry_every), h, d},
                          only(wide(x)));
  Tensor grad_x = fresh(x), grad_initial = initial_state ? fresh(*initial_state) : nothing(x);
  DecayConvCall call(x, decay, gain, values(grad_state), carry_every);
  DecayConv& args = call.args;
  std::vector<double> by_decay(b * args.chain.chunks * h * d), by_gain(by_decay.size());
  args.grad = source(grad);
  args.kept = source(carries);
  args.grad_x = sink(grad_x, n, h * d);
  if (initial_state) args.grad_initial = sink(grad_initial, 1, h * d);
  args.grad_decay = by_decay.data();
  args.grad_gain = by_gain.data();
  spread(FASTMIX_KERNELS(decay_conv_backward), args, call.units(), 2.0 * x.numel());
  return {grad_x, totals(by_decay, decay, d), gain ? totals(by_gain, *gain, d) : nothing(x),
          grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("decay_conv", TORCH_BOX(&decay_conv));
  m.impl("decay_conv_backward", TORCH_BOX(&decay_conv_backward));
}

}  // namespace fastmix

#endif
