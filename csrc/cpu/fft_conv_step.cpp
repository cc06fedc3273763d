// A convolution's step from a state on, step r of a block: y = ahead_r + Σ_{j ≤ r} kernel_j x_{r-j}
// + skip x_r, where `ahead` is what all steps before the block add. If lag l comes with step l, the
// block's new lags meet the first steps of all as well: + Σ_{j ≤ r} lags_j first_{r-j}. The block's
// steps, and its lags, come back with the new ones behind them.
//
// A unit of work is a block of channels of a batch entry.

#include "rows.h"

namespace fastmix {

struct FftConvStep {
  int64_t b, h, d, r, block;
  int64_t known;  // lags, of those that there are of `kernel`
  bool revealed;
  Source x, skip, ahead;        // (b, 1, h, d); (h, d), or none; (b, 1, h, d)
  Source steps, first;          // (b, r, h, d), (b, r + 1, h, d), channels side by side
  Source kernel, lags, newest;  // (b, known, h), (b, r, h), (b, 1, h)
  Sink out, all_steps, all_lags;
};

}  // namespace fastmix

FASTMIX_KERNEL(fft_conv_step, fastmix::FftConvStep)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

// sum (count,) += Σ_s weight_s rows_s over `together` rows, the weights a number or, `each`, a row
// for each. The sums of so many are added up, so that rounding grows more slowly.
template <int together, bool each, class C>
FASTMIX_INLINE void add_rows(const C* weight, int64_t weights, const C* rows, int64_t row,
                             int64_t count, C* sum) {
  each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
    using V = decltype(zero);
    V now{};
    for (int s = 0; s < together; ++s) {
      const V x = load<V>(rows + s * row + c);
      if constexpr (each) now = now + load<V>(weight + s * weights + c) * x;
      else now = now + weight[s * weights] * x;
    }
    store(sum + c, load<V>(sum + c) + now);
  });
}

template <bool each, class C>
void add_all(const C* weight, int64_t weights, const C* rows, int64_t row, int64_t steps,
             int64_t count, C* sum) {
  constexpr int together = 8;
  int64_t s = 0;
  for (; s + together <= steps; s += together)
    add_rows<together, each>(weight + s * weights, weights, rows + s * row, row, count, sum);
  for (; s < steps; ++s)
    add_rows<1, each>(weight + s * weights, weights, rows + s * row, row, count, sum);
}

// Channels c0 … of a batch entry.
template <class C>
struct Work {
  const FftConvStep& args;
  int64_t b, c0, count;
  C *sum, *weight;

  // sum += Σ_s weight_s rows_s. Rows begin `row` numbers apart; each has weights for `heads`.
  void add(const C* rows, int64_t row, int64_t steps, int64_t heads) const {
    if (args.d == 1) return add_all<true>(weight, heads, rows, row, steps, count, sum);
    for (int64_t c = 0, run; c < count; c += run) {  // of one head
      const int64_t head = (c0 + c) / args.d;
      run = smaller((head + 1) * args.d - c0, count) - c;
      add_all<false>(weight + head - c0 / args.d, heads, rows + c, row, steps, run, sum + c);
    }
  }

  void run(C* wide) const {
    const int64_t h0 = c0 / args.d, heads = (c0 + count - 1) / args.d + 1 - h0;
    const int64_t channels = args.h * args.d, all = args.r + 1;
    read_into(args.ahead, b, 0, c0, count, sum);
    C* const steps = static_cast<C*>(args.all_steps.data) + b * all * channels + c0;
    for (int64_t s = 0; s < args.r; ++s)
      memcpy(steps + s * channels, row(args.steps, s), count * sizeof(C));
    read_into(args.x, b, 0, c0, count, steps + args.r * channels);
    for (int64_t j = 0; j < args.known; ++j)
      read_into(args.kernel, b, j, h0, heads, weight + (args.known - 1 - j) * heads);
    add(steps + (all - args.known) * channels, channels, args.known, heads);
    if (args.revealed) {
      read_into(args.newest, b, 0, h0, heads, weight);
      for (int64_t j = 0; j < args.r; ++j)
        read_into(args.lags, b, j, h0, heads, weight + (args.r - j) * heads);
      add(row(args.first, 0), args.first.n, all, heads);
    }
    if (present(args.skip)) {
      const C* const skip = read(args.skip, 0, 0, c0, count, wide);
      add_all<true>(skip, 0, steps + args.r * channels, 0, 1, count, sum);
    }
    write(args.out, b, 0, c0, count, sum);
  }

  const C* row(const Source& s, int64_t t) const {
    return reinterpret_cast<const C*>(address(s, b, t, 0, 0)) + c0;
  }
};

template <class C>
void run(const FftConvStep& args, int64_t begin, int64_t end) {
  Scratch scratch;
  const int64_t channels = args.h * args.d, blocks = (channels + args.block - 1) / args.block;
  C *sum = scratch.take<C>(args.block), *wide = scratch.take<C>(args.block),
    *weight = scratch.take<C>((args.r + 1) * smaller(args.block, args.h));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks, c0 = unit % blocks * args.block;
    Work<C>{args, b, c0, smaller(args.block, channels - c0), sum, weight}.run(wide);
    if (!args.revealed || c0 > 0) continue;
    C* const lags = static_cast<C*>(args.all_lags.data) + b * (args.r + 1) * args.h;
    for (int64_t j = 0; j < args.r; ++j) read_into(args.lags, b, j, 0, args.h, lags + j * args.h);
    read_into(args.newest, b, 0, 0, args.h, lags + args.r * args.h);
  }
}

}  // namespace

void fft_conv_step(const FftConvStep& args, int64_t begin, int64_t end) {
  args.ahead.type == Type::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include "tensors.h"

namespace fastmix {
namespace {

// x, if the channels of a step lie side by side, or a copy in which they do.
Tensor with_rows(const Tensor& x) {
  return x.stride(3) == 1 && x.stride(2) == x.size(3) ? x : dense(x);
}

std::tuple<Tensor, Tensor, Tensor> fft_conv_step(const Tensor& x, const Tensor& kernel,
                                                 const OptionalTensor& skip, const Tensor& steps,
                                                 const Tensor& ahead, const OptionalTensor& lags,
                                                 const OptionalTensor& first,
                                                 const OptionalTensor& first_lags) {
  constexpr Checks checks{"fft_conv_step"};
  checks.tensor("x", x, {kAny, 1, kAny, kAny}, kReal);
  const int64_t b = x.size(0), h = x.size(2), d = x.size(3);
  checks.require(h > 0 && d > 0, "h and d", "at least 1", 0);
  const Types same = only(wide(x));
  checks.tensor("steps", steps, {b, kAny, h, d}, same);
  const int64_t r = steps.size(1);
  checks.tensor("ahead", ahead, {b, kAny, h, d}, same);
  checks.require(ahead.size(1) > r, "the number of steps of ahead", "more than those of steps",
                 ahead.size(1));
  checks.tensor("skip", skip, {h, d}, kReal);
  const bool revealed = lags.has_value();
  checks.require(first.has_value() == revealed && first_lags.has_value() == revealed,
                 "first and first_lags", "there if lags are", 0);
  if (revealed) {
    checks.tensor("kernel", kernel, {b, 1, h}, kReal);
    checks.tensor("lags", *lags, {b, r, h}, same);
    checks.tensor("first", *first, {b, kAny, h, d}, same);
    checks.tensor("first_lags", *first_lags, {b, first->size(1), h}, same);
    checks.require(first->size(1) > r, "the number of first steps", "more than those of steps",
                   first->size(1));
  } else if (kernel.dim() == 2) {
    checks.tensor("kernel", kernel, {kAny, h}, kReal);
  } else {
    checks.tensor("kernel", kernel, {b, kAny, h}, kReal);
  }
  const Tensor rows = with_rows(steps), first_rows = revealed ? with_rows(*first) : rows;
  const Tensor& known = revealed ? *first_lags : kernel;
  FftConvStep args{};
  args.b = b;
  args.h = h;
  args.d = d;
  args.r = r;
  args.block = channel_block(b, h * d, 1024);
  args.known = std::min(r + 1, known.size(-2));
  args.revealed = revealed;
  args.x = source(x);
  args.ahead = source(ahead);
  args.ahead.data = static_cast<const char*>(args.ahead.data) +
                    r * ahead.stride(1) * static_cast<int64_t>(ahead.element_size());
  if (skip)
    args.skip = {skip->const_data_ptr(),
                 type_of(skip->scalar_type()),
                 0,
                 0,
                 skip->stride(0),
                 skip->stride(1),
                 d};
  args.steps = source(rows);
  args.first = source(first_rows);
  args.kernel = known.dim() == 3 ? source(known) : Source{known.const_data_ptr(),
                                                          type_of(known.scalar_type()),
                                                          0,
                                                          known.stride(0),
                                                          known.stride(1),
                                                          1,
                                                          1};
  Tensor out = fresh(x, {b, 1, h, d}, x.scalar_type()),
         all_steps = fresh(x, {b, r + 1, h, d}, wide(x)),
         all_lags = revealed ? fresh(x, {b, r + 1, h}, wide(x)) : nothing(x);
  if (revealed) {
    args.newest = source(kernel);
    args.lags = source(*lags);
    args.all_lags = sink(all_lags, r + 1, h);
  }
  args.out = sink(out, 1, h * d);
  args.all_steps = sink(all_steps, r + 1, h * d);
  spread(FASTMIX_KERNELS(fft_conv_step), args, b * ((h * d + args.block - 1) / args.block),
         0.02 * b * h * d * (r + 1) * (revealed ? 3 : 2) * steps.element_size());
  return {out, all_steps, all_lags};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) { m.impl("fft_conv_step", TORCH_BOX(&fft_conv_step)); }

}  // namespace fastmix

#endif
