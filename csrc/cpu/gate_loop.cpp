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

// The gates of heads h0 … of one step, real and imaginary parts apart. Returns the logits, or the
// gates if there are none, as pairs; `z` has room for those 2 · count numbers. Real gates are no
// pairs, and nothing needs what is returned for them.
template <class N, class C>
const C* gates_at(const GateLoop& args, int64_t b, int64_t t, int64_t h0, int64_t count, C* z,
                  C* re, C* im) {
  if constexpr (!kComplex<N>) {
    read_into(args.gates, b, t, h0, count, re);
    return z;
  }
  if (present(args.logits)) {
    const C* pairs = read(args.logits, b, t, 2 * h0, 2 * count, z);
    activate(pairs, re, im, count);
    return pairs;
  }
  const C* pairs = reinterpret_cast<const C*>(
      read(args.gates, b, t, h0, count, reinterpret_cast<Complex<C>*>(z)));
  for (int64_t c = 0; c < count; ++c) {
    re[c] = pairs[2 * c];
    im[c] = pairs[2 * c + 1];
  }
  return pairs;
}

inline void prefetch_gates(const GateLoop& args, int64_t b, int64_t t, int64_t h0, int64_t count) {
  if (present(args.logits)) prefetch(args.logits, b, t, 2 * h0, 2 * count);
  else prefetch(args.gates, b, t, h0, count);
}

// Writes the gradients of the gates of one step, or of their logits if those were given. `pairs`
// has room for 2 · count numbers.
template <class N, class C>
void write_grad_gates(const GateLoop& args, int64_t b, int64_t t, int64_t h0, int64_t count,
                      const C* z, const C* re, const C* im, C* pairs) {
  if constexpr (!kComplex<N>) return write(args.grad_gates, b, t, h0, count, re);
  if (present(args.logits)) {
    activate_backward(z, re, im, pairs, count);
    write(args.grad_gates, b, t, 2 * h0, 2 * count, pairs);
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    pairs[2 * c] = re[c];
    pairs[2 * c + 1] = im[c];
  }
  write(args.grad_gates, b, t, h0, count, reinterpret_cast<const Complex<C>*>(pairs));
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

// h = a h + k v
template <class N, class C>
FASTMIX_INLINE void advance(const C* gate_re, const C* gate_im, const C* k, const C* v, const C* re,
                            const C* im, C* next_re, C* next_im, int64_t count) {
  each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
    using V = decltype(zero);
    if constexpr (!kComplex<N>) {
      store(next_re + c, load<V>(gate_re + c) * load<V>(re + c) + load<V>(k + c) * load<V>(v + c));
      return;
    }
    const V x = load<V>(gate_re + c), y = load<V>(gate_im + c), r = load<V>(re + c),
            i = load<V>(im + c);
    store(next_re + c, x * r - y * i + load<V>(k + c) * load<V>(v + c));
    store(next_im + c, x * i + y * r);
  });
}

template <class N>
void diagonal_forward(const GateLoop& args, int64_t b, int64_t h0) {
  using C = Real<N>;
  const int64_t count = smaller(args.block, args.h - h0);
  Scratch scratch;
  C *z = scratch.take<C>(2 * count), *gate_re = scratch.take<C>(count),
    *gate_im = imaginary<N>(scratch, count, gate_re), *re = scratch.zeros<C>(count),
    *im = imaginary<N>(scratch, count, re), *wide_q = scratch.take<C>(count),
    *wide_k = scratch.take<C>(count), *wide_v = scratch.take<C>(count),
    *out = scratch.take<C>(count);
  N* state = scratch.take<N>(count);
  if (present(args.initial_state))
    part(read(args.initial_state, b, 0, h0, count, state), re, im, count);
  for (int64_t t = 0; t < args.n; ++t) {
    if (args.carry_every && t % args.carry_every == 0) {
      join(re, im, state, count);
      write(args.carries, b, t / args.carry_every, h0, count, state);
    }
    if (t + kAhead < args.n) {
      prefetch_gates(args, b, t + kAhead, h0, count);
      prefetch(args.q, b, t + kAhead, h0, count);
      prefetch(args.k, b, t + kAhead, h0, count);
      prefetch(args.v, b, t + kAhead, h0, count);
    }
    gates_at<N>(args, b, t, h0, count, z, gate_re, gate_im);
    const C *q = read(args.q, b, t, h0, count, wide_q), *k = read(args.k, b, t, h0, count, wide_k),
            *v = read(args.v, b, t, h0, count, wide_v);
    advance<N>(gate_re, gate_im, k, v, re, im, re, im, count);
    each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
      using V = decltype(zero);
      store(out + c, load<V>(q + c) * load<V>(re + c));
    });
    write(args.out, b, t, h0, count, out);
  }
  join(re, im, state, count);
  if (args.carry_every) write(args.carries, b, args.carries.n_size - 1, h0, count, state);
  write(args.state, b, 0, h0, count, state);
  streamed();
}

// With g_t = q_t grad_t + conj(a_{t+1}) g_{t+1}: grad_q = grad · Re h, grad_k = Re g · v,
// grad_v = Re g · k and da_t = g_t conj(h_{t-1}). States come again from every carry.
template <class N>
void diagonal_backward(const GateLoop& args, int64_t b, int64_t h0) {
  using C = Real<N>;
  const int64_t count = smaller(args.block, args.h - h0), every = args.carry_every;
  Scratch scratch;
  C *z = scratch.take<C>(2 * count), *pairs = scratch.take<C>(2 * count),
    *wide_q = scratch.take<C>(count), *wide_k = scratch.take<C>(count),
    *wide_v = scratch.take<C>(count), *wide_grad = scratch.take<C>(count),
    *grad_q = scratch.take<C>(count), *grad_k = scratch.take<C>(count),
    *grad_v = scratch.take<C>(count), *grad_gate_re = scratch.take<C>(count),
    *grad_gate_im = imaginary<N>(scratch, count, grad_gate_re),
    *adjoint_re = scratch.take<C>(count),
    *adjoint_im = imaginary<N>(scratch, count, adjoint_re);  // conj(a_{t+1}) g_{t+1}
  // Of a chunk: the gates of its steps, and the states before each step and after the last.
  C *gate_re = scratch.take<C>(every * count),
    *gate_im = imaginary<N>(scratch, every * count, gate_re),
    *re = scratch.take<C>((every + 1) * count),
    *im = imaginary<N>(scratch, (every + 1) * count, re);
  N* state = scratch.take<N>(count);
  part(read(args.grad_state, b, 0, h0, count, state), adjoint_re, adjoint_im, count);
  for (int64_t start = (args.n - 1) / every * every; start >= 0; start -= every) {
    const int64_t end = smaller(start + every, args.n);
    part(read(args.kept, b, start / every, h0, count, state), re, im, count);
    for (int64_t t = start, at = 0; t < end; ++t, at += count) {
      gates_at<N>(args, b, t, h0, count, z, gate_re + at, gate_im + at);
      advance<N>(gate_re + at, gate_im + at, read(args.k, b, t, h0, count, wide_k),
                 read(args.v, b, t, h0, count, wide_v), re + at, im + at, re + at + count,
                 im + at + count, count);
    }
    for (int64_t t = end - 1; t >= start; --t) {
      const int64_t at = (t - start) * count;
      const C *q = read(args.q, b, t, h0, count, wide_q),
              *k = read(args.k, b, t, h0, count, wide_k),
              *v = read(args.v, b, t, h0, count, wide_v),
              *grad = read(args.grad, b, t, h0, count, wide_grad);
      if (t >= every) {  // the same step of the next chunk
        prefetch_gates(args, b, t - every, h0, count);
        prefetch(args.q, b, t - every, h0, count);
        prefetch(args.k, b, t - every, h0, count);
        prefetch(args.v, b, t - every, h0, count);
        prefetch(args.grad, b, t - every, h0, count);
      }
      each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
        using V = decltype(zero);
        const V dy = load<V>(grad + c), x = load<V>(gate_re + at + c),
                before_re = load<V>(re + at + c), r = load<V>(q + c) * dy + load<V>(adjoint_re + c);
        store(grad_q + c, dy * load<V>(re + at + count + c));
        store(grad_k + c, r * load<V>(v + c));
        store(grad_v + c, r * load<V>(k + c));
        if constexpr (!kComplex<N>) {
          store(grad_gate_re + c, r * before_re);
          store(adjoint_re + c, x * r);
          return;
        }
        const V y = load<V>(gate_im + at + c), before_im = load<V>(im + at + c),
                i = load<V>(adjoint_im + c);
        store(grad_gate_re + c, r * before_re + i * before_im);
        store(grad_gate_im + c, i * before_re - r * before_im);
        store(adjoint_re + c, x * r + y * i);
        store(adjoint_im + c, x * i - y * r);
      });
      write(args.grad_q, b, t, h0, count, grad_q);
      write(args.grad_k, b, t, h0, count, grad_k);
      write(args.grad_v, b, t, h0, count, grad_v);
      const C* logits = present(args.logits) ? read(args.logits, b, t, 2 * h0, 2 * count, z) : z;
      write_grad_gates<N>(args, b, t, h0, count, logits, grad_gate_re, grad_gate_im, pairs);
    }
  }
  if (args.grad_initial.data) {
    join(adjoint_re, adjoint_im, state, count);
    write(args.grad_initial, b, 0, h0, count, state);
  }
  streamed();
}

// ---- larger heads

// The largest power of two that is no larger than x, kept where its inverse is a normal number.
FASTMIX_INLINE float power_of_two(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits &= 0x7f800000;
  memcpy(&x, &bits, 4);
  return x < 0x1p-126f ? 0x1p-126f : x > 0x1p126f ? 0x1p126f : x;
}
FASTMIX_INLINE double power_of_two(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  bits &= 0x7ff0000000000000;
  memcpy(&x, &bits, 8);
  return x < 0x1p-1022 ? 0x1p-1022 : x > 0x1p1022 ? 0x1p1022 : x;
}

template <class C>
void scale_row(int64_t count, C scale, C* row) {
  for (int64_t c = 0; c < count; ++c) row[c] *= scale;
}

template <class C>
bool finite(const C* row, int64_t count) {
  return sum_over<C>(count, [&](int64_t c) FASTMIX_LAMBDA { return row[c] * 0; }) == 0;
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
    // Products within a chunk grow with its length; those with a real state are half as many.
    length = args.dk <= 16 && args.dv <= 16 ? 16 : kComplex<N> ? 64 : 32;
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
    for (int64_t s = 0; s < steps; ++s) {
      C pair[2];
      const C* source = gates_at<N>(args, b, t0 + s, head, 1, pair, gate_re + s, gate_im + s);
      if constexpr (kComplex<N>) {
        logits[2 * s] = source[0];
        logits[2 * s + 1] = source[1];
      }
    }
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

  // to (steps, steps) = scores ∘ Re W, a lower triangle
  void weigh(const C* scores, C* to) {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t r = 0; r <= s; ++r)
        to[s * steps_padded + r] = scores[s * steps_padded + r] * weight_re[s * steps_padded + r];
  }

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
    copy_state(state_re, state_im, entry_re, entry_im);
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
    const C x = gate_re[s], y = gate_im[s];
    for (int64_t i = 0; i < args.dk; ++i) {
      const C key = k[s * dk_padded + i], *value = v + s * dv_padded;
      C *re = state_re + i * dv_padded, *im = state_im + i * dv_padded;
      for (int64_t c = 0; c < args.dv; ++c) {
        const C before = re[c];
        if constexpr (kComplex<N>) {
          re[c] = x * before - y * im[c] + key * value[c];
          im[c] = x * im[c] + y * before;
        } else {
          re[c] = x * before + key * value[c];
        }
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

  // S = P_last S + Σ_r W[last, r] k_r v_rᵀ
  void advance_state() {
    const int64_t last = steps - 1;
    const C re = prefix_re[last], im = prefix_im[last];
    each_vector<C>(args.dk * dv_padded, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
      using V = decltype(zero);
      const V r = load<V>(state_re + c);
      if constexpr (kComplex<N>) {
        const V i = load<V>(state_im + c);
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

template <class N>
void heads_forward(const GateLoop& args, int64_t b, int64_t head) {
  using C = Real<N>;
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
    gemm<C>(chunk.steps, chunk.steps_padded, args.dk, {chunk.q, chunk.dk_padded, 1},
            {chunk.k_turned, chunk.steps_padded}, {scores, chunk.steps_padded}, false, kFull);
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
  C *states_re = nullptr, *states_im = nullptr;  // before and after every step, where needed
  C *grad, *v_turned;                            // (steps, dv), (dv, steps)
  C *scores, *grad_scores;                       // q kᵀ and grad vᵀ, (steps, steps)
  C* weighed;                                    // either of them ∘ Re W
  C *grad_weight_re, *grad_weight_im;            // (steps, steps)
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
    gemm<C>(steps, steps_padded, args.dk, {chunk.q, dk_padded, 1}, {chunk.k_turned, steps_padded},
            {scores, steps_padded}, false, kFull);
    gemm<C>(steps, steps_padded, args.dv, {grad, dv_padded, 1}, {v_turned, steps_padded},
            {grad_scores, steps_padded}, false, kFull);
    chunk.weigh(grad_scores, weighed);
    gemm<C>(steps, dk_padded, steps, {weighed, steps_padded, 1}, {chunk.k, dk_padded},
            {grad_q, dk_padded}, false, kLower);
    gemm<C>(steps, dk_padded, steps, {weighed, 1, steps_padded}, {chunk.q, dk_padded},
            {grad_k, dk_padded}, false, kUpper);
    chunk.weigh(scores, weighed);
    gemm<C>(steps, dv_padded, steps, {weighed, 1, steps_padded}, {grad, dv_padded},
            {grad_v, dv_padded}, false, kUpper);
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t r = 0; r <= s; ++r) {
        const int64_t at = s * steps_padded + r;
        grad_weight_re[at] = scores[at] * grad_scores[at];
        if constexpr (kComplex<N>) grad_weight_im[at] = 0;
      }
  }

  // What the outputs have from the chunk's entry S: adds to grad_q, starts the gradient of P. With
  // x = grad Re Sᵀ, y = grad Im Sᵀ.
  void from_entry(const C* state_re, const C* state_im) {
    const int64_t steps = chunk.steps;
    times_transpose(grad, state_re, turned_re, chunk.x);
    if constexpr (kComplex<N>) times_transpose(grad, state_im, turned_im, chunk.y);
    for (int64_t s = 0; s < steps; ++s) {
      const C *q = chunk.q + s * dk_padded, *x = chunk.x + s * dk_padded,
              *y = chunk.y + s * dk_padded;
      C* to = grad_q + s * dk_padded;
      if constexpr (kComplex<N>) {
        for (int64_t j = 0; j < args.dk; ++j)
          to[j] += chunk.prefix_re[s] * x[j] - chunk.prefix_im[s] * y[j];
      } else {
        for (int64_t j = 0; j < args.dk; ++j) to[j] += chunk.prefix_re[s] * x[j];
      }
      grad_prefix_re[s] =
          sum_over<C>(args.dk, [&](int64_t j) FASTMIX_LAMBDA { return q[j] * x[j]; });
      if constexpr (kComplex<N>)
        grad_prefix_im[s] =
            -sum_over<C>(args.dk, [&](int64_t j) FASTMIX_LAMBDA { return q[j] * y[j]; });
    }
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
      const C *k = chunk.k + r * dk_padded, *x = chunk.x + r * dk_padded,
              *y = chunk.y + r * dk_padded;
      C* to = grad_k + r * dk_padded;
      if constexpr (kComplex<N>) {
        for (int64_t j = 0; j < args.dk; ++j) to[j] += last_re[r] * x[j] + last_im[r] * y[j];
      } else {
        for (int64_t j = 0; j < args.dk; ++j) to[j] += last_re[r] * x[j];
      }
      grad_weight_re[last * steps_padded + r] +=
          sum_over<C>(args.dk, [&](int64_t j) FASTMIX_LAMBDA { return k[j] * x[j]; });
      if constexpr (kComplex<N>)
        grad_weight_im[last * steps_padded + r] +=
            sum_over<C>(args.dk, [&](int64_t j) FASTMIX_LAMBDA { return k[j] * y[j]; });
    }
    add_adjoint(last_re, adjoint_re);
    if constexpr (kComplex<N>) add_adjoint(last_im, adjoint_im);
  }

  // grad_v (steps, dv) += weight[r] k_r · adjoint
  void add_adjoint(const C* weight, const C* adjoint) {
    chunk.scale_rows(dk_padded, chunk.k, weight, C(1), chunk.x);
    gemm<C>(chunk.steps, dv_padded, args.dk, {chunk.x, dk_padded, 1}, {adjoint, dv_padded},
            {grad_v, dv_padded}, true, kFull);
  }

  // P_last carried the entry S across: its gradient gains Σ G conj(S). Then G steps back before the
  // chunk.
  void advance_adjoint(const C* state_re, const C* state_im) {
    const int64_t last = chunk.steps - 1;
    const C re = chunk.prefix_re[last], im = chunk.prefix_im[last];
    for (int64_t at = 0; at < state_size; at += dv_padded) {
      C *r = adjoint_re + at, *m = adjoint_im + at;
      const C *x = state_re + at, *y = state_im + at;
      if constexpr (!kComplex<N>) {
        grad_prefix_re[last] +=
            sum_over<C>(args.dv, [&](int64_t j) FASTMIX_LAMBDA { return r[j] * x[j]; });
        scale_row(args.dv, re, r);
        continue;
      }
      grad_prefix_re[last] +=
          sum_over<C>(args.dv, [&](int64_t j) FASTMIX_LAMBDA { return r[j] * x[j] + m[j] * y[j]; });
      grad_prefix_im[last] +=
          sum_over<C>(args.dv, [&](int64_t j) FASTMIX_LAMBDA { return m[j] * x[j] - r[j] * y[j]; });
      for (int64_t j = 0; j < args.dv; ++j) {
        const C before = r[j];
        r[j] = re * before + im * m[j];
        m[j] = re * m[j] - im * before;
      }
    }
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
    memset(row_re, 0, steps_padded * sizeof(C));
    if constexpr (!kComplex<N>) return real_gate_gradients();
    memset(row_im, 0, steps_padded * sizeof(C));
    C column_re = 0, column_im = 0;
    for (int64_t s = chunk.steps - 1; s >= 0; --s) {
      column_re += grad_prefix_re[s];
      column_im += grad_prefix_im[s];
      for (int64_t r = 0; r <= s; ++r) {
        row_re[r] += grad_weight_re[s * steps_padded + r];
        row_im[r] += grad_weight_im[s * steps_padded + r];
      }
      C sum_re, sum_im;
      if (s == 0) {
        sum_re = column_re;
        sum_im = column_im;
      } else {
        const C p = chunk.prefix_re[s - 1], m = chunk.prefix_im[s - 1];
        sum_re = column_re * p + column_im * m;
        sum_im = column_im * p - column_re * m;
        const C *before_re = chunk.weight_re + (s - 1) * steps_padded,
                *before_im = chunk.weight_im + (s - 1) * steps_padded;
        sum_re += sum_over<C>(s, [&](int64_t r) FASTMIX_LAMBDA {
          return row_re[r] * before_re[r] + row_im[r] * before_im[r];
        });
        sum_im += sum_over<C>(s, [&](int64_t r) FASTMIX_LAMBDA {
          return row_im[r] * before_re[r] - row_re[r] * before_im[r];
        });
      }
      grad_gate_re[s] = sum_re;
      grad_gate_im[s] = sum_im;
      const C x = chunk.gate_re[s], y = chunk.gate_im[s];
      const C turned = x * column_im - y * column_re;
      column_re = x * column_re + y * column_im;
      column_im = turned;
      for (int64_t r = 0; r <= s; ++r) {
        const C r_re = row_re[r], r_im = row_im[r];
        row_re[r] = x * r_re + y * r_im;
        row_im[r] = x * r_im - y * r_re;
      }
    }
  }

  void real_gate_gradients() {
    C column = 0;
    for (int64_t s = chunk.steps - 1; s >= 0; --s) {
      column += grad_prefix_re[s];
      for (int64_t r = 0; r <= s; ++r) row_re[r] += grad_weight_re[s * steps_padded + r];
      C sum = column;
      if (s > 0) {
        const C* before = chunk.weight_re + (s - 1) * steps_padded;
        sum = column * chunk.prefix_re[s - 1];
        sum += sum_over<C>(s, [&](int64_t r) FASTMIX_LAMBDA { return row_re[r] * before[r]; });
      }
      grad_gate_re[s] = sum;
      const C x = chunk.gate_re[s];
      column *= x;
      scale_row(s + 1, x, row_re);
    }
  }

  bool finite_gradients() const {
    const int64_t steps = chunk.steps;
    return finite(grad_q, steps * dk_padded) && finite(grad_k, steps * dk_padded) &&
           finite(grad_v, steps * dv_padded) && finite(grad_gate_re, steps) &&
           finite(grad_gate_im, steps) && finite(adjoint_re, state_size) &&
           finite(adjoint_im, state_size);
  }

  // All gradients of the chunk at t0, of the states and adjoints of every step.
  void step_through(int64_t t0, const C* state_re, const C* state_im) {
    if (states_re == nullptr) {
      states_re = scratch.zeros<C>((chunk.length + 1) * state_size);
      states_im = imaginary<N>(scratch, (chunk.length + 1) * state_size, states_re);
    }
    chunk.copy_state(state_re, state_im, chunk.entry_re, chunk.entry_im);
    chunk.start_again(t0);
    chunk.copy_state(state_re, state_im, states_re, states_im);
    for (int64_t s = 0; s < chunk.steps; ++s) {
      chunk.step(s);
      const int64_t at = (s + 1) * state_size;
      chunk.copy_state(chunk.state_re, chunk.state_im, states_re + at, states_im + at);
    }
    chunk.copy_state(exit_re, exit_im, adjoint_re, adjoint_im);
    for (int64_t s = chunk.steps - 1; s >= 0; --s) step_back(s);
  }

  // G_s = q_s grad_sᵀ + conj(a_{s+1}) G_{s+1}, the second of which is in `adjoint`: dq = Re S grad,
  // dk = Re G v, dv = k Re G, da = Σ G conj(S_{s-1}). Then the adjoint becomes conj(a_s) G_s.
  void step_back(int64_t s) {
    const C a_re = chunk.gate_re[s], a_im = chunk.gate_im[s];
    const C *dy = grad + s * dv_padded, *v = chunk.v + s * dv_padded;
    C* dv = grad_v + s * dv_padded;
    memset(dv, 0, dv_padded * sizeof(C));
    double sum_re = 0, sum_im = 0;
    for (int64_t i = 0; i < args.dk; ++i) {
      const C q = chunk.q[s * dk_padded + i], k = chunk.k[s * dk_padded + i];
      const C *x = states_re + s * state_size + i * dv_padded, *after = x + state_size,
              *y = states_im + s * state_size + i * dv_padded;
      C *re = adjoint_re + i * dv_padded, *im = adjoint_im + i * dv_padded;
      C dq = 0, dk = 0;
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
    }
    grad_gate_re[s] = sum_re;
    if constexpr (kComplex<N>) grad_gate_im[s] = sum_im;
  }

  void write_gradients(int64_t t0) {
    chunk.write_rows(args.grad_q, t0, args.dk, grad_q, dk_padded);
    chunk.write_rows(args.grad_k, t0, args.dk, grad_k, dk_padded);
    chunk.write_rows(args.grad_v, t0, args.dv, grad_v, dv_padded);
    for (int64_t s = 0; s < chunk.steps; ++s) {
      C pair[2];
      write_grad_gates<N>(args, chunk.b, t0 + s, chunk.head, 1, chunk.logits + 2 * s,
                          grad_gate_re + s, grad_gate_im + s, pair);
    }
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

template <class N>
void forward(const GateLoop& args, int64_t b, int64_t h0) {
  args.dk == 1 && args.dv == 1 ? diagonal_forward<N>(args, b, h0) : heads_forward<N>(args, b, h0);
}

template <class N>
void backward(const GateLoop& args, int64_t b, int64_t h0) {
  args.dk == 1 && args.dv == 1 ? diagonal_backward<N>(args, b, h0) : heads_backward<N>(args, b, h0);
}

// Calls work(number, b, h0) for each unit of work, with a zero of what gates and states are.
template <class F>
void each_unit(const GateLoop& args, int64_t begin, int64_t end, F work) {
  const int64_t blocks = (args.h + args.block - 1) / args.block;
  const bool is_double = args.q.type == Type::f64;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, h0 = unit % blocks * args.block;
    if (args.real) is_double ? work(double{}, b, h0) : work(float{}, b, h0);
    else is_double ? work(Complex<double>{}, b, h0) : work(Complex<float>{}, b, h0);
  }
}

}  // namespace

void gate_loop_forward(const GateLoop& args, int64_t begin, int64_t end) {
  each_unit(args, begin, end,
            [&](auto number, int64_t b, int64_t h0) { forward<decltype(number)>(args, b, h0); });
}

void gate_loop_backward(const GateLoop& args, int64_t begin, int64_t end) {
  each_unit(args, begin, end,
            [&](auto number, int64_t b, int64_t h0) { backward<decltype(number)>(args, b, h0); });
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
  GateLoop args = arguments(q, k, v, gates, logits, carry_every);
  const int64_t numbers = args.h * args.dk * args.dv;
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
  spread(FASTMIX_KERNELS(gate_loop_backward), args, units(args, q.size(0)),
         3 * nanoseconds(args, q.size(0)));
  return {grad_q, grad_k, grad_v, grad_gates, grad_logits, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("gate_loop", TORCH_BOX(&gate_loop));
  m.impl("gate_loop_backward", TORCH_BOX(&gate_loop_backward));
}

}  // namespace fastmix

#endif
