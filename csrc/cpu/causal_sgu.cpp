// out = activation(mix(norm(gate)) + bias + gate_residual) · res, with x = [res, gate].
//
// Every step mixes all steps up to itself, so a unit of work is a block of a head's channels at
// all steps: normalised, they stay in cache, and the lower triangle of the head's weight passes
// by. Backward goes in phases. What a unit of one phase needs of others lies in two arrays of
// the gate's size: one that is used twice, and the place of the gate's gradient if that will do.

#include "sgu.h"

namespace fastmix {

struct CausalSgu {
  int64_t b, n, c, h, s;
  Activation activation;
  double eps;
  const double *bias, *norm_weight, *norm_bias;  // (h, s), (c,), (c,)
  const void* weight;                            // (h, s, s), rows without gaps
  int64_t weight_head, weight_row;               // its strides
  Type weight_type;
  Source x, residual, grad;
  Sink out, grad_x, grad_residual;
  // In the compute type. Rows of whole vectors: n_ numbers for n, d_ for a head's channels.
  int64_t n_, d_;
  void* statistics;  // (b, n, 2): mean and inverse deviation of the gate
  void* turned;      // (b, h, d_, n_), the normed gate; then its gradient (b, n, h, d_)
  void* grad_mixed;  // (b, n, h, d_), with so many numbers from step to step:
  int64_t mixed_row;
  Sink grad_weight;  // (h · s, as many columns of zeros as has the weight of others, and s)
  double* grad_bias;
  int64_t runs;      // of steps, each with its own sums: (runs, c)
  double *grad_norm_weight, *grad_norm_bias;  // zeros at first
};

constexpr int64_t kNormed = 64;  // steps that a unit normalises
constexpr int64_t kBlock = 64;   // channels of a unit
constexpr int64_t kStrip = 48;   // rows of the weight's gradient of a unit

}  // namespace fastmix

FASTMIX_KERNEL(causal_sgu_norm, fastmix::CausalSgu)
FASTMIX_KERNEL(causal_sgu_forward, fastmix::CausalSgu)
FASTMIX_KERNEL(causal_sgu_grad_mixed, fastmix::CausalSgu)
FASTMIX_KERNEL(causal_sgu_grad_weight, fastmix::CausalSgu)
FASTMIX_KERNEL(causal_sgu_grad_normed, fastmix::CausalSgu)
FASTMIX_KERNEL(causal_sgu_grad_gate, fastmix::CausalSgu)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

template <class C>
void norm(const CausalSgu& f, int64_t begin, int64_t end) {
  Scratch scratch;
  C* wide = scratch.take<C>(f.c);
  for (int64_t r = begin * kNormed; r < smaller(end * kNormed, f.b * f.n); ++r) {
    C* to = static_cast<C*>(f.statistics) + 2 * r;
    const C* x = read(f.x, r / f.n, r % f.n, f.c, f.c, wide);
    row_statistics(x, f.c, f.eps, to, to + 1);
  }
}

// A block of a head's channels at all steps: rows of kBlock.
template <class C>
struct Block {
  const CausalSgu& f;
  int64_t b, head, c0, count, width;  // channels from c0 of c; as whole vectors
  int64_t at;                         // where they begin in a row (h, d_)
  C *normed, *mixed;
  C *wide, *wide_res, *wide_grad, *scale, *shift, *value, *slope;

  Block(const CausalSgu& f, Scratch& scratch) : f(f) {
    normed = scratch.take<C>(f.n * kBlock);
    mixed = scratch.take<C>(f.n * kBlock);
    C** const rows[] = {&wide, &wide_res, &wide_grad, &scale, &shift, &value, &slope};
    for (C** row : rows) {
      *row = scratch.take<C>(kBlock);
      memset(*row, 0, kBlock * sizeof(C));
    }
  }

  void place(int64_t index) {
    const int64_t d = f.c / f.h, blocks = (f.d_ + kBlock - 1) / kBlock;
    const int64_t offset = index % blocks * kBlock;
    head = index / blocks % f.h;
    b = index / blocks / f.h;
    count = smaller(kBlock, d - offset);
    width = smaller(kBlock, f.d_ - offset);
    c0 = head * d + offset;
    at = head * f.d_ + offset;
  }

  // to += triangle(W) · from, or to = triangle(W)ᵀ · from
  void multiply(bool turned, const C* from, C* to) const {
    by_type(f.weight_type, [&](auto stored) {
      using A = decltype(stored);
      if constexpr (sizeof(Computed<A>) == sizeof(C)) {
        const A* weight = static_cast<const A*>(f.weight) + head * f.weight_head;
        gemm<C, A>(f.n, width, f.n,
                   {weight, turned ? 1 : f.weight_row, turned ? f.weight_row : 1},
                   {from, kBlock}, {to, kBlock}, !turned, turned ? kUpper : kLower);
      }
    });
  }

  // A step of an array (b, n, h, d_), from this block's channels on.
  C* row_of(void* array, int64_t row, int64_t t) const {
    return static_cast<C*>(array) + (b * f.n + t) * row + at;
  }

  void fetch(const Source& s, int64_t t, int64_t from) const {
    if (t < f.n) prefetch(s, b, t, from, count);
  }

  void normalise() {
    for (int64_t c = 0; c < count; ++c) {
      scale[c] = static_cast<C>(f.norm_weight[c0 + c]);
      shift[c] = static_cast<C>(f.norm_bias[c0 + c]);
    }
    const C* statistics = static_cast<const C*>(f.statistics) + 2 * b * f.n;
    for (int64_t t = 0; t < f.n; ++t) {
      fetch(f.x, t + kAhead, f.c + c0);
      const C* x = read(f.x, b, t, f.c + c0, count, wide);
      const C mean = statistics[2 * t], inverse = statistics[2 * t + 1];
      C* to = normed + t * kBlock;
      for (int64_t c = 0; c < count; ++c) to[c] = (x[c] - mean) * inverse * scale[c] + shift[c];
      for (int64_t c = count; c < width; ++c) to[c] = 0;
    }
  }

  // mixed = bias + triangle(W) · normed, with the residual
  void mix() {
    for (int64_t t = 0; t < f.n; ++t) {
      const C bias = static_cast<C>(f.bias[head * f.s + t]);
      for (int64_t c = 0; c < width; ++c) mixed[t * kBlock + c] = bias;
    }
    multiply(false, normed, mixed);
    if (!present(f.residual)) return;
    for (int64_t t = 0; t < f.n; ++t) {
      const C* residual = read(f.residual, b, t, c0, count, wide);
      for (int64_t c = 0; c < count; ++c) mixed[t * kBlock + c] += residual[c];
    }
  }
};

template <class C>
void forward(const CausalSgu& f, int64_t begin, int64_t end) {
  Scratch scratch;
  Block<C> block(f, scratch);
  for (int64_t i = begin; i < end; ++i) {
    block.place(i);
    block.normalise();
    block.mix();
    for (int64_t t = 0; t < f.n; ++t) {
      block.fetch(f.x, t + kAhead, block.c0);
      const C* row = block.mixed + t * kBlock;
      if (f.activation != Activation::none) {
        const C* res = read(f.x, block.b, t, block.c0, block.count, block.wide_res);
        apply_gate(f.activation, row, res, block.value, block.count);
        row = block.value;
      }
      write(f.out, block.b, t, block.c0, block.count, row);
    }
  }
  streamed();
}

// The mixture's gradient, and those of res and of the residual; the normed gate, turned.
template <class C>
void grad_mixed(const CausalSgu& f, int64_t begin, int64_t end) {
  Scratch scratch;
  Block<C> block(f, scratch);
  C *grad_mixed = block.slope, *grad_res = block.value;
  for (int64_t i = begin; i < end; ++i) {
    block.place(i);
    block.normalise();
    transpose(f.n, block.width, block.normed, kBlock,
              static_cast<C*>(f.turned) + (block.b * f.h * f.d_ + block.at) * f.n_, f.n_);
    if (f.activation != Activation::none) block.mix();
    for (int64_t t = 0; t < f.n; ++t) {
      block.fetch(f.x, t + kAhead, block.c0);
      block.fetch(f.grad, t + kAhead, block.c0);
      const C* grad = read(f.grad, block.b, t, block.c0, block.count, block.wide_grad);
      if (f.activation == Activation::none) {
        memcpy(grad_mixed, grad, block.count * sizeof(C));
      } else {
        const C* res = read(f.x, block.b, t, block.c0, block.count, block.wide_res);
        apply_gate_backward(f.activation, block.mixed + t * kBlock, res, grad, grad_mixed,
                            grad_res, block.count);
      }
      for (int64_t c = block.count; c < block.width; ++c) grad_mixed[c] = 0;
      memcpy(block.row_of(f.grad_mixed, f.mixed_row, t), grad_mixed, block.width * sizeof(C));
      write(f.grad_x, block.b, t, block.c0, block.count, grad_res);
      if (f.grad_residual.data)
        write(f.grad_residual, block.b, t, block.c0, block.count, grad_mixed);
    }
  }
  streamed();
}

// A strip of rows of the weight's gradient, nothing above the diagonal, and of the bias's.
template <class C>
void grad_weight(const CausalSgu& f, int64_t begin, int64_t end) {
  Scratch scratch;
  C *sums = scratch.take<C>(kStrip * f.n_), *zeros = scratch.take<C>(f.s);
  memset(zeros, 0, f.s * sizeof(C));
  const int64_t others = f.grad_weight.channels - f.s;
  memset(sums, 0, kStrip * f.n_ * sizeof(C));
  const int64_t d = f.c / f.h, strips = (f.s + kStrip - 1) / kStrip, row = f.mixed_row;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / strips, first = i % strips * kStrip;
    const int64_t rows = smaller(kStrip, f.n - first);
    for (int64_t b = 0; b < f.b && rows > 0; ++b) {
      const C* grad = static_cast<const C*>(f.grad_mixed) + (b * f.n + first) * row + head * f.d_;
      const C* turned = static_cast<const C*>(f.turned) + (b * f.h + head) * f.d_ * f.n_;
      gemm<C>(rows, padded<C>(first + rows), d, {grad, row, 1}, {turned, f.n_}, {sums, f.n_},
              b > 0, kFull);
    }
    for (int64_t r = first; r < smaller(first + kStrip, f.s); ++r) {
      const int64_t kept = r < f.n ? r + 1 : 0, to = head * f.s + r;
      write(f.grad_weight, 0, to, 0, others, zeros);
      write(f.grad_weight, 0, to, others, kept, sums + (r - first) * f.n_);
      write(f.grad_weight, 0, to, others + kept, f.s - kept, zeros);
      double total = 0;
      for (int64_t b = 0; b < f.b && r < f.n; ++b) {
        const C* grad = static_cast<const C*>(f.grad_mixed) + (b * f.n + r) * row + head * f.d_;
        total += sum_over<C>(d, [&](int64_t c) LAMBDA { return grad[c]; });
      }
      f.grad_bias[head * f.s + r] = total;
    }
  }
  streamed();
}

// triangle(W)ᵀ · grad_mixed, where the normed gate was.
template <class C>
void grad_normed(const CausalSgu& f, int64_t begin, int64_t end) {
  Scratch scratch;
  Block<C> block(f, scratch);
  C *grad = block.mixed, *found = block.normed;
  for (int64_t i = begin; i < end; ++i) {
    block.place(i);
    for (int64_t t = 0; t < f.n; ++t)
      memcpy(grad + t * kBlock, block.row_of(f.grad_mixed, f.mixed_row, t),
             block.width * sizeof(C));
    block.multiply(true, grad, found);
    for (int64_t t = 0; t < f.n; ++t)
      memcpy(block.row_of(f.turned, f.h * f.d_, t), found + t * kBlock, block.width * sizeof(C));
  }
}

// The gradient of the layer norm, by runs of steps.
template <class C>
void grad_gate(const CausalSgu& f, int64_t begin, int64_t end) {
  Scratch scratch;
  C *wide = scratch.take<C>(f.c), *row = scratch.take<C>(f.c), *scale = scratch.take<C>(f.c),
    *normal = scratch.take<C>(f.c), *grad = scratch.take<C>(f.c),
    *by_scale = scratch.take<C>(f.c), *by_shift = scratch.take<C>(f.c);
  for (int64_t c = 0; c < f.c; ++c) scale[c] = static_cast<C>(f.norm_weight[c]);
  const int64_t d = f.c / f.h, steps = f.b * f.n;
  for (int64_t run = begin; run < end; ++run) {
    double *all_scale = f.grad_norm_weight + run * f.c, *all_shift = f.grad_norm_bias + run * f.c;
    const int64_t last = steps * (run + 1) / f.runs;
    for (int64_t r = steps * run / f.runs; r < last;) {
      memset(by_scale, 0, f.c * sizeof(C));
      memset(by_shift, 0, f.c * sizeof(C));
      for (const int64_t stop = smaller(r + kNormed, last); r < stop; ++r) {
        const int64_t b = r / f.n, t = r % f.n;
        const C* x = read(f.x, b, t, f.c, f.c, wide);
        const C* found = static_cast<const C*>(f.turned) + r * f.h * f.d_;
        for (int64_t head = 0; head < f.h; ++head)
          memcpy(row + head * d, found + head * f.d_, d * sizeof(C));
        const C* statistics = static_cast<const C*>(f.statistics) + 2 * r;
        norm_backward(x, row, statistics[0], statistics[1], scale, by_scale, by_shift, normal,
                      grad, f.c);
        write(f.grad_x, b, t, f.c, f.c, grad);
      }
      for (int64_t c = 0; c < f.c; ++c) {
        all_scale[c] += by_scale[c];
        all_shift[c] += by_shift[c];
      }
    }
  }
  streamed();
}

}  // namespace

#define FASTMIX_PHASE(name)                                                           \
  void causal_sgu_##name(const CausalSgu& f, int64_t begin, int64_t end) {            \
    f.x.type == Type::f64 ? name<double>(f, begin, end) : name<float>(f, begin, end); \
  }
FASTMIX_PHASE(norm)
FASTMIX_PHASE(forward)
FASTMIX_PHASE(grad_mixed)
FASTMIX_PHASE(grad_weight)
FASTMIX_PHASE(grad_normed)
FASTMIX_PHASE(grad_gate)

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include "sgu_tensors.h"

namespace fastmix {
namespace {

// The weight (h, s, s), or the last s columns of more, as it is if that is computed with in the
// type that is wanted: it may be large.
Tensor stored(Tensor weight, ScalarType wanted) {
  const int64_t s = weight.size(1);
  const Tensor own = torch::stable::narrow(weight, 2, weight.size(2) - s, s);
  const Tensor found = wide(own) == wanted ? own : converted(own, wanted);
  return found.stride(2) == 1 ? found : dense(found);
}

// The sizes, and the norm's statistics.
struct Call {
  CausalSgu f{};
  Parameters parameters;
  Tensor statistics;
  int64_t blocks;

  Call(const Tensor& x, const Tensor& weight, const Tensor& bias, const Maybe& norm_weight,
       const Maybe& norm_bias, double eps, const Maybe& residual, const std::string& activation)
      : parameters(x, stored(weight, wide(x)), bias, norm_weight, norm_bias),
        statistics(fresh(x, {x.size(0), x.size(1), 2}, wide(x))) {
    fill(f, x, parameters, eps, residual, activation);
    f.s = weight.size(1);
    f.weight_type = type_of(parameters.weight.scalar_type());
    f.weight_head = parameters.weight.stride(0);
    f.weight_row = parameters.weight.stride(1);
    f.statistics = statistics.mutable_data_ptr();
    // Whole vectors on every machine; an odd number of them, so that rows of powers of two do
    // not crowd a few places of the caches.
    f.d_ = (f.c / f.h + 15) / 16 * 16;
    f.n_ = (f.n + 15) / 32 * 32 + 16;
    blocks = f.b * f.h * ((f.d_ + kBlock - 1) / kBlock);
    spread(FASTMIX_KERNELS(causal_sgu_norm), f, (f.b * f.n + kNormed - 1) / kNormed);
  }
};

}  // namespace

Tensor causal_sgu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const Maybe& norm_weight, const Maybe& norm_bias, double eps,
                  const Maybe& residual, std::string activation) {
  Call call(x, weight, bias, norm_weight, norm_bias, eps, residual, activation);
  CausalSgu& f = call.f;
  Tensor out = fresh(x, {f.b, f.n, f.c}, x.scalar_type());
  f.out = sink(out, f.n, f.c);
  spread(FASTMIX_KERNELS(causal_sgu_forward), f, call.blocks);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> causal_sgu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Maybe& norm_weight, const Maybe& norm_bias, double eps, const Maybe& residual,
    std::string activation) {
  Call call(x, weight, bias, norm_weight, norm_bias, eps, residual, activation);
  CausalSgu& f = call.f;
  Tensor grad_x = fresh(x), grad_weight = fresh(weight),
         grad_residual = residual ? fresh(*residual) : nothing(x);
  f.grad = source(grad);
  f.grad_x = sink(grad_x, f.n, 2 * f.c);
  if (residual) f.grad_residual = sink(grad_residual, f.n, f.c);
  f.grad_weight = sink(grad_weight, f.h * f.s, weight.size(2));
  const bool fits = x.scalar_type() == wide(x) && f.h * f.d_ == f.c;  // into grad_x, for now
  const Tensor turned = fresh(x, {f.b, f.h * f.d_, f.n_}, wide(x)),
               grad_mixed = fits ? nothing(x) : fresh(x, {f.b, f.n, f.h * f.d_}, wide(x));
  f.turned = turned.mutable_data_ptr();
  f.mixed_row = fits ? 2 * f.c : f.h * f.d_;
  f.grad_mixed = fits ? static_cast<char*>(f.grad_x.data) + f.c * x.element_size()
                      : grad_mixed.mutable_data_ptr();
  f.runs = std::max<int64_t>(1, std::min<int64_t>(f.b * f.n / kNormed, 16));
  std::vector<double> by_bias(f.h * f.s), by_scale(f.runs * f.c), by_shift(f.runs * f.c);
  f.grad_bias = by_bias.data();
  f.grad_norm_weight = by_scale.data();
  f.grad_norm_bias = by_shift.data();
  spread(FASTMIX_KERNELS(causal_sgu_grad_mixed), f, call.blocks);
  spread(FASTMIX_KERNELS(causal_sgu_grad_weight), f, f.h * ((f.s + kStrip - 1) / kStrip));
  spread(FASTMIX_KERNELS(causal_sgu_grad_normed), f, call.blocks);
  spread(FASTMIX_KERNELS(causal_sgu_grad_gate), f, f.runs);
  return {grad_x, grad_weight, totals(by_bias, bias),
          norm_weight ? totals(by_scale, *norm_weight) : nothing(x),
          norm_bias ? totals(by_shift, *norm_bias) : nothing(x), grad_residual};
}

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("causal_sgu", TORCH_BOX(&causal_sgu));
  m.impl("causal_sgu_backward", TORCH_BOX(&causal_sgu_backward));
}

}  // namespace fastmix

#endif
