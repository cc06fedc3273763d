// S_t = a_t S_{t-1} + k_t v_tᵀ, out_t = q_t · Re S_t.
//
// Head dimension 1: channels in SIMD lanes, a unit of work is a block of channels of one
// batch entry. Larger heads: chunks of matrix products, a unit is one head. Within a chunk
// the step from r to s weighs Re W[s, r] = Re Π_{r<i≤s} a_i; the state S before the chunk
// enters step s through P_s = Π_{i≤s} a_i, as Re(P_s S), and step r enters the state after
// the chunk through W[last, r]. Products are formed step by step, so a gate of 0 is exact. Scores
// q · k could leave the range of numbers where k vᵀ and q · S do not: where a key is very large or
// small, a power of two moves from it to its value, which changes no digit of k vᵀ. Where a result
// is not finite all the same, the chunk is computed again step by step, as the definition does.
//
// Kernels are templates of N, the number that gates and states are: Complex<C>, whose parts lie
// apart, or a real C, which has no imaginary parts: the pointers to them are those to the real
// ones, and are not used.

#include "rows.h"

namespace fastmix {

struct GateLoop {
  int64_t n, h, dk, dv, block, carry_every;
  bool real;                                     // whether gates, and so states, are
  Source q, k, v, gates, logits, initial_state;  // of gates and logits, one; gates may be real
  Sink out, state, carries;                      // forward
  Source grad, grad_state, kept;
  Sink grad_q, grad_k, grad_v, grad_gates, grad_initial;  // backward; gates or logits
};

}  // namespace fastmix

FASTMIX_KERNEL(gate_loop_forward, fastmix::GateLoop)
FASTMIX_KERNEL(gate_loop_backward, fastmix::GateLoop)

#ifdef FASTMIX_CPU

#include "gate.h"
#include "gemm.h"

namespace fastmix::FASTMIX_CPU {
namespace {

template <class N>
struct Number {
  typedef N Real;
};
template <class C>
struct Number<Complex<C>> {
  typedef C Real;
};
template <class N>
using Real = typename Number<N>::Real;
template <class N>
constexpr bool kComplex = sizeof(N) != sizeof(Real<N>);

// Zeros for the imaginary parts that belong to `re`.
template <class N>
Real<N>* imaginary(Scratch& scratch, int64_t count, Real<N>* re) {
  return kComplex<N> ? scratch.zeros<Real<N>>(count) : re;
}

inline void prefetch_gates(const GateLoop& args, int64_t b, int64_t t, int64_t h0, int64_t count) {
  if (present(args.logits)) prefetch(args.logits, b, t, 2 * h0, 2 * count);
  else prefetch(args.gates, b, t, h0, count);
}

template <class C>
void join(const C* re, const C* im, Complex<C>* to, int64_t count) {
  for (int64_t c = 0; c < count; ++c) to[c] = {re[c], im[c]};
}

template <class C>
void join(const C* re, const C*, C* to, int64_t count) {
  memcpy(to, re, count * sizeof(C));
}

template <class C>
void part(const Complex<C>* from, C* re, C* im, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    re[c] = from[c].re;
    im[c] = from[c].im;
  }
}

template <class C>
void part(const C* from, C* re, C*, int64_t count) {
  memcpy(re, from, count * sizeof(C));
}

// ---- head dimension 1

// Gates as they are given: a row of one step's, as tensors store them or copied into `room`; of a
// row, the gates of channels c …; and the row of their gradients. Logits keep of a step
// what is dear to compute, e^{-|z|}, in a row `e`.
template <class G>
struct RealGates {
  typedef Computed<G> N;
  typedef G Stored;
  static constexpr int64_t numbers = 1;  // of G, of one gate

  static const G* row(const GateLoop& args, int64_t b, int64_t t, int64_t h0, int64_t count,
                      G* room) {
    return read(args.gates, b, t, h0, count, room);
  }
  static Row<G> gradients(const Sink& s, int64_t b, int64_t t, int64_t h0) { return {s, b, t, h0}; }
  template <class V>
  static FASTMIX_INLINE V at(const G* row, int64_t c) {
    return load<V>(row + c);
  }
};

template <class C>
struct ComplexGates {
  typedef Complex<C> N;
  typedef C Stored;
  static constexpr int64_t numbers = 2;

  static const C* row(const GateLoop& args, int64_t b, int64_t t, int64_t h0, int64_t count,
                      C* room) {
    return reinterpret_cast<const C*>(
        read(args.gates, b, t, h0, count, reinterpret_cast<Complex<C>*>(room)));
  }
  static PairRow<C> gradients(const Sink& s, int64_t b, int64_t t, int64_t h0) {
    return {{s.data, kType<C>, s.n_size, 2 * s.channels, s.streaming}, b, t, h0};
  }
  template <class V>
  static FASTMIX_INLINE Complex<V> at(const C* row, int64_t c) {
    return load_pairs<V>(row + 2 * c);
  }
};

template <class G>
struct Logits {
  typedef Complex<Computed<G>> N;
  typedef G Stored;
  static constexpr int64_t numbers = 2;

  static const G* row(const GateLoop& args, int64_t b, int64_t t, int64_t h0, int64_t count,
                      G* room) {
    return read(args.logits, b, t, 2 * h0, 2 * count, room);
  }
  static PairRow<G> gradients(const Sink& s, int64_t b, int64_t t, int64_t h0) {
    return {s, b, t, h0};
  }
  template <class V>
  static FASTMIX_INLINE Complex<V> at(const G* row, int64_t c) {
    return load_pairs<V>(row + 2 * c);
  }
};

template <class Gates>
constexpr bool kLogits = false;
template <class G>
constexpr bool kLogits<Logits<G>> = true;

// States of channels, whose parts lie apart.
template <class N>
struct States {
  Real<N>*re, *im;
};

template <class V>
FASTMIX_INLINE V load_state(const States<NumberOf<V>>& s, int64_t c, V) {
  return load<V>(s.re + c);
}
template <class V>
FASTMIX_INLINE Complex<V> load_state(const States<Complex<NumberOf<V>>>& s, int64_t c, V) {
  return {load<V>(s.re + c), load<V>(s.im + c)};
}
template <class C, class V>
FASTMIX_INLINE void store_state(const States<C>& s, int64_t c, V state) {
  store(s.re + c, state);
}
template <class C, class V>
FASTMIX_INLINE void store_state(const States<Complex<C>>& s, int64_t c, Complex<V> state) {
  store(s.re + c, state.re);
  store(s.im + c, state.im);
}

// a h + kv
template <class V>
FASTMIX_INLINE V advanced(V a, V h, V kv) {
  return a * h + kv;
}
template <class V>
FASTMIX_INLINE Complex<V> advanced(Complex<V> a, Complex<V> h, V kv) {
  return {a.re * h.re - a.im * h.im + kv, a.re * h.im + a.im * h.re};
}

// conj(a) b
template <class V>
FASTMIX_INLINE V conjugate_times(V a, V b) {
  return a * b;
}
template <class V>
FASTMIX_INLINE Complex<V> conjugate_times(Complex<V> a, Complex<V> b) {
  return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}

template <class V>
FASTMIX_INLINE V real_part(V a) {
  return a;
}
template <class V>
FASTMIX_INLINE V real_part(Complex<V> a) {
  return a.re;
}
template <class V>
FASTMIX_INLINE V plus_real(V a, V b) {
  return a + b;
}
template <class V>
FASTMIX_INLINE Complex<V> plus_real(Complex<V> a, V b) {
  return {a.re + b, a.im};
}

// A unit of work: `count` channels from h0 on of batch entry b, stored as numbers of T.
template <class T, class Gates>
struct Diagonal {
  using C = Computed<T>;
  using N = typename Gates::N;
  using G = typename Gates::Stored;
  const GateLoop& args;
  int64_t b, h0, count;
  Scratch scratch;
  T *room_q, *room_k, *room_v, *room_grad;
  G* room_gates;
  N* numbers;

  Diagonal(const GateLoop& args, int64_t b, int64_t h0)
      : args(args), b(b), h0(h0), count(smaller(args.block, args.h - h0)) {
    room_q = scratch.take<T>(count);
    room_k = scratch.take<T>(count);
    room_v = scratch.take<T>(count);
    room_grad = scratch.take<T>(count);
    room_gates = scratch.take<G>(Gates::numbers * count);
    numbers = scratch.take<N>(count);
  }

  States<N> states(int64_t rows) {
    C* re = scratch.take<C>(rows * count);
    return {re, kComplex<N> ? scratch.take<C>(rows * count) : re};
  }

  void read_states(const Source& s, int64_t t, const States<N>& to) {
    part(read(s, b, t, h0, count, numbers), to.re, to.im, count);
  }
  void write_states(const Sink& s, int64_t t, const States<N>& from) {
    join(from.re, from.im, numbers, count);
    write(s, b, t, h0, count, numbers);
  }

  const T* row(const Source& s, int64_t t, T* room) { return read(s, b, t, h0, count, room); }
  const G* gates(int64_t t) { return Gates::row(args, b, t, h0, count, room_gates); }

  void fetch(int64_t t) {
    if (t < 0 || t >= args.n) return;
    prefetch_gates(args, b, t, h0, count);
    prefetch(args.q, b, t, h0, count);
    prefetch(args.k, b, t, h0, count);
    prefetch(args.v, b, t, h0, count);
  }

  void forward();
  void backward();
};

template <class T, class Gates>
void Diagonal<T, Gates>::forward() {
  const States<N> h = states(1);
  if (present(args.initial_state)) {
    read_states(args.initial_state, 0, h);
  } else {
    memset(h.re, 0, count * sizeof(C));
    memset(h.im, 0, count * sizeof(C));
  }
  for (int64_t t = 0; t < args.n; ++t) {
    if (args.carry_every && t % args.carry_every == 0)
      write_states(args.carries, t / args.carry_every, h);
    fetch(t + kAhead);
    const T *q = row(args.q, t, room_q), *k = row(args.k, t, room_k), *v = row(args.v, t, room_v);
    const G* gates_row = gates(t);
    const Row<T> out(args.out, b, t, h0);
    each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
      using V = decltype(zero);
      auto a = Gates::template at<V>(gates_row, c);
      if constexpr (kLogits<Gates>) a = gate(a, polar(a));
      const auto now = advanced(a, load_state(h, c, zero), load<V>(k + c) * load<V>(v + c));
      store_state(h, c, now);
      out.put(c, load<V>(q + c) * real_part(now));
    });
  }
  if (args.carry_every) write_states(args.carries, args.carries.n_size - 1, h);
  write_states(args.state, 0, h);
  streamed();
}

// With g_t = q_t grad_t + conj(a_{t+1}) g_{t+1}: grad_q = grad · Re h, grad_k = Re g · v,
// grad_v = Re g · k and da_t = g_t conj(h_{t-1}). States come again from every carry.
template <class T, class Gates>
void Diagonal<T, Gates>::backward() {
  const int64_t every = args.carry_every;
  const States<N> adjoint = states(1);          // conj(a_{t+1}) g_{t+1}
  const States<N> entries = states(every + 1);  // of a chunk: before each step, after the last
  C* e = kLogits<Gates> ? scratch.take<C>(every * count) : nullptr;
  const auto before = [&](int64_t i) {
    return States<N>{entries.re + i * count, entries.im + i * count};
  };
  read_states(args.grad_state, 0, adjoint);
  for (int64_t start = (args.n - 1) / every * every; start >= 0; start -= every) {
    const int64_t steps = smaller(every, args.n - start);
    read_states(args.kept, start / every, entries);
    for (int64_t i = 0; i < steps; ++i) {
      const T *k = row(args.k, start + i, room_k), *v = row(args.v, start + i, room_v);
      const G* gates_row = gates(start + i);
      const States<N> h = before(i), next = before(i + 1);
      each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
        using V = decltype(zero);
        auto a = Gates::template at<V>(gates_row, c);
        if constexpr (kLogits<Gates>) {
          const Polar<V> p = polar(a);
          store(e + i * count + c, p.e);
          a = gate(a, p);
        }
        store_state(next, c, advanced(a, load_state(h, c, zero), load<V>(k + c) * load<V>(v + c)));
      });
    }
    for (int64_t i = steps - 1; i >= 0; --i) {
      const int64_t t = start + i;
      fetch(t - every);  // the same step of the next chunk
      if (t >= every) prefetch(args.grad, b, t - every, h0, count);
      const T *q = row(args.q, t, room_q), *k = row(args.k, t, room_k), *v = row(args.v, t, room_v),
              *grad = row(args.grad, t, room_grad);
      const G* gates_row = gates(t);
      const Row<T> grad_q(args.grad_q, b, t, h0), grad_k(args.grad_k, b, t, h0),
          grad_v(args.grad_v, b, t, h0);
      const auto grad_gates = Gates::gradients(args.grad_gates, b, t, h0);
      const States<N> h = before(i), after = before(i + 1);
      each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
        using V = decltype(zero);
        const V dy = load<V>(grad + c);
        grad_q.put(c, dy * load<V>(after.re + c));
        const auto g = plus_real(load_state(adjoint, c, zero), load<V>(q + c) * dy);
        grad_k.put(c, real_part(g) * load<V>(v + c));
        grad_v.put(c, real_part(g) * load<V>(k + c));
        auto a = Gates::template at<V>(gates_row, c);
        auto grad_a = conjugate_times(load_state(h, c, zero), g);
        if constexpr (kLogits<Gates>) {
          const auto z = a;
          const Polar<V> p = polar(z, load<V>(e + i * count + c));
          a = gate(z, p);
          grad_a = gate_gradient(z, p, grad_a);
        }
        grad_gates.put(c, grad_a);
        store_state(adjoint, c, conjugate_times(a, g));
      });
    }
  }
  if (args.grad_initial.data) write_states(args.grad_initial, 0, adjoint);
  streamed();
}

// ---- larger heads

// The largest power of two that is no larger than x > 0, kept where its inverse is a normal number.
template <class C>
FASTMIX_INLINE C power_of_two(C x) {
  constexpr C least = sizeof(C) == 4 ? C(0x1p-126) : C(0x1p-1022);
  typename Parts<C>::Bits bits;
  memcpy(&bits, &x, sizeof x);
  bits &= sizeof(C) == 4 ? 0x7f800000 : 0x7ff0000000000000;
  memcpy(&x, &bits, sizeof x);
  return x < least ? least : x > 1 / least ? 1 / least : x;
}

template <class C>
void scale_row(int64_t count, C scale, C* row) {
  for (int64_t c = 0; c < count; ++c) row[c] *= scale;
}

template <class C>
bool finite(const C* row, int64_t count) {
  return sum_over<C>(count, [&](int64_t c) FASTMIX_LAMBDA { return row[c] * 0; }) == 0;
}

// The gate of a head at step t; logits are left in `logits` (2,).
template <class N>
N gate_at(const GateLoop& args, int64_t b, int64_t t, int64_t head, Real<N>* logits) {
  N a;
  if constexpr (kComplex<N>) {
    if (present(args.logits)) {
      read_into(args.logits, b, t, 2 * head, 2, logits);
      const N z{logits[0], logits[1]};
      return gate(z, polar(z));
    }
  }
  read_into(args.gates, b, t, head, 1, &a);
  return a;
}

// A chunk of one head, `steps` rows, in matrices whose rows are whole vectors.
template <class N>
struct Chunk {
  using C = Real<N>;
  const GateLoop& args;
  int64_t b, head, length;                     // of a full chunk
  int64_t ahead;                               // from a chunk to the one that comes next, in steps
  int64_t steps_padded, dk_padded, dv_padded;  // row lengths
  int64_t steps = 0;
  C *q, *k, *v, *k_turned;                           // (steps, dk), …, (dk, steps)
  C *weight_re, *weight_im, *prefix_re, *prefix_im;  // W (steps, steps), P (steps)
  C *gate_re, *gate_im, *logits;                     // (steps), (steps, 2)
  C *state_re, *state_im;                            // (dk, dv)
  C *entry_re, *entry_im;                            // the state before the chunk, likewise
  C *x, *y;                                          // (steps, larger of dk and dv)
  C* k_scale;   // (steps): powers of two, that of a key moved to its value
  bool scaled;  // whether one of them is not 1
  N* numbers;

  Chunk(const GateLoop& args, int64_t b, int64_t head, Scratch& scratch)
      : args(args), b(b), head(head) {
    // Products within a chunk grow with its length; those with a real state are half as many, and
    // with narrow vectors they weigh more than what each chunk does to a small state.
    const bool fewer = !kComplex<N> || (kNarrow && args.dk * args.dv <= 64 * 64);
    length = args.dk <= 16 && args.dv <= 16 ? 16 : fewer ? 32 : 64;
    ahead = length;
    steps_padded = padded<C>(length);
    dk_padded = padded<C>(args.dk);
    dv_padded = padded<C>(args.dv);
    q = scratch.zeros<C>(length * dk_padded);
    k = scratch.zeros<C>(length * dk_padded);
    v = scratch.zeros<C>(length * dv_padded);
    k_turned = scratch.zeros<C>(args.dk * steps_padded);
    weight_re = scratch.zeros<C>(length * steps_padded);
    weight_im = imaginary<N>(scratch, length * steps_padded, weight_re);
    prefix_re = scratch.zeros<C>(length);
    prefix_im = imaginary<N>(scratch, length, prefix_re);
    gate_re = scratch.zeros<C>(length);
    gate_im = imaginary<N>(scratch, length, gate_re);
    logits = scratch.zeros<C>(2 * length);
    state_re = scratch.zeros<C>(args.dk * dv_padded);
    state_im = imaginary<N>(scratch, args.dk * dv_padded, state_re);
    entry_re = scratch.zeros<C>(args.dk * dv_padded);
    entry_im = imaginary<N>(scratch, args.dk * dv_padded, entry_re);
    x = scratch.zeros<C>(length * larger(dk_padded, dv_padded));
    y = scratch.zeros<C>(length * larger(dk_padded, dv_padded));
    k_scale = scratch.zeros<C>(length);
    numbers = scratch.take<N>(args.dk * args.dv);
  }

  void rows(const Source& s, int64_t t0, int64_t d, C* to, int64_t row) {
    for (int64_t i = 0; i < steps; ++i, to += row) {
      read_into(s, b, t0 + i, head * d, d, to);
      const int64_t next = t0 + ahead + i;
      if (next >= 0 && next < args.n) prefetch(s, b, next, head * d, d);
    }
  }

  void write_rows(const Sink& s, int64_t t0, int64_t d, const C* from, int64_t row) {
    for (int64_t i = 0; i < steps; ++i) write(s, b, t0 + i, head * d, d, from + i * row);
  }

  void read_state(const Source& s, int64_t t, C* re, C* im) {
    const N* from = read(s, b, t, head * args.dk * args.dv, args.dk * args.dv, numbers);
    for (int64_t i = 0; i < args.dk; ++i)
      part(from + i * args.dv, re + i * dv_padded, im + i * dv_padded, args.dv);
  }

  void write_state(const Sink& s, int64_t t, const C* re, const C* im) {
    for (int64_t i = 0; i < args.dk; ++i)
      join(re + i * dv_padded, im + i * dv_padded, numbers + i * args.dv, args.dv);
    write(s, b, t, head * args.dk * args.dv, args.dk * args.dv, numbers);
  }

  // Keys, values and gates of the chunk at t0, and their weights.
  void load_chunk(int64_t t0) {
    using V = typename Simd<C>::Vector;
    steps = smaller(length, args.n - t0);
    rows(args.k, t0, args.dk, k, dk_padded);
    rows(args.v, t0, args.dv, v, dv_padded);
    scale_keys();
    load_gates(t0);
    for (int64_t s = 0; s < steps; ++s) {
      C *re = weight_re + s * steps_padded, *im = weight_im + s * steps_padded;
      const C x = gate_re[s], y = gate_im[s];
      if (s == 0) {
        prefix_re[0] = x;
        if constexpr (kComplex<N>) prefix_im[0] = y;
      } else {
        next_prefix(s, x, y);
        for (int64_t r = 0; r < s; r += Simd<C>::lanes) {  // beyond the diagonal are zeros
          const V before_re = load<V>(re - steps_padded + r);
          if constexpr (kComplex<N>) {
            const V before_im = load<V>(im - steps_padded + r);
            store(re + r, x * before_re - y * before_im);
            store(im + r, x * before_im + y * before_re);
          } else {
            store(re + r, x * before_re);
          }
        }
      }
      re[s] = 1;
      if constexpr (kComplex<N>) im[s] = 0;
    }
  }

  void load_gates(int64_t t0) {
    for (int64_t s = 0; s < steps; ++s) {
      if constexpr (!kComplex<N>) {
        read_into(args.gates, b, t0 + s, head, 1, gate_re + s);
      } else if (present(args.logits)) {
        read_into(args.logits, b, t0 + s, 2 * head, 2, logits + 2 * s);
      } else {
        N a;
        read_into(args.gates, b, t0 + s, head, 1, &a);
        gate_re[s] = a.re;
        gate_im[s] = a.im;
      }
    }
    if (!kComplex<N> || !present(args.logits)) return;
    each_vector<C>(steps, [&](auto zero, int64_t s) FASTMIX_LAMBDA {
      const auto z = load_pairs<decltype(zero)>(logits + 2 * s);
      const auto a = gate(z, polar(z));
      store(gate_re + s, a.re);
      store(gate_im + s, a.im);
    });
  }

  // Writes the gradients of the chunk's gates, or of their logits if those were given.
  void write_grad_gates(int64_t t0, C* re, C* im) {
    const bool from_logits = kComplex<N> && present(args.logits);
    if (from_logits)
      each_vector<C>(steps, [&](auto zero, int64_t s) FASTMIX_LAMBDA {
        using V = decltype(zero);
        const auto z = load_pairs<V>(logits + 2 * s);
        const auto grad = gate_gradient(z, polar(z), {load<V>(re + s), load<V>(im + s)});
        store(re + s, grad.re);
        store(im + s, grad.im);
      });
    for (int64_t s = 0; s < steps; ++s) {
      if (from_logits) {
        const C pair[] = {re[s], im[s]};
        write(args.grad_gates, b, t0 + s, 2 * head, 2, pair);
      } else {
        N grad;
        join(re + s, im + s, &grad, 1);
        write(args.grad_gates, b, t0 + s, head, 1, &grad);
      }
    }
  }

  // P_s = a_s P_{s-1}
  void next_prefix(int64_t s, C x, C y) {
    const C re = prefix_re[s - 1], im = prefix_im[s - 1];
    if constexpr (kComplex<N>) {
      prefix_re[s] = x * re - y * im;
      prefix_im[s] = x * im + y * re;
    } else {
      prefix_re[s] = x * re;
    }
  }

  // Scales keys whose largest number is far from 1 so that it lies in [1, 2), and their values
  // inversely. Two limits remain, both beyond 1e-38: numbers of such a key that are smaller than
  // its largest by that factor, and products grad · v, lose digits.
  void scale_keys() {
    using V = typename Simd<C>::Vector;
    constexpr C far = 1 << 10;
    scaled = false;
    for (int64_t s = 0; s < steps; ++s) {
      V sizes{};
      for (int64_t j = 0; j < dk_padded; j += Simd<C>::lanes) {
        const V number = load<V>(k + s * dk_padded + j), size = number < 0 ? -number : number;
        sizes = size > sizes ? size : sizes;
      }
      C largest = 0;
      for (int i = 0; i < Simd<C>::lanes; ++i) largest = sizes[i] > largest ? sizes[i] : largest;
      k_scale[s] = 1;
      if (largest == 0 || largest > Range<C>::most || (largest <= far && largest * far >= 1))
        continue;
      scaled = true;
      k_scale[s] = power_of_two(largest);
      scale_row(args.dk, 1 / k_scale[s], k + s * dk_padded);
      scale_row(args.dv, k_scale[s], v + s * dv_padded);
    }
  }

  // Takes the scales back out of the gradients of keys and values.
  void unscale_keys(C* grad_k, C* grad_v) {
    for (int64_t s = 0; scaled && s < steps; ++s) {
      scale_row(args.dk, 1 / k_scale[s], grad_k + s * dk_padded);
      scale_row(args.dv, k_scale[s], grad_v + s * dv_padded);
    }
  }

  void load_queries(int64_t t0) {
    rows(args.q, t0, args.dk, q, dk_padded);
    transpose(steps, args.dk, k, dk_padded, k_turned, steps_padded);
  }

  // to[s] = sign · scale[s] · from[s]
  void scale_rows(int64_t d, const C* from, const C* scale, C sign, C* to) {
    for (int64_t s = 0; s < steps; ++s) {
      const C by = sign * scale[s];
      each_vector<C>(d, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
        store(to + s * d + c, by * load<decltype(zero)>(from + s * d + c));
      });
    }
  }

  // to (steps, steps) = rows (steps, d) · turned (d, steps), the panels of the lower triangle.
  void lower_product(int64_t d, const C* rows, int64_t row, const C* turned, C* to) {
    constexpr int64_t panel = 2 * Simd<C>::lanes;
    for (int64_t j = 0; j < steps; j += panel)
      gemm<C>(steps - j, smaller(panel, steps_padded - j), d, {rows + j * row, row, 1},
              {turned + j, steps_padded}, {to + j * steps_padded + j, steps_padded}, false, kFull);
  }

  // to (steps, steps) = a ∘ b, the vectors of the lower triangle.
  void lower_times(const C* a, const C* b, C* to) {
    using V = typename Simd<C>::Vector;
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t r = 0; r <= s; r += Simd<C>::lanes) {
        const int64_t at = s * steps_padded + r;
        store(to + at, load<V>(a + at) * load<V>(b + at));
      }
  }

  // to (steps, steps) = scores ∘ Re W
  void weigh(const C* scores, C* to) { lower_times(scores, weight_re, to); }

  bool finite_state() const {
    const int64_t size = args.dk * dv_padded;
    return finite(state_re, size) && (!kComplex<N> || finite(state_im, size));
  }

  void copy_state(const C* from_re, const C* from_im, C* to_re, C* to_im) const {
    memcpy(to_re, from_re, args.dk * dv_padded * sizeof(C));
    if constexpr (kComplex<N>) memcpy(to_im, from_im, args.dk * dv_padded * sizeof(C));
  }

  // Takes the state across the chunk at t0, and keeps its entry.
  void advance(int64_t t0) {
    exchange_state();
    advance_state();
    if (finite_state()) return;
    start_again(t0);
    for (int64_t s = 0; s < steps; ++s) step(s);
  }

  // The chunk's entry, and its keys and values as they came.
  void start_again(int64_t t0) {
    copy_state(entry_re, entry_im, state_re, state_im);
    rows(args.k, t0, args.dk, k, dk_padded);
    rows(args.v, t0, args.dv, v, dv_padded);
    scaled = false;
  }

  // S = a_s S + k_s v_sᵀ
  void step(int64_t s) {
    for (int64_t i = 0; i < args.dk; ++i) {
      C *re = state_re + i * dv_padded, *im = state_im + i * dv_padded;
      step_row(s, i, re, im, re, im);
    }
  }

  // Row i of it, from that of the state before.
  void step_row(int64_t s, int64_t i, const C* re, const C* im, C* to_re, C* to_im) {
    const C x = gate_re[s], y = gate_im[s], key = k[s * dk_padded + i], *value = v + s * dv_padded;
    for (int64_t c = 0; c < args.dv; ++c) {
      const C before = re[c];
      if constexpr (kComplex<N>) {
        const C turned = im[c];
        to_re[c] = x * before - y * turned + key * value[c];
        to_im[c] = x * turned + y * before;
      } else {
        to_re[c] = x * before + key * value[c];
      }
    }
  }

  // The chunk's outputs, of the state of every step.
  void step_through(int64_t t0, C* out) {
    start_again(t0);
    for (int64_t s = 0; s < steps; ++s) {
      step(s);
      memset(out + s * dv_padded, 0, dv_padded * sizeof(C));
      for (int64_t i = 0; i < args.dk; ++i)
        for (int64_t c = 0; c < args.dv; ++c)
          out[s * dv_padded + c] += q[s * dk_padded + i] * state_re[i * dv_padded + c];
    }
  }

  // The state becomes the entry, whose memory the next one takes.
  void exchange_state() {
    C *const re = entry_re, *const im = entry_im;
    entry_re = state_re;
    entry_im = state_im;
    state_re = re;
    state_im = im;
  }

  // S = P_last · entry + Σ_r W[last, r] k_r v_rᵀ
  void advance_state() {
    const int64_t last = steps - 1;
    const C re = prefix_re[last], im = prefix_im[last];
    each_vector<C>(args.dk * dv_padded, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
      using V = decltype(zero);
      const V r = load<V>(entry_re + c);
      if constexpr (kComplex<N>) {
        const V i = load<V>(entry_im + c);
        store(state_re + c, re * r - im * i);
        store(state_im + c, re * i + im * r);
      } else {
        store(state_re + c, re * r);
      }
    });
    add_to_state(weight_re + last * steps_padded, state_re);
    if constexpr (kComplex<N>) add_to_state(weight_im + last * steps_padded, state_im);
  }

  // to (dk, dv) += Σ_r weight[r] k_r v_rᵀ
  void add_to_state(const C* weight, C* to) {
    scale_rows(dk_padded, k, weight, C(1), x);
    gemm<C>(args.dk, dv_padded, steps, {x, 1, dk_padded}, {v, dv_padded}, {to, dv_padded}, true,
            kFull);
  }

  // out (steps, dv) += sign · Σ prefix[s] q_s · state
  void add_state(const C* prefix, C sign, const C* state, C* out) {
    scale_rows(dk_padded, q, prefix, sign, x);
    gemm<C>(steps, dv_padded, args.dk, {x, dk_padded, 1}, {state, dv_padded}, {out, dv_padded},
            true, kFull);
  }
};

// Numbers of a state that lie one behind the other, as tensors have them.
template <class V, class C>
FASTMIX_INLINE V load_numbers(const C* p) {
  return load<V>(p);
}
template <class V, class C>
FASTMIX_INLINE Complex<V> load_numbers(const Complex<C>* p) {
  return load_pairs<V>(&p->re);
}
template <class V, class C>
FASTMIX_INLINE void store_numbers(C* p, V v) {
  store(p, v);
}
template <class V, class C>
FASTMIX_INLINE void store_numbers(Complex<C>* p, Complex<V> v) {
  if constexpr (kVector<V>) v = together(v.re, v.im, Indices<sizeof v.re / sizeof(C)>());
  store(&p->re, v.re);
  store(&p->re + sizeof v.re / sizeof(C), v.im);
}

template <class V>
FASTMIX_INLINE V everywhere(NumberOf<V> a) {
  return V{} + a;
}
template <class V>
FASTMIX_INLINE Complex<V> everywhere(Complex<NumberOf<V>> a) {
  return {V{} + a.re, V{} + a.im};
}

// to = a · from + k vᵀ of channels c … of all rows, `vectors` of them; out += q · Re to.
template <int vectors, class V, class N>
FASTMIX_INLINE void step_columns(const GateLoop& args, N a, const Real<N>* q, const Real<N>* k,
                                 const Real<N>* v, const N* from, N* to, int64_t c, Real<N>* out) {
  constexpr int64_t lanes = sizeof(V) / sizeof(Real<N>);
  constexpr int64_t depth = 128;  // as in gemm.h, the sums of so many are added up
  const auto gate = everywhere<V>(a);
  for (int64_t i0 = 0; i0 < args.dk; i0 += depth) {
    V sum[vectors] = {};
    for (int64_t i = i0; i < smaller(i0 + depth, args.dk); ++i)
      for (int j = 0; j < vectors; ++j) {
        const int64_t at = i * args.dv + c + j * lanes;
        const auto now =
            advanced(gate, load_numbers<V>(from + at), k[i] * load<V>(v + c + j * lanes));
        store_numbers(to + at, now);
        sum[j] += q[i] * real_part(now);
      }
    for (int j = 0; j < vectors; ++j)
      store(out + c + j * lanes, load<V>(out + c + j * lanes) + sum[j]);
  }
}

constexpr int64_t kFew = 4;  // steps that take less time one by one than a chunk does

// A head's few steps as the definition has them: states are computed where they are returned.
template <class N>
void heads_steps(const GateLoop& args, int64_t b, int64_t head) {
  using C = Real<N>;
  using V = typename Simd<C>::Vector;
  constexpr int64_t lanes = Simd<C>::lanes;
  Scratch scratch;
  C *room_q = scratch.take<C>(args.dk), *room_k = scratch.take<C>(args.dk),
    *room_v = scratch.take<C>(args.dv), *out = scratch.take<C>(args.dv), logits[2];
  const int64_t size = args.dk * args.dv, all = args.h * size;
  N* const state = static_cast<N*>(args.state.data) + b * all + head * size;
  const N* from = state;
  if (present(args.initial_state))
    from = static_cast<const N*>(args.initial_state.data) + b * args.initial_state.b + head * size;
  else memset(static_cast<void*>(state), 0, size * sizeof(N));
  const auto keep = [&](int64_t carry, const N* numbers) {
    if (!args.carry_every) return;
    N* const to = static_cast<N*>(args.carries.data) + (b * args.carries.n_size + carry) * all;
    memcpy(static_cast<void*>(to + head * size), numbers, size * sizeof(N));
  };
  for (int64_t t = 0; t < args.n; ++t, from = state) {
    if (args.carry_every && t % args.carry_every == 0) keep(t / args.carry_every, from);
    const N a = gate_at<N>(args, b, t, head, logits);
    const C *q = read(args.q, b, t, head * args.dk, args.dk, room_q),
            *k = read(args.k, b, t, head * args.dk, args.dk, room_k),
            *v = read(args.v, b, t, head * args.dv, args.dv, room_v);
    memset(out, 0, args.dv * sizeof(C));
    int64_t c = 0;
    for (; c + 4 * lanes <= args.dv; c += 4 * lanes)
      step_columns<4, V>(args, a, q, k, v, from, state, c, out);
    for (; c + lanes <= args.dv; c += lanes)
      step_columns<1, V>(args, a, q, k, v, from, state, c, out);
    for (; c < args.dv; ++c) step_columns<1, C>(args, a, q, k, v, from, state, c, out);
    write(args.out, b, t, head * args.dv, args.dv, out);
  }
  keep(args.carries.n_size - 1, state);
  streamed();
}

template <class N>
void heads_forward(const GateLoop& args, int64_t b, int64_t head) {
  using C = Real<N>;
  if (args.n <= kFew) return heads_steps<N>(args, b, head);
  Scratch scratch;
  Chunk<N> chunk(args, b, head, scratch);
  C *scores = scratch.zeros<C>(chunk.length * chunk.steps_padded),
    *out = scratch.zeros<C>(chunk.length * chunk.dv_padded);
  if (present(args.initial_state))
    chunk.read_state(args.initial_state, 0, chunk.state_re, chunk.state_im);
  for (int64_t t0 = 0; t0 < args.n; t0 += chunk.length) {
    if (args.carry_every && t0 % args.carry_every == 0)
      chunk.write_state(args.carries, t0 / args.carry_every, chunk.state_re, chunk.state_im);
    chunk.load_chunk(t0);
    chunk.load_queries(t0);
    chunk.lower_product(args.dk, chunk.q, chunk.dk_padded, chunk.k_turned, scores);
    chunk.weigh(scores, scores);
    gemm<C>(chunk.steps, chunk.dv_padded, chunk.steps, {scores, chunk.steps_padded, 1},
            {chunk.v, chunk.dv_padded}, {out, chunk.dv_padded}, false, kLower);
    chunk.add_state(chunk.prefix_re, C(1), chunk.state_re, out);
    if constexpr (kComplex<N>) chunk.add_state(chunk.prefix_im, C(-1), chunk.state_im, out);
    chunk.advance(t0);
    if (!finite(out, chunk.steps * chunk.dv_padded)) chunk.step_through(t0, out);
    chunk.write_rows(args.out, t0, args.dv, out, chunk.dv_padded);
  }
  if (args.carry_every)
    chunk.write_state(args.carries, args.carries.n_size - 1, chunk.state_re, chunk.state_im);
  chunk.write_state(args.state, 0, chunk.state_re, chunk.state_im);
  streamed();
}

// Backward of one head. The adjoint G, the gradient of the state, runs against time: before a chunk
// it is conj(P_last) G plus what the chunk's outputs add, Σ_s conj(P_s) q_s grad_sᵀ.
template <class N>
struct HeadBackward {
  using C = Real<N>;
  const GateLoop& args;
  Scratch& scratch;
  Chunk<N> chunk;
  const int64_t steps_padded, dk_padded, dv_padded, state_size;
  C *entry_re, *entry_im;      // entries of the chunks between two carries, (chunks, dk, dv)
  C *turned_re, *turned_im;    // a transposed state, (dv, dk)
  C *adjoint_re, *adjoint_im;  // (dk, dv)
  C *exit_re, *exit_im;        // the adjoint after the chunk, (dk, dv)
  // Of one row of the state, before and after every step, and of gates, where they are needed.
  C *states_re = nullptr, *states_im = nullptr;
  double* gate_sums = nullptr;
  C *grad, *v_turned;                  // (steps, dv), (dv, steps)
  C *scores, *grad_scores;             // q kᵀ and grad vᵀ, (steps, steps)
  C* weighed;                          // either of them ∘ Re W
  C *grad_weight_re, *grad_weight_im;  // (steps, steps)
  C *grad_prefix_re, *grad_prefix_im, *grad_gate_re, *grad_gate_im;  // (steps)
  C *grad_q, *grad_k, *grad_v;
  C *row_re, *row_im;  // (steps)

  HeadBackward(const GateLoop& args, int64_t b, int64_t head, Scratch& scratch)
      : args(args), scratch(scratch), chunk(args, b, head, scratch),
        steps_padded(chunk.steps_padded), dk_padded(chunk.dk_padded), dv_padded(chunk.dv_padded),
        state_size(args.dk * dv_padded) {
    const int64_t length = chunk.length, chunks = args.carry_every / length;
    entry_re = scratch.zeros<C>(chunks * state_size);
    entry_im = imaginary<N>(scratch, chunks * state_size, entry_re);
    turned_re = scratch.zeros<C>(args.dv * dk_padded);
    turned_im = imaginary<N>(scratch, args.dv * dk_padded, turned_re);
    adjoint_re = scratch.zeros<C>(state_size);
    adjoint_im = imaginary<N>(scratch, state_size, adjoint_re);
    exit_re = scratch.zeros<C>(state_size);
    exit_im = imaginary<N>(scratch, state_size, exit_re);
    grad = scratch.zeros<C>(length * dv_padded);
    v_turned = scratch.zeros<C>(args.dv * steps_padded);
    scores = scratch.zeros<C>(length * steps_padded);
    grad_scores = scratch.zeros<C>(length * steps_padded);
    weighed = scratch.zeros<C>(length * steps_padded);
    grad_weight_re = weighed;  // free once the products within the chunk are done
    grad_weight_im = imaginary<N>(scratch, length * steps_padded, grad_weight_re);
    grad_q = scratch.zeros<C>(length * dk_padded);
    grad_k = scratch.zeros<C>(length * dk_padded);
    grad_v = scratch.zeros<C>(length * dv_padded);
    grad_prefix_re = scratch.zeros<C>(length);
    grad_prefix_im = imaginary<N>(scratch, length, grad_prefix_re);
    grad_gate_re = scratch.zeros<C>(length);
    grad_gate_im = imaginary<N>(scratch, length, grad_gate_re);
    row_re = scratch.zeros<C>(steps_padded);
    row_im = imaginary<N>(scratch, steps_padded, row_re);
  }

  // Walks through the steps first … end-1 from their carry, and keeps each chunk's entry. Returns
  // the number of the last chunk.
  int64_t keep_entries(int64_t carry, int64_t first, int64_t end) {
    const int64_t last_chunk = (end - 1 - first) / chunk.length;
    chunk.read_state(args.kept, carry, chunk.state_re, chunk.state_im);
    chunk.ahead = chunk.length;
    for (int64_t i = 0; i <= last_chunk; ++i) {
      chunk.copy_state(chunk.state_re, chunk.state_im, entry_re + i * state_size,
                       entry_im + i * state_size);
      if (i == last_chunk) break;
      chunk.load_chunk(first + i * chunk.length);
      chunk.advance(first + i * chunk.length);
    }
    chunk.ahead = -chunk.length;
    return last_chunk;
  }

  void load_chunk(int64_t t0) {
    chunk.load_chunk(t0);
    chunk.load_queries(t0);
    chunk.rows(args.grad, t0, args.dv, grad, dv_padded);
    transpose(chunk.steps, args.dv, chunk.v, dv_padded, v_turned, steps_padded);
  }

  // What the chunk's outputs have from its own steps: starts the gradients of q, k, v and W.
  void within_chunk() {
    const int64_t steps = chunk.steps;
    chunk.lower_product(args.dk, chunk.q, dk_padded, chunk.k_turned, scores);
    chunk.lower_product(args.dv, grad, dv_padded, v_turned, grad_scores);
    chunk.weigh(grad_scores, weighed);
    gemm<C>(steps, dk_padded, steps, {weighed, steps_padded, 1}, {chunk.k, dk_padded},
            {grad_q, dk_padded}, false, kLower);
    gemm<C>(steps, dk_padded, steps, {weighed, 1, steps_padded}, {chunk.q, dk_padded},
            {grad_k, dk_padded}, false, kUpper);
    chunk.weigh(scores, weighed);
    gemm<C>(steps, dv_padded, steps, {weighed, 1, steps_padded}, {grad, dv_padded},
            {grad_v, dv_padded}, false, kUpper);
    chunk.lower_times(scores, grad_scores, grad_weight_re);
    if constexpr (kComplex<N>) memset(grad_weight_im, 0, steps * steps_padded * sizeof(C));
  }

  // What the outputs have from the chunk's entry S: adds to grad_q, starts the gradient of P. With
  // x = grad Re Sᵀ, y = grad Im Sᵀ.
  void from_entry(const C* state_re, const C* state_im) {
    const int64_t steps = chunk.steps;
    times_transpose(grad, state_re, turned_re, chunk.x);
    if constexpr (kComplex<N>) times_transpose(grad, state_im, turned_im, chunk.y);
    for (int64_t s = 0; s < steps; ++s)
      add_scaled(s, chunk.prefix_re[s], -chunk.prefix_im[s], chunk.q, grad_q, grad_prefix_re + s,
                 grad_prefix_im + s);
    if constexpr (kComplex<N>)
      for (int64_t s = 0; s < steps; ++s) grad_prefix_im[s] = -grad_prefix_im[s];
  }

  // Row s of `to` += re · x + im · y, where x and y are rows s of chunk.x and chunk.y. What the
  // factors have for gradients, x and y times row s of `rows`, comes in by_re and by_im.
  void add_scaled(int64_t s, C re, C im, const C* rows, C* to, C* by_re, C* by_im) {
    using V = typename Simd<C>::Vector;
    V sum_re{}, sum_im{};
    for (int64_t at = s * dk_padded; at < (s + 1) * dk_padded; at += Simd<C>::lanes) {
      const V row = load<V>(rows + at), x = load<V>(chunk.x + at);
      V result = load<V>(to + at) + re * x;
      sum_re += row * x;
      if constexpr (kComplex<N>) {
        const V y = load<V>(chunk.y + at);
        result += im * y;
        sum_im += row * y;
      }
      store(to + at, result);
    }
    *by_re = static_cast<C>(total(sum_re));
    if constexpr (kComplex<N>) *by_im = static_cast<C>(total(sum_im));
  }

  // to (steps, dk) = rows (steps, dv) · stateᵀ, which is left in `turned`
  void times_transpose(const C* rows, const C* state, C* turned, C* to) {
    transpose(args.dk, args.dv, state, dv_padded, turned, dk_padded);
    gemm<C>(chunk.steps, dk_padded, args.dv, {rows, dv_padded, 1}, {turned, dk_padded},
            {to, dk_padded}, false, kFull);
  }

  // What the chunk's exit has from its keys and values: adds to the gradients of k, v and W's last
  // row. With x = v Re Gᵀ, y = v Im Gᵀ.
  void into_exit() {
    const int64_t steps = chunk.steps, last = steps - 1;
    times_transpose(chunk.v, adjoint_re, turned_re, chunk.x);
    if constexpr (kComplex<N>) times_transpose(chunk.v, adjoint_im, turned_im, chunk.y);
    const C *last_re = chunk.weight_re + last * steps_padded,
            *last_im = chunk.weight_im + last * steps_padded;
    for (int64_t r = 0; r < steps; ++r) {
      C re, im;
      add_scaled(r, last_re[r], last_im[r], chunk.k, grad_k, &re, &im);
      grad_weight_re[last * steps_padded + r] += re;
      if constexpr (kComplex<N>) grad_weight_im[last * steps_padded + r] += im;
    }
    add_adjoint(last_re, adjoint_re);
    if constexpr (kComplex<N>) add_adjoint(last_im, adjoint_im);
  }

  // grad_v (steps, dv) += weight[r] k_r · adjoint
  void add_adjoint(const C* weight, const C* adjoint) {
    gemm<C>(chunk.steps, dv_padded, args.dk, {chunk.k, dk_padded, 1}, {adjoint, dv_padded},
            {grad_v, dv_padded}, true, kFull, weight);
  }

  // P_last carried the entry S across: its gradient gains Σ G conj(S). Then G steps back before the
  // chunk.
  void advance_adjoint(const C* state_re, const C* state_im) {
    const int64_t last = chunk.steps - 1;
    const C re = chunk.prefix_re[last], im = chunk.prefix_im[last];
    using V = typename Simd<C>::Vector;
    V sum_re{}, sum_im{};
    for (int64_t at = 0; at < state_size; at += dv_padded) {
      V row_re{}, row_im{};
      for (int64_t j = at; j < at + dv_padded; j += Simd<C>::lanes) {
        const V r = load<V>(adjoint_re + j), x = load<V>(state_re + j);
        if constexpr (kComplex<N>) {
          const V m = load<V>(adjoint_im + j), y = load<V>(state_im + j);
          row_re += r * x + m * y;
          row_im += m * x - r * y;
          store(adjoint_re + j, re * r + im * m);
          store(adjoint_im + j, re * m - im * r);
        } else {
          row_re += r * x;
          store(adjoint_re + j, re * r);
        }
      }
      sum_re += row_re;
      sum_im += row_im;
    }
    grad_prefix_re[last] += static_cast<C>(total(sum_re));
    if constexpr (kComplex<N>) grad_prefix_im[last] += static_cast<C>(total(sum_im));
    add_to_adjoint(chunk.prefix_re, C(1), adjoint_re);
    if constexpr (kComplex<N>) add_to_adjoint(chunk.prefix_im, C(-1), adjoint_im);
  }

  // to (dk, dv) += sign · Σ_s prefix[s] q_s grad_sᵀ
  void add_to_adjoint(const C* prefix, C sign, C* to) {
    chunk.scale_rows(dk_padded, chunk.q, prefix, sign, chunk.x);
    gemm<C>(args.dk, dv_padded, chunk.steps, {chunk.x, 1, dk_padded}, {grad, dv_padded},
            {to, dv_padded}, true, kFull);
  }

  // Gradients of the gates: with R_s = dW_s + conj(a_{s+1}) R_{s+1}, which is `row`,
  // da_s = Σ_r R[s, r] conj(W[s-1, r]); likewise for P, a column.
  void gate_gradients() {
    using V = typename Simd<C>::Vector;
    memset(row_re, 0, steps_padded * sizeof(C));
    if constexpr (kComplex<N>) memset(row_im, 0, steps_padded * sizeof(C));
    C column_re = 0, column_im = 0;
    for (int64_t s = chunk.steps - 1; s >= 0; --s) {
      column_re += grad_prefix_re[s];
      if constexpr (kComplex<N>) column_im += grad_prefix_im[s];
      const C x = chunk.gate_re[s], y = chunk.gate_im[s];
      const int64_t at = s * steps_padded, before = larger(0, at - steps_padded);
      V sum_re{}, sum_im{};
      for (int64_t r = 0; r <= s; r += Simd<C>::lanes) {  // W[s-1] is 0 from column s on
        const V re = load<V>(row_re + r) + load<V>(grad_weight_re + at + r);
        const V w_re = load<V>(chunk.weight_re + before + r);
        if constexpr (kComplex<N>) {
          const V im = load<V>(row_im + r) + load<V>(grad_weight_im + at + r);
          const V w_im = load<V>(chunk.weight_im + before + r);
          sum_re += re * w_re + im * w_im;
          sum_im += im * w_re - re * w_im;
          store(row_re + r, x * re + y * im);
          store(row_im + r, x * im - y * re);
        } else {
          sum_re += re * w_re;
          store(row_re + r, x * re);
        }
      }
      add_column(s, column_re, column_im, total(sum_re), total(sum_im));
      const C turned = kComplex<N> ? x * column_im - y * column_re : C(0);
      column_re = kComplex<N> ? x * column_re + y * column_im : x * column_re;
      column_im = turned;
    }
  }

  // The gradient of the gate of step s, from the sums of its row and from the column.
  void add_column(int64_t s, C re, C im, double sum_re, double sum_im) {
    if (s == 0) {
      grad_gate_re[0] = re;
      if constexpr (kComplex<N>) grad_gate_im[0] = im;
      return;
    }
    const C p = chunk.prefix_re[s - 1], m = chunk.prefix_im[s - 1];
    if constexpr (kComplex<N>) {
      grad_gate_re[s] = static_cast<C>(re * p + im * m + sum_re);
      grad_gate_im[s] = static_cast<C>(im * p - re * m + sum_im);
    } else {
      grad_gate_re[s] = static_cast<C>(re * p + sum_re);
    }
  }

  bool finite_gradients() const {
    const int64_t steps = chunk.steps;
    return finite(grad_q, steps * dk_padded) && finite(grad_k, steps * dk_padded) &&
           finite(grad_v, steps * dv_padded) && finite(grad_gate_re, steps) &&
           finite(grad_gate_im, steps) && finite(adjoint_re, state_size) &&
           finite(adjoint_im, state_size);
  }

  // All gradients of the chunk at t0, of the states and adjoints of every step: of one row after
  // the other, so that no more than a row's are held.
  void step_through(int64_t t0, const C* state_re, const C* state_im) {
    if (states_re == nullptr) {
      states_re = scratch.zeros<C>((chunk.length + 1) * dv_padded);
      states_im = imaginary<N>(scratch, (chunk.length + 1) * dv_padded, states_re);
      gate_sums = scratch.zeros<double>(2 * chunk.length);
    }
    chunk.copy_state(state_re, state_im, chunk.entry_re, chunk.entry_im);
    chunk.start_again(t0);
    chunk.copy_state(exit_re, exit_im, adjoint_re, adjoint_im);
    memset(grad_v, 0, chunk.steps * dv_padded * sizeof(C));
    memset(gate_sums, 0, 2 * chunk.length * sizeof(double));
    for (int64_t i = 0; i < args.dk; ++i) {
      memcpy(states_re, state_re + i * dv_padded, dv_padded * sizeof(C));
      if constexpr (kComplex<N>) memcpy(states_im, state_im + i * dv_padded, dv_padded * sizeof(C));
      for (int64_t s = 0; s < chunk.steps; ++s) {
        C *re = states_re + s * dv_padded, *im = states_im + s * dv_padded;
        chunk.step_row(s, i, re, im, re + dv_padded, im + dv_padded);
      }
      for (int64_t s = chunk.steps - 1; s >= 0; --s) step_back(s, i);
    }
    for (int64_t s = 0; s < chunk.steps; ++s) {
      grad_gate_re[s] = static_cast<C>(gate_sums[2 * s]);
      if constexpr (kComplex<N>) grad_gate_im[s] = static_cast<C>(gate_sums[2 * s + 1]);
    }
  }

  // G_s = q_s grad_sᵀ + conj(a_{s+1}) G_{s+1}, the second of which is in `adjoint`: dq = Re S grad,
  // dk = Re G v, dv = k Re G, da = Σ G conj(S_{s-1}). Then the adjoint becomes conj(a_s) G_s. All
  // of that of row i.
  void step_back(int64_t s, int64_t i) {
    const C a_re = chunk.gate_re[s], a_im = chunk.gate_im[s];
    const C q = chunk.q[s * dk_padded + i], k = chunk.k[s * dk_padded + i];
    const C *dy = grad + s * dv_padded, *v = chunk.v + s * dv_padded;
    const C *x = states_re + s * dv_padded, *after = x + dv_padded, *y = states_im + s * dv_padded;
    C *dv = grad_v + s * dv_padded, *re = adjoint_re + i * dv_padded,
      *im = adjoint_im + i * dv_padded;
    C dq = 0, dk = 0;
    double sum_re = 0, sum_im = 0;
    for (int64_t c = 0; c < args.dv; ++c) {
      re[c] += q * dy[c];
      dq += after[c] * dy[c];
      dk += re[c] * v[c];
      dv[c] += k * re[c];
      const C g = re[c];
      if constexpr (kComplex<N>) {
        sum_re += g * x[c] + im[c] * y[c];
        sum_im += im[c] * x[c] - g * y[c];
        re[c] = a_re * g + a_im * im[c];
        im[c] = a_re * im[c] - a_im * g;
      } else {
        sum_re += g * x[c];
        re[c] = a_re * g;
      }
    }
    grad_q[s * dk_padded + i] = dq;
    grad_k[s * dk_padded + i] = dk;
    gate_sums[2 * s] += sum_re;
    if constexpr (kComplex<N>) gate_sums[2 * s + 1] += sum_im;
  }

  void write_gradients(int64_t t0) {
    chunk.write_rows(args.grad_q, t0, args.dk, grad_q, dk_padded);
    chunk.write_rows(args.grad_k, t0, args.dk, grad_k, dk_padded);
    chunk.write_rows(args.grad_v, t0, args.dv, grad_v, dv_padded);
    chunk.write_grad_gates(t0, grad_gate_re, grad_gate_im);
  }
};

template <class N>
void heads_backward(const GateLoop& args, int64_t b, int64_t head) {
  using C = Real<N>;
  Scratch scratch;
  HeadBackward<N> backward(args, b, head, scratch);
  Chunk<N>& chunk = backward.chunk;
  chunk.read_state(args.grad_state, 0, backward.adjoint_re, backward.adjoint_im);
  for (int64_t carry = (args.n - 1) / args.carry_every; carry >= 0; --carry) {
    const int64_t first = carry * args.carry_every;
    const int64_t end = smaller(first + args.carry_every, args.n);
    for (int64_t i = backward.keep_entries(carry, first, end); i >= 0; --i) {
      const int64_t t0 = first + i * chunk.length;
      const C *entry_re = backward.entry_re + i * backward.state_size,
              *entry_im = backward.entry_im + i * backward.state_size;
      chunk.copy_state(backward.adjoint_re, backward.adjoint_im, backward.exit_re,
                       backward.exit_im);
      backward.load_chunk(t0);
      backward.within_chunk();
      backward.from_entry(entry_re, entry_im);
      backward.into_exit();
      backward.advance_adjoint(entry_re, entry_im);
      backward.gate_gradients();
      chunk.unscale_keys(backward.grad_k, backward.grad_v);
      if (!backward.finite_gradients()) backward.step_through(t0, entry_re, entry_im);
      backward.write_gradients(t0);
    }
  }
  if (args.grad_initial.data)
    chunk.write_state(args.grad_initial, 0, backward.adjoint_re, backward.adjoint_im);
  streamed();
}

// Calls work(unit) with the diagonal unit at (b, h0), of the types that its tensors have.
template <class T, class F>
void with_diagonal(const GateLoop& args, int64_t b, int64_t h0, F work) {
  using C = Computed<T>;
  const auto with = [&](auto stored) {
    using G = decltype(stored);
    if (args.real) work(Diagonal<T, RealGates<G>>(args, b, h0));
    else work(Diagonal<T, Logits<G>>(args, b, h0));
  };
  if (!args.real && !present(args.logits)) work(Diagonal<T, ComplexGates<C>>(args, b, h0));
  else if ((args.real ? args.gates : args.logits).type == kType<T>) with(T{});
  else with(C{});
}

// Calls diagonal(unit) or heads(number, b, head) for each unit of work, with a zero of what gates
// and states are.
template <class F, class G>
void each_unit(const GateLoop& args, int64_t begin, int64_t end, F diagonal, G heads) {
  const int64_t blocks = (args.h + args.block - 1) / args.block;
  const bool is_double = args.q.type == Type::f64;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, h0 = unit % blocks * args.block;
    if (args.dk == 1 && args.dv == 1)
      by_type(args.q.type,
              [&](auto stored) { with_diagonal<decltype(stored)>(args, b, h0, diagonal); });
    else if (args.real) is_double ? heads(double{}, b, h0) : heads(float{}, b, h0);
    else is_double ? heads(Complex<double>{}, b, h0) : heads(Complex<float>{}, b, h0);
  }
}

}  // namespace

void gate_loop_forward(const GateLoop& args, int64_t begin, int64_t end) {
  each_unit(
      args, begin, end, [](auto&& unit) { unit.forward(); },
      [&](auto number, int64_t b, int64_t head) {
        heads_forward<decltype(number)>(args, b, head);
      });
}

void gate_loop_backward(const GateLoop& args, int64_t begin, int64_t end) {
  each_unit(
      args, begin, end, [](auto&& unit) { unit.backward(); },
      [&](auto number, int64_t b, int64_t head) {
        heads_backward<decltype(number)>(args, b, head);
      });
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include "tensors.h"

namespace fastmix {
namespace {

// A state (b, h, dk, dv), or the carries (b, carries, h, dk, dv), as rows of h · dk · dv.
Source states(const Tensor& x, bool steps) {
  const int64_t axes = x.dim();
  const int64_t numbers = x.size(axes - 1) * x.size(axes - 2) * x.size(axes - 3);
  return {x.const_data_ptr(),
          type_of(x.scalar_type()),
          x.stride(0),
          steps ? x.stride(1) : 0,
          1,
          1,
          std::max<int64_t>(1, numbers)};
}

constexpr Checks kGateLoopChecks{"gate_loop"};

void check(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& gates,
           const OptionalTensor& logits, const OptionalTensor& initial_state, int64_t carry_every,
           bool backward) {
  kGateLoopChecks.tensor("q", q, {kAny, kAny, kAny, kAny}, kReal);
  const Types same = only(q.scalar_type()), real = same | only(wide(q)),
              complex = only(wide_complex(q));
  const int64_t b = q.size(0), n = q.size(1), h = q.size(2), dk = q.size(3);
  kGateLoopChecks.require(n > 0, "n", "at least 1", n);
  kGateLoopChecks.tensor("k", k, {b, n, h, dk}, same);
  kGateLoopChecks.tensor("v", v, {b, n, h, kAny}, same);
  const int given = gates.has_value() + logits.has_value();
  kGateLoopChecks.require(given == 1, "the number of gates and gate_logits", "1", given);
  kGateLoopChecks.tensor("gates", gates, {b, n, h}, real | complex);
  kGateLoopChecks.tensor("gate_logits", logits, {b, n, h, 2}, real);
  const bool real_gates = gates && (real & only(gates->scalar_type()));
  kGateLoopChecks.tensor("initial_state", initial_state, {b, h, dk, v.size(3)},
                         real_gates ? only(wide(q)) : complex);
  kGateLoopChecks.carries(carry_every, backward, dk == 1 && v.size(3) == 1 ? 64 : 4096);
}

GateLoop arguments(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& gates,
                   const OptionalTensor& logits, int64_t carry_every) {
  GateLoop args{};
  args.n = q.size(1);
  args.h = q.size(2);
  args.dk = q.size(3);
  args.dv = v.size(3);
  args.block = args.dk == 1 && args.dv == 1 ? channel_block(q.size(0), args.h, 512) : 1;
  args.carry_every = carry_every;
  args.q = source(q);
  args.k = source(k);
  args.v = source(v);
  if (gates) args.gates = source(*gates);
  args.real = gates && args.gates.type != Type::c128 && args.gates.type != Type::c64;
  if (logits) args.logits = source(*logits);
  return args;
}

// Of one thread, forward.
double nanoseconds(const GateLoop& args, int64_t batches) {
  return batches * args.n * args.h * (2.0 + 0.2 * args.dk * args.dv);
}

int64_t units(const GateLoop& args, int64_t batches) {
  return batches * ((args.h + args.block - 1) / args.block);
}

std::tuple<Tensor, Tensor, Tensor> gate_loop(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& gates,
                                             const OptionalTensor& logits,
                                             const OptionalTensor& initial_state,
                                             int64_t carry_every) {
  check(q, k, v, gates, logits, initial_state, carry_every, false);
  GateLoop args = arguments(q, k, v, gates, logits, carry_every);
  const int64_t b = q.size(0), numbers = args.h * args.dk * args.dv;
  const int64_t carries = carry_count(args.n, carry_every);
  const ScalarType number = args.real ? wide(q) : wide_complex(q);
  Tensor out = fresh(q, {b, args.n, args.h, args.dv}, q.scalar_type()),
         state = fresh(q, {b, args.h, args.dk, args.dv}, number),
         kept = fresh(q, {b, carries, args.h, args.dk, args.dv}, number);
  const OptionalTensor initial = dense(initial_state);
  if (initial) args.initial_state = states(*initial, false);
  args.out = sink(out, args.n, args.h * args.dv);
  args.state = sink(state, 1, numbers);
  args.carries = sink(kept, carries, numbers);
  spread(FASTMIX_KERNELS(gate_loop_forward), args, units(args, b), nanoseconds(args, b));
  return {out, state, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_loop_backward(
    const Tensor& grad, const Tensor& grad_state, const Tensor& carries, const Tensor& q,
    const Tensor& k, const Tensor& v, const OptionalTensor& gates, const OptionalTensor& logits,
    const OptionalTensor& initial_state, int64_t carry_every) {
  check(q, k, v, gates, logits, initial_state, carry_every, true);
  GateLoop args = arguments(q, k, v, gates, logits, carry_every);
  const int64_t b = q.size(0), numbers = args.h * args.dk * args.dv;
  const ScalarType number = args.real ? wide(q) : wide_complex(q);
  kGateLoopChecks.tensor("grad_out", grad, {b, args.n, args.h, args.dv}, kReal);
  kGateLoopChecks.tensor("grad_state", grad_state, {b, args.h, args.dk, args.dv}, only(number));
  kGateLoopChecks.tensor("carries", carries,
                         {b, carry_count(args.n, carry_every), args.h, args.dk, args.dv},
                         only(number));
  Tensor grad_q = fresh(q), grad_k = fresh(k), grad_v = fresh(v),
         grad_gates = gates ? fresh(*gates) : nothing(q),
         grad_logits = logits ? fresh(*logits) : nothing(q),
         grad_initial = initial_state ? fresh(*initial_state) : nothing(q);
  const Tensor last = dense(grad_state), kept = dense(carries);
  args.grad = source(grad);
  args.grad_state = states(last, false);
  args.kept = states(kept, true);
  args.grad_q = sink(grad_q, args.n, args.h * args.dk);
  args.grad_k = sink(grad_k, args.n, args.h * args.dk);
  args.grad_v = sink(grad_v, args.n, args.h * args.dv);
  args.grad_gates =
      gates ? sink(grad_gates, args.n, args.h) : sink(grad_logits, args.n, 2 * args.h);
  if (initial_state) args.grad_initial = sink(grad_initial, 1, numbers);
  spread(FASTMIX_KERNELS(gate_loop_backward), args, units(args, b), 3 * nanoseconds(args, b));
  return {grad_q, grad_k, grad_v, grad_gates, grad_logits, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("gate_loop", TORCH_BOX(&gate_loop));
  m.impl("gate_loop_backward", TORCH_BOX(&gate_loop_backward));
}

}  // namespace fastmix

#endif
