// y_t = Σ_{j ≤ t} kernel_j · x_{t-j} + skip · x_t, by transforms in the tensors' own layout
// (fft.h).
//
// A SIMD lane holds a channel. A sequence of N real numbers is taken as a polynomial modulo
// z^N = i. The coefficients N … 2N-1 of a product come out as imaginary parts, so its real
// part is the causal convolution: from N complex points, with no zeros to pad. At the leaves
// eight points are transformed, multiplied by the kernel's and taken back in registers.
//
// The kernel's gradient is summed over channels in the spectrum, with one inverse per head. A
// skip is one more lag of 0, a channel's own: it is the same number at every point.
//
// Where magnitudes grow so much along the steps that a transform's rounding would drown the
// outputs before them, or are not finite, a vector of channels is convolved segment by segment
// (fft_segments.h) instead. What enters a transform is checked for that on its way in.

#include "fft_segments.h"

namespace fastmix {

// How a kernel begins (see Beginning), or that no transform takes it.
struct KernelBeginning {
  bool refused;
  int64_t zeros, ready;
};

struct FftConv {
  FftPlan plan;
  int64_t b, n, h, d, lags;
  int64_t chunk;  // steps that one transform yields: n, or less if lags are few
  // A unit of work is `group` channels of a head; or, where many heads fit into a vector,
  // all channels of `heads` of them, whose kernels then lie in lanes as well.
  bool kernels_in_lanes;
  int64_t heads, group, groups;
  bool shared;     // one kernel for the whole batch
  bool streaming;  // `out` is large and its rows start at whole cache lines
  Source x, kernel, grad;
  const double* skip;  // per channel; or null
  Sink out, grad_kernel;
  double* grad_skip;  // (b, channels)
  void* spectra;      // of each kernel: 8 real parts, 8 imaginary parts, …
  void* sums;         // (b, h, groups): spectra of the kernels' gradients; null if units are alone
                      // with whole vectors of kernels, and need to keep none
  KernelBeginning* beginnings;  // of each kernel
  // (b, h, groups, kEarly): the gradients of the kernels' last lags, the last first; or null
  void* early_lags;
  // (b, h, groups): what channels that no transform takes add to the gradients of their
  // kernels' lags, from malloc; or null
  void** segmented_lags;
};

}  // namespace fastmix

FASTMIX_KERNEL(fft_conv_spectra, fastmix::FftConv)
FASTMIX_KERNEL(fft_conv_forward, fastmix::FftConv)
FASTMIX_KERNEL(fft_conv_backward, fastmix::FftConv)
FASTMIX_KERNEL(fft_conv_lags, fastmix::FftConv)
FASTMIX_KERNEL(fft_conv_direct, fastmix::FftConv)

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

// Channels c0 … of a tensor like x.
template <class C>
Lanes<C> channels(const FftConv& f, const Source& s, int64_t b, int64_t c0, int64_t count) {
  return lanes_of<C>(s, f.n, count,
                     [&](int64_t i) { return address(s, b, 0, (c0 + i) / f.d, (c0 + i) % f.d); });
}

// Kernels b · h + head from `first` on, each in `repeat` lanes.
template <class C>
Lanes<C> kernels(const FftConv& f, int64_t first, int64_t count, int64_t repeat) {
  return lanes_of<C>(f.kernel, f.lags, count * repeat, [&](int64_t i) {
    const int64_t index = first + i / repeat;
    return address(f.kernel, index / f.h, 0, index % f.h, 0);
  });
}

// Writes channels c0 … of the output.
template <class C>
struct Channels {
  const FftConv& f;
  int64_t b, c0, count;

  FASTMIX_INLINE void operator()(int64_t t, Vector<C> v) const {
    const int64_t at = (b * f.n + t) * f.out.channels + c0;
    if (count == Simd<C>::lanes) {
      if (f.out.type == kType<C>) {
        C* to = static_cast<C*>(f.out.data) + at;
        return f.streaming ? stream(to, v) : store(to, v);
      }
      if constexpr (sizeof(C) == 4) {
        if (f.out.type == Type::bf16) return store(static_cast<Bf16*>(f.out.data) + at, v);
        if (f.out.type == Type::f16) return store(static_cast<F16*>(f.out.data) + at, v);
      }
    }
    C values[Simd<C>::lanes];
    store(values, v);
    write(f.out, b, t, c0, count, values);
  }
};

// The sums over lanes of as many vectors as there are lanes.
template <class C, int s = 1>
FASTMIX_INLINE Vector<C> over_lanes(Vector<C>* v) {
  constexpr int lanes = Simd<C>::lanes;
  if constexpr (s == lanes) return *v;
  else {
    Vector<C> halves[lanes / s / 2];
    for (int i = 0; i < lanes / s / 2; ++i) {
      exchange<s>(v[2 * i], v[2 * i + 1], Indices<lanes>());
      halves[i] = v[2 * i] + v[2 * i + 1];
    }
    return over_lanes<C, 2 * s>(halves);
  }
}

// x · kernel; or grad · conj kernel, and the sums of grad · conj x, over lanes and for each over
// points. The kernel's spectrum is the same for all lanes or lies in the last buffer.
template <class C, bool backward, bool in_lanes>
struct Product {
  static constexpr int inputs = 1 + backward + in_lanes, outputs = 1, buffers = inputs;
  const C* spectrum;
  C scale;
  Vector<C> skip;  // over the length
  C* sums;
  double* lane_sums;
  int64_t heads, d, sums_step;

  FASTMIX_INLINE void operator()(int64_t block, C* const* at, const C* w) const {
    using V = Vector<C>;
    constexpr int lanes = Simd<C>::lanes;
    Complex<V> a[kLeaf], other[kLeaf];
    open_leaf(a, at[0], w);
    if constexpr (backward) {
      open_leaf(other, at[1], w);
      V products[2 * kLeaf];
      for (int k = 0; k < kLeaf; ++k) {
        products[k] = a[k].re * other[k].re + a[k].im * other[k].im;
        products[k + kLeaf] = a[k].im * other[k].re - a[k].re * other[k].im;
      }
      V at_points = products[0];
      for (int k = 1; k < kLeaf; ++k) at_points += products[k];
      for (int i = 0; i < lanes; ++i) lane_sums[i] += at_points[i];
      C* to = sums + block * 2 * kLeaf;
      if constexpr (!in_lanes) {
        for (int k = 0; k < 2 * kLeaf; k += lanes)
          store(to + k, load<V>(to + k) + over_lanes<C>(products + k));
      } else {
        C numbers[2 * kLeaf][lanes];
        for (int k = 0; k < 2 * kLeaf; ++k) store(numbers[k], products[k]);
        for (int64_t head = 0; head < heads; ++head, to += sums_step)
          for (int k = 0; k < 2 * kLeaf; ++k)
            for (int64_t i = 0; i < d; ++i) to[k] += numbers[k][head * d + i];
      }
    }
    if constexpr (in_lanes) {
      open_leaf(other, at[inputs - 1], w);
      for (int k = 0; k < kLeaf; ++k) {
        const V re = other[k].re * scale + skip, im = other[k].im * (backward ? -scale : scale);
        a[k] = times(a[k], re, im);
      }
    } else {
      const C* s = spectrum + block * 2 * kLeaf;
      for (int k = 0; k < kLeaf; ++k)
        a[k] = times(a[k], s[k] + skip, (backward ? -s[k + kLeaf] : s[k + kLeaf]) - V{});
    }
    close_leaf(a, at[0], w);
  }
};

// Each lane's spectrum over N, to its own place.
template <class C>
struct Spectra {
  static constexpr int inputs = 1, outputs = 0, buffers = 1;
  C* to;
  int64_t count, length;

  void operator()(int64_t block, C* const* at, const C* w) const {
    Complex<Vector<C>> a[kLeaf];
    open_leaf(a, at[0], w);
    for (int64_t i = 0; i < count; ++i)
      for (int k = 0; k < kLeaf; ++k) {
        C* p = to + i * 2 * length + block * 2 * kLeaf + k;
        p[0] = a[k].re[i] / length;
        p[kLeaf] = a[k].im[i] / length;
      }
  }
};

// Puts the sum of several spectra into each lane.
template <class C>
struct Sums {
  static constexpr int inputs = 0, outputs = 1, buffers = 1;
  const C* from;
  int64_t count, length, step, inner, inner_step, outer, outer_step;

  void operator()(int64_t block, C* const* at, const C* w) const {
    constexpr int lanes = Simd<C>::lanes;
    C numbers[2 * kLeaf][lanes] = {};
    for (int64_t i = 0; i < count; ++i)
      for (int64_t o = 0; o < outer; ++o)
        for (int64_t j = 0; j < inner; ++j) {
          const C* p = from + i * step + o * outer_step + j * inner_step + block * 2 * kLeaf;
          for (int k = 0; k < 2 * kLeaf; ++k) numbers[k][i] += p[k];
        }
    Complex<Vector<C>> a[kLeaf];
    for (int k = 0; k < kLeaf; ++k) {
      a[k].re = load<Vector<C>>(numbers[k]) / C(length);
      a[k].im = load<Vector<C>>(numbers[k + kLeaf]) / C(length);
    }
    close_leaf(a, at[0], w);
  }
};

// ---- Units of work ----

struct Unit {
  int64_t b, head, heads, group, c0, count;
};

Unit unit_of(const FftConv& f, int64_t index) {
  const int64_t sets = (f.h + f.heads - 1) / f.heads;
  Unit u;
  u.group = index % f.groups;
  u.head = index / f.groups % sets * f.heads;
  u.b = index / f.groups / sets;
  u.heads = smaller(f.heads, f.h - u.head);
  u.c0 = u.head * f.d + u.group * f.group;
  u.count = f.kernels_in_lanes ? u.heads * f.d : smaller(f.group, f.d - u.group * f.group);
  return u;
}

// Calls g(c0, count) for every vector of a unit's channels.
template <class C, class G>
FASTMIX_INLINE void each_lanes(const Unit& u, G g) {
  for (int64_t c = 0; c < u.count; c += Simd<C>::lanes)
    g(u.c0 + c, smaller(Simd<C>::lanes, u.count - c));
}

template <class C>
struct Buffers {
  Scratch scratch;
  C *at[3], *tile;

  Buffers(int count, int64_t rows) {
    for (int i = 0; i < count; ++i) at[i] = scratch.take<C>(rows * kRow<C>);
    tile = scratch.take<C>(64 * kColumns * kRow<C>);
  }
};

// The place of a unit's first kernel among all.
FASTMIX_INLINE int64_t kernel_index(const FftConv& f, const Unit& u) {
  return (f.shared ? 0 : u.b * f.h) + u.head;
}

// A channel's skip, over `length`, in each lane.
template <class C>
Vector<C> skips(const FftConv& f, int64_t c0, int64_t count, int64_t length) {
  C numbers[Simd<C>::lanes] = {};
  for (int64_t i = 0; f.skip != nullptr && i < count; ++i) numbers[i] = f.skip[c0 + i] / length;
  return load<Vector<C>>(numbers);
}

template <class C>
void spectra(const FftConv& f, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<C>::lanes;
  const int64_t length = f.plan.length, all = (f.shared ? 1 : f.b) * f.h;
  Buffers<C> buffers(1, length);
  for (int64_t i = begin * lanes; i < smaller(end * lanes, all); i += lanes) {
    const int64_t count = smaller(lanes, all - i);
    const Lanes<C> in = kernels<C>(f, i, count, 1);
    const auto accept = checked<C>([&](int, const Magnitudes<C>& largest) {
      Beginning<C> begins;
      const Ints<C> refused = refusals<C>({in, f.lags, false}, largest, begins);
      for (int64_t j = 0; j < count; ++j)
        f.beginnings[i + j] = {refused[j] != 0, begins.zeros[j], begins.ready[j]};
      return true;
    });
    transform(f.plan, &in, buffers.at, buffers.tile, 0,
              Spectra<C>{static_cast<C*>(f.spectra) + i * 2 * length, count, length}, nullptr,
              accept);
  }
}

// Calls g(lane, lags) for all that did not go through transforms of the gradients of `count`
// kernels from `first` on.
template <class C, class G>
FASTMIX_INLINE void each_segmented(const FftConv& f, int64_t first, int64_t count, G g) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t b = 0; b < (f.shared ? f.b : 1); ++b)
      for (int64_t group = 0; group < f.groups; ++group)
        if (const void* lags = f.segmented_lags[(b * f.h + first + i) * f.groups + group])
          g(i, static_cast<const C*>(lags));
}

// Adds grad_t x_{t-lag} of the last lags, of a vector of a unit's channels.
template <class C>
void add_early_lags(const FftConv& f, const Unit& u, const Sequence<C>& backwards,
                    const Sequence<C>& x, int64_t count) {
  Vector<C> a[kEarly], b[kEarly];
  const int64_t end = smaller(kEarly, f.n);
  for (int64_t t = 0; t < end; ++t) a[t] = backwards(t), b[t] = x(t);
  for (int64_t t = 0; t < end; ++t) {
    Vector<C> sum{};
    for (int64_t s = 0; s <= t; ++s) sum += a[s] * b[t - s];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t head = u.head + (f.kernels_in_lanes ? i / f.d : 0);
      C* const lags = static_cast<C*>(f.early_lags);
      lags[((u.b * f.h + head) * f.groups + u.group) * kEarly + t] += sum[i];
    }
  }
}

// The gradient of a kernel's lag that is among the last.
template <class C>
C early_lag(const FftConv& f, int64_t kernel, int64_t lag) {
  C sum = 0;
  for (int64_t b = 0; b < (f.shared ? f.b : 1); ++b)
    for (int64_t group = 0; group < f.groups; ++group)
      sum += static_cast<const C*>(
          f.early_lags)[((b * f.h + kernel) * f.groups + group) * kEarly + f.n - 1 - lag];
  return sum;
}

// The gradients of `count` kernels from `first` on, from the sums of their spectra.
template <class C>
void write_lags(const FftConv& f, Buffers<C>& buffers, int64_t first, int64_t count,
                const C* sums) {
  const int64_t spectrum = 2 * f.plan.length, step = f.groups * spectrum;
  bool segmented = false;
  each_segmented<C>(f, first, count, [&](int64_t, const C*) { segmented = true; });
  const auto put = [&](int64_t lag, Vector<C> v) {
    C values[Simd<C>::lanes];
    store(values, v);
    if (f.early_lags != nullptr && lag < f.lags && lag >= f.n - kEarly)
      for (int64_t i = 0; i < count; ++i) values[i] = early_lag<C>(f, first + i, lag);
    if (segmented && lag < f.lags)
      each_segmented<C>(f, first, count, [&](int64_t i, const C* lags) { values[i] += lags[lag]; });
    for (int64_t i = 0, run; i < count; i += run) {
      const int64_t head = (first + i) % f.h;
      run = smaller(count - i, f.h - head);
      write(f.grad_kernel, (first + i) / f.h, lag, head, run, values + i);
    }
  };
  transform(
      f.plan, static_cast<const Lanes<C>*>(nullptr), buffers.at, buffers.tile, f.lags,
      Sums<C>{sums, count, f.plan.length, step, f.groups, spectrum, f.shared ? f.b : 1, f.h * step},
      put);
  for (int64_t lag = f.lags; lag < f.grad_kernel.n_size; ++lag) put(lag, Vector<C>{});
}

// Channels c0 … and a chunk of their steps, where one transform cannot take them.
template <class C>
struct SegmentedChunk {
  const FftConv& f;
  const Unit& u;
  const Channels<C>& out;
  Sequence<C> kernel;
  Buffers<C> buffers;
  C* sum;

  SegmentedChunk(const FftConv& f, const Unit& u, const Channels<C>& out)
      : f(f), u(u), out(out), buffers(2, f.plan.length),
        sum(buffers.scratch.template take<C>(f.plan.length * Simd<C>::lanes)) {
    const Lanes<C> lanes = f.kernels_in_lanes ? kernels<C>(f, kernel_index(f, u), u.heads, f.d)
                                              : kernels<C>(f, kernel_index(f, u), 1, out.count);
    kernel = {lanes, f.lags, false};
  }

  void convolve(const Sequence<C>& a, const Sequence<C>& b) {
    Product<C, false, true> product{};
    product.scale = C(1) / f.plan.length;
    causal_product(f.plan, a, b, a.count, sum, buffers.at, buffers.tile, product);
  }

  Vector<C> at(int64_t t) const { return load<Vector<C>>(sum + t * Simd<C>::lanes); }

  // y_start … of `count` steps, from x and the `before` steps before them, where there are any.
  void forward(const Lanes<C>& all, int64_t start, int64_t before, int64_t count) {
    before = smaller(before, start);
    const Lanes<C> x = all.window(start - before, start + count);
    convolve({x, before + count, false}, kernel);
    const Vector<C> skip = skips<C>(f, out.c0, out.count, 1);
    for (int64_t t = before; t < before + count; ++t)
      out(start + t - before, f.skip == nullptr ? at(t) : at(t) + skip * x(t));
  }

  // dx of `count` steps from `start` on, from as many of x and `reach` of the gradient; adds to
  // the kernels' lags and to the skips.
  void backward(const Lanes<C>& grad, const Lanes<C>& x, int64_t start, int64_t count,
                int64_t reach, double* grad_skips) {
    const Sequence<C> backwards{grad, reach, true};
    convolve(backwards, kernel);
    const Vector<C> skip = skips<C>(f, out.c0, out.count, 1);
    for (int64_t t = 0; t < count; ++t) {
      const Vector<C> v = at(reach - 1 - t);
      out(start + t, f.skip == nullptr ? v : v + skip * grad(t));
    }
    convolve(backwards, {x, count, false});
    for (int64_t i = 0; i < out.count; ++i) {
      C* const to = lags_of(f.kernels_in_lanes ? i / f.d : 0);
      for (int64_t lag = 0; lag < smaller(f.lags, reach); ++lag) to[lag] += at(reach - 1 - lag)[i];
    }
    for (int64_t t = 0; f.skip != nullptr && t < count; ++t) {
      const Vector<C> g = grad(t), v = x(t);
      for (int64_t i = 0; i < out.count; ++i) grad_skips[i] += double(g[i]) * double(v[i]);
    }
  }

  // The lags of a head of the unit, zero at first.
  C* lags_of(int64_t head) const {
    void*& lags = f.segmented_lags[(u.b * f.h + u.head + head) * f.groups + u.group];
    if (lags == nullptr) lags = calloc(f.lags, sizeof(C));
    if (lags == nullptr) abort();
    return static_cast<C*>(lags);
  }
};

// Whether a skip is too large, or not finite, to be a part of a spectrum.
template <class C>
bool fits(Vector<C> skip) {
  return !any(magnitude<C>(skip) > power_bits<C>(ints<C>(Format<C>::bias / 2 - 13)));
}

template <class C, bool backward, bool in_lanes>
void units(const FftConv& f, int64_t begin, int64_t end) {
  using Leaf = Product<C, backward, in_lanes>;
  const int64_t length = f.plan.length;
  Buffers<C> buffers(Leaf::buffers, length);
  const bool alone = backward && f.sums == nullptr;
  C* const own = alone ? buffers.scratch.template take<C>(f.heads * 2 * length) : nullptr;
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit_of(f, i);
    Leaf leaf{};
    if (!in_lanes) leaf.spectrum = static_cast<C*>(f.spectra) + kernel_index(f, u) * 2 * length;
    leaf.scale = C(1) / length;
    leaf.heads = u.heads;
    leaf.d = f.d;
    leaf.sums_step = f.groups * 2 * length;
    if (backward) {
      leaf.sums = alone ? own
                        : static_cast<C*>(f.sums) +
                              ((u.b * f.h + u.head) * f.groups + u.group) * 2 * length;
      memset(leaf.sums, 0, u.heads * 2 * length * sizeof(C));
    }
    each_lanes<C>(u, [&](int64_t c0, int64_t count) {
      const Lanes<C> x = channels<C>(f, f.x, u.b, c0, count);
      const Lanes<C> grad = backward ? channels<C>(f, f.grad, u.b, c0, count) : x;
      const Channels<C> out{f, u.b, c0, count};
      double points[Simd<C>::lanes] = {}, segmented_points[Simd<C>::lanes] = {};
      leaf.skip = skips<C>(f, c0, count, length);
      leaf.lane_sums = points;
      const Lanes<C> kernel = in_lanes ? kernels<C>(f, kernel_index(f, u), u.heads, f.d)
                                       : kernels<C>(f, kernel_index(f, u), 1, count);
      const Vector<C> skip = skips<C>(f, c0, count, 1);
      Beginning<C> begins[3];  // of the inputs, the kernel last
      bool whole = fits<C>(skip);
      if (!in_lanes) {
        const KernelBeginning& of_kernel = f.beginnings[kernel_index(f, u)];
        begins[1 + backward] = {ints<C>(of_kernel.zeros), ints<C>(of_kernel.ready)};
        whole &= !of_kernel.refused;
      }
      Lanes<C> in[3];
      if (in_lanes) in[1 + backward] = kernel;
      for (int64_t start = 0; start < f.n; start += f.chunk) {
        // y needs the lags before a chunk, dx and the kernel's gradient those after it.
        const int64_t stop = smaller(start + f.chunk, f.n);
        const int64_t before = backward || f.chunk == f.n ? 0 : f.lags - 1;
        in[0] = backward ? grad.window(start, f.n) : x.window(start - before, f.n);
        if (backward) in[1] = x.window(start, stop);
        const int64_t reach =
            backward ? smaller(stop - start + f.lags - 1, f.n - start) : before + stop - start;
        const int64_t steps[3] = {reach, backward ? stop - start : f.lags, f.lags};
        EarlyOutputs<C> early;
        const auto accept = checked<C>([&](int input, const Magnitudes<C>& largest) {
          const Sequence<C> sequence{in[input], steps[input], backward && input == 0};
          if (any(refusals(sequence, largest, begins[input]))) return false;
          if (input + 1 < Leaf::inputs) return true;
          early.compute({in[0], reach, backward}, begins[0], {kernel, f.lags, false},
                        begins[1 + backward], f.skip == nullptr ? nullptr : &skip);
          return true;
        });
        if (whole && transform(
                         f.plan, in, buffers.at, buffers.tile, before + stop - start, leaf,
                         [&](int64_t t, Vector<C> v) FASTMIX_LAMBDA {
                           if (t < before) return;
                           const int64_t step = backward ? reach - 1 - t : t;
                           out(start + t - before, step < early.end ? early(step, v) : v);
                         },
                         accept)) {
          if (backward && f.early_lags != nullptr)
            add_early_lags<C>(f, u, {in[0], reach, true}, {in[1], stop, false}, count);
          continue;
        }
        SegmentedChunk<C> segmented(f, u, out);
        if (backward)
          segmented.backward(in[0], in[1], start, stop - start, reach, segmented_points);
        else segmented.forward(x, start, before, stop - start);
      }
      if (backward && f.grad_skip != nullptr)
        for (int64_t i = 0; i < count; ++i)
          f.grad_skip[u.b * f.out.channels + c0 + i] = points[i] / length + segmented_points[i];
    });
    if constexpr (backward && in_lanes)
      if (alone) write_lags<C>(f, buffers, kernel_index(f, u), u.heads, own);
  }
  if (f.streaming) streamed();
}

template <class C, bool backward>
void convolve(const FftConv& f, int64_t begin, int64_t end) {
  f.kernels_in_lanes ? units<C, backward, true>(f, begin, end)
                     : units<C, backward, false>(f, begin, end);
}

template <class C>
void lags(const FftConv& f, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<C>::lanes;
  const int64_t all = (f.shared ? 1 : f.b) * f.h, step = f.groups * 2 * f.plan.length;
  Buffers<C> buffers(1, f.plan.length);
  for (int64_t first = begin * lanes; first < smaller(end * lanes, all); first += lanes)
    write_lags(f, buffers, first, smaller(lanes, all - first),
               static_cast<const C*>(f.sums) + first * step);
}

// ---- Few lags: the products themselves ----

template <class C>
void direct(const FftConv& f, int64_t begin, int64_t end) {
  using V = Vector<C>;
  constexpr int64_t lanes = Simd<C>::lanes, steps = 128, at_once = 8;
  Scratch scratch;
  C* kernel = scratch.take<C>(f.lags * lanes);
  C* rows = scratch.take<C>((steps + f.lags) * lanes);
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit_of(f, i);
    each_lanes<C>(u, [&](int64_t c0, int64_t count) {
      const auto k = f.kernels_in_lanes ? kernels<C>(f, kernel_index(f, u), u.heads, f.d)
                                        : kernels<C>(f, kernel_index(f, u), 1, count);
      for (int64_t j = 0; j < f.lags; ++j)
        store(kernel + j * lanes, j == 0 ? k(0) + skips<C>(f, c0, count, 1) : k(j));
      const Lanes<C> x = channels<C>(f, f.x, u.b, c0, count);
      const Channels<C> out{f, u.b, c0, count};
      for (int64_t start = 0; start < f.n; start += steps) {
        const int64_t stop = smaller(start + steps, f.n), from = larger(0, start - f.lags + 1);
        for (int64_t s = from; s < stop; ++s) store(rows + (s - from) * lanes, x(s));
        for (int64_t t = start; t < stop; t += at_once) {
          V y[at_once] = {};
          const int64_t last = smaller(t + at_once, stop);
          for (int64_t s = larger(from, t - f.lags + 1); s < last; ++s) {
            const V in = load<V>(rows + (s - from) * lanes);
            const int64_t lag = t - s;  // of y[0]
            if (lag >= 0 && lag + at_once <= f.lags) {
              for (int r = 0; r < at_once; ++r) y[r] += in * load<V>(kernel + (lag + r) * lanes);
            } else {
              for (int r = 0; r < at_once; ++r)
                if (lag + r >= 0 && lag + r < f.lags)
                  y[r] += in * load<V>(kernel + (lag + r) * lanes);
            }
          }
          for (int64_t r = 0; r < last - t; ++r) out(t + r, y[r]);
        }
      }
    });
  }
  if (f.streaming) streamed();
}

}  // namespace

void fft_conv_spectra(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? spectra<double>(f, begin, end) : spectra<float>(f, begin, end);
}

void fft_conv_lags(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? lags<double>(f, begin, end) : lags<float>(f, begin, end);
}

void fft_conv_forward(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? convolve<double, false>(f, begin, end)
                        : convolve<float, false>(f, begin, end);
}

void fft_conv_backward(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? convolve<double, true>(f, begin, end)
                        : convolve<float, true>(f, begin, end);
}

void fft_conv_direct(const FftConv& f, int64_t begin, int64_t end) {
  f.x.type == Type::f64 ? direct<double>(f, begin, end) : direct<float>(f, begin, end);
}

}  // namespace fastmix::FASTMIX_CPU

#else  // registration

#include <cmath>
#include <complex>
#include <cstdlib>
#include <memory>

#include "tensors.h"

namespace fastmix {
namespace {

constexpr int64_t kFewLags = 24;    // products per step up to which transforms do not pay
constexpr int64_t kFitting = 2048;  // steps whose transform stays near the core

// The smallest {4, 5, 6, 7} · 2^a that is at least n, and its table.
FftPlan plan_for(int64_t n, std::vector<double>& table) {
  FftPlan p{};
  p.length = INT64_MAX;
  int bits = 0;
  for (int64_t first = 4; first < 8; ++first) {
    int a = 4;
    while (first << a < n) ++a;
    if (first << a < p.length) {
      p.length = first << a;
      p.first = first;
      bits = a;
    }
  }
  for (int left = bits - 3, taken; left > 0; left -= taken) {
    taken = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
    p.radix[p.levels++] = 1 << taken;
  }
  p.radix[p.levels++] = kLeaf;

  const double turn = 2 * std::acos(-1.0);
  std::vector<double> angles;  // of the blocks' c in z^L = c, in turns
  for (int64_t j = 0; j < p.first; ++j) {
    angles.push_back((0.25 + j) / p.first);
    for (int64_t k = 0; k < p.first; ++k) {
      table.push_back(std::cos(turn * angles[j] * k));
      table.push_back(std::sin(turn * angles[j] * k));
    }
  }
  for (int level = 0; level < p.levels; ++level) {
    const int radix = p.radix[level];
    p.twiddles[level] = table.size();
    std::vector<double> next;
    for (double angle : angles) {
      const std::complex<double> r = std::polar(1.0, turn * angle / radix);
      std::complex<double> powers[kLeaf] = {1.0, r};
      for (int k = 1; k < radix; ++k) {
        if (k > 1) powers[k] = powers[k / 2] * powers[k - k / 2];
        table.push_back(powers[k].real());
        table.push_back(powers[k].imag());
      }
      for (int j = 0; j < radix; ++j) next.push_back((angle + j) / radix);
    }
    angles = std::move(next);
  }
  return p;
}

Source kernel_source(const Tensor& kernel) {
  if (kernel.dim() == 3) return source(kernel);
  return {kernel.const_data_ptr(),
          type_of(kernel.scalar_type()),
          0,
          kernel.stride(0),
          kernel.stride(1),
          1,
          1};
}

// What forward and backward share: the sizes, how work is cut, the plan and its table.
struct FftConvCall {
  FftConv f{};
  int64_t lanes, units, kernel_units;
  std::vector<double> table, skip;
  std::vector<float> narrow;
  std::unique_ptr<KernelBeginning[]> beginnings;
  std::vector<void*> segmented_lags;

  FftConvCall(const FftConvCall&) = delete;
  ~FftConvCall() {
    for (void* lags : segmented_lags) std::free(lags);
  }

  FftConvCall(const Tensor& x, const Tensor& kernel, const OptionalTensor& skip_of_channel) {
    if (skip_of_channel) skip = values(*skip_of_channel);
    f.skip = skip_of_channel ? skip.data() : nullptr;
    f.b = x.size(0);
    f.n = x.size(1);
    f.h = x.size(2);
    f.d = x.size(3);
    f.lags = std::min(f.n, kernel.size(-2));
    f.shared = kernel.dim() == 2;
    f.x = source(x);
    f.kernel = kernel_source(kernel);
    lanes = (16 << instruction_set()) / (is_double(x) ? 8 : 4);
    f.kernels_in_lanes = 2 * f.d <= lanes;
    f.heads = f.kernels_in_lanes ? lanes / f.d : 1;
    // Each group sums its own spectra of the kernels' gradients: no more than make work for many.
    f.group = f.kernels_in_lanes ? f.d : f.b * f.h * f.d < 512 ? 16 : 32;
    f.groups = (f.d + f.group - 1) / f.group;
    units = f.b * ((f.h + f.heads - 1) / f.heads) * f.groups;
    kernel_units = ((f.shared ? 1 : f.b) * f.h + lanes - 1) / lanes;
  }

  // Streams where every vector is a whole cache line.
  void writes(const Tensor& out) {
    f.out = sink(out, f.n, f.h * f.d);
    const bool full =
        f.kernels_in_lanes ? lanes % f.d == 0 && f.h % f.heads == 0 : f.d % lanes == 0;
    f.streaming = instruction_set() == 2 && full && f.out.streaming &&
                  reinterpret_cast<uintptr_t>(f.out.data) % 64 == 0;
  }

  void plan() {
    const bool whole = f.n < 2 * kFitting || f.n < 16 * f.lags;
    f.plan = plan_for(whole ? f.n : std::max(kFitting, 4 * f.lags), table);
    f.chunk = whole ? f.n : f.plan.length - f.lags + 1;
    beginnings = std::make_unique<KernelBeginning[]>((f.shared ? 1 : f.b) * f.h);
    f.beginnings = beginnings.get();
    narrow.assign(table.begin(), table.end());
    f.plan.table = f.x.type == Type::f64 ? static_cast<const void*>(table.data()) : narrow.data();
  }
};

// The kernels' spectra, unless each unit makes its own.
Tensor transformed(FftConvCall& call, const Tensor& x) {
  FftConv& f = call.f;
  if (f.kernels_in_lanes) return nothing(x);
  Tensor spectra = fresh(x, {(f.shared ? 1 : f.b) * f.h, 2 * f.plan.length}, wide(x));
  f.spectra = spectra.mutable_data_ptr();
  spread(FASTMIX_KERNELS(fft_conv_spectra), f, call.kernel_units);
  return spectra;
}

Tensor fft_conv(const Tensor& x, const Tensor& kernel, const OptionalTensor& skip) {
  Tensor out = fresh(x);
  if (x.numel() == 0) return out;
  FftConvCall call(x, kernel, skip);
  call.writes(out);
  if (call.f.lags - call.f.lags * call.f.lags / (2 * call.f.n) <= kFewLags) {
    spread(FASTMIX_KERNELS(fft_conv_direct), call.f, call.units);
    return out;
  }
  call.plan();
  const Tensor spectra = transformed(call, x);
  spread(FASTMIX_KERNELS(fft_conv_forward), call.f, call.units);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> fft_conv_backward(const Tensor& grad, const Tensor& x,
                                                     const Tensor& kernel,
                                                     const OptionalTensor& skip) {
  Tensor grad_x = fresh(x);
  if (x.numel() == 0) return {grad_x, totals({}, kernel), skip ? totals({}, *skip) : nothing(x)};
  Tensor grad_kernel = fresh(kernel);
  FftConvCall call(x, kernel, skip);
  FftConv& f = call.f;
  std::vector<double> by_sample(f.b * call.skip.size());
  f.grad_skip = skip ? by_sample.data() : nullptr;
  f.grad = source(grad);
  call.writes(grad_x);
  f.grad_kernel = sink(grad_kernel, kernel.size(-2), f.h);
  call.plan();
  const bool alone = f.d == 1 && (f.b == 1 || !f.shared);
  const Tensor sums =
                   alone ? nothing(x) : fresh(x, {f.b, f.h, f.groups, 2 * f.plan.length}, wide(x)),
               spectra = transformed(call, x);
  f.sums = alone ? nullptr : sums.mutable_data_ptr();
  std::vector<double> early_lags;
  if (f.chunk == f.n && f.lags > f.n - kEarly) early_lags.resize(f.b * f.h * f.groups * kEarly);
  f.early_lags = early_lags.empty() ? nullptr : early_lags.data();
  call.segmented_lags.resize(f.b * f.h * f.groups);
  f.segmented_lags = call.segmented_lags.data();
  spread(FASTMIX_KERNELS(fft_conv_backward), f, call.units);
  if (!alone) spread(FASTMIX_KERNELS(fft_conv_lags), f, call.kernel_units);
  return {grad_x, grad_kernel, skip ? totals(by_sample, *skip) : nothing(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("fft_conv", TORCH_BOX(&fft_conv));
  m.impl("fft_conv_backward", TORCH_BOX(&fft_conv_backward));
}

}  // namespace fastmix

#endif
