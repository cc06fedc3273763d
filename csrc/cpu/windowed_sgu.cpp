// out = activation(mix(norm(gate)) + bias + gate_residual) · res, with x = [res, gate].
//
// Window i mixes its own gate rows by a lower triangle and those of the window before by a
// square: two products per head, of rows normalised just before and still in cache. Forward's
// unit of work is a window. Backward walks through a run of windows, because a window's gate
// gets gradients from the window after it too, which is computed once more at a run's end;
// it computes the mixture again and keeps nothing of the size of x.

#include "sgu.h"

namespace fastmix {

struct WindowedSgu {
  int64_t b, n, c, h, w, windows;
  Activation activation;
  double eps;
  const double *bias, *norm_weight, *norm_bias;  // (h, w), (c,), (c,)
  const void* weight;                            // (h, w, 2w), dense, in the compute type
  Source x, residual, grad;
  Sink out, grad_x, grad_residual;
  // Backward: runs of windows, and sums of each: (runs, …).
  int64_t runs, run_windows;
  void* grad_weight;  // (runs, h, w, 2w) in the compute type
  double *grad_bias, *grad_norm_weight, *grad_norm_bias;
};

}  // namespace fastmix

FASTMIX_KERNEL(windowed_sgu_forward, fastmix::WindowedSgu)
FASTMIX_KERNEL(windowed_sgu_backward, fastmix::WindowedSgu)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

// A window's gate: normalised, by head (h, w, d), and what the norm's gradient needs.
template <class C>
struct Gate {
  C *rows, *turned;  // turned (h, d, w), if asked for
  C *mean, *inverse;
};

template <class C>
struct Sgu {
  const WindowedSgu& f;
  const int64_t d, d_, w_;  // channels of a head; rows as whole vectors, of d and of w
  C *scale, *shift, *wide, *row, *mixed;
  C *value, *slope, *wide_res;  // rows of c

  Sgu(const WindowedSgu& f, Scratch& scratch)
      : f(f), d(f.c / f.h), d_(padded<C>(d)), w_(padded<C>(f.w)) {
    scale = scratch.take<C>(f.c);
    shift = scratch.take<C>(f.c);
    for (int64_t c = 0; c < f.c; ++c) {
      scale[c] = static_cast<C>(f.norm_weight[c]);
      shift[c] = static_cast<C>(f.norm_bias[c]);
    }
    wide = scratch.take<C>(2 * f.c);
    row = scratch.take<C>(f.c);
    mixed = zeros(scratch, f.h * f.w * d_);
    value = scratch.take<C>(f.c);
    slope = scratch.take<C>(f.c);
    wide_res = scratch.take<C>(f.c);
  }

  static C* zeros(Scratch& scratch, int64_t count) {
    C* found = scratch.take<C>(count);
    memset(found, 0, count * sizeof(C));
    return found;
  }

  Gate<C> gate(Scratch& scratch, bool turned) {
    return {zeros(scratch, f.h * f.w * d_), turned ? zeros(scratch, f.h * d * w_) : nullptr,
            scratch.take<C>(f.w), scratch.take<C>(f.w)};
  }

  int64_t rows_of(int64_t window) const { return smaller(f.w, f.n - window * f.w); }

  // The row of each head: (h, w, d)
  C* at(C* heads, int64_t head, int64_t r) const { return heads + (head * f.w + r) * d_; }

  // Channels c0 … c0+c-1 of a step that will be read soon.
  void fetch(const Source& s, int64_t b, int64_t t, int64_t c0) const {
    if (t < f.n) prefetch(s, b, t, c0, f.c);
  }

  void normalise(int64_t b, int64_t window, Gate<C>& gate) {
    const int64_t rows = rows_of(window);
    for (int64_t r = 0; r < rows; ++r) {
      fetch(f.x, b, window * f.w + r + kAhead, f.c);
      const C* x = read(f.x, b, window * f.w + r, f.c, f.c, wide);
      row_statistics(x, f.c, f.eps, gate.mean + r, gate.inverse + r);
      const C mean = gate.mean[r], inverse = gate.inverse[r];
      for (int64_t head = 0; head < f.h; ++head) {
        C* to = at(gate.rows, head, r);
        const int64_t c0 = head * d;
        for (int64_t c = 0; c < d; ++c)
          to[c] = (x[c0 + c] - mean) * inverse * scale[c0 + c] + shift[c0 + c];
      }
    }
    if (gate.turned)
      for (int64_t head = 0; head < f.h; ++head)
        transpose(rows, d, at(gate.rows, head, 0), d_, gate.turned + head * d * w_, w_);
  }

  // The part of the weight (h, w, 2w) for the window itself, or for the one before it.
  Left<C> weight(int64_t head, bool own) const {
    const C* data = static_cast<const C*>(f.weight) + head * f.w * 2 * f.w;
    return {data + (own ? f.w : 0), 2 * f.w, 1};
  }

  // mixed = bias + W_before · before + triangle(W_own) · own
  void mix(int64_t window, const Gate<C>& before, const Gate<C>& own) {
    const int64_t rows = rows_of(window);
    for (int64_t head = 0; head < f.h; ++head) {
      for (int64_t r = 0; r < rows; ++r) {
        const C bias = static_cast<C>(f.bias[head * f.w + r]);
        for (int64_t c = 0; c < d_; ++c) at(mixed, head, r)[c] = bias;
      }
      if (window > 0)
        gemm<C>(rows, d_, f.w, weight(head, false), {at(before.rows, head, 0), d_},
                {at(mixed, head, 0), d_}, true, kFull);
      gemm<C>(rows, d_, rows, weight(head, true), {at(own.rows, head, 0), d_},
              {at(mixed, head, 0), d_}, true, kLower);
    }
  }

  // The mixture of step t with its residual, all heads in one row.
  const C* mixed_row(int64_t b, int64_t window, int64_t r) {
    for (int64_t head = 0; head < f.h; ++head)
      memcpy(row + head * d, at(mixed, head, r), d * sizeof(C));
    if (present(f.residual)) {
      const C* residual = read(f.residual, b, window * f.w + r, 0, f.c, wide);
      for (int64_t c = 0; c < f.c; ++c) row[c] += residual[c];
    }
    return row;
  }
};

template <class C>
void forward(const WindowedSgu& f, int64_t begin, int64_t end) {
  Scratch scratch;
  Sgu<C> s(f, scratch);
  Gate<C> before = s.gate(scratch, false), own = s.gate(scratch, false);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / f.windows, window = index % f.windows;
    if (window > 0 && index == begin) s.normalise(b, window - 1, before);
    s.normalise(b, window, own);
    s.mix(window, before, own);
    for (int64_t r = 0; r < s.rows_of(window); ++r) {
      const int64_t t = window * f.w + r;
      s.fetch(f.x, b, t + kAhead, 0);
      const C* mixed = s.mixed_row(b, window, r);
      if (f.activation == Activation::none) {
        write(f.out, b, t, 0, f.c, mixed);
        continue;
      }
      const C* res = read(f.x, b, t, 0, f.c, s.wide_res);
      apply_gate(f.activation, mixed, res, s.value, f.c);
      write(f.out, b, t, 0, f.c, s.value);
    }
    const Gate<C> gate = before;
    before = own;
    own = gate;
  }
  streamed();
}

// The gradient of the layer norm for the window's gate rows, from that of its result.
template <class C>
void write_grad_gate(Sgu<C>& s, int64_t b, int64_t window, const Gate<C>& gate, C* grad_rows,
                     C* by_scale, C* by_shift) {
  const WindowedSgu& f = s.f;
  for (int64_t r = 0; r < s.rows_of(window); ++r) {
    const int64_t t = window * f.w + r;
    const C* x = read(f.x, b, t, f.c, f.c, s.wide);
    for (int64_t head = 0; head < f.h; ++head)
      memcpy(s.row + head * s.d, s.at(grad_rows, head, r), s.d * sizeof(C));
    norm_backward(x, s.row, gate.mean[r], gate.inverse[r], s.scale, by_scale, by_shift, s.slope,
                  s.value, f.c);
    write(f.grad_x, b, t, f.c, f.c, s.value);
  }
}

template <class C>
struct Sums {
  C *weight_before, *weight_own;  // (h, w, w), rows as whole vectors
  C *by_scale, *by_shift;         // (c,), of one window
};

// Gradients within one window, from the mixture: of res, of the residual, of bias and weight;
// that of the mixture itself, by head, stays in `s.mixed`. `only_mixture` for a window that
// belongs to the next run.
template <class C>
void window_backward(Sgu<C>& s, int64_t b, int64_t window, const Gate<C>& before,
                     const Gate<C>& own, Sums<C>& sums, double* grad_bias, bool only_mixture) {
  const WindowedSgu& f = s.f;
  const int64_t rows = s.rows_of(window);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = window * f.w + r;
    s.fetch(f.x, b, t + kAhead, 0);
    s.fetch(f.grad, b, t + kAhead, 0);
    const C* mixed = s.mixed_row(b, window, r);
    const C* grad = read(f.grad, b, t, 0, f.c, s.wide);
    C *grad_mixed = s.slope, *grad_res = s.value;
    if (f.activation == Activation::none) {
      memcpy(grad_mixed, grad, f.c * sizeof(C));
      memset(grad_res, 0, f.c * sizeof(C));
    } else {
      apply_gate_backward(f.activation, mixed, read(f.x, b, t, 0, f.c, s.wide_res), grad,
                          grad_mixed, grad_res, f.c);
    }
    for (int64_t head = 0; head < f.h; ++head)
      memcpy(s.at(s.mixed, head, r), grad_mixed + head * s.d, s.d * sizeof(C));
    if (only_mixture) continue;
    write(f.grad_x, b, t, 0, f.c, grad_res);
    if (f.grad_residual.data) write(f.grad_residual, b, t, 0, f.c, grad_mixed);
    for (int64_t head = 0; head < f.h; ++head) {
      const C* of_head = grad_mixed + head * s.d;
      grad_bias[head * f.w + r] += sum_over<C>(s.d, [&](int64_t c) LAMBDA { return of_head[c]; });
    }
  }
  if (only_mixture) return;
  for (int64_t head = 0; head < f.h; ++head) {
    const Left<C> grad{s.at(s.mixed, head, 0), s.d_, 1};
    C *to_own = sums.weight_own + head * f.w * s.w_,
      *to_before = sums.weight_before + head * f.w * s.w_;
    if (window > 0)
      gemm<C>(rows, s.w_, s.d, grad, {before.turned + head * s.d * s.w_, s.w_},
              {to_before, s.w_}, true, kFull);
    // Of the triangle, panel by panel: the rows from its diagonal on.
    constexpr int64_t panel = kVectors * Simd<C>::lanes;
    for (int64_t j = 0; j < rows; j += panel)
      gemm<C>(rows - j, smaller(panel, s.w_ - j), s.d, {grad.data + j * s.d_, s.d_, 1},
              {own.turned + head * s.d * s.w_ + j, s.w_}, {to_own + j * s.w_ + j, s.w_}, true,
              kFull);
  }
}

// What a thread keeps from run to run.
template <class C>
struct Backward {
  Gate<C> before, own;
  C *grad_before, *grad_own;  // of the normalised gate, of the window before and of this one
  Sums<C> sums;

  Backward(Sgu<C>& s, Scratch& scratch) {
    const WindowedSgu& f = s.f;
    before = s.gate(scratch, true);
    own = s.gate(scratch, true);
    grad_before = s.zeros(scratch, f.h * f.w * s.d_);
    grad_own = s.zeros(scratch, f.h * f.w * s.d_);
    sums = {scratch.take<C>(f.h * f.w * s.w_), scratch.take<C>(f.h * f.w * s.w_),
            scratch.take<C>(f.c), scratch.take<C>(f.c)};
  }
};

template <class C>
void backward(Sgu<C>& s, Backward<C>& kept, int64_t run) {
  const WindowedSgu& f = s.f;
  auto& [before, own, grad_before, grad_own, sums] = kept;
  double *grad_bias = f.grad_bias + run * f.h * f.w,
         *by_scale = f.grad_norm_weight + run * f.c, *by_shift = f.grad_norm_bias + run * f.c;
  memset(sums.weight_before, 0, f.h * f.w * s.w_ * sizeof(C));
  memset(sums.weight_own, 0, f.h * f.w * s.w_ * sizeof(C));
  memset(grad_bias, 0, f.h * f.w * sizeof(double));
  memset(by_scale, 0, f.c * sizeof(double));
  memset(by_shift, 0, f.c * sizeof(double));
  const auto finish = [&](int64_t b, int64_t window, const Gate<C>& gate, C* grad) {
    memset(kept.sums.by_scale, 0, f.c * sizeof(C));
    memset(kept.sums.by_shift, 0, f.c * sizeof(C));
    write_grad_gate(s, b, window, gate, grad, kept.sums.by_scale, kept.sums.by_shift);
    for (int64_t c = 0; c < f.c; ++c) {
      by_scale[c] += kept.sums.by_scale[c];
      by_shift[c] += kept.sums.by_shift[c];
    }
  };
  // The windows of all batch entries in a row, `run_windows` to a run.
  const int64_t first = run * f.run_windows, end = smaller(first + f.run_windows, f.b * f.windows);
  for (int64_t index = first; index < end; ++index) {
    const int64_t b = index / f.windows;
    int64_t window = index % f.windows;
    const bool starts = index == first || window == 0;
    if (starts && window > 0) s.normalise(b, window - 1, before);
    // A run that ends within a sequence looks at the mixture's gradient one window on.
    const bool ends = index + 1 == end || window + 1 == f.windows;
    const int64_t last = ends && window + 1 < f.windows ? window + 1 : window;
    for (bool first_here = starts; window <= last; ++window, first_here = false) {
      const bool only_mixture = window > index % f.windows;
      s.normalise(b, window, own);
      s.mix(window, before, own);
      window_backward(s, b, window, before, own, sums, grad_bias, only_mixture);
      const int64_t rows = s.rows_of(window);
      for (int64_t head = 0; head < f.h; ++head) {
        const Rows<const C> grad{s.at(s.mixed, head, 0), s.d_};
        const Left<C> w_before = s.weight(head, false), w_own = s.weight(head, true);
        if (!first_here)
          gemm<C>(f.w, s.d_, rows, {w_before.data, 1, w_before.row}, grad,
                  {s.at(grad_before, head, 0), s.d_}, true, kFull);
        if (!only_mixture)
          gemm<C>(rows, s.d_, rows, {w_own.data, 1, w_own.row}, grad,
                  {s.at(grad_own, head, 0), s.d_}, false, kUpper);
      }
      if (!first_here) finish(b, window - 1, before, grad_before);
      const Gate<C> gate = before;
      before = own;
      own = gate;
      C* const grad = grad_before;
      grad_before = grad_own;
      grad_own = grad;
    }
    if (ends && last == index % f.windows) finish(b, last, before, grad_before);
  }
  // (h, w, [before, own]), nothing above the diagonal.
  C* grad_weight = static_cast<C*>(f.grad_weight) + run * f.h * f.w * 2 * f.w;
  for (int64_t i = 0; i < f.h * f.w; ++i) {
    memcpy(grad_weight + i * 2 * f.w, sums.weight_before + i * s.w_, f.w * sizeof(C));
    const int64_t below = i % f.w + 1;
    memcpy(grad_weight + i * 2 * f.w + f.w, sums.weight_own + i * s.w_, below * sizeof(C));
    memset(grad_weight + i * 2 * f.w + f.w + below, 0, (f.w - below) * sizeof(C));
  }
}

template <class C>
void backward(const WindowedSgu& f, int64_t begin, int64_t end) {
  Scratch scratch;
  Sgu<C> s(f, scratch);
  Backward<C> kept(s, scratch);
  for (int64_t run = begin; run < end; ++run) backward(s, kept, run);
  streamed();
}

}  // namespace

void windowed_sgu_forward(const WindowedSgu& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? forward<double>(f, begin, end) : forward<float>(f, begin, end);
}

void windowed_sgu_backward(const WindowedSgu& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? backward<double>(f, begin, end) : backward<float>(f, begin, end);
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include "sgu_tensors.h"

namespace fastmix {
namespace {

WindowedSgu arguments(const Tensor& x, const Parameters& p, double eps, const Maybe& residual,
                      const std::string& activation) {
  WindowedSgu f{};
  fill(f, x, p, eps, residual, activation);
  f.w = p.weight.size(1);
  f.windows = (f.n + f.w - 1) / f.w;
  return f;
}

// Σ over the first axis of `parts`, into the fresh tensor `sum`, row by row.
template <class C>
void add_runs(const Tensor& parts, const Tensor& sum) {
  const C* data = static_cast<const C*>(parts.const_data_ptr());
  const int64_t numbers = sum.numel(), row = sum.size(2);
  std::vector<double> total(row);
  for (int64_t at = 0; at < numbers; at += row) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t run = 0; run < parts.size(0); ++run)
      for (int64_t i = 0; i < row; ++i) total[i] += data[run * numbers + at + i];
    assign(sum, total, at);
  }
}

// Whether the sequences are of one window and so few that work is better cut by channels.
bool causal(const Tensor& x, const Tensor& weight) {
  return x.size(1) <= weight.size(1) && x.size(0) < 8;
}

// The weight in the compute type: unlike causal_sgu's it is small.
Tensor computed(const Tensor& weight, const Tensor& x) {
  return dense(converted(weight, wide(x)));
}

Tensor windowed_sgu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                    const Maybe& norm_weight, const Maybe& norm_bias, double eps,
                    const Maybe& residual, std::string activation) {
  if (causal(x, weight))
    return causal_sgu(x, weight, bias, norm_weight, norm_bias, eps, residual, activation);
  const Parameters p(x, computed(weight, x), bias, norm_weight, norm_bias);
  WindowedSgu f = arguments(x, p, eps, residual, activation);
  Tensor out = fresh(x, {f.b, f.n, f.c}, x.scalar_type());
  f.out = sink(out, f.n, f.c);
  spread(FASTMIX_KERNELS(windowed_sgu_forward), f, f.c ? f.b * f.windows : 0);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> windowed_sgu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Maybe& norm_weight, const Maybe& norm_bias, double eps, const Maybe& residual,
    std::string activation) {
  if (causal(x, weight))
    return causal_sgu_backward(grad, x, weight, bias, norm_weight, norm_bias, eps, residual,
                               activation);
  const Parameters p(x, computed(weight, x), bias, norm_weight, norm_bias);
  WindowedSgu f = arguments(x, p, eps, residual, activation);
  Tensor grad_x = fresh(x), grad_residual = residual ? fresh(*residual) : nothing(x);
  f.grad = source(grad);
  f.grad_x = sink(grad_x, f.n, 2 * f.c);
  if (residual) f.grad_residual = sink(grad_residual, f.n, f.c);

  // Runs are as many as keep their sums of the weight's gradient small, or small beside x, and so
  // long that the window which is computed twice at the end of each weighs little: two at least.
  const int64_t windows = f.b * f.windows, numbers = std::max<int64_t>(1, p.weight.numel());
  const int64_t affordable = std::max<int64_t>(x.numel() / 16, 1 << 19) / numbers;
  const int64_t worthwhile = std::max<int64_t>(windows / 8, 2);
  const int64_t runs = std::max<int64_t>(1, std::min({affordable, worthwhile, int64_t(16)}));
  f.run_windows = std::max<int64_t>(1, (windows + runs - 1) / runs);
  f.runs = (windows + f.run_windows - 1) / f.run_windows;
  Tensor sums = fresh(x, {f.runs, f.h, f.w, 2 * f.w}, wide(x));
  std::vector<double> by_bias(f.runs * f.h * f.w), by_scale(f.runs * f.c), by_shift(f.runs * f.c);
  f.grad_weight = sums.mutable_data_ptr();
  f.grad_bias = by_bias.data();
  f.grad_norm_weight = by_scale.data();
  f.grad_norm_bias = by_shift.data();
  spread(FASTMIX_KERNELS(windowed_sgu_backward), f, f.runs);

  Tensor grad_weight = fresh(weight);
  is_double(x) ? add_runs<double>(sums, grad_weight) : add_runs<float>(sums, grad_weight);
  return {grad_x, grad_weight, totals(by_bias, bias),
          norm_weight ? totals(by_scale, *norm_weight) : nothing(x),
          norm_bias ? totals(by_shift, *norm_bias) : nothing(x), grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("windowed_sgu", TORCH_BOX(&windowed_sgu));
  m.impl("windowed_sgu_backward", TORCH_BOX(&windowed_sgu_backward));
}

}  // namespace fastmix

#endif
