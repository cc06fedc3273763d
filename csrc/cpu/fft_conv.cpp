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
  bool gathering;  // a vector is part of a line: a unit writes those of a line together
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
Lanes<C> channels(const FftConv& args, const Source& s, int64_t b, int64_t c0, int64_t count) {
  return lanes_of<C>(s, args.n, count, [&](int64_t i) {
    return address(s, b, 0, (c0 + i) / args.d, (c0 + i) % args.d);
  });
}

// Kernels b · h + head from `first` on, each in `repeat` lanes.
template <class C>
Lanes<C> kernels(const FftConv& args, int64_t first, int64_t count, int64_t repeat) {
  return lanes_of<C>(args.kernel, args.lags, count * repeat, [&](int64_t i) {
    const int64_t index = first + i / repeat;
    return address(args.kernel, index / args.h, 0, index % args.h, 0);
  });
}

// Writes channels c0 … of the output; or steps of a vector, one after the other, to `gathered`.
template <class C>
struct Channels {
  const FftConv& args;
  int64_t b, c0, count;
  C* gathered = nullptr;

  FASTMIX_INLINE void operator()(int64_t t, Vector<C> v) const {
    if (gathered != nullptr) return store(gathered + t * Simd<C>::lanes, v);
    const int64_t at = (b * args.n + t) * args.out.channels + c0;
    if (count == Simd<C>::lanes) {
      if (args.out.type == kType<C>) {
        C* to = static_cast<C*>(args.out.data) + at;
        return args.streaming ? stream(to, v) : store(to, v);
      }
      if constexpr (sizeof(C) == 4) {
        if (args.out.type == Type::bf16) return store(static_cast<Bf16*>(args.out.data) + at, v);
        if (args.out.type == Type::f16) return store(static_cast<F16*>(args.out.data) + at, v);
      }
    }
    C values[Simd<C>::lanes];
    store(values, v);
    write(args.out, b, t, c0, count, values);
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
    if constexpr (backward || in_lanes) set_aside(a, at[0]);
    if constexpr (backward) {
      open_leaf(other, at[1], w);
      V products[2 * kLeaf];
      for (int k = 0; k < kLeaf; ++k) {
        const Complex<V> own = taken_back(a, at[0], k);
        products[k] = own.re * other[k].re + own.im * other[k].im;
        products[k + kLeaf] = own.im * other[k].re - own.re * other[k].im;
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
        a[k] = times(taken_back(a, at[0], k), re, im);
      }
    } else {
      const C* s = spectrum + block * 2 * kLeaf;
      for (int k = 0; k < kLeaf; ++k)
        a[k] = times(backward ? taken_back(a, at[0], k) : a[k], s[k] + skip,
                     (backward ? -s[k + kLeaf] : s[k + kLeaf]) - V{});
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

Unit unit_of(const FftConv& args, int64_t index) {
  const int64_t sets = (args.h + args.heads - 1) / args.heads;
  Unit u;
  u.group = index % args.groups;
  u.head = index / args.groups % sets * args.heads;
  u.b = index / args.groups / sets;
  u.heads = smaller(args.heads, args.h - u.head);
  u.c0 = u.head * args.d + u.group * args.group;
  u.count =
      args.kernels_in_lanes ? u.heads * args.d : smaller(args.group, args.d - u.group * args.group);
  return u;
}

// Calls g(c0, count) for every vector of a unit's channels.
template <class C, class G>
FASTMIX_INLINE void each_lanes(const Unit& u, G g) {
  for (int64_t c = 0; c < u.count; c += Simd<C>::lanes)
    g(u.c0 + c, smaller(Simd<C>::lanes, u.count - c));
}

// Writes what the vectors of a unit have gathered, line by line. A transform's outputs are rows
// apart: lines that are written in halves would be fetched and written back for each vector.
template <class C>
void write_gathered(const FftConv& args, const Unit& u, const C* gathered) {
  for (int64_t t = 0; t < args.n; ++t)
    each_lanes<C>(u, [&](int64_t c0, int64_t count) FASTMIX_LAMBDA {
      const Channels<C> out{args, u.b, c0, count};
      out(t, load<Vector<C>>(gathered + (c0 - u.c0) * args.n + t * Simd<C>::lanes));
    });
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
FASTMIX_INLINE int64_t kernel_index(const FftConv& args, const Unit& u) {
  return (args.shared ? 0 : u.b * args.h) + u.head;
}

// A channel's skip, over `length`, in each lane.
template <class C>
Vector<C> skips(const FftConv& args, int64_t c0, int64_t count, int64_t length) {
  C numbers[Simd<C>::lanes] = {};
  for (int64_t i = 0; args.skip != nullptr && i < count; ++i)
    numbers[i] = args.skip[c0 + i] / length;
  return load<Vector<C>>(numbers);
}

template <class C>
void spectra(const FftConv& args, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<C>::lanes;
  const int64_t length = args.plan.length, all = (args.shared ? 1 : args.b) * args.h;
  Buffers<C> buffers(1, length);
  for (int64_t i = begin * lanes; i < smaller(end * lanes, all); i += lanes) {
    const int64_t count = smaller(lanes, all - i);
    const Lanes<C> in = kernels<C>(args, i, count, 1);
    const auto accept = checked<C>([&](int, const Magnitudes<C>& largest) {
      Beginning<C> begins;
      const Ints<C> refused = refusals<C>({in, args.lags, false}, largest, begins);
      for (int64_t j = 0; j < count; ++j)
        args.beginnings[i + j] = {refused[j] != 0, begins.zeros[j], begins.ready[j]};
      return true;
    });
    transform(args.plan, &in, buffers.at, buffers.tile, 0,
              Spectra<C>{static_cast<C*>(args.spectra) + i * 2 * length, count, length}, nullptr,
              accept);
  }
}

// Calls g(i, lags) for the lags' gradients that were summed without transforms, of the i-th of
// `count` kernels from `first` on.
template <class C, class G>
FASTMIX_INLINE void each_segmented(const FftConv& args, int64_t first, int64_t count, G g) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t b = 0; b < (args.shared ? args.b : 1); ++b)
      for (int64_t group = 0; group < args.groups; ++group)
        if (const void* lags = args.segmented_lags[(b * args.h + first + i) * args.groups + group])
          g(i, static_cast<const C*>(lags));
}

// Adds grad_t x_{t-lag} of the last lags, of a vector of a unit's channels.
template <class C>
void add_early_lags(const FftConv& args, const Unit& u, const Sequence<C>& backwards,
                    const Sequence<C>& x, int64_t count) {
  Vector<C> a[kEarly], b[kEarly];
  const int64_t end = smaller(kEarly, args.n);
  for (int64_t t = 0; t < end; ++t) a[t] = backwards(t), b[t] = x(t);
  for (int64_t t = 0; t < end; ++t) {
    Vector<C> sum{};
    for (int64_t s = 0; s <= t; ++s) sum += a[s] * b[t - s];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t head = u.head + (args.kernels_in_lanes ? i / args.d : 0);
      C* const lags = static_cast<C*>(args.early_lags);
      lags[((u.b * args.h + head) * args.groups + u.group) * kEarly + t] += sum[i];
    }
  }
}

// The gradient of a kernel's lag that is among the last.
template <class C>
C early_lag(const FftConv& args, int64_t kernel, int64_t lag) {
  C sum = 0;
  for (int64_t b = 0; b < (args.shared ? args.b : 1); ++b)
    for (int64_t group = 0; group < args.groups; ++group)
      sum += static_cast<const C*>(
          args.early_lags)[((b * args.h + kernel) * args.groups + group) * kEarly + args.n - 1 -
                           lag];
  return sum;
}

// The gradients of `count` kernels from `first` on, from the sums of their spectra.
template <class C>
void write_lags(const FftConv& args, Buffers<C>& buffers, int64_t first, int64_t count,
                const C* sums) {
  const int64_t spectrum = 2 * args.plan.length, step = args.groups * spectrum;
  bool segmented = false;
  each_segmented<C>(args, first, count, [&](int64_t, const C*) { segmented = true; });
  const auto put = [&](int64_t lag, Vector<C> v) {
    C values[Simd<C>::lanes];
    store(values, v);
    if (args.early_lags != nullptr && lag < args.lags && lag >= args.n - kEarly)
      for (int64_t i = 0; i < count; ++i) values[i] = early_lag<C>(args, first + i, lag);
    if (segmented && lag < args.lags)
      each_segmented<C>(args, first, count,
                        [&](int64_t i, const C* lags) { values[i] += lags[lag]; });
    for (int64_t i = 0, run; i < count; i += run) {
      const int64_t head = (first + i) % args.h;
      run = smaller(count - i, args.h - head);
      write(args.grad_kernel, (first + i) / args.h, lag, head, run, values + i);
    }
  };
  transform(args.plan, static_cast<const Lanes<C>*>(nullptr), buffers.at, buffers.tile, args.lags,
            Sums<C>{sums, count, args.plan.length, step, args.groups, spectrum,
                    args.shared ? args.b : 1, args.h * step},
            put);
  for (int64_t lag = args.lags; lag < args.grad_kernel.n_size; ++lag) put(lag, Vector<C>{});
}

// Channels c0 … and a chunk of their steps, where one transform cannot take them.
template <class C>
struct SegmentedChunk {
  const FftConv& args;
  const Unit& u;
  const Channels<C>& out;
  Sequence<C> kernel;
  Buffers<C> buffers;
  C* sum;

  SegmentedChunk(const FftConv& args, const Unit& u, const Channels<C>& out)
      : args(args), u(u), out(out), buffers(2, args.plan.length),
        sum(buffers.scratch.template take<C>(args.plan.length * Simd<C>::lanes)) {
    const Lanes<C> lanes = args.kernels_in_lanes
                               ? kernels<C>(args, kernel_index(args, u), u.heads, args.d)
                               : kernels<C>(args, kernel_index(args, u), 1, out.count);
    kernel = {lanes, args.lags, false};
  }

  void convolve(const Sequence<C>& a, const Sequence<C>& b) {
    Product<C, false, true> product{};
    product.scale = C(1) / args.plan.length;
    causal_product(args.plan, a, b, a.count, sum, buffers.at, buffers.tile, product);
  }

  Vector<C> at(int64_t t) const { return load<Vector<C>>(sum + t * Simd<C>::lanes); }

  // y_start … of `count` steps, from x and the `before` steps before them, where there are any.
  void forward(const Lanes<C>& all, int64_t start, int64_t before, int64_t count) {
    before = smaller(before, start);
    const Lanes<C> x = all.window(start - before, start + count);
    convolve({x, before + count, false}, kernel);
    const Vector<C> skip = skips<C>(args, out.c0, out.count, 1);
    for (int64_t t = before; t < before + count; ++t)
      out(start + t - before, args.skip == nullptr ? at(t) : at(t) + skip * x(t));
  }

  // dx of `count` steps from `start` on, from as many of x and `reach` of the gradient; adds to
  // the kernels' lags and to the skips.
  void backward(const Lanes<C>& grad, const Lanes<C>& x, int64_t start, int64_t count,
                int64_t reach, double* grad_skips) {
    const Sequence<C> backwards{grad, reach, true};
    convolve(backwards, kernel);
    const Vector<C> skip = skips<C>(args, out.c0, out.count, 1);
    for (int64_t t = 0; t < count; ++t) {
      const Vector<C> v = at(reach - 1 - t);
      out(start + t, args.skip == nullptr ? v : v + skip * grad(t));
    }
    convolve(backwards, {x, count, false});
    for (int64_t i = 0; i < out.count; ++i) {
      C* const to = lags_of(args.kernels_in_lanes ? i / args.d : 0);
      for (int64_t lag = 0; lag < smaller(args.lags, reach); ++lag)
        to[lag] += at(reach - 1 - lag)[i];
    }
    for (int64_t t = 0; args.skip != nullptr && t < count; ++t) {
      const Vector<C> g = grad(t), v = x(t);
      for (int64_t i = 0; i < out.count; ++i) grad_skips[i] += double(g[i]) * double(v[i]);
    }
  }

  // The lags of a head of the unit, zero at first.
  C* lags_of(int64_t head) const {
    void*& lags = args.segmented_lags[(u.b * args.h + u.head + head) * args.groups + u.group];
    if (lags == nullptr) lags = calloc(args.lags, sizeof(C));
    if (lags == nullptr) abort();
    return static_cast<C*>(lags);
  }
};

// Whether a skip is too large, or not finite, to be a part of a spectrum.
template <class C>
bool fits(Vector<C> skip) {
  return !any(magnitude<C>(skip) > power_bits<C>(ints<C>(Format<C>::bias / 2 - 13)));
}

// The steps of one transform: y_start … y_{stop-1}, or dx.
struct Chunk {
  int64_t start, stop;
  int64_t before;  // steps of x that enter before them: y needs as many lags
  int64_t reach;   // steps that enter of what is convolved: dx needs lags after its own

  FASTMIX_INLINE int64_t count() const { return stop - start; }
};

Chunk chunk_from(const FftConv& args, int64_t start, bool backward) {
  const int64_t stop = smaller(start + args.chunk, args.n),
                before = backward || args.chunk == args.n ? 0 : args.lags - 1;
  return {start, stop, before,
          backward ? smaller(stop - start + args.lags - 1, args.n - start) : before + stop - start};
}

// A vector of a unit's channels, convolved chunk by chunk.
template <class C, bool backward, bool in_lanes>
struct ChannelVector {
  using Leaf = Product<C, backward, in_lanes>;
  static constexpr int64_t lanes = Simd<C>::lanes;
  const FftConv& args;
  const Unit& u;
  const Buffers<C>& buffers;
  const Channels<C> out;
  const Lanes<C> x, grad, kernel;
  const Vector<C> skip;
  Beginning<C> begins[3];  // of the inputs, the kernel last
  Lanes<C> in[3];
  bool whole;  // a transform takes the skip and the kernel
  // Sums of grad · x, each lane's: times the length from spectra, and from segments.
  double points[lanes] = {}, segmented_points[lanes] = {};

  ChannelVector(const FftConv& args, const Unit& u, const Buffers<C>& buffers, int64_t c0,
                int64_t count, C* gathered)
      : args(args), u(u), buffers(buffers), out{args, u.b, c0, count, gathered},
        x(channels<C>(args, args.x, u.b, c0, count)),
        grad(backward ? channels<C>(args, args.grad, u.b, c0, count) : x),
        kernel(in_lanes ? kernels<C>(args, kernel_index(args, u), u.heads, args.d)
                        : kernels<C>(args, kernel_index(args, u), 1, count)),
        skip(skips<C>(args, c0, count, 1)), whole(fits<C>(skip)) {
    if (in_lanes) {
      in[1 + backward] = kernel;
    } else {
      const KernelBeginning& of_kernel = args.beginnings[kernel_index(args, u)];
      begins[1 + backward] = {ints<C>(of_kernel.zeros), ints<C>(of_kernel.ready)};
      whole &= !of_kernel.refused;
    }
  }

  void convolve(Leaf& leaf) {
    leaf.skip = skips<C>(args, out.c0, out.count, args.plan.length);
    leaf.lane_sums = points;
    for (int64_t start = 0; start < args.n; start += args.chunk) {
      const Chunk chunk = chunk_from(args, start, backward);
      in[0] = backward ? grad.window(start, args.n) : x.window(start - chunk.before, args.n);
      if (backward) in[1] = x.window(start, chunk.stop);
      if (whole && transformed(chunk, leaf)) {
        if (backward && args.early_lags != nullptr)
          add_early_lags<C>(args, u, {in[0], chunk.reach, true}, {in[1], chunk.stop, false},
                            out.count);
        continue;
      }
      SegmentedChunk<C> segmented(args, u, out);
      if (backward)
        segmented.backward(in[0], in[1], start, chunk.count(), chunk.reach, segmented_points);
      else segmented.forward(x, start, chunk.before, chunk.count());
    }
    if (backward && args.grad_skip != nullptr)
      for (int64_t i = 0; i < out.count; ++i)
        args.grad_skip[u.b * args.out.channels + out.c0 + i] =
            points[i] / args.plan.length + segmented_points[i];
  }

  // A chunk's outputs by one transform; false, and nothing written, where it refuses its inputs.
  bool transformed(const Chunk& chunk, const Leaf& leaf) {
    const int64_t steps[3] = {chunk.reach, backward ? chunk.count() : args.lags, args.lags};
    EarlyOutputs<C> early;
    const auto accept = checked<C>([&](int input, const Magnitudes<C>& largest) {
      const Sequence<C> sequence{in[input], steps[input], backward && input == 0};
      if (any(refusals(sequence, largest, begins[input]))) return false;
      if (input + 1 < Leaf::inputs) return true;
      early.compute({in[0], chunk.reach, backward}, begins[0], {kernel, args.lags, false},
                    begins[1 + backward], args.skip == nullptr ? nullptr : &skip);
      return true;
    });
    const auto put = [&](int64_t t, Vector<C> v) FASTMIX_LAMBDA {
      if (t < chunk.before) return;
      const int64_t step = backward ? chunk.reach - 1 - t : t;
      out(chunk.start + t - chunk.before, step < early.end ? early(step, v) : v);
    };
    return transform(args.plan, in, buffers.at, buffers.tile, chunk.before + chunk.count(), leaf,
                     put, accept);
  }
};

template <class C, bool backward, bool in_lanes>
void units(const FftConv& args, int64_t begin, int64_t end) {
  using Leaf = Product<C, backward, in_lanes>;
  const int64_t spectrum = 2 * args.plan.length;
  Buffers<C> buffers(Leaf::buffers, args.plan.length);
  const bool alone = backward && args.sums == nullptr;
  C* const own = alone ? buffers.scratch.template take<C>(args.heads * spectrum) : nullptr;
  C* const gathered =
      args.gathering ? buffers.scratch.template take<C>(args.n * args.group) : nullptr;
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit_of(args, i);
    Leaf leaf{};
    if (!in_lanes) leaf.spectrum = static_cast<C*>(args.spectra) + kernel_index(args, u) * spectrum;
    leaf.scale = C(1) / args.plan.length;
    leaf.heads = u.heads;
    leaf.d = args.d;
    leaf.sums_step = args.groups * spectrum;
    if (backward) {
      leaf.sums = alone ? own
                        : static_cast<C*>(args.sums) +
                              ((u.b * args.h + u.head) * args.groups + u.group) * spectrum;
      memset(leaf.sums, 0, u.heads * spectrum * sizeof(C));
    }
    each_lanes<C>(u, [&](int64_t c0, int64_t count) {
      C* const rows = args.gathering ? gathered + (c0 - u.c0) * args.n : nullptr;
      ChannelVector<C, backward, in_lanes>(args, u, buffers, c0, count, rows).convolve(leaf);
    });
    if (args.gathering) write_gathered(args, u, gathered);
    if constexpr (backward && in_lanes)
      if (alone) write_lags<C>(args, buffers, kernel_index(args, u), u.heads, own);
  }
  if (args.streaming) streamed();
}

template <class C, bool backward>
void convolve(const FftConv& args, int64_t begin, int64_t end) {
  args.kernels_in_lanes ? units<C, backward, true>(args, begin, end)
                        : units<C, backward, false>(args, begin, end);
}

template <class C>
void lags(const FftConv& args, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<C>::lanes;
  const int64_t all = (args.shared ? 1 : args.b) * args.h,
                step = args.groups * 2 * args.plan.length;
  Buffers<C> buffers(1, args.plan.length);
  for (int64_t first = begin * lanes; first < smaller(end * lanes, all); first += lanes)
    write_lags(args, buffers, first, smaller(lanes, all - first),
               static_cast<const C*>(args.sums) + first * step);
}

// ---- Few lags: the products themselves ----

template <class C>
void direct(const FftConv& args, int64_t begin, int64_t end) {
  using V = Vector<C>;
  constexpr int64_t lanes = Simd<C>::lanes, steps = 128, at_once = 8;
  Scratch scratch;
  C* kernel = scratch.take<C>(args.lags * lanes);
  C* rows = scratch.take<C>((steps + args.lags) * lanes);
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit_of(args, i);
    each_lanes<C>(u, [&](int64_t c0, int64_t count) {
      const auto k = args.kernels_in_lanes
                         ? kernels<C>(args, kernel_index(args, u), u.heads, args.d)
                         : kernels<C>(args, kernel_index(args, u), 1, count);
      for (int64_t j = 0; j < args.lags; ++j)
        store(kernel + j * lanes, j == 0 ? k(0) + skips<C>(args, c0, count, 1) : k(j));
      const Lanes<C> x = channels<C>(args, args.x, u.b, c0, count);
      const Channels<C> out{args, u.b, c0, count};
      for (int64_t start = 0; start < args.n; start += steps) {
        const int64_t stop = smaller(start + steps, args.n),
                      from = larger(0, start - args.lags + 1);
        for (int64_t s = from; s < stop; ++s) store(rows + (s - from) * lanes, x(s));
        for (int64_t t = start; t < stop; t += at_once) {
          V y[at_once] = {};
          const int64_t last = smaller(t + at_once, stop);
          for (int64_t s = larger(from, t - args.lags + 1); s < last; ++s) {
            const V in = load<V>(rows + (s - from) * lanes);
            const int64_t lag = t - s;  // of y[0]
            if (lag >= 0 && lag + at_once <= args.lags) {
              for (int r = 0; r < at_once; ++r) y[r] += in * load<V>(kernel + (lag + r) * lanes);
            } else {
              for (int r = 0; r < at_once; ++r)
                if (lag + r >= 0 && lag + r < args.lags)
                  y[r] += in * load<V>(kernel + (lag + r) * lanes);
            }
          }
          for (int64_t r = 0; r < last - t; ++r) out(t + r, y[r]);
        }
      }
    });
  }
  if (args.streaming) streamed();
}

}  // namespace

void fft_conv_spectra(const FftConv& args, int64_t begin, int64_t end) {
  args.x.type == Type::f64 ? spectra<double>(args, begin, end) : spectra<float>(args, begin, end);
}

void fft_conv_lags(const FftConv& args, int64_t begin, int64_t end) {
  args.x.type == Type::f64 ? lags<double>(args, begin, end) : lags<float>(args, begin, end);
}

void fft_conv_forward(const FftConv& args, int64_t begin, int64_t end) {
  args.x.type == Type::f64 ? convolve<double, false>(args, begin, end)
                           : convolve<float, false>(args, begin, end);
}

void fft_conv_backward(const FftConv& args, int64_t begin, int64_t end) {
  args.x.type == Type::f64 ? convolve<double, true>(args, begin, end)
                           : convolve<float, true>(args, begin, end);
}

void fft_conv_direct(const FftConv& args, int64_t begin, int64_t end) {
  args.x.type == Type::f64 ? direct<double>(args, begin, end) : direct<float>(args, begin, end);
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

constexpr Checks kFftConvChecks{"fft_conv"};

void check(const Tensor& x, const Tensor& kernel, const OptionalTensor& skip) {
  kFftConvChecks.tensor("x", x, {kAny, kAny, kAny, kAny}, kReal);
  kFftConvChecks.require(x.size(1) > 0, "n", "at least 1", x.size(1));
  const int64_t h = x.size(2);
  if (kernel.dim() == 2) kFftConvChecks.tensor("kernel", kernel, {kAny, h}, kReal);
  else kFftConvChecks.tensor("kernel", kernel, {x.size(0), kAny, h}, kReal);
  kFftConvChecks.require(kernel.size(-2) > 0, "the number of the kernel's lags", "at least 1", 0);
  kFftConvChecks.tensor("skip", skip, {h, x.size(3)}, kReal);
}

// What forward and backward share: the sizes, how work is cut, the plan and its table.
struct FftConvCall {
  FftConv args{};
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
    args.skip = skip_of_channel ? skip.data() : nullptr;
    args.b = x.size(0);
    args.n = x.size(1);
    args.h = x.size(2);
    args.d = x.size(3);
    args.lags = std::min(args.n, kernel.size(-2));
    args.shared = kernel.dim() == 2;
    args.x = source(x);
    args.kernel = kernel_source(kernel);
    lanes = (16 << instruction_set()) / (is_double(x) ? 8 : 4);
    args.kernels_in_lanes = 2 * args.d <= lanes;
    args.heads = args.kernels_in_lanes ? lanes / args.d : 1;
    // Each group sums its own spectra of the kernels' gradients: no more than make work for many.
    args.group = args.kernels_in_lanes ? args.d : args.b * args.h * args.d < 512 ? 16 : 32;
    args.groups = (args.d + args.group - 1) / args.group;
    units = args.b * ((args.h + args.heads - 1) / args.heads) * args.groups;
    kernel_units = ((args.shared ? 1 : args.b) * args.h + lanes - 1) / lanes;
  }

  // Streams where every vector is a whole cache line.
  void writes(const Tensor& out) {
    args.out = sink(out, args.n, args.h * args.d);
    const bool full = args.kernels_in_lanes ? lanes % args.d == 0 && args.h % args.heads == 0
                                            : args.d % lanes == 0;
    args.streaming = instruction_set() == 2 && full && args.out.streaming &&
                     reinterpret_cast<uintptr_t>(args.out.data) % 64 == 0;
  }

  // Nanoseconds of one thread, for the transforms of all kernels.
  double transforming() const {
    return 4.0 * (args.shared ? 1 : args.b) * args.h * args.plan.length;
  }

  void plan() {
    const bool whole = args.n < 2 * kFitting || args.n < 16 * args.lags;
    args.plan = plan_for(whole ? args.n : std::max(kFitting, 4 * args.lags), table);
    args.chunk = whole ? args.n : args.plan.length - args.lags + 1;
    const bool half_lines = instruction_set() == 1 &&
                            (args.out.type == Type::f32 || args.out.type == Type::f64) &&
                            !args.kernels_in_lanes && args.d % (2 * lanes) == 0;
    args.gathering = whole && half_lines && args.out.streaming &&
                     reinterpret_cast<uintptr_t>(args.out.data) % 64 == 0;
    args.streaming |= args.gathering;
    beginnings = std::make_unique<KernelBeginning[]>((args.shared ? 1 : args.b) * args.h);
    args.beginnings = beginnings.get();
    narrow.assign(table.begin(), table.end());
    args.plan.table =
        args.x.type == Type::f64 ? static_cast<const void*>(table.data()) : narrow.data();
  }
};

// The kernels' spectra, unless each unit makes its own.
Tensor transformed(FftConvCall& call, const Tensor& x) {
  FftConv& args = call.args;
  if (args.kernels_in_lanes) return nothing(x);
  Tensor spectra = fresh(x, {(args.shared ? 1 : args.b) * args.h, 2 * args.plan.length}, wide(x));
  args.spectra = spectra.mutable_data_ptr();
  spread(FASTMIX_KERNELS(fft_conv_spectra), args, call.kernel_units, call.transforming());
  return spectra;
}

Tensor fft_conv(const Tensor& x, const Tensor& kernel, const OptionalTensor& skip) {
  check(x, kernel, skip);
  Tensor out = fresh(x);
  if (x.numel() == 0) return out;
  FftConvCall call(x, kernel, skip);
  call.writes(out);
  if (call.args.lags - call.args.lags * call.args.lags / (2 * call.args.n) <= kFewLags) {
    spread(FASTMIX_KERNELS(fft_conv_direct), call.args, call.units,
           0.2 * call.args.lags * x.numel());
    return out;
  }
  call.plan();
  const Tensor spectra = transformed(call, x);
  spread(FASTMIX_KERNELS(fft_conv_forward), call.args, call.units, 5.0 * x.numel());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> fft_conv_backward(const Tensor& grad, const Tensor& x,
                                                     const Tensor& kernel,
                                                     const OptionalTensor& skip) {
  check(x, kernel, skip);
  kFftConvChecks.tensor("grad_out", grad, {x.size(0), x.size(1), x.size(2), x.size(3)}, kReal);
  Tensor grad_x = fresh(x);
  if (x.numel() == 0) return {grad_x, totals({}, kernel), skip ? totals({}, *skip) : nothing(x)};
  Tensor grad_kernel = fresh(kernel);
  FftConvCall call(x, kernel, skip);
  FftConv& args = call.args;
  std::vector<double> by_sample(args.b * call.skip.size());
  args.grad_skip = skip ? by_sample.data() : nullptr;
  args.grad = source(grad);
  call.writes(grad_x);
  args.grad_kernel = sink(grad_kernel, kernel.size(-2), args.h);
  call.plan();
  const bool alone = args.d == 1 && (args.b == 1 || !args.shared);
  const Tensor sums = alone
                          ? nothing(x)
                          : fresh(x, {args.b, args.h, args.groups, 2 * args.plan.length}, wide(x)),
               spectra = transformed(call, x);
  args.sums = alone ? nullptr : sums.mutable_data_ptr();
  std::vector<double> early_lags;
  if (args.chunk == args.n && args.lags > args.n - kEarly)
    early_lags.resize(args.b * args.h * args.groups * kEarly);
  args.early_lags = early_lags.empty() ? nullptr : early_lags.data();
  call.segmented_lags.resize(args.b * args.h * args.groups);
  args.segmented_lags = call.segmented_lags.data();
  spread(FASTMIX_KERNELS(fft_conv_backward), args, call.units, 10.0 * x.numel());
  if (!alone) spread(FASTMIX_KERNELS(fft_conv_lags), args, call.kernel_units, call.transforming());
  return {grad_x, grad_kernel, skip ? totals(by_sample, *skip) : nothing(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("fft_conv", TORCH_BOX(&fft_conv));
  m.impl("fft_conv_backward", TORCH_BOX(&fft_conv_backward));
}

}  // namespace fastmix

#endif
