// A gating unit's step from a state on, whose normed gate becomes a row of the ring (b, size, c)
// that the state keeps. A row of the weight mixes the ring's; out as windowed_sgu.cpp and
// causal_sgu.cpp.
//
// Two phases: a unit of the first is a batch entry, whose gate is normed; of the second a block of
// channels of one, past which the ring's rows go.

#include "sgu.h"

namespace fastmix {

struct SguStep {
  int64_t b, c, h, block;
  Activation activation;
  double eps;
  void* ring;        // in the compute type
  int64_t size, at;  // of it; where the step's own row is
  // Rows of the ring that are mixed, `count` from `first` on, by the weight's columns from `column`
  // on: all that it has of the past. Those of two windows may be two parts.
  struct Part {
    int64_t column, first, count;
  } parts[2];
  int64_t row;  // of weight and bias
  Source x, weight, bias, norm_weight, norm_bias, residual;
  Sink out;
};

}  // namespace fastmix

FASTMIX_KERNEL(sgu_step_norm, fastmix::SguStep)
FASTMIX_KERNEL(sgu_step_mix, fastmix::SguStep)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

template <class C>
C* ring_row(const SguStep& args, int64_t b, int64_t at) {
  return static_cast<C*>(args.ring) + (b * args.size + at) * args.c;
}

// (c,), or as many times `otherwise`
template <class C>
const C* parameter(const Source& s, int64_t count, C otherwise, C* scratch) {
  if (present(s)) return read(s, 0, 0, 0, count, scratch);
  for (int64_t c = 0; c < count; ++c) scratch[c] = otherwise;
  return scratch;
}

template <class C>
void norm(const SguStep& args, int64_t begin, int64_t end) {
  Scratch scratch;
  C* wide = scratch.take<C>(args.c);
  const C *scale = parameter(args.norm_weight, args.c, C(1), scratch.take<C>(args.c)),
          *shift = parameter(args.norm_bias, args.c, C(0), scratch.take<C>(args.c));
  for (int64_t b = begin; b < end; ++b) {
    const C* x = read(args.x, b, 0, args.c, args.c, wide);
    C mean, inverse, *to = ring_row<C>(args, b, args.at);
    row_statistics(x, args.c, args.eps, &mean, &inverse);
    for (int64_t c = 0; c < args.c; ++c) to[c] = (x[c] - mean) * inverse * scale[c] + shift[c];
  }
}

// sum (count,) += Σ_r weight[r] · rows[r], `together` rows at once, which begin `row` numbers
// apart.
template <int together, class C>
FASTMIX_INLINE void add_rows(const C* weight, const C* rows, int64_t row, int64_t count, C* sum) {
  each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
    using V = decltype(zero);
    V now = load<V>(sum + c);
    for (int r = 0; r < together; ++r) now = now + weight[r] * load<V>(rows + r * row + c);
    store(sum + c, now);
  });
}

// mixed (count,) += the mixture's channels c0 …. As in gemm.h, the sums of so many are added up.
template <class C>
void mix(const SguStep& args, int64_t b, int64_t c0, int64_t count, C* mixed, C* sum) {
  constexpr int64_t depth = 128;
  constexpr int together = 8;
  const int64_t d = args.c / args.h;
  C copied[depth];
  for (const SguStep::Part& part : args.parts)
    for (int64_t first = 0; first < part.count; first += depth) {
      const int64_t rows = smaller(depth, part.count - first);
      memset(sum, 0, count * sizeof(C));
      for (int64_t c = 0, run; c < count; c += run) {  // of one head
        const int64_t head = (c0 + c) / d;
        run = smaller((head + 1) * d - c0, count) - c;
        const C* weight = read(args.weight, head, args.row, part.column + first, rows, copied);
        const C* from = ring_row<C>(args, b, part.first + first) + c0 + c;
        int64_t r = 0;
        for (; r + together <= rows; r += together)
          add_rows<together>(weight + r, from + r * args.c, args.c, run, sum + c);
        for (; r < rows; ++r) add_rows<1>(weight + r, from + r * args.c, args.c, run, sum + c);
      }
      for (int64_t c = 0; c < count; ++c) mixed[c] += sum[c];
    }
}

template <class C>
void mix(const SguStep& args, int64_t begin, int64_t end) {
  Scratch scratch;
  C *mixed = scratch.take<C>(args.block), *wide = scratch.take<C>(args.block),
    *value = scratch.take<C>(args.block);
  const int64_t blocks = (args.c + args.block - 1) / args.block, d = args.c / args.h;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, c0 = unit % blocks * args.block;
    const int64_t count = smaller(args.block, args.c - c0);
    for (int64_t c = 0, run; c < count; c += run) {
      const int64_t head = (c0 + c) / d;
      run = smaller((head + 1) * d - c0, count) - c;
      const C bias = *read(args.bias, head, args.row, 0, 1, wide);
      for (int64_t i = c; i < c + run; ++i) mixed[i] = bias;
    }
    mix(args, b, c0, count, mixed, value);
    if (present(args.residual)) {
      const C* residual = read(args.residual, b, 0, c0, count, wide);
      for (int64_t c = 0; c < count; ++c) mixed[c] += residual[c];
    }
    if (args.activation == Activation::outside) {
      write(args.out, b, 0, c0, count, mixed);
      continue;
    }
    apply_gate(args.activation, mixed, read(args.x, b, 0, c0, count, wide), value, count);
    write(args.out, b, 0, c0, count, value);
  }
}

}  // namespace

void sgu_step_norm(const SguStep& args, int64_t begin, int64_t end) {
  args.x.type == Type::f64 ? norm<double>(args, begin, end) : norm<float>(args, begin, end);
}

void sgu_step_mix(const SguStep& args, int64_t begin, int64_t end) {
  args.x.type == Type::f64 ? mix<double>(args, begin, end) : mix<float>(args, begin, end);
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include "sgu_tensors.h"

namespace fastmix {
namespace {

// The places of step t: a window's (h, w, 2w) weight has the one before first, and the ring that of
// even windows; causal_sgu's (h, s, s) ring has every step at its own place.
void place(SguStep& args, const Tensor& weight, int64_t t) {
  const int64_t w = weight.size(1);
  if (weight.size(2) == w) {
    args.at = args.row = t;
    args.parts[0] = {0, 0, t + 1};
    return;
  }
  const int64_t window = t / w;
  args.row = t % w;
  args.at = window % 2 * w + args.row;
  if (window % 2) {
    args.parts[0] = {0, 0, w + args.row + 1};
  } else {
    args.parts[0] = {w, 0, args.row + 1};
    if (window > 0) args.parts[1] = {0, w, w};
  }
}

Tensor sgu_step(const Tensor& ring, const Tensor& x, const Tensor& weight, const Tensor& bias,
                const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                const OptionalTensor& residual, Activation activation, int64_t t) {
  constexpr Checks checks{"sgu_step"};
  check(checks, x, weight, bias, norm_weight, norm_bias, residual, true);
  checks.require(x.size(1) == 1, "n", "1", x.size(1));
  checks.tensor("ring", ring, {x.size(0), weight.size(2), x.size(2) / 2}, only(wide(x)));
  checks.require(ring.is_contiguous(), "ring's memory", "contiguous", 0);
  checks.require(t >= 0 && (t < weight.size(1) || weight.size(2) > weight.size(1)), "t",
                 "a step that the weight has a row for", t);
  SguStep args{};
  args.b = x.size(0);
  args.c = x.size(2) / 2;
  args.h = weight.size(0);
  args.block = channel_block(args.b, args.c, 1024);
  args.activation = activation;
  args.eps = eps;
  args.ring = ring.mutable_data_ptr();
  args.size = ring.size(1);
  place(args, weight, t);
  args.x = source(x);
  args.weight = source(weight);
  args.bias = source(bias);
  const auto of_channels = [](const Tensor& p) {
    return Source{p.const_data_ptr(), type_of(p.scalar_type()), 0, 0, p.stride(0), 1, 1};
  };
  if (norm_weight) args.norm_weight = of_channels(*norm_weight);
  if (norm_bias) args.norm_bias = of_channels(*norm_bias);
  if (residual) args.residual = source(*residual);
  Tensor out = fresh(x, {args.b, 1, args.c}, x.scalar_type());
  args.out = sink(out, 1, args.c);
  const double numbers = 1.0 * args.b * args.c, rows = args.parts[0].count + args.parts[1].count;
  spread(FASTMIX_KERNELS(sgu_step_norm), args, args.b, numbers);
  spread(FASTMIX_KERNELS(sgu_step_mix), args, args.b * ((args.c + args.block - 1) / args.block),
         numbers * (2.0 + 0.02 * rows * ring.element_size()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) { m.impl("sgu_step", TORCH_BOX(&sgu_step)); }

}  // namespace fastmix

#endif
