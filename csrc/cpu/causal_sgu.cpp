// out = activation(mix(norm(gate)) + bias + gate_residual) · res, with x = [res, gate].
//
// Every step mixes all steps up to itself, so a unit of work is a block of a head's channels at
// all steps: normalised, they stay in cache, and the lower triangle of the head's weight passes
// by. Backward goes in phases. What one phase leaves to the next lies in two arrays of the gate's
// size: `turned`, which is used twice, and `grad_mixed`, which lies in the memory of the gate's
// gradient if its dtype and shape allow.

#include "sgu.h"

namespace fastmix {

struct CausalSgu {
  int64_t b, n, c, h, s;
  Activation activation;
  bool unit;  // whether the matrix unit multiplies with the weight
  double eps;
  const double *bias, *norm_weight, *norm_bias;  // (h, s), (c,), (c,)
  const void* weight;                            // (h, s, s), rows without gaps
  int64_t weight_head, weight_row;               // its strides
  Type weight_type;
  Source x, residual, grad;
  Sink out, grad_x, grad_residual;
  // In the compute type. Rows of whole vectors: n_padded numbers for n, d_padded for a head's
  // channels.
  int64_t n_padded, d_padded;
  void* statistics;  // (b, n, 2): mean and inverse deviation of the gate
  void*
      turned;  // (b, h, panels, d_padded, steps of one): the normed gate; its gradient (b, n, h, …)
  void* grad_mixed;  // (b, n, h, d_padded), with mixed_row numbers from step to step
  int64_t mixed_row;
  Sink grad_weight;  // (h · s, as many columns of zeros as has the weight of others, and s)
  double* grad_bias;
  int64_t runs;                               // of steps, each with its own sums: (runs, c)
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

// Steps that lie side by side in `turned`: those of a panel of the products that read it, so that
// its rows lie on few pages, or all.
template <class C>
int64_t panel_of(const CausalSgu& args) {
  return kNarrow ? kVectors * Simd<C>::lanes : args.n_padded;
}

template <class C>
void norm(const CausalSgu& args, int64_t begin, int64_t end) {
  Scratch scratch;
  C* wide = scratch.take<C>(args.c);
  for (int64_t r = begin * kNormed; r < smaller(end * kNormed, args.b * args.n); ++r) {
    C* to = static_cast<C*>(args.statistics) + 2 * r;
    const C* x = read(args.x, r / args.n, r % args.n, args.c, args.c, wide);
    row_statistics(x, args.c, args.eps, to, to + 1);
  }
}

// A block of a head's channels at all steps: rows of kBlock.
template <class C>
struct Block {
  const CausalSgu& args;
  int64_t b, head, c0, count, width;  // channels from c0 of c; as whole vectors
  int64_t at;                         // where they begin in a row (h, d_padded)
  C *normed, *mixed;
  C *wide, *wide_res, *wide_grad, *scale, *shift, *value, *slope;

  Block(const CausalSgu& args, Scratch& scratch) : args(args) {
    normed = scratch.take<C>(args.n * kBlock);
    mixed = scratch.take<C>(args.n * kBlock);
    C** const rows[] = {&wide, &wide_res, &wide_grad, &scale, &shift, &value, &slope};
    for (C** row : rows) {
      *row = scratch.take<C>(kBlock);
      memset(*row, 0, kBlock * sizeof(C));
    }
  }

  void select(int64_t index) {
    const int64_t d = args.c / args.h, blocks = (args.d_padded + kBlock - 1) / kBlock;
    const int64_t offset = index % blocks * kBlock;
    head = index / blocks % args.h;
    b = index / blocks / args.h;
    count = smaller(kBlock, d - offset);
    width = smaller(kBlock, args.d_padded - offset);
    c0 = head * d + offset;
    at = head * args.d_padded + offset;
  }

  // to += triangle(W) · from, or to = triangle(W)ᵀ · from
  void multiply(bool turned, const C* from, C* to) const {
    by_type(args.weight_type, [&](auto stored) {
      using A = decltype(stored);
      if constexpr (sizeof(Computed<A>) == sizeof(C)) {
        const A* weight = static_cast<const A*>(args.weight) + head * args.weight_head;
        matrix_product<C, A>(args.unit, args.n, width, args.n,
                             {weight, turned ? 1 : args.weight_row, turned ? args.weight_row : 1},
                             {from, kBlock}, {to, kBlock}, !turned, turned ? kUpper : kLower);
      }
    });
  }

  // A step of an array (b, n, h, d_padded), from this block's channels on.
  C* row_of(void* array, int64_t row, int64_t t) const {
    return static_cast<C*>(array) + (b * args.n + t) * row + at;
  }

  void fetch(const Source& s, int64_t t, int64_t from) const {
    if (t < args.n) prefetch(s, b, t, from, count);
  }

  void normalise() {
    for (int64_t c = 0; c < count; ++c) {
      scale[c] = static_cast<C>(args.norm_weight[c0 + c]);
      shift[c] = static_cast<C>(args.norm_bias[c0 + c]);
    }
    const C* statistics = static_cast<const C*>(args.statistics) + 2 * b * args.n;
    for (int64_t t = 0; t < args.n; ++t) {
      fetch(args.x, t + kAhead, args.c + c0);
      const C* x = read(args.x, b, t, args.c + c0, count, wide);
      const C mean = statistics[2 * t], inverse = statistics[2 * t + 1];
      C* to = normed + t * kBlock;
      for (int64_t c = 0; c < count; ++c) to[c] = (x[c] - mean) * inverse * scale[c] + shift[c];
      for (int64_t c = count; c < width; ++c) to[c] = 0;
    }
  }

  // The normed block, panel by panel.
  void turn() {
    const int64_t panel = panel_of<C>(args), offset = at - head * args.d_padded;
    C* turned = static_cast<C*>(args.turned) + (b * args.h + head) * args.d_padded * args.n_padded +
                offset * panel;
    for (int64_t t = 0; t < args.n; t += panel, turned += args.d_padded * panel)
      transpose(smaller(panel, args.n - t), width, normed + t * kBlock, kBlock, turned, panel);
  }

  // mixed = bias + triangle(W) · normed, with the residual
  void mix() {
    for (int64_t t = 0; t < args.n; ++t) {
      const C bias = static_cast<C>(args.bias[head * args.s + t]);
      for (int64_t c = 0; c < width; ++c) mixed[t * kBlock + c] = bias;
    }
    multiply(false, normed, mixed);
    if (!present(args.residual)) return;
    for (int64_t t = 0; t < args.n; ++t) {
      const C* residual = read(args.residual, b, t, c0, count, wide);
      for (int64_t c = 0; c < count; ++c) mixed[t * kBlock + c] += residual[c];
    }
  }
};

template <class C>
void forward(const CausalSgu& args, int64_t begin, int64_t end) {
  Scratch scratch;
  const Tiles tiles(args.unit);
  Block<C> block(args, scratch);
  for (int64_t i = begin; i < end; ++i) {
    block.select(i);
    block.normalise();
    block.mix();
    for (int64_t t = 0; t < args.n; ++t) {
      block.fetch(args.x, t + kAhead, block.c0);
      const C* row = block.mixed + t * kBlock;
      if (args.activation != Activation::outside) {
        const C* res = read(args.x, block.b, t, block.c0, block.count, block.wide_res);
        apply_gate(args.activation, row, res, block.value, block.count);
        row = block.value;
      }
      write(args.out, block.b, t, block.c0, block.count, row);
    }
  }
  streamed();
}

// The mixture's gradient, and those of res and of the residual; the normed gate, turned.
template <class C>
void grad_mixed(const CausalSgu& args, int64_t begin, int64_t end) {
  Scratch scratch;
  const Tiles tiles(args.unit);
  Block<C> block(args, scratch);
  C *grad_mixed = block.slope, *grad_res = block.value;
  for (int64_t i = begin; i < end; ++i) {
    block.select(i);
    block.normalise();
    block.turn();
    if (args.activation != Activation::outside) block.mix();
    for (int64_t t = 0; t < args.n; ++t) {
      block.fetch(args.x, t + kAhead, block.c0);
      block.fetch(args.grad, t + kAhead, block.c0);
      const C* grad = read(args.grad, block.b, t, block.c0, block.count, block.wide_grad);
      if (args.activation == Activation::outside) {
        memcpy(grad_mixed, grad, block.count * sizeof(C));
      } else {
        const C* res = read(args.x, block.b, t, block.c0, block.count, block.wide_res);
        apply_gate_backward(args.activation, block.mixed + t * kBlock, res, grad, grad_mixed,
                            grad_res, block.count);
      }
      for (int64_t c = block.count; c < block.width; ++c) grad_mixed[c] = 0;
      memcpy(block.row_of(args.grad_mixed, args.mixed_row, t), grad_mixed, block.width * sizeof(C));
      write(args.grad_x, block.b, t, block.c0, block.count, grad_res);
      if (args.grad_residual.data)
        write(args.grad_residual, block.b, t, block.c0, block.count, grad_mixed);
    }
  }
  streamed();
}

// A strip of rows of the weight's gradient, nothing above the diagonal, and of the bias's.
template <class C>
void grad_weight(const CausalSgu& args, int64_t begin, int64_t end) {
  Scratch scratch;
  C *sums = scratch.take<C>(kStrip * args.n_padded), *zeros = scratch.take<C>(args.s),
    *strip = scratch.take<C>(kStrip * args.d_padded);
  memset(zeros, 0, args.s * sizeof(C));
  const int64_t others = args.grad_weight.channels - args.s;
  memset(sums, 0, kStrip * args.n_padded * sizeof(C));
  const int64_t d = args.c / args.h, strips = (args.s + kStrip - 1) / kStrip, row = args.mixed_row,
                panel = panel_of<C>(args);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / strips, first = i % strips * kStrip;
    const int64_t rows = smaller(kStrip, args.n - first);
    for (int64_t b = 0; b < args.b && rows > 0; ++b) {
      const C* grad = static_cast<const C*>(args.grad_mixed) + (b * args.n + first) * row +
                      head * args.d_padded;
      const C* turned =
          static_cast<const C*>(args.turned) + (b * args.h + head) * args.d_padded * args.n_padded;
      // Rows of x lie so far apart that they would crowd a few places of the caches.
      for (int64_t r = 0; r < rows; ++r)
        memcpy(strip + r * args.d_padded, grad + r * row, d * sizeof(C));
      for (int64_t t = 0; t < first + rows; t += panel)
        gemm<C>(rows, smaller(panel, padded<C>(first + rows - t)), d, {strip, args.d_padded, 1},
                {turned + t * args.d_padded, panel}, {sums + t, args.n_padded}, b > 0, kFull);
    }
    for (int64_t r = first; r < smaller(first + kStrip, args.s); ++r) {
      const int64_t kept = r < args.n ? r + 1 : 0, to = head * args.s + r;
      write(args.grad_weight, 0, to, 0, others, zeros);
      write(args.grad_weight, 0, to, others, kept, sums + (r - first) * args.n_padded);
      write(args.grad_weight, 0, to, others + kept, args.s - kept, zeros);
      double total = 0;
      for (int64_t b = 0; b < args.b && r < args.n; ++b) {
        const C* grad =
            static_cast<const C*>(args.grad_mixed) + (b * args.n + r) * row + head * args.d_padded;
        total += sum_over<C>(d, [&](int64_t c) FASTMIX_LAMBDA { return grad[c]; });
      }
      args.grad_bias[head * args.s + r] = total;
    }
  }
  streamed();
}

// triangle(W)ᵀ · grad_mixed, where the normed gate was.
template <class C>
void grad_normed(const CausalSgu& args, int64_t begin, int64_t end) {
  Scratch scratch;
  const Tiles tiles(args.unit);
  Block<C> block(args, scratch);
  C *grad = block.mixed, *product = block.normed;
  for (int64_t i = begin; i < end; ++i) {
    block.select(i);
    for (int64_t t = 0; t < args.n; ++t)
      memcpy(grad + t * kBlock, block.row_of(args.grad_mixed, args.mixed_row, t),
             block.width * sizeof(C));
    block.multiply(true, grad, product);
    for (int64_t t = 0; t < args.n; ++t)
      memcpy(block.row_of(args.turned, args.h * args.d_padded, t), product + t * kBlock,
             block.width * sizeof(C));
  }
}

// The gradient of the layer norm, by runs of steps.
template <class C>
void grad_gate(const CausalSgu& args, int64_t begin, int64_t end) {
  Scratch scratch;
  C *wide = scratch.take<C>(args.c), *row = scratch.take<C>(args.c),
    *scale = scratch.take<C>(args.c), *normal = scratch.take<C>(args.c),
    *grad = scratch.take<C>(args.c), *by_scale = scratch.take<C>(args.c),
    *by_shift = scratch.take<C>(args.c);
  for (int64_t c = 0; c < args.c; ++c) scale[c] = static_cast<C>(args.norm_weight[c]);
  const int64_t d = args.c / args.h, steps = args.b * args.n;
  for (int64_t run = begin; run < end; ++run) {
    double *all_scale = args.grad_norm_weight + run * args.c,
           *all_shift = args.grad_norm_bias + run * args.c;
    const int64_t last = steps * (run + 1) / args.runs;
    for (int64_t r = steps * run / args.runs; r < last;) {
      memset(by_scale, 0, args.c * sizeof(C));
      memset(by_shift, 0, args.c * sizeof(C));
      for (const int64_t stop = smaller(r + kNormed, last); r < stop; ++r) {
        const int64_t b = r / args.n, t = r % args.n;
        const C* x = read(args.x, b, t, args.c, args.c, wide);
        const C* grad_normed = static_cast<const C*>(args.turned) + r * args.h * args.d_padded;
        for (int64_t head = 0; head < args.h; ++head)
          memcpy(row + head * d, grad_normed + head * args.d_padded, d * sizeof(C));
        const C* statistics = static_cast<const C*>(args.statistics) + 2 * r;
        norm_backward(x, row, statistics[0], statistics[1], args.eps, scale, by_scale, by_shift,
                      normal, grad, args.c);
        write(args.grad_x, b, t, args.c, args.c, grad);
      }
      for (int64_t c = 0; c < args.c; ++c) {
        all_scale[c] += by_scale[c];
        all_shift[c] += by_shift[c];
      }
    }
  }
  streamed();
}

}  // namespace

#define FASTMIX_PHASE(name)                                                                    \
  void causal_sgu_##name(const CausalSgu& args, int64_t begin, int64_t end) {                  \
    args.x.type == Type::f64 ? name<double>(args, begin, end) : name<float>(args, begin, end); \
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

constexpr Checks kCausalChecks{"causal_sgu"};

// The weight (h, s, s), or the last s columns of more, as it is if that is computed with in the
// type that is wanted: it may be large.
Tensor stored(Tensor weight, ScalarType wanted) {
  const int64_t s = weight.size(1);
  const Tensor own = torch::stable::narrow(weight, 2, weight.size(2) - s, s);
  const Tensor in_type = wide(own) == wanted ? own : converted(own, wanted);
  return in_type.stride(2) == 1 ? in_type : dense(in_type);
}

// The sizes, and the norm's statistics.
struct CausalSguCall {
  CausalSgu args{};
  Parameters parameters;
  Tensor statistics;
  int64_t blocks;
  double passing, mixing;  // nanoseconds of one thread: for reading rows, for a product

  CausalSguCall(const Tensor& x, const Tensor& weight, const Tensor& bias,
                const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                const OptionalTensor& residual, Activation activation)
      : parameters(x, stored(weight, wide(x)), weight.scalar_type() == ScalarType::BFloat16, bias,
                   norm_weight, norm_bias),
        statistics(fresh(x, {x.size(0), x.size(1), 2}, wide(x))) {
    fill(args, x, parameters, eps, residual, activation);
    args.s = weight.size(1);
    args.weight_type = type_of(parameters.weight.scalar_type());
    args.weight_head = parameters.weight.stride(0);
    args.weight_row = parameters.weight.stride(1);
    args.statistics = statistics.mutable_data_ptr();
    // Whole vectors on every machine; an odd number of them, so that rows of powers of two do
    // not crowd a few places of the caches.
    args.d_padded = (args.c / args.h + 15) / 16 * 16;
    args.n_padded = (args.n + 15) / 32 * 32 + 16;
    blocks = args.b * args.h * ((args.d_padded + kBlock - 1) / kBlock);
    passing = 1.0 * args.b * args.n * args.c;
    mixing = 0.02 * args.n * passing;
    spread(FASTMIX_KERNELS(causal_sgu_norm), args, (args.b * args.n + kNormed - 1) / kNormed,
           passing);
  }
};

}  // namespace

Tensor causal_sgu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                  const OptionalTensor& residual, Activation activation) {
  check(kCausalChecks, x, weight, bias, norm_weight, norm_bias, residual, true);
  CausalSguCall call(x, weight, bias, norm_weight, norm_bias, eps, residual, activation);
  CausalSgu& args = call.args;
  Tensor out = fresh(x, {args.b, args.n, args.c}, x.scalar_type());
  args.out = sink(out, args.n, args.c);
  spread(FASTMIX_KERNELS(causal_sgu_forward), args, call.blocks, call.passing + call.mixing);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> causal_sgu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
    const OptionalTensor& residual, Activation activation) {
  check(kCausalChecks, x, weight, bias, norm_weight, norm_bias, residual, true);
  kCausalChecks.tensor("grad_out", grad, {x.size(0), x.size(1), x.size(2) / 2}, kReal);
  CausalSguCall call(x, weight, bias, norm_weight, norm_bias, eps, residual, activation);
  CausalSgu& args = call.args;
  Tensor grad_x = fresh(x), grad_weight = fresh(weight),
         grad_residual = residual ? fresh(*residual) : nothing(x);
  args.grad = source(grad);
  args.grad_x = sink(grad_x, args.n, 2 * args.c);
  if (residual) args.grad_residual = sink(grad_residual, args.n, args.c);
  args.grad_weight = sink(grad_weight, args.h * args.s, weight.size(2));
  const bool fits =
      x.scalar_type() == wide(x) && args.h * args.d_padded == args.c;  // into grad_x, for now
  const Tensor turned = fresh(x, {args.b, args.h * args.d_padded, args.n_padded}, wide(x)),
               grad_mixed =
                   fits ? nothing(x) : fresh(x, {args.b, args.n, args.h * args.d_padded}, wide(x));
  args.turned = turned.mutable_data_ptr();
  args.mixed_row = fits ? 2 * args.c : args.h * args.d_padded;
  args.grad_mixed = fits ? static_cast<char*>(args.grad_x.data) + args.c * x.element_size()
                         : grad_mixed.mutable_data_ptr();
  args.runs = std::max<int64_t>(1, std::min<int64_t>(args.b * args.n / kNormed, 16));
  std::vector<double> by_bias(args.h * args.s), by_scale(args.runs * args.c),
      by_shift(args.runs * args.c);
  args.grad_bias = by_bias.data();
  args.grad_norm_weight = by_scale.data();
  args.grad_norm_bias = by_shift.data();
  spread(FASTMIX_KERNELS(causal_sgu_grad_mixed), args, call.blocks, call.passing + call.mixing);
  spread(FASTMIX_KERNELS(causal_sgu_grad_weight), args, args.h * ((args.s + kStrip - 1) / kStrip),
         call.mixing + 0.5 * args.h * args.s * weight.size(2));
  spread(FASTMIX_KERNELS(causal_sgu_grad_normed), args, call.blocks, call.mixing);
  spread(FASTMIX_KERNELS(causal_sgu_grad_gate), args, args.runs, call.passing);
  return {grad_x,
          grad_weight,
          totals(by_bias, bias),
          norm_weight ? totals(by_scale, *norm_weight) : nothing(x),
          norm_bias ? totals(by_shift, *norm_bias) : nothing(x),
          grad_residual};
}

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("causal_sgu", TORCH_BOX(&causal_sgu));
  m.impl("causal_sgu_backward", TORCH_BOX(&causal_sgu_backward));
}

}  // namespace fastmix

#endif
