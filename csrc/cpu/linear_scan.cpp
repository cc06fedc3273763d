// h_t = gates_t · h_{t-1} + inputs_t, all states written, in either direction.
//
// Trailing axes are seen as (heads, d): a gate holds for the d channels of its head. A unit
// of work is a block of whole heads of one batch entry; channels lie side by side in it.

#include "rows.h"

namespace fastmix {

struct LinearScan {
  int64_t n, heads, d, block, carry_every;
  bool reverse, complex, doubles;
  Source gates, inputs, initial_state;
  Sink states, carries;  // forward
  Source grad, kept;
  Sink grad_gates, grad_inputs, grad_initial;  // backward
};

}  // namespace fastmix

FASTMIX_KERNEL(linear_scan_forward, fastmix::LinearScan)
FASTMIX_KERNEL(linear_scan_backward, fastmix::LinearScan)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

template <class C>
INLINE Complex<C> operator*(Complex<C> a, Complex<C> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class C>
INLINE Complex<C> operator+(Complex<C> a, Complex<C> b) {
  return {a.re + b.re, a.im + b.im};
}
INLINE float conjugate(float x) { return x; }
INLINE double conjugate(double x) { return x; }
template <class C>
INLINE Complex<C> conjugate(Complex<C> x) {
  return {x.re, -x.im};
}

// A unit: heads h0 … of batch entry b.
template <class N>
struct Unit {
  const LinearScan& f;
  int64_t b, h0, heads, c0, count;
  N *gate_row, *gates, *wide;

  Unit(const LinearScan& f, int64_t index, Scratch& scratch) : f(f) {
    const int64_t blocks = (f.heads + f.block - 1) / f.block;
    b = index / blocks;
    h0 = index % blocks * f.block;
    heads = smaller(f.block, f.heads - h0);
    c0 = h0 * f.d;
    count = heads * f.d;
    gate_row = scratch.take<N>(heads);
    gates = scratch.take<N>(count);
    wide = scratch.take<N>(count);
  }

  // The gate of every channel at step t.
  const N* gates_at(int64_t t) {
    const N* row = read(f.gates, b, t, h0, heads, gate_row);
    if (f.d == 1) return row;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < f.d; ++i) gates[h * f.d + i] = row[h];
    return gates;
  }

  const N* inputs_at(int64_t t) { return read(f.inputs, b, t, c0, count, wide); }

  void fetch(int64_t t) {
    if (t < 0 || t >= f.n) return;
    prefetch(f.gates, b, t, h0, heads);
    prefetch(f.inputs, b, t, c0, count);
  }
};

template <class N>
INLINE void advance(const N* gates, const N* inputs, const N* state, N* __restrict next,
                    int64_t count) {
  for (int64_t c = 0; c < count; ++c) next[c] = gates[c] * state[c] + inputs[c];
}

template <class N>
void forward(const LinearScan& f, int64_t index) {
  Scratch scratch;
  Unit<N> u(f, index, scratch);
  N *state = scratch.take<N>(u.count), *next = scratch.take<N>(u.count);
  memset(static_cast<void*>(state), 0, u.count * sizeof(N));
  if (present(f.initial_state)) read_into(f.initial_state, u.b, 0, u.c0, u.count, state);
  for (int64_t i = 0; i < f.n; ++i) {
    const int64_t t = f.reverse ? f.n - 1 - i : i;
    const bool entering = f.reverse ? i == 0 || (t + 1) % larger(f.carry_every, 1) == 0
                                    : t % larger(f.carry_every, 1) == 0;
    if (f.carry_every && entering) write(f.carries, u.b, t / f.carry_every, u.c0, u.count, state);
    u.fetch(f.reverse ? t - kAhead : t + kAhead);
    advance(u.gates_at(t), u.inputs_at(t), state, next, u.count);
    N* swap = state;
    state = next;
    next = swap;
    write(f.states, u.b, t, u.c0, u.count, state);
  }
  if (f.carry_every) write(f.carries, u.b, f.carries.n_size - 1, u.c0, u.count, state);
  streamed();
}

// With g_t = grad_t + conj(gates_{t+1}) g_{t+1}: dinputs = g and dgates_t = g_t conj(h_{t-1}),
// summed over the channels of a head. States come again from every carry.
template <class N>
void backward(const LinearScan& f, int64_t index) {
  Scratch scratch;
  Unit<N> u(f, index, scratch);
  const int64_t count = u.count, every = f.carry_every;
  N *g = scratch.take<N>(count), *now = scratch.take<N>(count),
    *wide_grad = scratch.take<N>(count), *by_gate = scratch.take<N>(count),
    *before = scratch.take<N>((every + 1) * count);  // the states before the steps of a chunk
  memset(static_cast<void*>(g), 0, count * sizeof(N));
  const int64_t chunks = (f.n + every - 1) / every;
  for (int64_t j = 0; j < chunks; ++j) {
    const int64_t chunk = f.reverse ? j : chunks - 1 - j;
    const int64_t first = chunk * every, steps = smaller(every, f.n - first);
    read_into(f.kept, u.b, chunk, u.c0, count, before);
    const auto time = [&](int64_t i) { return f.reverse ? first + steps - 1 - i : first + i; };
    for (int64_t i = 0; i + 1 < steps; ++i)
      advance(u.gates_at(time(i)), u.inputs_at(time(i)), before + i * count,
              before + (i + 1) * count, count);
    for (int64_t i = steps - 1; i >= 0; --i) {
      const int64_t t = time(i);
      const N *grad = read(f.grad, u.b, t, u.c0, count, wide_grad), *gates = u.gates_at(t),
              *h = before + i * count;
      const int64_t ahead = f.reverse ? t + every : t - every;  // this step of the next chunk
      u.fetch(ahead);
      if (ahead >= 0 && ahead < f.n) prefetch(f.grad, u.b, ahead, u.c0, count);
      for (int64_t c = 0; c < count; ++c) {
        now[c] = grad[c] + g[c];
        by_gate[c] = now[c] * conjugate(h[c]);
        g[c] = conjugate(gates[c]) * now[c];
      }
      write(f.grad_inputs, u.b, t, u.c0, count, now);
      for (int64_t head = 0; f.d > 1 && head < u.heads; ++head) {
        N sum = by_gate[head * f.d];
        for (int64_t c = 1; c < f.d; ++c) sum = sum + by_gate[head * f.d + c];
        by_gate[head] = sum;
      }
      write(f.grad_gates, u.b, t, u.h0, u.heads, by_gate);
    }
  }
  if (f.grad_initial.data) write(f.grad_initial, u.b, 0, u.c0, count, g);
  streamed();
}

}  // namespace

void linear_scan_forward(const LinearScan& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (f.complex)
      f.doubles ? forward<Complex<double>>(f, i) : forward<Complex<float>>(f, i);
    else
      f.doubles ? forward<double>(f, i) : forward<float>(f, i);
  }
}

void linear_scan_backward(const LinearScan& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (f.complex)
      f.doubles ? backward<Complex<double>>(f, i) : backward<Complex<float>>(f, i);
    else
      f.doubles ? backward<double>(f, i) : backward<float>(f, i);
  }
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include <numeric>

#include "tensors.h"

namespace fastmix {
namespace {

bool is_complex(const Tensor& x) {
  return x.scalar_type() == ScalarType::ComplexFloat ||
         x.scalar_type() == ScalarType::ComplexDouble;
}

LinearScan arguments(const Tensor& gates, const Tensor& inputs, bool reverse,
                     int64_t carry_every) {
  LinearScan f{};
  const int64_t b = inputs.size(0);
  f.n = inputs.size(1);
  f.heads = f.d = 1;
  for (int64_t i = 2; i < inputs.dim(); ++i)
    (gates.size(i) == inputs.size(i) && f.d == 1 ? f.heads : f.d) *= inputs.size(i);
  f.carry_every = carry_every;
  f.reverse = reverse;
  f.complex = is_complex(gates) || is_complex(inputs);
  // Whole heads; if complex, whole vectors too: a compiler fuses the products of what is left
  // over from those in another way.
  const int64_t d = std::max<int64_t>(1, f.d);
  const int64_t least = f.complex ? 16 / std::gcd<int64_t>(d, 16) : 1;
  f.block = std::max<int64_t>(1, channel_block(b, f.heads * d, 512) / d);
  f.block = (f.block + least - 1) / least * least;
  f.doubles = is_double(gates) || is_double(inputs) ||
              gates.scalar_type() == ScalarType::ComplexDouble ||
              inputs.scalar_type() == ScalarType::ComplexDouble;
  return f;
}

// (b, n, …) as rows of heads · d channels; copied only if strides demand.
Tensor rows(const Tensor& x, int64_t heads, int64_t d) {
  if (x.dim() < 4 || (x.dim() == 4 && x.stride(3) == 1)) return x;
  return reshaped(x, {x.size(0), x.size(1), heads, d});
}

Tensor state(const LinearScan& f, const Tensor& x) {
  return reshaped(x, {x.size(0), f.heads, f.d});
}

int64_t units(const LinearScan& f, int64_t batches) {
  return f.d ? batches * ((f.heads + f.block - 1) / f.block) : 0;
}

std::tuple<Tensor, Tensor> linear_scan(const Tensor& gates, const Tensor& inputs,
                                       const Maybe& initial_state, bool reverse,
                                       int64_t carry_every) {
  LinearScan f = arguments(gates, inputs, reverse, carry_every);
  const int64_t b = inputs.size(0), channels = f.heads * f.d;
  const int64_t carries = carry_every ? (f.n + carry_every - 1) / carry_every + 1 : 0;
  const ScalarType type = is_complex(gates) ? gates.scalar_type() : inputs.scalar_type();
  const ScalarType wide_type = f.complex ? type : wide(inputs);
  std::vector<int64_t> shape(inputs.sizes().begin(), inputs.sizes().end());
  Tensor states = fresh(inputs, shape, type);
  shape[1] = carries;
  Tensor kept = fresh(inputs, shape, wide_type);
  const Tensor gate = rows(gates, f.heads, 1), input = rows(inputs, f.heads, f.d);
  const Maybe initial = initial_state ? Maybe(state(f, *initial_state)) : Maybe();
  f.gates = source(gate);
  f.inputs = source(input);
  f.initial_state = state_source(initial);
  f.states = sink(states, f.n, channels);
  f.carries = sink(kept, carries, channels);
  spread(FASTMIX_KERNELS(linear_scan_forward), f, units(f, b));
  return {states, kept};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(
    const Tensor& grad, const Tensor& carries, const Tensor& gates, const Tensor& inputs,
    const Maybe& initial_state, bool reverse, int64_t carry_every) {
  LinearScan f = arguments(gates, inputs, reverse, carry_every);
  const int64_t b = inputs.size(0), channels = f.heads * f.d;
  Tensor grad_gates = fresh(gates), grad_inputs = fresh(inputs),
         grad_initial = initial_state ? fresh(*initial_state) : nothing(inputs);
  const Tensor gate = rows(gates, f.heads, 1), input = rows(inputs, f.heads, f.d),
               grads = rows(grad, f.heads, f.d), kept = rows(carries, f.heads, f.d);
  f.gates = source(gate);
  f.inputs = source(input);
  f.grad = source(grads);
  f.kept = source(kept);
  f.grad_gates = sink(grad_gates, f.n, f.heads);
  f.grad_inputs = sink(grad_inputs, f.n, channels);
  if (initial_state) f.grad_initial = sink(grad_initial, 1, channels);
  if (f.d == 0) clear(grad_gates);
  spread(FASTMIX_KERNELS(linear_scan_backward), f, units(f, b));
  return {grad_gates, grad_inputs, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("linear_scan", TORCH_BOX(&linear_scan));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace fastmix

#endif
