// y_t = mean of x_0 … x_t; backward dx_t = Σ_{s ≥ t} grad_s / (s + 1).
//
// Threads share the work as a Chain whose state is the sum so far, in double; within 64
// steps sums are kept in the compute type. Backward runs the same from the last step.

#include "rows.h"

namespace fastmix {

struct CumulativeMean {
  Chain chain;
  int64_t n;
  Source x;
  Sink out;
  bool backward;
};

}  // namespace fastmix

FASTMIX_KERNEL(cumulative_mean, fastmix::CumulativeMean)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

constexpr int64_t kRun = 64;  // steps summed in the compute type

// Adds the steps of a chunk to `total`; if `writes`, writes their means and fetches `next`.
template <class T, bool writes>
void run(const CumulativeMean& args, const Link& link, const Link& next, double* total,
         Scratch& scratch) {
  using C = Computed<T>;
  const int64_t count = link.count, start = link.order * args.chain.steps,
                end = smaller(start + args.chain.steps, args.n);
  T* gathered = scratch.take<T>(count);
  C *base = scratch.take<C>(count), *sum = scratch.take<C>(count);
  for (int64_t i0 = start; i0 < end; i0 += kRun) {
    for (int64_t c = 0; c < count; ++c) {
      base[c] = static_cast<C>(total[c]);
      sum[c] = 0;
    }
    for (int64_t i = i0; i < smaller(i0 + kRun, end); ++i) {
      const int64_t t = args.backward ? args.n - 1 - i : i;
      const T* x = read(args.x, link.b, t, link.c0, count, gathered);
      const Row<T> y(args.out, link.b, t, link.c0);
      const int64_t ahead = next.order * args.chain.steps + i - start;
      if (writes && next.count > 0 && ahead < args.n)
        prefetch(args.x, next.b, args.backward ? args.n - 1 - ahead : ahead, next.c0, next.count);
      const C share = static_cast<C>(1.0 / static_cast<double>(t + 1));
      each_vector<C>(count, [&](auto zero, int64_t c) FASTMIX_LAMBDA {
        using V = decltype(zero);
        const V now = load<V>(sum + c) + (args.backward ? share * load<V>(x + c) : load<V>(x + c));
        store(sum + c, now);
        if (writes)
          y.put(c, args.backward ? load<V>(base + c) + now : share * (load<V>(base + c) + now));
      });
    }
    for (int64_t c = 0; c < count; ++c) total[c] += sum[c];
  }
  streamed();
}

template <class T>
void unit(const CumulativeMean& args, const Link& link, const Link& next) {
  Scratch scratch;
  double *added = scratch.take<double>(link.count), *total = scratch.take<double>(link.count);
  memset(added, 0, link.count * sizeof(double));
  if (link.order + 1 < args.chain.chunks) run<T, false>(args, link, next, added, scratch);
  await(link);
  for (int64_t c = 0; c < link.count; ++c) {
    total[c] = link.state[c];
    link.state[c] += added[c];
  }
  pass_on(link);
  run<T, true>(args, link, next, total, scratch);
}

}  // namespace

void cumulative_mean(const CumulativeMean& args, int64_t begin, int64_t end) {
  by_type(args.x.type, [&](auto stored) {
    each_link(args.chain, end - begin, [&](const Link& link, const Link& next) {
      unit<decltype(stored)>(args, link, next);
    });
  });
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include "tensors.h"

namespace fastmix {
namespace {

Tensor run(const Tensor& x, bool backward) {
  constexpr Checks checks{"cumulative_mean"};
  checks.require(x.dim() >= 2, "the number of x's axes", "at least 2", x.dim());
  checks.tensor("x", x, x.sizes(), kReal);
  checks.require(x.size(1) > 0, "n", "at least 1", x.size(1));
  const int64_t b = x.size(0), n = x.size(1);
  Tensor out = fresh(x);
  const int64_t channels = b ? x.numel() / (b * n) : 0;
  const Tensor rows = x.dim() <= 4 ? x : reshaped(x, {b, n, channels});
  ChainStorage storage(b, n, channels);
  const CumulativeMean args{storage.chain, n, source(rows), sink(out, n, channels), backward};
  spread(FASTMIX_KERNELS(cumulative_mean), args, storage.units(), 1.0 * x.numel());
  return out;
}

Tensor forward(const Tensor& x) { return run(x, false); }

Tensor backward(const Tensor& grad, const Tensor&) { return run(grad, true); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("cumulative_mean", TORCH_BOX(&forward));
  m.impl("cumulative_mean_backward", TORCH_BOX(&backward));
}

}  // namespace fastmix

#endif
