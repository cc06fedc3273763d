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
FASTMIX_INLINE Complex<C> operator+(Complex<C> a, Complex<C> b) {
  return {a.re + b.re, a.im + b.im};
}

// Numbers N side by side in a vector; complex ones as they lie in memory, in pairs.
template <class N>
struct Packed {
  using V = typename Simd<N>::Vector;
  // a · b + c, and conj(a) · b
  static FASTMIX_INLINE V times_plus(V a, V b, V c) { return a * b + c; }
  static FASTMIX_INLINE V conjugate_times(V a, V b) { return a * b; }
};

template <class C>
struct Packed<Complex<C>> {
  using V = typename Simd<C>::Vector;
  using Lanes = Indices<Simd<C>::lanes>;

  template <int... I>
  static FASTMIX_INLINE V real_parts(V a, Indices<0, I...>) {
    return __builtin_shufflevector(a, a, (I & ~1)...);
  }
  // -im, im of each number
  template <int... I>
  static FASTMIX_INLINE V imaginary_parts(V a, Indices<0, I...>) {
    return __builtin_shufflevector(a, a, (I | 1)...) * V{(I % 2 ? C(1) : C(-1))...};
  }
  template <int... I>
  static FASTMIX_INLINE V exchanged(V a, Indices<0, I...>) {
    return __builtin_shufflevector(a, a, (I ^ 1)...);
  }

  static FASTMIX_INLINE V times_plus(V a, V b, V c) {
    return imaginary_parts(a, Lanes()) * exchanged(b, Lanes()) + (real_parts(a, Lanes()) * b + c);
  }
  static FASTMIX_INLINE V conjugate_times(V a, V b) {
    return real_parts(a, Lanes()) * b - imaginary_parts(a, Lanes()) * exchanged(b, Lanes());
  }
};

// Vectors of N, whole ones or the first bytes of one.
template <class N>
struct WholeVector {
  using V = typename Packed<N>::V;
  FASTMIX_INLINE V get(const N* p) const { return load<V>(p); }
  FASTMIX_INLINE void put(N* p, V v) const { memcpy(static_cast<void*>(p), &v, sizeof v); }
};
template <class N>
struct PartOfVector {
  using V = typename Packed<N>::V;
  int64_t bytes;
  FASTMIX_INLINE V get(const N* p) const {
    V v{};
    memcpy(&v, p, bytes);
    return v;
  }
  FASTMIX_INLINE void put(N* p, V v) const { memcpy(static_cast<void*>(p), &v, bytes); }
};

// Calls f(vector, c) for numbers c …; a number's result is the same in either kind of vector.
template <class N, class F>
FASTMIX_INLINE void each_packed(int64_t count, F f) {
  constexpr int64_t numbers = kRegister / sizeof(N);
  int64_t c = 0;
  for (; c + numbers <= count; c += numbers) f(WholeVector<N>{}, c);
  if (c < count) f(PartOfVector<N>{(count - c) * int64_t(sizeof(N))}, c);
}

// A unit: heads h0 … of batch entry b.
template <class N>
struct Unit {
  const LinearScan& args;
  int64_t b, h0, heads, c0, count;
  N *gate_row, *gates, *wide;

  Unit(const LinearScan& args, int64_t index, Scratch& scratch) : args(args) {
    const int64_t blocks = (args.heads + args.block - 1) / args.block;
    b = index / blocks;
    h0 = index % blocks * args.block;
    heads = smaller(args.block, args.heads - h0);
    c0 = h0 * args.d;
    count = heads * args.d;
    gate_row = scratch.take<N>(heads);
    gates = scratch.take<N>(count);
    wide = scratch.take<N>(count);
  }

  // The gate of every channel at step t.
  const N* gates_at(int64_t t) {
    const N* row = read(args.gates, b, t, h0, heads, gate_row);
    if (args.d == 1) return row;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < args.d; ++i) gates[h * args.d + i] = row[h];
    return gates;
  }

  const N* inputs_at(int64_t t) { return read(args.inputs, b, t, c0, count, wide); }

  void fetch(int64_t t) {
    if (t < 0 || t >= args.n) return;
    prefetch(args.gates, b, t, h0, heads);
    prefetch(args.inputs, b, t, c0, count);
  }
};

// A step's numbers. Complex ones go as a row of twice as many real ones, which can be streamed.
template <class N>
FASTMIX_INLINE void put(const Sink& s, int64_t b, int64_t t, int64_t c0, int64_t count,
                        const N* values) {
  write(s, b, t, c0, count, values);
}

template <class C>
FASTMIX_INLINE void put(const Sink& s, int64_t b, int64_t t, int64_t c0, int64_t count,
                        const Complex<C>* values) {
  if (s.type != kType<Complex<C>>) return write(s, b, t, c0, count, values);
  const Sink parts{s.data, kType<C>, s.n_size, 2 * s.channels, s.streaming};
  write(parts, b, t, 2 * c0, 2 * count, reinterpret_cast<const C*>(values));
}

template <class N>
FASTMIX_INLINE void advance(const N* gates, const N* inputs, const N* state, N* __restrict next,
                            int64_t count) {
  each_packed<N>(count, [&](auto vector, int64_t c) FASTMIX_LAMBDA {
    vector.put(next + c, Packed<N>::times_plus(vector.get(gates + c), vector.get(state + c),
                                               vector.get(inputs + c)));
  });
}

template <class N>
void forward(const LinearScan& args, int64_t index) {
  Scratch scratch;
  Unit<N> u(args, index, scratch);
  N *state = scratch.take<N>(u.count), *next = scratch.take<N>(u.count);
  memset(static_cast<void*>(state), 0, u.count * sizeof(N));
  if (present(args.initial_state)) read_into(args.initial_state, u.b, 0, u.c0, u.count, state);
  for (int64_t i = 0; i < args.n; ++i) {
    const int64_t t = args.reverse ? args.n - 1 - i : i;
    const bool entering = args.reverse ? i == 0 || (t + 1) % larger(args.carry_every, 1) == 0
                                       : t % larger(args.carry_every, 1) == 0;
    if (args.carry_every && entering)
      write(args.carries, u.b, t / args.carry_every, u.c0, u.count, state);
    u.fetch(args.reverse ? t - kAhead : t + kAhead);
    advance(u.gates_at(t), u.inputs_at(t), state, next, u.count);
    N* swap = state;
    state = next;
    next = swap;
    put(args.states, u.b, t, u.c0, u.count, state);
  }
  if (args.carry_every) write(args.carries, u.b, args.carries.n_size - 1, u.c0, u.count, state);
  streamed();
}

// With g_t = grad_t + conj(gates_{t+1}) g_{t+1}: dinputs = g and dgates_t = g_t conj(h_{t-1}),
// summed over the channels of a head. States come again from every carry.
template <class N>
void backward(const LinearScan& args, int64_t index) {
  Scratch scratch;
  Unit<N> u(args, index, scratch);
  const int64_t count = u.count, every = args.carry_every;
  N *g = scratch.take<N>(count), *now = scratch.take<N>(count), *wide_grad = scratch.take<N>(count),
    *by_gate = scratch.take<N>(count),
    *before = scratch.take<N>((every + 1) * count);  // the states before the steps of a chunk
  memset(static_cast<void*>(g), 0, count * sizeof(N));
  const int64_t chunks = (args.n + every - 1) / every;
  for (int64_t j = 0; j < chunks; ++j) {
    const int64_t chunk = args.reverse ? j : chunks - 1 - j;
    const int64_t first = chunk * every, steps = smaller(every, args.n - first);
    read_into(args.kept, u.b, chunk, u.c0, count, before);
    const auto time = [&](int64_t i) { return args.reverse ? first + steps - 1 - i : first + i; };
    for (int64_t i = 0; i + 1 < steps; ++i)
      advance(u.gates_at(time(i)), u.inputs_at(time(i)), before + i * count,
              before + (i + 1) * count, count);
    for (int64_t i = steps - 1; i >= 0; --i) {
      const int64_t t = time(i);
      const N *grad = read(args.grad, u.b, t, u.c0, count, wide_grad), *gates = u.gates_at(t),
              *h = before + i * count;
      const int64_t ahead = args.reverse ? t + every : t - every;  // this step of the next chunk
      u.fetch(ahead);
      if (ahead >= 0 && ahead < args.n) prefetch(args.grad, u.b, ahead, u.c0, count);
      each_packed<N>(count, [&](auto vector, int64_t c) FASTMIX_LAMBDA {
        const auto sum = vector.get(grad + c) + vector.get(g + c);
        vector.put(now + c, sum);
        vector.put(by_gate + c, Packed<N>::conjugate_times(vector.get(h + c), sum));
        vector.put(g + c, Packed<N>::conjugate_times(vector.get(gates + c), sum));
      });
      put(args.grad_inputs, u.b, t, u.c0, count, now);
      for (int64_t head = 0; args.d > 1 && head < u.heads; ++head) {
        N sum = by_gate[head * args.d];
        for (int64_t c = 1; c < args.d; ++c) sum = sum + by_gate[head * args.d + c];
        by_gate[head] = sum;
      }
      put(args.grad_gates, u.b, t, u.h0, u.heads, by_gate);
    }
  }
  if (args.grad_initial.data) write(args.grad_initial, u.b, 0, u.c0, count, g);
  streamed();
}

}  // namespace

void linear_scan_forward(const LinearScan& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (args.complex)
      args.doubles ? forward<Complex<double>>(args, i) : forward<Complex<float>>(args, i);
    else args.doubles ? forward<double>(args, i) : forward<float>(args, i);
  }
}

void linear_scan_backward(const LinearScan& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (args.complex)
      args.doubles ? backward<Complex<double>>(args, i) : backward<Complex<float>>(args, i);
    else args.doubles ? backward<double>(args, i) : backward<float>(args, i);
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

LinearScan arguments(const Tensor& gates, const Tensor& inputs, bool reverse, int64_t carry_every) {
  LinearScan args{};
  const int64_t b = inputs.size(0);
  args.n = inputs.size(1);
  args.heads = args.d = 1;
  for (int64_t i = 2; i < inputs.dim(); ++i)
    (gates.size(i) == inputs.size(i) && args.d == 1 ? args.heads : args.d) *= inputs.size(i);
  args.carry_every = carry_every;
  args.reverse = reverse;
  args.complex = is_complex(gates) || is_complex(inputs);
  // Blocks are whole heads. Blocks of complex numbers are whole vectors too, because compilers
  // contract a partial vector's products into other FMAs, and the bits would depend on the block.
  const int64_t d = std::max<int64_t>(1, args.d);
  const int64_t least = args.complex ? 16 / std::gcd<int64_t>(d, 16) : 1;
  args.block = std::max<int64_t>(1, channel_block(b, args.heads * d, 512) / d);
  args.block = (args.block + least - 1) / least * least;
  args.doubles = is_double(gates) || is_double(inputs) ||
                 gates.scalar_type() == ScalarType::ComplexDouble ||
                 inputs.scalar_type() == ScalarType::ComplexDouble;
  return args;
}

// (b, n, …) as rows of heads · d channels; copied only if strides demand.
Tensor rows(const Tensor& x, int64_t heads, int64_t d) {
  if (x.dim() < 4 || (x.dim() == 4 && x.stride(3) == 1)) return x;
  return reshaped(x, {x.size(0), x.size(1), heads, d});
}

Tensor state(const LinearScan& args, const Tensor& x) {
  if (x.dim() == 2 || x.dim() == 3) return x;
  return reshaped(x, {x.size(0), args.heads, args.d});
}

int64_t units(const LinearScan& args, int64_t batches) {
  return args.d ? batches * ((args.heads + args.block - 1) / args.block) : 0;
}

std::tuple<Tensor, Tensor> linear_scan(const Tensor& gates, const Tensor& inputs,
                                       const OptionalTensor& initial_state, bool reverse,
                                       int64_t carry_every) {
  LinearScan args = arguments(gates, inputs, reverse, carry_every);
  const int64_t b = inputs.size(0), channels = args.heads * args.d;
  const int64_t carries = carry_count(args.n, carry_every);
  const ScalarType type = is_complex(gates) ? gates.scalar_type() : inputs.scalar_type();
  const ScalarType wide_type = args.complex ? type : wide(inputs);
  std::vector<int64_t> shape(inputs.sizes().begin(), inputs.sizes().end());
  Tensor states = fresh(inputs, shape, type);
  shape[1] = carries;
  Tensor kept = fresh(inputs, shape, wide_type);
  const Tensor gate = rows(gates, args.heads, 1), input = rows(inputs, args.heads, args.d);
  const OptionalTensor initial =
      initial_state ? OptionalTensor(state(args, *initial_state)) : OptionalTensor();
  args.gates = source(gate);
  args.inputs = source(input);
  args.initial_state = state_source(initial);
  args.states = sink(states, args.n, channels);
  args.carries = sink(kept, carries, channels);
  spread(FASTMIX_KERNELS(linear_scan_forward), args, units(args, b), 2.0 * inputs.numel());
  return {states, kept};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(const Tensor& grad, const Tensor& carries,
                                                        const Tensor& gates, const Tensor& inputs,
                                                        const OptionalTensor& initial_state,
                                                        bool reverse, int64_t carry_every) {
  LinearScan args = arguments(gates, inputs, reverse, carry_every);
  const int64_t b = inputs.size(0), channels = args.heads * args.d;
  Tensor grad_gates = fresh(gates), grad_inputs = fresh(inputs),
         grad_initial = initial_state ? fresh(*initial_state) : nothing(inputs);
  const Tensor gate = rows(gates, args.heads, 1), input = rows(inputs, args.heads, args.d),
               grads = rows(grad, args.heads, args.d), kept = rows(carries, args.heads, args.d);
  args.gates = source(gate);
  args.inputs = source(input);
  args.grad = source(grads);
  args.kept = source(kept);
  args.grad_gates = sink(grad_gates, args.n, args.heads);
  args.grad_inputs = sink(grad_inputs, args.n, channels);
  if (initial_state) args.grad_initial = sink(grad_initial, 1, channels);
  if (args.d == 0) clear(grad_gates);
  spread(FASTMIX_KERNELS(linear_scan_backward), args, units(args, b), 5.0 * inputs.numel());
  return {grad_gates, grad_inputs, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("linear_scan", TORCH_BOX(&linear_scan));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace fastmix

#endif
