// h_t = gates_t · h_{t-1} + inputs_t, all states written, in either direction.
//
// Trailing axes are seen as (heads, d): a gate holds for the d channels of its head. A unit
// of work is a block of whole heads of one batch entry; channels lie side by side in it.
//
// Kernels are templates of T, what tensors store: of numbers of 16 bits, where all tensors have
// them, else what is computed with, Computed<T>.

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

// Real numbers N, one or a vector of them; complex ones in a vector, in pairs as in memory.
template <class N>
struct Packed {
  // a · b + c, and conj(a) · b
  template <class V>
  static FASTMIX_INLINE V times_plus(V a, V b, V c) {
    return a * b + c;
  }
  template <class V>
  static FASTMIX_INLINE V conjugate_times(V a, V b) {
    return a * b;
  }
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

// Vectors of the numbers of T, whole ones or a part of one. A part holds a single real number, or
// the first bytes of a vector of complex ones: results are the same in either.
template <class T, class V>
struct Lanes {
  template <class From>
  FASTMIX_INLINE V get(const From* p) const {
    return load<V>(p);
  }
  FASTMIX_INLINE void put(Computed<T>* p, V v) const { store(p, v); }
  FASTMIX_INLINE void put(const Row<T>& row, int64_t c, V v) const { row.put(c, v); }
};

template <class C, class V>
struct Lanes<Complex<C>, V> {
  int64_t bytes = sizeof(V);

  FASTMIX_INLINE bool whole() const { return bytes == sizeof(V); }
  FASTMIX_INLINE V get(const Complex<C>* p) const {
    V v{};
    whole() ? memcpy(&v, p, sizeof v) : memcpy(&v, p, bytes);
    return v;
  }
  FASTMIX_INLINE void put(Complex<C>* p, V v) const {
    void* to = p;
    whole() ? memcpy(to, &v, sizeof v) : memcpy(to, &v, bytes);
  }
  FASTMIX_INLINE void put(const Row<C>& row, int64_t c, V v) const {
    whole() ? row.put(2 * c, v) : (void)memcpy(row.to + 2 * c, &v, bytes);
  }
};

// Calls f(lanes, c) for numbers c …
template <class T>
struct Numbers {
  typedef T Stored;                    // real numbers as tensors store them
  static constexpr int64_t parts = 1;  // of those, of a number

  template <class F>
  static FASTMIX_INLINE void each(int64_t count, F f) {
    each_vector<Computed<T>>(
        count, [&](auto zero, int64_t c) FASTMIX_LAMBDA { f(Lanes<T, decltype(zero)>{}, c); });
  }
};

template <class C>
struct Numbers<Complex<C>> {
  typedef C Stored;
  static constexpr int64_t parts = 2;

  template <class F>
  static FASTMIX_INLINE void each(int64_t count, F f) {
    using V = typename Simd<C>::Vector;
    constexpr int64_t numbers = Simd<C>::lanes / 2;
    int64_t c = 0;
    for (; c + numbers <= count; c += numbers) f(Lanes<Complex<C>, V>{}, c);
    if (c < count) f(Lanes<Complex<C>, V>{(count - c) * int64_t(sizeof(Complex<C>))}, c);
  }
};

// Whether what goes past the caches is less than a line. Written to two rows in turns, backward
// took 1.6 times as long on AMD's Zen 3 as with one row after the other.
#if defined(__x86_64__)
constexpr bool kPieces = kRegister < 64;
#else
constexpr bool kPieces = false;
#endif

// A row that is written in turns with another: where it would go past the caches in pieces, it is
// in `room` until `finish` sends it on. One that is not has no room.
template <class T>
struct InTurns : Row<T> {
  T* place;

  InTurns(Row<T> row, void* room) : Row<T>(row), place(row.to) {
    const bool whole = reinterpret_cast<uintptr_t>(place) % kRegister == 0;
    if (!kPieces || !row.streaming || !whole || room == nullptr) return;
    this->to = static_cast<T*>(room);
    this->streaming = false;
  }

  void finish(int64_t count) const {
    if (!kPieces || this->to == place) return;
    const int64_t bytes = count * sizeof(T);
    const char* from = reinterpret_cast<const char*>(this->to);
    char* to = reinterpret_cast<char*>(place);
    int64_t i = 0;
    for (; i + kRegister <= bytes; i += kRegister) stream(to + i, load<Words>(from + i));
    memcpy(to + i, from + i, bytes - i);
  }
};

// A step's row of a sink: written where it is, or in `room` if the sink's numbers are others.
// `turns`: in turns with another row.
template <class T>
struct Output {
  using Stored = typename Numbers<T>::Stored;
  static constexpr int64_t parts = Numbers<T>::parts;
  const Sink& sink;
  int64_t b, t, c0, count;
  Computed<T>* room;
  InTurns<Stored> row;

  Output(const Sink& sink, int64_t b, int64_t t, int64_t c0, int64_t count, Computed<T>* room,
         bool turns)
      : sink(sink), b(b), t(t), c0(c0), count(count), room(room),
        row(direct() ? Row<Stored>({sink.data, kType<Stored>, sink.n_size, parts * sink.channels,
                                    sink.streaming},
                                   b, t, parts * c0)
                     : Row<Stored>({room, kType<Stored>, 1, parts * count, false}, 0, 0, 0),
            turns ? room : nullptr) {}

  bool direct() const { return sink.type == kType<T>; }
  void finish() const {
    row.finish(parts * count);
    if constexpr (!kHalf<T>)
      if (!direct()) write(sink, b, t, c0, count, room);
  }
};

// A unit: heads h0 … of batch entry b.
template <class T>
struct Unit {
  using N = Computed<T>;
  const LinearScan& args;
  int64_t b, h0, heads, c0, count;
  T *gate_row, *gates, *gathered;
  N* room;

  Unit(const LinearScan& args, int64_t index, Scratch& scratch) : args(args) {
    const int64_t blocks = (args.heads + args.block - 1) / args.block;
    b = index / blocks;
    h0 = index % blocks * args.block;
    heads = smaller(args.block, args.heads - h0);
    c0 = h0 * args.d;
    count = heads * args.d;
    gate_row = scratch.take<T>(heads);
    gates = scratch.take<T>(count);
    gathered = scratch.take<T>(count);
    room = scratch.take<N>(count);
  }

  // The gate of every channel at step t.
  const T* gates_at(int64_t t) {
    const T* row = read(args.gates, b, t, h0, heads, gate_row);
    if (args.d == 1) return row;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < args.d; ++i) gates[h * args.d + i] = row[h];
    return gates;
  }

  const T* inputs_at(int64_t t) { return read(args.inputs, b, t, c0, count, gathered); }

  void fetch(int64_t t) {
    if (t < 0 || t >= args.n) return;
    prefetch(args.gates, b, t, h0, heads);
    prefetch(args.inputs, b, t, c0, count);
  }
};

template <class T>
void forward(const LinearScan& args, int64_t index) {
  using N = Computed<T>;
  using P = Packed<N>;
  Scratch scratch;
  Unit<T> u(args, index, scratch);
  N* state = scratch.take<N>(u.count);
  memset(static_cast<void*>(state), 0, u.count * sizeof(N));
  if (present(args.initial_state)) read_into(args.initial_state, u.b, 0, u.c0, u.count, state);
  for (int64_t i = 0; i < args.n; ++i) {
    const int64_t t = args.reverse ? args.n - 1 - i : i;
    const bool entering = args.reverse ? i == 0 || (t + 1) % larger(args.carry_every, 1) == 0
                                       : t % larger(args.carry_every, 1) == 0;
    if (args.carry_every && entering)
      write(args.carries, u.b, t / args.carry_every, u.c0, u.count, state);
    u.fetch(args.reverse ? t - kAhead : t + kAhead);
    const T *gates = u.gates_at(t), *inputs = u.inputs_at(t);
    const Output<T> out(args.states, u.b, t, u.c0, u.count, u.room, false);
    Numbers<T>::each(u.count, [&](auto lanes, int64_t c) FASTMIX_LAMBDA {
      const auto now =
          P::times_plus(lanes.get(gates + c), lanes.get(state + c), lanes.get(inputs + c));
      lanes.put(state + c, now);
      lanes.put(out.row, c, now);
    });
    out.finish();
  }
  if (args.carry_every) write(args.carries, u.b, args.carries.n_size - 1, u.c0, u.count, state);
  streamed();
}

// With g_t = grad_t + conj(gates_{t+1}) g_{t+1}: dinputs = g and dgates_t = g_t conj(h_{t-1}),
// summed over the channels of a head. States come again from every carry.
template <class T>
void backward(const LinearScan& args, int64_t index) {
  using N = Computed<T>;
  using P = Packed<N>;
  Scratch scratch;
  Unit<T> u(args, index, scratch);
  const int64_t count = u.count, every = args.carry_every;
  T* gathered_grad = scratch.take<T>(count);
  N *g = scratch.take<N>(count), *by_gate = scratch.take<N>(count), *room = scratch.take<N>(count),
    *before = scratch.take<N>((every + 1) * count);  // the states before the steps of a chunk
  memset(static_cast<void*>(g), 0, count * sizeof(N));
  const int64_t chunks = (args.n + every - 1) / every;
  for (int64_t j = 0; j < chunks; ++j) {
    const int64_t chunk = args.reverse ? j : chunks - 1 - j;
    const int64_t first = chunk * every, steps = smaller(every, args.n - first);
    read_into(args.kept, u.b, chunk, u.c0, count, before);
    const auto time = [&](int64_t i) { return args.reverse ? first + steps - 1 - i : first + i; };
    for (int64_t i = 0; i + 1 < steps; ++i) {
      const T *gates = u.gates_at(time(i)), *inputs = u.inputs_at(time(i));
      const N* h = before + i * count;
      N* next = before + (i + 1) * count;
      Numbers<T>::each(count, [&](auto lanes, int64_t c) FASTMIX_LAMBDA {
        lanes.put(next + c,
                  P::times_plus(lanes.get(gates + c), lanes.get(h + c), lanes.get(inputs + c)));
      });
    }
    for (int64_t i = steps - 1; i >= 0; --i) {
      const int64_t t = time(i);
      const T *grad = read(args.grad, u.b, t, u.c0, count, gathered_grad), *gates = u.gates_at(t);
      const N* h = before + i * count;
      const int64_t ahead = args.reverse ? t + every : t - every;  // this step of the next chunk
      u.fetch(ahead);
      if (ahead >= 0 && ahead < args.n) prefetch(args.grad, u.b, ahead, u.c0, count);
      const Output<T> inputs(args.grad_inputs, u.b, t, u.c0, count, u.room, args.d == 1),
          by_head(args.grad_gates, u.b, t, u.h0, u.heads, room, args.d == 1);
      Numbers<T>::each(count, [&](auto lanes, int64_t c) FASTMIX_LAMBDA {
        const auto sum = lanes.get(grad + c) + lanes.get(g + c);
        const auto by = P::conjugate_times(lanes.get(h + c), sum);
        lanes.put(inputs.row, c, sum);
        if (args.d == 1) lanes.put(by_head.row, c, by);
        else lanes.put(by_gate + c, by);
        lanes.put(g + c, P::conjugate_times(lanes.get(gates + c), sum));
      });
      inputs.finish();
      if (args.d == 1) {
        by_head.finish();
        continue;
      }
      for (int64_t head = 0; head < u.heads; ++head) {
        N sum = by_gate[head * args.d];
        for (int64_t c = 1; c < args.d; ++c) sum = sum + by_gate[head * args.d + c];
        by_gate[head] = sum;
      }
      write(args.grad_gates, u.b, t, u.h0, u.heads, by_gate);
    }
  }
  if (args.grad_initial.data) write(args.grad_initial, u.b, 0, u.c0, count, g);
  streamed();
}

// Calls work(zero) with a zero of what the kernels are templates of.
template <class F>
FASTMIX_INLINE void by_numbers(const LinearScan& args, F work) {
  if (args.complex) args.doubles ? work(Complex<double>{}) : work(Complex<float>{});
  else if (args.gates.type == args.inputs.type) by_type(args.inputs.type, work);
  else args.doubles ? work(double{}) : work(float{});
}

}  // namespace

void linear_scan_forward(const LinearScan& args, int64_t begin, int64_t end) {
  by_numbers(args, [&](auto zero) {
    for (int64_t i = begin; i < end; ++i) forward<decltype(zero)>(args, i);
  });
}

void linear_scan_backward(const LinearScan& args, int64_t begin, int64_t end) {
  by_numbers(args, [&](auto zero) {
    for (int64_t i = begin; i < end; ++i) backward<decltype(zero)>(args, i);
  });
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

constexpr Checks kScanChecks{"linear_scan"};

// x's axes with `steps` in place of the time.
std::vector<int64_t> carried(const Tensor& x, int64_t steps) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[1] = steps;
  return shape;
}

std::vector<int64_t> without_time(const Tensor& x) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.erase(shape.begin() + 1);
  return shape;
}

// The shape that gates should have: theirs, where they hold for all steps of whole heads.
std::vector<int64_t> fitting(const Tensor& gates, const Tensor& inputs) {
  std::vector<int64_t> shape(inputs.sizes().begin(), inputs.sizes().end());
  if (gates.dim() != inputs.dim()) return shape;
  bool shared = false;
  for (int64_t i = 2; i < inputs.dim(); ++i) {
    shared = shared || gates.size(i) != shape[i];
    if (shared) shape[i] = 1;
  }
  return shape;
}

void check(const Tensor& gates, const Tensor& inputs, const OptionalTensor& initial_state,
           int64_t carry_every, bool backward) {
  kScanChecks.require(inputs.dim() >= 2, "the number of axes of inputs", "at least 2",
                      inputs.dim());
  kScanChecks.require(inputs.size(1) > 0, "n", "at least 1", inputs.size(1));
  kScanChecks.tensor("inputs", inputs, inputs.sizes(), kReal | kComplex);
  const bool doubles = is_double(inputs) || inputs.scalar_type() == ScalarType::ComplexDouble;
  const Types real = doubles ? only(ScalarType::Double) : kReal & ~only(ScalarType::Double),
              complex = only(doubles ? ScalarType::ComplexDouble : ScalarType::ComplexFloat);
  kScanChecks.tensor("gates", gates, fitting(gates, inputs),
                     complex | (is_complex(inputs) ? real : only(inputs.scalar_type())));
  kScanChecks.tensor("initial_state", initial_state, without_time(inputs),
                     is_complex(gates) || is_complex(inputs) ? complex : real);
  kScanChecks.carries(carry_every, backward);
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
  check(gates, inputs, initial_state, carry_every, false);
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
  check(gates, inputs, initial_state, carry_every, true);
  LinearScan args = arguments(gates, inputs, reverse, carry_every);
  const Types states = args.complex ? kReal | kComplex : kReal;
  kScanChecks.tensor("grad_states", grad, inputs.sizes(), states);
  kScanChecks.tensor("carries", carries, carried(inputs, carry_count(args.n, carry_every)), states);
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
