// A diagonal state space's step: z_hk = power_k z_hk + u_h, out_h = Re Σ_k c_hk factor_k z_hk +
// skip_h u_h, of states z (b, h, n) in place.
//
// A unit of work is a channel h, whose gains c_hk factor_k serve all batch entries.

#include "rows.h"

namespace fastmix {

struct DssStep {
  int64_t b, h, n;
  void* state;                 // (b, h, n), complex numbers of the compute type
  const void *power, *factor;  // (n,), the same
  Source u, c_re, c_im, skip;  // (b, 1, h); (h, n), whose rows are a source's batch; (h,)
  Type state_type;
  Sink out;  // (b, 1, h)
};

}  // namespace fastmix

FASTMIX_KERNEL(dss_step, fastmix::DssStep)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

// The parts of complex numbers, apart.
template <class C>
struct Numbers {
  C *re, *im;

  Numbers(int64_t count, Scratch& scratch)
      : re(scratch.take<C>(count)), im(scratch.take<C>(count)) {}

  void read(const void* from, int64_t count) {
    const Complex<C>* numbers = static_cast<const Complex<C>*>(from);
    for (int64_t k = 0; k < count; ++k) {
      re[k] = numbers[k].re;
      im[k] = numbers[k].im;
    }
  }
};

// z = power z + u of `count` vectors from k on, or numbers; returns Re Σ gain z.
template <class V, class C>
FASTMIX_INLINE V advanced(const PairRow<C>& z, const Numbers<C>& power, const Numbers<C>& gain, C u,
                          int64_t k) {
  const V re = load<V>(power.re + k), im = load<V>(power.im + k);
  const Complex<V> before = load_pairs<V>(z.to + 2 * k);
  const Complex<V> now{re * before.re - im * before.im + u, re * before.im + im * before.re};
  z.put(k, now);
  return load<V>(gain.re + k) * now.re - load<V>(gain.im + k) * now.im;
}

template <class C>
void run(const DssStep& args, int64_t begin, int64_t end) {
  using V = typename Simd<C>::Vector;
  constexpr int64_t lanes = Simd<C>::lanes, together = 4;
  Scratch scratch;
  Numbers<C> power(args.n, scratch), factor(args.n, scratch), gain(args.n, scratch);
  power.read(args.power, args.n);
  factor.read(args.factor, args.n);
  C *room_re = scratch.take<C>(args.n), *room_im = scratch.take<C>(args.n);
  const Sink states{args.state, kType<C>, args.h, 2 * args.n, false};
  for (int64_t h = begin; h < end; ++h) {
    const C *re = read(args.c_re, h, 0, 0, args.n, room_re),
            *im = read(args.c_im, h, 0, 0, args.n, room_im);
    for (int64_t k = 0; k < args.n; ++k) {
      gain.re[k] = re[k] * factor.re[k] - im[k] * factor.im[k];
      gain.im[k] = re[k] * factor.im[k] + im[k] * factor.re[k];
    }
    C skip;
    read_into(args.skip, 0, 0, h, 1, &skip);
    for (int64_t b = 0; b < args.b; ++b) {
      const PairRow<C> z(states, b, h, 0);
      C u;
      read_into(args.u, b, 0, h, 1, &u);
      V sums[together] = {};
      C rest = 0;
      int64_t k = 0;
      for (; k + together * lanes <= args.n; k += together * lanes)
        for (int j = 0; j < together; ++j) sums[j] += advanced<V>(z, power, gain, u, k + j * lanes);
      for (; k + lanes <= args.n; k += lanes) sums[0] += advanced<V>(z, power, gain, u, k);
      for (; k < args.n; ++k) rest += advanced<C>(z, power, gain, u, k);
      const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (int i = 0; i < lanes; ++i) rest += sum[i];
      rest += skip * u;
      write(args.out, b, 0, h, 1, &rest);
    }
  }
}

}  // namespace

void dss_step(const DssStep& args, int64_t begin, int64_t end) {
  args.state_type == Type::c128 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include "tensors.h"

namespace fastmix {
namespace {

Tensor dss_step(const Tensor& state, const Tensor& u, const Tensor& power, const Tensor& factor,
                const Tensor& c_re, const Tensor& c_im, const Tensor& skip) {
  constexpr Checks checks{"dss_step"};
  checks.tensor("state", state, {kAny, kAny, kAny}, kComplex);
  checks.require(state.is_contiguous(), "state's memory", "contiguous", 0);
  const int64_t b = state.size(0), h = state.size(1), n = state.size(2);
  const Types same = only(state.scalar_type());
  checks.tensor("u", u, {b, 1, h}, kReal);
  checks.tensor("power", power, {n}, same);
  checks.tensor("factor", factor, {n}, same);
  checks.tensor("c_real", c_re, {h, n}, kReal);
  checks.tensor("c_imag", c_im, {h, n}, kReal);
  checks.tensor("skip", skip, {h}, kReal);
  const Tensor powers = dense(power), factors = dense(factor);
  DssStep args{};
  args.b = b;
  args.h = h;
  args.n = n;
  args.state = state.mutable_data_ptr();
  args.power = powers.const_data_ptr();
  args.factor = factors.const_data_ptr();
  args.u = source(u);
  const auto rows = [](const Tensor& x) {
    return Source{
        x.const_data_ptr(), type_of(x.scalar_type()), x.stride(0), 0, x.stride(x.dim() - 1), 1, 1};
  };
  args.c_re = rows(c_re);
  args.c_im = rows(c_im);
  args.skip = rows(skip);
  args.state_type = type_of(state.scalar_type());
  Tensor out = fresh(u, {args.b, 1, args.h}, u.scalar_type());
  args.out = sink(out, 1, args.h);
  spread(FASTMIX_KERNELS(dss_step), args, args.h,
         0.1 * args.h * args.n * (args.b + 1) * state.element_size());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) { m.impl("dss_step", TORCH_BOX(&dss_step)); }

}  // namespace fastmix

#endif
