// y_t = mean of x_0 … x_t; backward dx_t = Σ_{s ≥ t} grad_s / (s + 1).
//
// Sums are kept in the compute type for 64 steps at a time and beyond that in double. A
// unit of work is a stretch of time of a block of channels; where there are several
// stretches, a first pass finds the sum of each.

#include "rows.h"

namespace fastmix {

struct CumulativeMean {
  int64_t n, channels, block, stretch, stretches;
  Source x;
  Sink out;
  bool backward;
  double* sums;  // (b, stretches, channels): of each stretch, then of all that it follows
};

}  // namespace fastmix

FASTMIX_KERNEL(cumulative_mean_sums, fastmix::CumulativeMean)
FASTMIX_KERNEL(cumulative_mean, fastmix::CumulativeMean)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

constexpr int64_t kRun = 64;  // steps summed in the compute type

// Writes means if `writes`, else the sum of the stretch.
template <class C, bool writes>
void run(const CumulativeMean& f, int64_t index) {
  const int64_t blocks = (f.channels + f.block - 1) / f.block;
  const int64_t c0 = index % blocks * f.block, s = index / blocks % f.stretches,
                b = index / blocks / f.stretches;
  const int64_t count = smaller(f.block, f.channels - c0);
  const int64_t start = s * f.stretch, end = smaller(start + f.stretch, f.n);
  Scratch scratch;
  C *wide = scratch.take<C>(count), *base = scratch.take<C>(count),
    *sum = scratch.take<C>(count), *y = scratch.take<C>(count);
  double *total = scratch.take<double>(count), *entry = f.sums + (b * f.stretches + s) * f.channels + c0;
  for (int64_t c = 0; c < count; ++c) total[c] = writes ? entry[c] : 0;
  for (int64_t i0 = start; i0 < end; i0 += kRun) {
    for (int64_t c = 0; c < count; ++c) {
      base[c] = static_cast<C>(total[c]);
      sum[c] = 0;
    }
    for (int64_t i = i0; i < smaller(i0 + kRun, end); ++i) {
      const int64_t t = f.backward ? f.n - 1 - i : i;
      const C* x = read(f.x, b, t, c0, count, wide);
      const C share = static_cast<C>(1.0 / static_cast<double>(t + 1));
      each_vector<C>(count, [&](auto zero, int64_t c) LAMBDA {
        using V = decltype(zero);
        const V now = load<V>(sum + c) + (f.backward ? share * load<V>(x + c) : load<V>(x + c));
        store(sum + c, now);
        if (writes) store(y + c, f.backward ? load<V>(base + c) + now
                                            : share * (load<V>(base + c) + now));
      });
      if (writes) write(f.out, b, t, c0, count, y);
    }
    for (int64_t c = 0; c < count; ++c) total[c] += sum[c];
  }
  if (!writes) memcpy(entry, total, count * sizeof(double));
  streamed();
}

}  // namespace

void cumulative_mean_sums(const CumulativeMean& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    f.x.type == Type::f64 ? run<double, false>(f, i) : run<float, false>(f, i);
}

void cumulative_mean(const CumulativeMean& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    f.x.type == Type::f64 ? run<double, true>(f, i) : run<float, true>(f, i);
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include "tensors.h"

namespace fastmix {
namespace {

// Backward counts steps from the end.
Tensor run(const Tensor& x, bool backward) {
  const int64_t b = x.size(0), n = x.size(1);
  Tensor out = fresh(x);
  const int64_t channels = b ? x.numel() / (b * n) : 0;
  const Tensor rows = x.dim() <= 4 ? x : torch::stable::reshape(x, {{b, n, channels}});
  CumulativeMean f{n, channels, kBlock, stretch(b, n)};
  f.stretches = (n + f.stretch - 1) / f.stretch;
  f.x = source(rows);
  f.out = sink(out, n, channels);
  f.backward = backward;
  std::vector<double> sums(b * f.stretches * channels);
  f.sums = sums.data();
  const int64_t units = b * f.stretches * blocks(channels);
  if (f.stretches > 1) spread(FASTMIX_KERNELS(cumulative_mean_sums), f, units);
  for (int64_t i = 0; i < b; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t s = 0; s < f.stretches; ++s) {
        double& sum = f.sums[(i * f.stretches + s) * channels + c];
        const double of_stretch = sum;
        sum = total;
        total += of_stretch;
      }
    }
  spread(FASTMIX_KERNELS(cumulative_mean), f, units);
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
