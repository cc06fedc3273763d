// S_t = a_t S_{t-1} + k_t v_tᵀ, out_t = q_t · Re S_t.
//
// Head dimension 1: channels in SIMD lanes, a unit of work is a block of channels of one
// batch entry. Larger heads: chunks of matrix products, a unit is one head. Within a chunk
// the step from r to s weighs Re W[s, r] = Re Π_{r<i≤s} a_i; the state S before the chunk
// enters step s through P_s = Π_{i≤s} a_i, as Re(P_s S), and step r enters the state after
// the chunk through W[last, r]. Products are formed step by step, so a gate of 0 is exact.

#include "rows.h"

namespace fastmix {

struct GateLoop {
  int64_t n, h, dk, dv, block, carry_every;
  Source q, k, v, gates, logits, initial_state;  // of gates and logits, one
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

// The gates of heads h0 … of one step, real and imaginary parts apart. `z` is room for
// 2 · count numbers, and what is returned: the logits, or the gates themselves.
template <class C>
const C* gates_at(const GateLoop& f, int64_t b, int64_t t, int64_t h0, int64_t count, C* z,
                  C* re, C* im) {
  if (present(f.logits)) {
    const C* pairs = read(f.logits, b, t, 2 * h0, 2 * count, z);
    activate(pairs, re, im, count);
    return pairs;
  }
  const C* pairs = reinterpret_cast<const C*>(
      read(f.gates, b, t, h0, count, reinterpret_cast<Complex<C>*>(z)));
  for (int64_t c = 0; c < count; ++c) {
    re[c] = pairs[2 * c];
    im[c] = pairs[2 * c + 1];
  }
  return pairs;
}

inline void prefetch_gates(const GateLoop& f, int64_t b, int64_t t, int64_t h0, int64_t count) {
  if (present(f.logits))
    prefetch(f.logits, b, t, 2 * h0, 2 * count);
  else
    prefetch(f.gates, b, t, h0, count);
}

// Gradients of the gates of one step, handed on to the logits if those were given. `pairs`
// is room for 2 · count numbers.
template <class C>
void write_grad_gates(const GateLoop& f, int64_t b, int64_t t, int64_t h0, int64_t count,
                      const C* z, const C* re, const C* im, C* pairs) {
  if (present(f.logits)) {
    activate_backward(z, re, im, pairs, count);
    write(f.grad_gates, b, t, 2 * h0, 2 * count, pairs);
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    pairs[2 * c] = re[c];
    pairs[2 * c + 1] = im[c];
  }
  write(f.grad_gates, b, t, h0, count, reinterpret_cast<const Complex<C>*>(pairs));
}

template <class C>
void join(const C* re, const C* im, Complex<C>* to, int64_t count) {
  for (int64_t c = 0; c < count; ++c) to[c] = {re[c], im[c]};
}

template <class C>
void part(const Complex<C>* from, C* re, C* im, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    re[c] = from[c].re;
    im[c] = from[c].im;
  }
}

// ---- head dimension 1

// h = a h + k v
template <class C>
INLINE void advance(const C* a_re, const C* a_im, const C* k, const C* v, const C* re,
                    const C* im, C* next_re, C* next_im, int64_t count) {
  each_vector<C>(count, [&](auto zero, int64_t c) LAMBDA {
    using V = decltype(zero);
    const V x = load<V>(a_re + c), y = load<V>(a_im + c), r = load<V>(re + c),
            i = load<V>(im + c);
    store(next_re + c, x * r - y * i + load<V>(k + c) * load<V>(v + c));
    store(next_im + c, x * i + y * r);
  });
}

template <class C>
void diagonal_forward(const GateLoop& f, int64_t b, int64_t h0) {
  const int64_t count = smaller(f.block, f.h - h0);
  Scratch scratch;
  C *z = scratch.take<C>(2 * count), *a_re = scratch.take<C>(count),
    *a_im = scratch.take<C>(count), *re = scratch.take<C>(count), *im = scratch.take<C>(count),
    *wide_q = scratch.take<C>(count), *wide_k = scratch.take<C>(count),
    *wide_v = scratch.take<C>(count), *out = scratch.take<C>(count);
  Complex<C>* state = scratch.take<Complex<C>>(count);
  memset(re, 0, count * sizeof(C));
  memset(im, 0, count * sizeof(C));
  if (present(f.initial_state)) part(read(f.initial_state, b, 0, h0, count, state), re, im, count);
  for (int64_t t = 0; t < f.n; ++t) {
    if (f.carry_every && t % f.carry_every == 0) {
      join(re, im, state, count);
      write(f.carries, b, t / f.carry_every, h0, count, state);
    }
    if (t + kAhead < f.n) {
      prefetch_gates(f, b, t + kAhead, h0, count);
      prefetch(f.q, b, t + kAhead, h0, count);
      prefetch(f.k, b, t + kAhead, h0, count);
      prefetch(f.v, b, t + kAhead, h0, count);
    }
    gates_at(f, b, t, h0, count, z, a_re, a_im);
    const C *q = read(f.q, b, t, h0, count, wide_q), *k = read(f.k, b, t, h0, count, wide_k),
            *v = read(f.v, b, t, h0, count, wide_v);
    advance(a_re, a_im, k, v, re, im, re, im, count);
    each_vector<C>(count, [&](auto zero, int64_t c) LAMBDA {
      using V = decltype(zero);
      store(out + c, load<V>(q + c) * load<V>(re + c));
    });
    write(f.out, b, t, h0, count, out);
  }
  join(re, im, state, count);
  if (f.carry_every) write(f.carries, b, f.carries.n_size - 1, h0, count, state);
  write(f.state, b, 0, h0, count, state);
  streamed();
}

// With g_t = q_t grad_t + conj(a_{t+1}) g_{t+1}: dq = grad · Re h, dk = Re g · v,
// dv = Re g · k and da_t = g_t conj(h_{t-1}). States come again from every carry.
template <class C>
void diagonal_backward(const GateLoop& f, int64_t b, int64_t h0) {
  const int64_t count = smaller(f.block, f.h - h0), every = f.carry_every;
  Scratch scratch;
  C *z = scratch.take<C>(2 * count), *pairs = scratch.take<C>(2 * count),
    *wide_q = scratch.take<C>(count), *wide_k = scratch.take<C>(count),
    *wide_v = scratch.take<C>(count), *wide_grad = scratch.take<C>(count),
    *dq = scratch.take<C>(count), *dk = scratch.take<C>(count), *dv = scratch.take<C>(count),
    *da_re = scratch.take<C>(count), *da_im = scratch.take<C>(count),
    *g_re = scratch.take<C>(count), *g_im = scratch.take<C>(count);  // conj(a_{t+1}) g_{t+1}
  // Of a chunk: the gates of its steps, and the states before each step and after the last.
  C *a_re = scratch.take<C>(every * count), *a_im = scratch.take<C>(every * count),
    *re = scratch.take<C>((every + 1) * count), *im = scratch.take<C>((every + 1) * count);
  Complex<C>* state = scratch.take<Complex<C>>(count);
  part(read(f.grad_state, b, 0, h0, count, state), g_re, g_im, count);
  for (int64_t start = (f.n - 1) / every * every; start >= 0; start -= every) {
    const int64_t end = smaller(start + every, f.n);
    part(read(f.kept, b, start / every, h0, count, state), re, im, count);
    for (int64_t t = start, at = 0; t < end; ++t, at += count) {
      gates_at(f, b, t, h0, count, z, a_re + at, a_im + at);
      advance(a_re + at, a_im + at, read(f.k, b, t, h0, count, wide_k),
              read(f.v, b, t, h0, count, wide_v), re + at, im + at, re + at + count,
              im + at + count, count);
    }
    for (int64_t t = end - 1; t >= start; --t) {
      const int64_t at = (t - start) * count;
      const C *q = read(f.q, b, t, h0, count, wide_q), *k = read(f.k, b, t, h0, count, wide_k),
              *v = read(f.v, b, t, h0, count, wide_v),
              *grad = read(f.grad, b, t, h0, count, wide_grad);
      if (t >= every) {  // the same step of the next chunk
        prefetch_gates(f, b, t - every, h0, count);
        prefetch(f.q, b, t - every, h0, count);
        prefetch(f.k, b, t - every, h0, count);
        prefetch(f.v, b, t - every, h0, count);
        prefetch(f.grad, b, t - every, h0, count);
      }
      each_vector<C>(count, [&](auto zero, int64_t c) LAMBDA {
        using V = decltype(zero);
        const V dy = load<V>(grad + c), x = load<V>(a_re + at + c), y = load<V>(a_im + at + c),
                before_re = load<V>(re + at + c), before_im = load<V>(im + at + c),
                r = load<V>(q + c) * dy + load<V>(g_re + c), i = load<V>(g_im + c);
        store(dq + c, dy * load<V>(re + at + count + c));
        store(dk + c, r * load<V>(v + c));
        store(dv + c, r * load<V>(k + c));
        store(da_re + c, r * before_re + i * before_im);
        store(da_im + c, i * before_re - r * before_im);
        store(g_re + c, x * r + y * i);
        store(g_im + c, x * i - y * r);
      });
      write(f.grad_q, b, t, h0, count, dq);
      write(f.grad_k, b, t, h0, count, dk);
      write(f.grad_v, b, t, h0, count, dv);
      const C* logits = present(f.logits) ? read(f.logits, b, t, 2 * h0, 2 * count, z) : z;
      write_grad_gates(f, b, t, h0, count, logits, da_re, da_im, pairs);
    }
  }
  if (f.grad_initial.data) {
    join(g_re, g_im, state, count);
    write(f.grad_initial, b, 0, h0, count, state);
  }
  streamed();
}

// ---- larger heads

// One head: its chunk of `steps` rows in matrices whose rows are whole vectors.
template <class C>
struct Head {
  const GateLoop& f;
  int64_t b, head, length;     // of a full chunk
  int64_t ahead;               // from a chunk to the one that comes next, in steps
  int64_t steps_, dk_, dv_;    // row lengths
  int64_t steps = 0;
  C *q, *k, *v, *kt;           // (steps, dk), …, (dk, steps)
  C *w_re, *w_im, *p_re, *p_im;  // (steps, steps), (steps)
  C *a_re, *a_im, *z;
  C *state_re, *state_im;      // (dk, dv)
  C *x, *y;                    // (steps, larger of dk and dv)
  Complex<C>* numbers;

  Head(const GateLoop& f, int64_t b, int64_t head, Scratch& scratch) : f(f), b(b), head(head) {
    length = f.dk <= 16 && f.dv <= 16 ? 16 : 64;
    ahead = length;
    steps_ = padded<C>(length);
    dk_ = padded<C>(f.dk);
    dv_ = padded<C>(f.dv);
    q = zeros(scratch, length * dk_);
    k = zeros(scratch, length * dk_);
    v = zeros(scratch, length * dv_);
    kt = zeros(scratch, f.dk * steps_);
    w_re = zeros(scratch, length * steps_);
    w_im = zeros(scratch, length * steps_);
    p_re = zeros(scratch, length);
    p_im = zeros(scratch, length);
    a_re = zeros(scratch, length);
    a_im = zeros(scratch, length);
    z = zeros(scratch, 2 * length);
    state_re = zeros(scratch, f.dk * dv_);
    state_im = zeros(scratch, f.dk * dv_);
    x = zeros(scratch, length * larger(dk_, dv_));
    y = zeros(scratch, length * larger(dk_, dv_));
    numbers = scratch.take<Complex<C>>(f.dk * f.dv);
  }

  static C* zeros(Scratch& scratch, int64_t count) {
    C* found = scratch.take<C>(count);
    memset(found, 0, count * sizeof(C));
    return found;
  }

  void rows(const Source& s, int64_t t0, int64_t d, C* to, int64_t row) {
    for (int64_t i = 0; i < steps; ++i, to += row) {
      read_into(s, b, t0 + i, head * d, d, to);
      const int64_t next = t0 + ahead + i;
      if (next >= 0 && next < f.n) prefetch(s, b, next, head * d, d);
    }
  }

  void write_rows(const Sink& s, int64_t t0, int64_t d, const C* from, int64_t row) {
    for (int64_t i = 0; i < steps; ++i) write(s, b, t0 + i, head * d, d, from + i * row);
  }

  void read_state(const Source& s, int64_t t, C* re, C* im) {
    const Complex<C>* from = read(s, b, t, head * f.dk * f.dv, f.dk * f.dv, numbers);
    for (int64_t i = 0; i < f.dk; ++i) part(from + i * f.dv, re + i * dv_, im + i * dv_, f.dv);
  }

  void write_state(const Sink& s, int64_t t, const C* re, const C* im) {
    for (int64_t i = 0; i < f.dk; ++i) join(re + i * dv_, im + i * dv_, numbers + i * f.dv, f.dv);
    write(s, b, t, head * f.dk * f.dv, f.dk * f.dv, numbers);
  }

  // Keys, values and gates of the chunk at t0, and their weights.
  void load_chunk(int64_t t0) {
    steps = smaller(length, f.n - t0);
    rows(f.k, t0, f.dk, k, dk_);
    rows(f.v, t0, f.dv, v, dv_);
    for (int64_t s = 0; s < steps; ++s) {
      C pair[2];
      const C* found = gates_at(f, b, t0 + s, head, 1, pair, a_re + s, a_im + s);
      z[2 * s] = found[0];
      z[2 * s + 1] = found[1];
    }
    for (int64_t s = 0; s < steps; ++s) {
      C *re = w_re + s * steps_, *im = w_im + s * steps_;
      const C x = a_re[s], y = a_im[s];
      if (s == 0) {
        p_re[0] = x;
        p_im[0] = y;
      } else {
        p_re[s] = x * p_re[s - 1] - y * p_im[s - 1];
        p_im[s] = x * p_im[s - 1] + y * p_re[s - 1];
        each_vector<C>(s, [&](auto zero, int64_t r) LAMBDA {
          using V = decltype(zero);
          const V before_re = load<V>(re - steps_ + r), before_im = load<V>(im - steps_ + r);
          store(re + r, x * before_re - y * before_im);
          store(im + r, x * before_im + y * before_re);
        });
      }
      re[s] = 1;
      im[s] = 0;
    }
  }

  void load_queries(int64_t t0) {
    rows(f.q, t0, f.dk, q, dk_);
    transpose(steps, f.dk, k, dk_, kt, steps_);
  }

  // to[s] = scale_s · from[s]
  void scale_rows(int64_t d, const C* from, const C* scale, int64_t stride, C sign, C* to) {
    for (int64_t s = 0; s < steps; ++s) {
      const C by = sign * scale[s * stride];
      each_vector<C>(d, [&](auto zero, int64_t c) LAMBDA {
        store(to + s * d + c, by * load<decltype(zero)>(from + s * d + c));
      });
    }
  }

  // to (steps, steps) = scores ∘ Re W, a lower triangle
  void weigh(const C* scores, C* to) {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t r = 0; r <= s; ++r)
        to[s * steps_ + r] = scores[s * steps_ + r] * w_re[s * steps_ + r];
  }

  // S = P_last S + Σ_r W[last, r] k_r v_rᵀ
  void advance_state() {
    const int64_t last = steps - 1;
    const C re = p_re[last], im = p_im[last];
    each_vector<C>(f.dk * dv_, [&](auto zero, int64_t c) LAMBDA {
      using V = decltype(zero);
      const V r = load<V>(state_re + c), i = load<V>(state_im + c);
      store(state_re + c, re * r - im * i);
      store(state_im + c, re * i + im * r);
    });
    scale_rows(dk_, k, w_re + last * steps_, 1, C(1), x);
    gemm<C>(f.dk, dv_, steps, {x, 1, dk_}, {v, dv_}, {state_re, dv_}, true, kFull);
    scale_rows(dk_, k, w_im + last * steps_, 1, C(1), x);
    gemm<C>(f.dk, dv_, steps, {x, 1, dk_}, {v, dv_}, {state_im, dv_}, true, kFull);
  }
};

template <class C>
void heads_forward(const GateLoop& f, int64_t b, int64_t head) {
  Scratch scratch;
  Head<C> c(f, b, head, scratch);
  C *scores = Head<C>::zeros(scratch, c.length * c.steps_),
    *out = Head<C>::zeros(scratch, c.length * c.dv_);
  if (present(f.initial_state)) c.read_state(f.initial_state, 0, c.state_re, c.state_im);
  for (int64_t t0 = 0; t0 < f.n; t0 += c.length) {
    if (f.carry_every && t0 % f.carry_every == 0)
      c.write_state(f.carries, t0 / f.carry_every, c.state_re, c.state_im);
    c.load_chunk(t0);
    c.load_queries(t0);
    gemm<C>(c.steps, c.steps_, f.dk, {c.q, c.dk_, 1}, {c.kt, c.steps_}, {scores, c.steps_},
            false, kFull);
    c.weigh(scores, scores);
    gemm<C>(c.steps, c.dv_, c.steps, {scores, c.steps_, 1}, {c.v, c.dv_}, {out, c.dv_}, false,
            kLower);
    c.scale_rows(c.dk_, c.q, c.p_re, 1, C(1), c.x);
    gemm<C>(c.steps, c.dv_, f.dk, {c.x, c.dk_, 1}, {c.state_re, c.dv_}, {out, c.dv_}, true,
            kFull);
    c.scale_rows(c.dk_, c.q, c.p_im, 1, C(-1), c.x);
    gemm<C>(c.steps, c.dv_, f.dk, {c.x, c.dk_, 1}, {c.state_im, c.dv_}, {out, c.dv_}, true,
            kFull);
    c.write_rows(f.out, t0, f.dv, out, c.dv_);
    c.advance_state();
  }
  if (f.carry_every) c.write_state(f.carries, f.carries.n_size - 1, c.state_re, c.state_im);
  c.write_state(f.state, 0, c.state_re, c.state_im);
  streamed();
}

// The gradient of the state, G, runs against time: before a chunk it is conj(P_last) G plus
// what the chunk's outputs ask of the state, Σ_s conj(P_s) q_s grad_sᵀ.
template <class C>
void heads_backward(const GateLoop& f, int64_t b, int64_t head) {
  Scratch scratch;
  Head<C> c(f, b, head, scratch);
  const int64_t length = c.length, steps_ = c.steps_, dk_ = c.dk_, dv_ = c.dv_;
  const auto zeros = [&](int64_t count) { return Head<C>::zeros(scratch, count); };
  // Entering states of the chunks between two carries, and their transposes (dv, dk).
  const int64_t chunks = f.carry_every / length, size = f.dk * dv_;
  C *enter_re = zeros(chunks * size), *enter_im = zeros(chunks * size),
    *turned_re = zeros(f.dv * dk_), *turned_im = zeros(f.dv * dk_);
  C *g_re = zeros(size), *g_im = zeros(size);
  C *dy = zeros(length * dv_), *vt = zeros(f.dv * steps_);
  C *scores = zeros(length * steps_), *grad_scores = zeros(length * steps_),
    *inside = zeros(length * steps_), *dw_im = zeros(length * steps_);
  C *dq = zeros(length * dk_), *dk = zeros(length * dk_), *dv = zeros(length * dv_);
  C *dp_re = zeros(length), *dp_im = zeros(length), *da_re = zeros(length),
    *da_im = zeros(length), *row_re = zeros(steps_), *row_im = zeros(steps_);
  C* dw_re = inside;  // free once the products within the chunk are done
  c.read_state(f.grad_state, 0, g_re, g_im);
  for (int64_t carry = (f.n - 1) / f.carry_every; carry >= 0; --carry) {
    const int64_t first = carry * f.carry_every, end = smaller(first + f.carry_every, f.n);
    const int64_t last_chunk = (end - 1 - first) / length;
    c.read_state(f.kept, carry, c.state_re, c.state_im);
    c.ahead = length;
    for (int64_t i = 0; i <= last_chunk; ++i) {
      memcpy(enter_re + i * size, c.state_re, size * sizeof(C));
      memcpy(enter_im + i * size, c.state_im, size * sizeof(C));
      if (i == last_chunk) break;
      c.load_chunk(first + i * length);
      c.advance_state();
    }
    c.ahead = -length;
    for (int64_t i = last_chunk; i >= 0; --i) {
      const int64_t t0 = first + i * length;
      c.load_chunk(t0);
      c.load_queries(t0);
      const int64_t steps = c.steps, last = steps - 1;
      c.rows(f.grad, t0, f.dv, dy, dv_);
      transpose(steps, f.dv, c.v, dv_, vt, steps_);

      // Within the chunk.
      gemm<C>(steps, steps_, f.dk, {c.q, dk_, 1}, {c.kt, steps_}, {scores, steps_}, false,
              kFull);
      gemm<C>(steps, steps_, f.dv, {dy, dv_, 1}, {vt, steps_}, {grad_scores, steps_}, false,
              kFull);
      c.weigh(grad_scores, inside);
      gemm<C>(steps, dk_, steps, {inside, steps_, 1}, {c.k, dk_}, {dq, dk_}, false, kLower);
      gemm<C>(steps, dk_, steps, {inside, 1, steps_}, {c.q, dk_}, {dk, dk_}, false, kUpper);
      c.weigh(scores, inside);
      gemm<C>(steps, dv_, steps, {inside, 1, steps_}, {dy, dv_}, {dv, dv_}, false, kUpper);
      for (int64_t s = 0; s < steps; ++s)
        for (int64_t r = 0; r <= s; ++r) {
          dw_re[s * steps_ + r] = scores[s * steps_ + r] * grad_scores[s * steps_ + r];
          dw_im[s * steps_ + r] = 0;
        }

      // Out of the state that enters: x = grad Re Sᵀ, y = grad Im Sᵀ.
      const C *s_re = enter_re + i * size, *s_im = enter_im + i * size;
      transpose(f.dk, f.dv, s_re, dv_, turned_re, dk_);
      transpose(f.dk, f.dv, s_im, dv_, turned_im, dk_);
      gemm<C>(steps, dk_, f.dv, {dy, dv_, 1}, {turned_re, dk_}, {c.x, dk_}, false, kFull);
      gemm<C>(steps, dk_, f.dv, {dy, dv_, 1}, {turned_im, dk_}, {c.y, dk_}, false, kFull);
      for (int64_t s = 0; s < steps; ++s) {
        const C *q = c.q + s * dk_, *x = c.x + s * dk_, *y = c.y + s * dk_;
        C* to = dq + s * dk_;
        for (int64_t j = 0; j < f.dk; ++j) to[j] += c.p_re[s] * x[j] - c.p_im[s] * y[j];
        dp_re[s] = sum_over<C>(f.dk, [&](int64_t j) LAMBDA { return q[j] * x[j]; });
        dp_im[s] = -sum_over<C>(f.dk, [&](int64_t j) LAMBDA { return q[j] * y[j]; });
      }

      // Into the state that leaves: x = v Re Gᵀ, y = v Im Gᵀ.
      transpose(f.dk, f.dv, g_re, dv_, turned_re, dk_);
      transpose(f.dk, f.dv, g_im, dv_, turned_im, dk_);
      gemm<C>(steps, dk_, f.dv, {c.v, dv_, 1}, {turned_re, dk_}, {c.x, dk_}, false, kFull);
      gemm<C>(steps, dk_, f.dv, {c.v, dv_, 1}, {turned_im, dk_}, {c.y, dk_}, false, kFull);
      const C *e_re = c.w_re + last * steps_, *e_im = c.w_im + last * steps_;
      for (int64_t r = 0; r < steps; ++r) {
        const C *k = c.k + r * dk_, *x = c.x + r * dk_, *y = c.y + r * dk_;
        C* to = dk + r * dk_;
        for (int64_t j = 0; j < f.dk; ++j) to[j] += e_re[r] * x[j] + e_im[r] * y[j];
        dw_re[last * steps_ + r] +=
            sum_over<C>(f.dk, [&](int64_t j) LAMBDA { return k[j] * x[j]; });
        dw_im[last * steps_ + r] +=
            sum_over<C>(f.dk, [&](int64_t j) LAMBDA { return k[j] * y[j]; });
      }
      c.scale_rows(dk_, c.k, e_re, 1, C(1), c.x);
      gemm<C>(steps, dv_, f.dk, {c.x, dk_, 1}, {g_re, dv_}, {dv, dv_}, true, kFull);
      c.scale_rows(dk_, c.k, e_im, 1, C(1), c.x);
      gemm<C>(steps, dv_, f.dk, {c.x, dk_, 1}, {g_im, dv_}, {dv, dv_}, true, kFull);

      // P_last carried the state across: its gradient is Σ G conj(S), and G becomes
      // conj(P_last) G + Σ_s conj(P_s) q_s grad_sᵀ.
      const C re = c.p_re[last], im = c.p_im[last];
      for (int64_t at = 0; at < size; at += dv_) {
        C *r = g_re + at, *m = g_im + at;
        const C *x = s_re + at, *y = s_im + at;
        dp_re[last] +=
            sum_over<C>(f.dv, [&](int64_t j) LAMBDA { return r[j] * x[j] + m[j] * y[j]; });
        dp_im[last] +=
            sum_over<C>(f.dv, [&](int64_t j) LAMBDA { return m[j] * x[j] - r[j] * y[j]; });
        for (int64_t j = 0; j < f.dv; ++j) {
          const C before = r[j];
          r[j] = re * before + im * m[j];
          m[j] = re * m[j] - im * before;
        }
      }
      c.scale_rows(dk_, c.q, c.p_re, 1, C(1), c.x);
      gemm<C>(f.dk, dv_, steps, {c.x, 1, dk_}, {dy, dv_}, {g_re, dv_}, true, kFull);
      c.scale_rows(dk_, c.q, c.p_im, 1, C(-1), c.x);
      gemm<C>(f.dk, dv_, steps, {c.x, 1, dk_}, {dy, dv_}, {g_im, dv_}, true, kFull);

      // Gates: with R_s = dW_s + conj(a_{s+1}) R_{s+1}, da_s = Σ_r R[s, r] conj(W[s-1, r]),
      // and likewise for the column P.
      memset(row_re, 0, steps_ * sizeof(C));
      memset(row_im, 0, steps_ * sizeof(C));
      C column_re = 0, column_im = 0;
      for (int64_t s = last; s >= 0; --s) {
        column_re += dp_re[s];
        column_im += dp_im[s];
        for (int64_t r = 0; r <= s; ++r) {
          row_re[r] += dw_re[s * steps_ + r];
          row_im[r] += dw_im[s * steps_ + r];
        }
        C sum_re, sum_im;
        if (s == 0) {
          sum_re = column_re;
          sum_im = column_im;
        } else {
          const C p = c.p_re[s - 1], m = c.p_im[s - 1];
          sum_re = column_re * p + column_im * m;
          sum_im = column_im * p - column_re * m;
          const C *before_re = c.w_re + (s - 1) * steps_, *before_im = c.w_im + (s - 1) * steps_;
          sum_re += sum_over<C>(s, [&](int64_t r) LAMBDA {
            return row_re[r] * before_re[r] + row_im[r] * before_im[r];
          });
          sum_im += sum_over<C>(s, [&](int64_t r) LAMBDA {
            return row_im[r] * before_re[r] - row_re[r] * before_im[r];
          });
        }
        da_re[s] = sum_re;
        da_im[s] = sum_im;
        const C x = c.a_re[s], y = c.a_im[s];
        const C turned = x * column_im - y * column_re;
        column_re = x * column_re + y * column_im;
        column_im = turned;
        for (int64_t r = 0; r <= s; ++r) {
          const C r_re = row_re[r], r_im = row_im[r];
          row_re[r] = x * r_re + y * r_im;
          row_im[r] = x * r_im - y * r_re;
        }
      }

      c.write_rows(f.grad_q, t0, f.dk, dq, dk_);
      c.write_rows(f.grad_k, t0, f.dk, dk, dk_);
      c.write_rows(f.grad_v, t0, f.dv, dv, dv_);
      for (int64_t s = 0; s < steps; ++s) {
        C pair[2];
        write_grad_gates(f, b, t0 + s, head, 1, c.z + 2 * s, da_re + s, da_im + s, pair);
      }
    }
  }
  if (f.grad_initial.data) c.write_state(f.grad_initial, 0, g_re, g_im);
  streamed();
}

bool diagonal(const GateLoop& f) { return f.dk == 1 && f.dv == 1; }

}  // namespace

void gate_loop_forward(const GateLoop& f, int64_t begin, int64_t end) {
  const int64_t blocks = (f.h + f.block - 1) / f.block;
  const bool is_double = f.q.type == Type::f64;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, h0 = unit % blocks * f.block;
    if (diagonal(f))
      is_double ? diagonal_forward<double>(f, b, h0) : diagonal_forward<float>(f, b, h0);
    else
      is_double ? heads_forward<double>(f, b, h0) : heads_forward<float>(f, b, h0);
  }
}

void gate_loop_backward(const GateLoop& f, int64_t begin, int64_t end) {
  const int64_t blocks = (f.h + f.block - 1) / f.block;
  const bool is_double = f.q.type == Type::f64;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, h0 = unit % blocks * f.block;
    if (diagonal(f))
      is_double ? diagonal_backward<double>(f, b, h0) : diagonal_backward<float>(f, b, h0);
    else
      is_double ? heads_backward<double>(f, b, h0) : heads_backward<float>(f, b, h0);
  }
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
  return {x.const_data_ptr(), type_of(x.scalar_type()), x.stride(0),
          steps ? x.stride(1) : 0, 1, 1, std::max<int64_t>(1, numbers)};
}

GateLoop arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& gates,
                   const Maybe& logits, int64_t carry_every) {
  GateLoop f{};
  f.n = q.size(1);
  f.h = q.size(2);
  f.dk = q.size(3);
  f.dv = v.size(3);
  f.block = f.dk == 1 && f.dv == 1 ? channel_block(q.size(0), f.h, 512) : 1;
  f.carry_every = carry_every;
  f.q = source(q);
  f.k = source(k);
  f.v = source(v);
  if (gates) f.gates = source(*gates);
  if (logits) f.logits = source(*logits);
  return f;
}

int64_t units(const GateLoop& f, int64_t batches) {
  return batches * ((f.h + f.block - 1) / f.block);
}

std::tuple<Tensor, Tensor, Tensor> gate_loop(
    const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& gates, const Maybe& logits,
    const Maybe& initial_state, int64_t carry_every) {
  GateLoop f = arguments(q, k, v, gates, logits, carry_every);
  const int64_t b = q.size(0), numbers = f.h * f.dk * f.dv;
  const int64_t carries = carry_every ? (f.n + carry_every - 1) / carry_every + 1 : 0;
  Tensor out = fresh(q, {b, f.n, f.h, f.dv}, q.scalar_type()),
         state = fresh(q, {b, f.h, f.dk, f.dv}, wide_complex(q)),
         kept = fresh(q, {b, carries, f.h, f.dk, f.dv}, wide_complex(q));
  const Maybe initial = dense(initial_state);
  if (initial) f.initial_state = states(*initial, false);
  f.out = sink(out, f.n, f.h * f.dv);
  f.state = sink(state, 1, numbers);
  f.carries = sink(kept, carries, numbers);
  spread(FASTMIX_KERNELS(gate_loop_forward), f, units(f, b));
  return {out, state, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_loop_backward(
    const Tensor& grad, const Tensor& grad_state, const Tensor& carries, const Tensor& q,
    const Tensor& k, const Tensor& v, const Maybe& gates, const Maybe& logits,
    const Maybe& initial_state, int64_t carry_every) {
  GateLoop f = arguments(q, k, v, gates, logits, carry_every);
  const int64_t numbers = f.h * f.dk * f.dv;
  Tensor grad_q = fresh(q), grad_k = fresh(k), grad_v = fresh(v),
         grad_gates = gates ? fresh(*gates) : nothing(q),
         grad_logits = logits ? fresh(*logits) : nothing(q),
         grad_initial = initial_state ? fresh(*initial_state) : nothing(q);
  const Tensor last = dense(grad_state), kept = dense(carries);
  f.grad = source(grad);
  f.grad_state = states(last, false);
  f.kept = states(kept, true);
  f.grad_q = sink(grad_q, f.n, f.h * f.dk);
  f.grad_k = sink(grad_k, f.n, f.h * f.dk);
  f.grad_v = sink(grad_v, f.n, f.h * f.dv);
  f.grad_gates = gates ? sink(grad_gates, f.n, f.h) : sink(grad_logits, f.n, 2 * f.h);
  if (initial_state) f.grad_initial = sink(grad_initial, 1, numbers);
  spread(FASTMIX_KERNELS(gate_loop_backward), f, units(f, q.size(0)));
  return {grad_q, grad_k, grad_v, grad_gates, grad_logits, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("gate_loop", TORCH_BOX(&gate_loop));
  m.impl("gate_loop_backward", TORCH_BOX(&gate_loop_backward));
}

}  // namespace fastmix

#endif
