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
  bool unit;  // whether the matrix unit multiplies in `mix`
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
  C *rows, *turned;  // turned (h, d, w), or null
  C *mean, *inverse;
};

template <class C>
struct Sgu {
  const WindowedSgu& args;
  const int64_t d, d_padded, w_padded;  // channels of a head; rows as whole vectors, of d and of w
  C *scale, *shift, *wide, *row, *mixed;
  C *value, *slope, *wide_res;  // rows of c

  Sgu(const WindowedSgu& args, Scratch& scratch)
      : args(args), d(args.c / args.h), d_padded(padded<C>(d)), w_padded(padded<C>(args.w)) {
    scale = scratch.take<C>(args.c);
    shift = scratch.take<C>(args.c);
    for (int64_t c = 0; c < args.c; ++c) {
      scale[c] = static_cast<C>(args.norm_weight[c]);
      shift[c] = static_cast<C>(args.norm_bias[c]);
    }
    wide = scratch.take<C>(2 * args.c);
    row = scratch.take<C>(args.c);
    mixed = scratch.zeros<C>(args.h * args.w * d_padded);
    value = scratch.take<C>(args.c);
    slope = scratch.take<C>(args.c);
    wide_res = scratch.take<C>(args.c);
  }

  Gate<C> gate(Scratch& scratch, bool turned) {
    return {scratch.zeros<C>(args.h * args.w * d_padded),
            turned ? scratch.zeros<C>(args.h * d * w_padded) : nullptr, scratch.take<C>(args.w),
            scratch.take<C>(args.w)};
  }

  int64_t rows_of(int64_t window) const { return smaller(args.w, args.n - window * args.w); }

  // The row of each head: (h, w, d)
  C* at(C* heads, int64_t head, int64_t r) const { return heads + (head * args.w + r) * d_padded; }

  // Channels c0 … c0+c-1 of a step that will be read soon.
  void fetch(const Source& s, int64_t b, int64_t t, int64_t c0) const {
    if (t < args.n) prefetch(s, b, t, c0, args.c);
  }

  void normalise(int64_t b, int64_t window, Gate<C>& gate) {
    const int64_t rows = rows_of(window);
    for (int64_t r = 0; r < rows; ++r) {
      fetch(args.x, b, window * args.w + r + kAhead, args.c);
      const C* x = read(args.x, b, window * args.w + r, args.c, args.c, wide);
      row_statistics(x, args.c, args.eps, gate.mean + r, gate.inverse + r);
      const C mean = gate.mean[r], inverse = gate.inverse[r];
      for (int64_t head = 0; head < args.h; ++head) {
        C* to = at(gate.rows, head, r);
        const int64_t c0 = head * d;
        for (int64_t c = 0; c < d; ++c)
          to[c] = (x[c0 + c] - mean) * inverse * scale[c0 + c] + shift[c0 + c];
      }
    }
    if (gate.turned)
      for (int64_t head = 0; head < args.h; ++head)
        transpose(rows, d, at(gate.rows, head, 0), d_padded, gate.turned + head * d * w_padded,
                  w_padded);
  }

  // The part of the weight (h, w, 2w) for the window itself, or for the one before it.
  Left<C> weight(int64_t head, bool own) const {
    const C* data = static_cast<const C*>(args.weight) + head * args.w * 2 * args.w;
    return {data + (own ? args.w : 0), 2 * args.w, 1};
  }

  // mixed = bias + W_before · before + triangle(W_own) · own
  void mix(int64_t window, const Gate<C>& before, const Gate<C>& own) {
    const int64_t rows = rows_of(window);
    for (int64_t head = 0; head < args.h; ++head) {
      for (int64_t r = 0; r < rows; ++r) {
        const C bias = static_cast<C>(args.bias[head * args.w + r]);
        for (int64_t c = 0; c < d_padded; ++c) at(mixed, head, r)[c] = bias;
      }
      if (window > 0)
        matrix_product<C>(args.unit, rows, d_padded, args.w, weight(head, false),
                          {at(before.rows, head, 0), d_padded}, {at(mixed, head, 0), d_padded},
                          true, kFull);
      matrix_product<C>(args.unit, rows, d_padded, rows, weight(head, true),
                        {at(own.rows, head, 0), d_padded}, {at(mixed, head, 0), d_padded}, true,
                        kLower);
    }
  }

  // The mixture of step t with its residual, all heads in one row.
  const C* mixed_row(int64_t b, int64_t window, int64_t r) {
    for (int64_t head = 0; head < args.h; ++head)
      memcpy(row + head * d, at(mixed, head, r), d * sizeof(C));
    if (present(args.residual)) {
      const C* residual = read(args.residual, b, window * args.w + r, 0, args.c, wide);
      for (int64_t c = 0; c < args.c; ++c) row[c] += residual[c];
    }
    return row;
  }
};

template <class C>
void forward(const WindowedSgu& args, int64_t begin, int64_t end) {
  Scratch scratch;
  const Tiles tiles(args.unit);
  Sgu<C> s(args, scratch);
  Gate<C> before = s.gate(scratch, false), own = s.gate(scratch, false);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / args.windows, window = index % args.windows;
    if (window > 0 && index == begin) s.normalise(b, window - 1, before);
    s.normalise(b, window, own);
    s.mix(window, before, own);
    for (int64_t r = 0; r < s.rows_of(window); ++r) {
      const int64_t t = window * args.w + r;
      s.fetch(args.x, b, t + kAhead, 0);
      const C* mixed = s.mixed_row(b, window, r);
      if (args.activation == Activation::outside) {
        write(args.out, b, t, 0, args.c, mixed);
        continue;
      }
      const C* res = read(args.x, b, t, 0, args.c, s.wide_res);
      apply_gate(args.activation, mixed, res, s.value, args.c);
      write(args.out, b, t, 0, args.c, s.value);
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
  const WindowedSgu& args = s.args;
  for (int64_t r = 0; r < s.rows_of(window); ++r) {
    const int64_t t = window * args.w + r;
    const C* x = read(args.x, b, t, args.c, args.c, s.wide);
    for (int64_t head = 0; head < args.h; ++head)
      memcpy(s.row + head * s.d, s.at(grad_rows, head, r), s.d * sizeof(C));
    norm_backward(x, s.row, gate.mean[r], gate.inverse[r], args.eps, s.scale, by_scale, by_shift,
                  s.slope, s.value, args.c);
    write(args.grad_x, b, t, args.c, args.c, s.value);
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
  const WindowedSgu& args = s.args;
  const int64_t rows = s.rows_of(window);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = window * args.w + r;
    s.fetch(args.x, b, t + kAhead, 0);
    s.fetch(args.grad, b, t + kAhead, 0);
    const C* mixed = s.mixed_row(b, window, r);
    const C* grad = read(args.grad, b, t, 0, args.c, s.wide);
    C *grad_mixed = s.slope, *grad_res = s.value;
    if (args.activation == Activation::outside) {
      memcpy(grad_mixed, grad, args.c * sizeof(C));
      memset(grad_res, 0, args.c * sizeof(C));
    } else {
      apply_gate_backward(args.activation, mixed, read(args.x, b, t, 0, args.c, s.wide_res), grad,
                          grad_mixed, grad_res, args.c);
    }
    for (int64_t head = 0; head < args.h; ++head)
      memcpy(s.at(s.mixed, head, r), grad_mixed + head * s.d, s.d * sizeof(C));
    if (only_mixture) continue;
    write(args.grad_x, b, t, 0, args.c, grad_res);
    if (args.grad_residual.data) write(args.grad_residual, b, t, 0, args.c, grad_mixed);
    for (int64_t head = 0; head < args.h; ++head) {
      const C* of_head = grad_mixed + head * s.d;
      grad_bias[head * args.w + r] +=
          sum_over<C>(s.d, [&](int64_t c) FASTMIX_LAMBDA { return of_head[c]; });
    }
  }
  if (only_mixture) return;
  for (int64_t head = 0; head < args.h; ++head) {
    const Left<C> grad{s.at(s.mixed, head, 0), s.d_padded, 1};
    C *to_own = sums.weight_own + head * args.w * s.w_padded,
      *to_before = sums.weight_before + head * args.w * s.w_padded;
    if (window > 0)
      gemm<C>(rows, s.w_padded, s.d, grad, {before.turned + head * s.d * s.w_padded, s.w_padded},
              {to_before, s.w_padded}, true, kFull);
    // Of the triangle, panel by panel: the rows from its diagonal on.
    constexpr int64_t panel = kVectors * Simd<C>::lanes;
    for (int64_t j = 0; j < rows; j += panel)
      gemm<C>(rows - j, smaller(panel, s.w_padded - j), s.d,
              {grad.data + j * s.d_padded, s.d_padded, 1},
              {own.turned + head * s.d * s.w_padded + j, s.w_padded},
              {to_own + j * s.w_padded + j, s.w_padded}, true, kFull);
  }
}

// What a thread keeps from run to run.
template <class C>
struct Backward {
  Gate<C> before, own;
  C *grad_before, *grad_own;  // of the normalised gate, of the window before and of this one
  Sums<C> sums;

  Backward(Sgu<C>& s, Scratch& scratch) {
    const WindowedSgu& args = s.args;
    before = s.gate(scratch, true);
    own = s.gate(scratch, true);
    grad_before = scratch.zeros<C>(args.h * args.w * s.d_padded);
    grad_own = scratch.zeros<C>(args.h * args.w * s.d_padded);
    sums = {scratch.take<C>(args.h * args.w * s.w_padded),
            scratch.take<C>(args.h * args.w * s.w_padded), scratch.take<C>(args.c),
            scratch.take<C>(args.c)};
  }
};

template <class C>
void backward(Sgu<C>& s, Backward<C>& kept, int64_t run) {
  const WindowedSgu& args = s.args;
  auto& [before, own, grad_before, grad_own, sums] = kept;
  double *grad_bias = args.grad_bias + run * args.h * args.w,
         *by_scale = args.grad_norm_weight + run * args.c,
         *by_shift = args.grad_norm_bias + run * args.c;
  memset(sums.weight_before, 0, args.h * args.w * s.w_padded * sizeof(C));
  memset(sums.weight_own, 0, args.h * args.w * s.w_padded * sizeof(C));
  memset(grad_bias, 0, args.h * args.w * sizeof(double));
  memset(by_scale, 0, args.c * sizeof(double));
  memset(by_shift, 0, args.c * sizeof(double));
  const auto finish = [&](int64_t b, int64_t window, const Gate<C>& gate, C* grad) {
    memset(kept.sums.by_scale, 0, args.c * sizeof(C));
    memset(kept.sums.by_shift, 0, args.c * sizeof(C));
    write_grad_gate(s, b, window, gate, grad, kept.sums.by_scale, kept.sums.by_shift);
    for (int64_t c = 0; c < args.c; ++c) {
      by_scale[c] += kept.sums.by_scale[c];
      by_shift[c] += kept.sums.by_shift[c];
    }
  };
  // The windows of all batch entries in a row, `run_windows` to a run.
  const int64_t first = run * args.run_windows,
                end = smaller(first + args.run_windows, args.b * args.windows);
  for (int64_t index = first; index < end; ++index) {
    const int64_t b = index / args.windows;
    int64_t window = index % args.windows;
    const bool starts = index == first || window == 0;
    if (starts && window > 0) s.normalise(b, window - 1, before);
    // A run that ends within a sequence looks at the mixture's gradient one window on.
    const bool ends = index + 1 == end || window + 1 == args.windows;
    const int64_t last = ends && window + 1 < args.windows ? window + 1 : window;
    for (bool first_here = starts; window <= last; ++window, first_here = false) {
      const bool only_mixture = window > index % args.windows;
      s.normalise(b, window, own);
      s.mix(window, before, own);
      window_backward(s, b, window, before, own, sums, grad_bias, only_mixture);
      const int64_t rows = s.rows_of(window);
      for (int64_t head = 0; head < args.h; ++head) {
        const RowMajor<const C> grad{s.at(s.mixed, head, 0), s.d_padded};
        const Left<C> w_before = s.weight(head, false), w_own = s.weight(head, true);
        if (!first_here)
          gemm<C>(args.w, s.d_padded, rows, {w_before.data, 1, w_before.row}, grad,
                  {s.at(grad_before, head, 0), s.d_padded}, true, kFull);
        if (!only_mixture)
          gemm<C>(rows, s.d_padded, rows, {w_own.data, 1, w_own.row}, grad,
                  {s.at(grad_own, head, 0), s.d_padded}, false, kUpper);
      }
      if (!first_here) finish(b, window - 1, before, grad_before);
      const Gate<C> gate = before;
      before = own;
      own = gate;
      C* const grad = grad_before;
      grad_before = grad_own;
      grad_own = grad;
    }
    if (ends && last == index % args.windows) finish(b, last, before, grad_before);
  }
  // (h, w, [before, own]), nothing above the diagonal.
  C* grad_weight = static_cast<C*>(args.grad_weight) + run * args.h * args.w * 2 * args.w;
  for (int64_t i = 0; i < args.h * args.w; ++i) {
    memcpy(grad_weight + i * 2 * args.w, sums.weight_before + i * s.w_padded, args.w * sizeof(C));
    const int64_t below = i % args.w + 1;
    memcpy(grad_weight + i * 2 * args.w + args.w, sums.weight_own + i * s.w_padded,
           below * sizeof(C));
    memset(grad_weight + i * 2 * args.w + args.w + below, 0, (args.w - below) * sizeof(C));
  }
}

template <class C>
void backward(const WindowedSgu& args, int64_t begin, int64_t end) {
  Scratch scratch;
  const Tiles tiles(args.unit);
  Sgu<C> s(args, scratch);
  Backward<C> kept(s, scratch);
  for (int64_t run = begin; run < end; ++run) backward(s, kept, run);
  streamed();
}

}  // namespace

void windowed_sgu_forward(const WindowedSgu& args, int64_t begin, int64_t end) {
  args.x.type == Type::f64 ? forward<double>(args, begin, end) : forward<float>(args, begin, end);
}

void windowed_sgu_backward(const WindowedSgu& args, int64_t begin, int64_t end) {
  args.x.type == Type::f64 ? backward<double>(args, begin, end) : backward<float>(args, begin, end);
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include "sgu_tensors.h"

namespace fastmix {
namespace {

constexpr Checks kWindowedChecks{"windowed_sgu"};

WindowedSgu arguments(const Tensor& x, const Parameters& p, double eps,
                      const OptionalTensor& residual, Activation activation) {
  WindowedSgu args{};
  fill(args, x, p, eps, residual, activation);
  args.w = p.weight.size(1);
  args.windows = (args.n + args.w - 1) / args.w;
  return args;
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

// Of one thread, forward.
double nanoseconds(const WindowedSgu& args) {
  return args.b * args.n * args.c * (2.0 + 0.04 * args.w);
}

// Whether the sequences are of one window and so few that work is better cut by channels.
bool causal(const Tensor& x, const Tensor& weight) {
  return x.size(1) <= weight.size(1) && x.size(0) < 8;
}

// The weight in the compute type: unlike causal_sgu's it is small.
Tensor computed(const Tensor& weight, const Tensor& x) { return dense(converted(weight, wide(x))); }

Tensor windowed_sgu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                    const OptionalTensor& residual, Activation activation) {
  check(kWindowedChecks, x, weight, bias, norm_weight, norm_bias, residual, false);
  if (causal(x, weight))
    return causal_sgu(x, weight, bias, norm_weight, norm_bias, eps, residual, activation);
  const Parameters p(x, computed(weight, x), weight.scalar_type() == ScalarType::BFloat16, bias,
                     norm_weight, norm_bias);
  WindowedSgu args = arguments(x, p, eps, residual, activation);
  Tensor out = fresh(x, {args.b, args.n, args.c}, x.scalar_type());
  args.out = sink(out, args.n, args.c);
  spread(FASTMIX_KERNELS(windowed_sgu_forward), args, args.c ? args.b * args.windows : 0,
         nanoseconds(args));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> windowed_sgu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
    const OptionalTensor& residual, Activation activation) {
  check(kWindowedChecks, x, weight, bias, norm_weight, norm_bias, residual, false);
  kWindowedChecks.tensor("grad_out", grad, {x.size(0), x.size(1), x.size(2) / 2}, kReal);
  if (causal(x, weight))
    return causal_sgu_backward(grad, x, weight, bias, norm_weight, norm_bias, eps, residual,
                               activation);
  const Parameters p(x, computed(weight, x), weight.scalar_type() == ScalarType::BFloat16, bias,
                     norm_weight, norm_bias);
  WindowedSgu args = arguments(x, p, eps, residual, activation);
  Tensor grad_x = fresh(x), grad_residual = residual ? fresh(*residual) : nothing(x);
  args.grad = source(grad);
  args.grad_x = sink(grad_x, args.n, 2 * args.c);
  if (residual) args.grad_residual = sink(grad_residual, args.n, args.c);

  // Runs are as many as keep their sums of the weight's gradient small, or small beside x, and so
  // long that the window which is computed twice at the end of each weighs little: two at least.
  const int64_t windows = args.b * args.windows, numbers = std::max<int64_t>(1, p.weight.numel());
  const int64_t affordable = std::max<int64_t>(x.numel() / 16, 1 << 19) / numbers;
  const int64_t worthwhile = std::max<int64_t>(windows / 8, 2);
  const int64_t runs = std::max<int64_t>(1, std::min({affordable, worthwhile, int64_t(16)}));
  args.run_windows = std::max<int64_t>(1, (windows + runs - 1) / runs);
  args.runs = (windows + args.run_windows - 1) / args.run_windows;
  Tensor sums = fresh(x, {args.runs, args.h, args.w, 2 * args.w}, wide(x));
  std::vector<double> by_bias(args.runs * args.h * args.w), by_scale(args.runs * args.c),
      by_shift(args.runs * args.c);
  args.grad_weight = sums.mutable_data_ptr();
  args.grad_bias = by_bias.data();
  args.grad_norm_weight = by_scale.data();
  args.grad_norm_bias = by_shift.data();
  spread(FASTMIX_KERNELS(windowed_sgu_backward), args, args.runs, 3 * nanoseconds(args));

  Tensor grad_weight = fresh(weight);
  is_double(x) ? add_runs<double>(sums, grad_weight) : add_runs<float>(sums, grad_weight);
  return {grad_x,
          grad_weight,
          totals(by_bias, bias),
          norm_weight ? totals(by_scale, *norm_weight) : nothing(x),
          norm_bias ? totals(by_shift, *norm_bias) : nothing(x),
          grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("windowed_sgu", TORCH_BOX(&windowed_sgu));
  m.impl("windowed_sgu_backward", TORCH_BOX(&windowed_sgu_backward));
}

}  // namespace fastmix

#endif
