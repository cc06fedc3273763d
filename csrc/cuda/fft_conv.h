// y_t = Σ_{j ≤ t} kernel_j · x_{t-j} + skip · x_t and its gradients: the kernels of fft_conv.cu,
// written for any Block that has threads, shared memory and barriers. A test runs them on a CPU.
//
// A sequence is cut into r interleaved subsequences x_{r s + ρ}, each transformed for itself
// (fft_stages.h); with z^r = u the values at a point u are polynomials in z of degree r - 1,
// multiplied modulo z^r = u. A thread reads a few neighbouring channels of its time steps at
// once, as raw words, and takes them through the transforms one after another: what has been
// read is replaced by what will be written. A skip is one more lag of 0, a channel's own: it is
// the same number at every point.

#pragma once

#include "fft_work.h"

namespace fastmix::cuda {

// ---- the kernels

// Which of `units` a slot of threads works at, or -1: the last block's may have none.
template <class S>
FASTMIX_HD int unit_of(int units, int block, int thread) {
  if (S::teams == 1) return block;
  const int unit = block * S::teams + thread / S::slot;
  return unit < units ? unit : -1;
}

// Channels of a head, which is counted over all samples, from c on; none where it has no more.
template <class S>
FASTMIX_HD Channels channels_of(const FftConv& conv, int head, int c) {
  if (c < 0 || c >= conv.channels) return {0, 0, 0, 0};
  return {head / conv.heads, head % conv.heads, c,
          conv.channels - c < S::at_once ? conv.channels - c : S::at_once};
}

// The skip of the i-th of those channels.
template <class Block, class Conv>
FASTMIX_HD float skip_of(Block& block, const Conv& conv, Channels at, int i) {
  if (conv.skip == nullptr || i >= at.count) return 0;
  return as_float(block.template load_one<4>(conv.skip + at.h * conv.channels + at.c + i));
}

// The kernel of a head, which is counted over all samples.
FASTMIX_HD int kernel_of(const FftConv& conv, int head) {
  return conv.kernels == 1 ? head % conv.heads : head;
}

template <class S, bool wrapped>
FASTMIX_HD const Complex* spectrum_of(const FftConv& conv, int kernel) {
  return conv.spectra + int64_t{kernel} * (wrapped ? 2 * S::r - 1 : S::r) * S::M;
}

// f(j, address) for those of a thread's sixteen lags that such a kernel has.
template <class S, class F>
FASTMIX_HD void each_lag(const View& view, const FftConv& args, int kernel, int thread, int i,
                         F f) {
  const int lags = kernel < 0 ? 0 : args.lags, first = S::first_step(thread, i);
  unrolled<16>([&](auto j) {
    const int t = first + j * S::stride;
    char* address = static_cast<char*>(view.data) +
                    (view.type == Type::f32 ? 4 : 2) *
                        (kernel / args.heads * view.b + t * view.n + kernel % args.heads * view.d);
    if (t < lags) f(j, address);
  });
}

// Spectra of kernels, as the others read them: for r = 1 values in pairs of all threads
// together; else the r values of a point, and before them the last r - 1 of them times u.
template <class S>
struct Spectra {
  static constexpr int shared = S::shared;

  FASTMIX_HD static int units(const FftConv& conv) { return conv.kernels * conv.heads; }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const FftConv& conv) {
    using W = Work<S, Block>;
    W work(block);
    block.phase([&](int thread) { work.tabulate(thread); });
    work.forward([&](int thread, int i, float* x) {
      unrolled<16>([&](auto j) { x[j] = 0; });
      const int kernel = unit_of<S>(units(conv), block.index(), thread);
      each_lag<S>(conv.kernel, conv, kernel, thread, i, [&](auto j, const char* from) {
        x[j] = number<Block>(block, conv.kernel.type, from);
      });
    });
    if constexpr (S::r == 1) {
      block.phase([&](int thread) {
        const int kernel = unit_of<S>(units(conv), block.index(), thread);
        Complex* to = kernel < 0 ? nullptr : conv.spectra + int64_t{kernel} * S::M;
        work.third_in(thread, [&](auto i, Complex* v) {
          if (to != nullptr) block.store_pair(to + W::pair(thread, i / 2), v);
        });
      });
    } else {
      work.last(work.points);
      Complex* to = conv.spectra + int64_t{block.index()} * (conv.wrapped + S::r) * S::M;
      work.each_leaf([&](int place) {
        const Complex u = S::Stages::point(place);
        unrolled<S::r>([&](auto e) {
          const Complex k = work.points.get(W::leaf(place, e));
          block.store_complex(to + (conv.wrapped + e) * S::M + place, k);
          if (e > 0 && conv.wrapped > 0) block.store_complex(to + (e - 1) * S::M + place, u * k);
        });
      });
    }
  }
};

template <class S>
struct Forward {
  static constexpr int shared = S::shared;

  FASTMIX_HD static int groups(const FftConv& conv) {
    return (conv.channels + S::at_once - 1) / S::at_once;
  }

  FASTMIX_HD static int units(const FftConv& conv) {
    return conv.batch * conv.heads * groups(conv);
  }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const FftConv& conv) {
    using W = Work<S, Block>;
    W work(block);
    const Type type = conv.x.type;
    auto unit = [&](int thread) { return unit_of<S>(units(conv), block.index(), thread); };
    auto at = [&](int thread) {
      const int own = unit(thread);
      return channels_of<S>(conv, own / groups(conv),
                            own < 0 ? -1 : own % groups(conv) * S::at_once);
    };
    auto kernel_at = [&](int thread) {
      return kernel_of(conv, (unit(thread) < 0 ? 0 : unit(thread)) / groups(conv));
    };
    const int only = kernel_at(0);  // of a block with one unit: the compiler divides just once
    auto spectrum = [&](int thread) {
      return spectrum_of<S, true>(conv, S::teams == 1 ? only : kernel_at(thread));
    };
    typename W::template Own<Queue<S>> queue(block);
    block.phase([&](int thread) {
      work.tabulate(thread);
      read<Block, S>(block, conv.x, conv.channels, conv.steps, at(thread), thread,
                     queue.of(thread));
    });
    const int all = S::at_once < conv.channels ? S::at_once : conv.channels;
    FASTMIX_ROLLED for (int c = 0; c < all; ++c) {
      work.forward(queue, type);
      if constexpr (S::r == 1) {
        block.phase([&](int thread) {
          const Complex* kernel = spectrum(thread);
          const float skip = skip_of(block, conv, at(thread), c);
          work.third(thread, [&](auto i, Complex* v) {
            Complex k[2];
            block.load_pair(kernel + W::pair(thread, i / 2), k);
            v[0] = v[0] * (k[0] + skip);
            v[1] = v[1] * (k[1] + skip);
            if (i % 8 == 6) block.in_order();
          });
        });
      } else {
        work.last(work.points);
        const Complex* kernel = spectrum(0) + (S::r - 1) * S::M;
        const float skip = skip_of(block, conv, at(0), c);
        work.each_leaf([&](int place) {
          Complex a[S::r], k[2 * S::r - 1];
          unrolled<2 * S::r - 1>(
              [&](auto e) { k[e] = block.load_complex(kernel + (e - (S::r - 1)) * S::M + place); });
          k[S::r - 1] = k[S::r - 1] + skip;
          unrolled<S::r>([&](auto j) { a[j] = work.points.get(W::leaf(place, j)); });
          unrolled<S::r>([&](auto i) {
            Complex sum = a[0] * k[i + S::r - 1];
            unrolled<S::r - 1>([&](auto j) { sum = sum + a[j + 1] * k[i - j - 1 + S::r - 1]; });
            work.points.put(W::leaf(place, i), sum);
          });
        });
        work.last_back();
      }
      work.back(queue, type);
    }
    block.own([&](int thread) {
      write<Block, S>(block, conv.out, conv.channels, conv.steps, at(thread), thread,
                      queue.of(thread));
    });
  }
};

// The gradient of x, from conjugated spectra; and of each kernel the spectrum, summed over
// a part of the head's channels.
template <class S>
struct Backward {
  static constexpr int shared = S::shared_backward;

  FASTMIX_HD static int units(const FftConv& conv) { return conv.batch * conv.heads * conv.parts; }

  template <class Block>
  FASTMIX_HD static int unit(Block& block, const FftConv& conv, int thread) {
    return unit_of<S>(units(conv), block.index(), thread);
  }

  // A thread's channels, from the `first` of its share on.
  template <class Block>
  FASTMIX_HD static Channels at(Block& block, const FftConv& conv, int thread, int first) {
    const int own = unit(block, conv, thread);
    return channels_of<S>(conv, own / conv.parts,
                          own < 0 ? -1 : own % conv.parts * conv.share + first);
  }

  template <class Block>
  FASTMIX_HD static const Complex* spectrum(Block& block, const FftConv& conv, int thread) {
    const int head = (unit(block, conv, thread) < 0 ? 0 : unit(block, conv, thread)) / conv.parts;
    return spectrum_of<S, false>(conv, kernel_of(conv, head));
  }

  template <class Block>
  FASTMIX_HD static Complex* sums(Block& block, const FftConv& conv, int thread) {
    return conv.sums + int64_t{unit(block, conv, thread)} * S::length;
  }

  // Where the e-th value of x at a place waits for the gradient's, if not in shared memory.
  template <class Block>
  FASTMIX_HD static Complex* kept_at(Block& block, const FftConv& conv, int place, int e) {
    return conv.kept + (int64_t{block.index()} * S::r + e) * S::M + place;
  }

  // The last stage of x, whose values wait in shared memory if that has room for them.
  template <class Block>
  FASTMIX_HD static void keep(Work<S, Block>& work, const FftConv& conv) {
    if constexpr (S::keeps_shared) {
      work.last(work.kept);
    } else {
      work.last(work.points);
      work.each_leaf([&](int place) {
        unrolled<S::r>([&](auto e) {
          work.block.store_complex(kept_at(work.block, conv, place, e),
                                   work.points.get(Work<S, Block>::leaf(place, e)));
        });
      });
    }
  }

  // The gradient's products with x, added to the sums, and with the kernel, of the c-th channel.
  // Where r = 1: within the last stage.
  template <class Block>
  FASTMIX_HD static void multiply(Work<S, Block>& work, const FftConv& conv, int c) {
    using W = Work<S, Block>;
    Block& block = work.block;
    block.phase([&](int thread) {
      typename W::Shared kept = W::of(work.kept, thread, 0);
      const Complex* kernel = spectrum(block, conv, thread);
      const float skip = skip_of(block, conv, at(block, conv, thread, c), 0);
      Complex* to = unit(block, conv, thread) < 0 ? nullptr : sums(block, conv, thread);
      work.third(thread, [&](auto i, Complex* v) {
        Complex k[2], sum[2] = {};
        if (to != nullptr && c > 0) block.load_pair(to + W::pair(thread, i / 2), sum);
        unrolled<2>([&](auto j) {
          sum[j] = sum[j] + conj(kept.get(17 * (thread % S::slot) + i + j)) * v[j];
        });
        if (to != nullptr) block.store_pair(to + W::pair(thread, i / 2), sum);
        if (S::bytes == 2) block.in_order();  // else 4096 points spill a register
        block.load_pair(kernel + W::pair(thread, i / 2), k);
        unrolled<2>([&](auto j) { v[j] = v[j] * (conj(k[j]) + skip); });
        block.in_order();
      });
    });
  }

  // Where r > 1: at each point, between the last stage and the way back.
  template <class Block>
  FASTMIX_HD static void multiply_leaves(Work<S, Block>& work, const FftConv& conv, int c) {
    using W = Work<S, Block>;
    Block& block = work.block;
    const Complex* kernel = spectrum(block, conv, 0);
    const float skip = skip_of(block, conv, at(block, conv, 0, c), 0);
    Complex* to = sums(block, conv, 0);
    work.each_leaf([&](int place) {
      Complex w[S::r], a[S::r];
      unrolled<S::r>([&](auto e) {
        w[e] = work.points.get(W::leaf(place, e));
        a[e] = S::keeps_shared ? work.kept.get(W::leaf(place, e))
                               : block.load_complex(kept_at(block, conv, place, e));
      });
      // The kernel's e-th value met a_j in w_{j+e}, times u where that passes the end.
      const Complex u = S::Stages::point(place);
      unrolled<S::r>([&](auto e) {
        Complex sum = conj(a[0]) * w[e], wrapped{0, 0};
        unrolled<S::r - 1>([&](auto j) {
          const Complex product = conj(a[j + 1]) * w[(e + j + 1) % S::r];
          if (e + j + 1 < S::r) sum = sum + product;
          else wrapped = wrapped + product;
        });
        sum = sum + conj(u) * wrapped;
        if (c > 0) sum = sum + block.load_complex(to + e * S::M + place);
        block.store_complex(to + e * S::M + place, sum);
      });
      Complex k[2 * S::r - 1];
      unrolled<S::r>([&](auto e) {
        k[S::r - 1 + e] = conj(block.load_complex(kernel + e * S::M + place));
        if constexpr (e > 0) k[e - 1] = conj(u) * k[S::r - 1 + e];
      });
      k[S::r - 1] = k[S::r - 1] + skip;
      unrolled<S::r>([&](auto j) {
        Complex sum = w[0] * k[S::r - 1 - j];
        unrolled<S::r - 1>([&](auto i) { sum = sum + w[i + 1] * k[i + 1 - j + S::r - 1]; });
        work.points.put(W::leaf(place, j), sum);
      });
    });
  }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const FftConv& conv) {
    using W = Work<S, Block>;
    W work(block);
    const Type type = conv.x.type;
    typename W::template Own<Queue<S>> x(block), grad(block);
    block.phase([&](int thread) { work.tabulate(thread); });
    FASTMIX_ROLLED for (int c = 0; c < conv.share; ++c) {
      if (c % S::at_once == 0)
        block.own([&](int thread) {
          read<Block, S>(block, conv.x, conv.channels, conv.steps, at(block, conv, thread, c),
                         thread, x.of(thread));
          read<Block, S>(block, conv.grad, conv.channels, conv.steps, at(block, conv, thread, c),
                         thread, grad.of(thread));
        });
      work.forward(x, type);
      work.drop(x, type);
      keep(work, conv);
      work.forward(grad, type);
      if constexpr (S::r == 1) {
        multiply(work, conv, c);
      } else {
        work.last(work.points);
        multiply_leaves(work, conv, c);
        work.last_back();
      }
      work.back(grad, type);
      if (c % S::at_once == S::at_once - 1 || c == conv.share - 1)
        block.own([&](int thread) {
          write<Block, S>(block, conv.out, conv.channels, conv.steps,
                          at(block, conv, thread, c / S::at_once * S::at_once), thread,
                          grad.of(thread));
        });
    }
  }
};

// The gradients of kernels from their spectra, summed over parts (and over the batch, where
// it shares a kernel).
template <class S>
struct Lags {
  static constexpr int shared = S::shared;

  FASTMIX_HD static int units(const FftConv& conv) { return conv.kernels * conv.heads; }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const FftConv& conv) {
    using W = Work<S, Block>;
    W work(block);
    block.phase([&](int thread) { work.tabulate(thread); });
    // add(sums) for each part of each sample whose kernel this is.
    auto each_part = [&](int kernel, auto&& add) {
      const int samples = kernel < 0 ? 0 : conv.kernels == 1 ? conv.batch : 1;
      for (int b = 0; b < samples; ++b)
        for (int part = 0; part < conv.parts; ++part)
          add(conv.sums + (int64_t{b * conv.heads + kernel} * conv.parts + part) * S::length);
    };
    if constexpr (S::r == 1) {
      block.phase([&](int thread) {
        const int kernel = unit_of<S>(units(conv), block.index(), thread);
        work.third_back(thread, [&](auto i, Complex* v) {
          v[0] = v[1] = {0, 0};
          each_part(kernel, [&](const Complex* from) {
            Complex part[2];
            block.load_pair(from + W::pair(thread, i / 2), part);
            v[0] = v[0] + part[0];
            v[1] = v[1] + part[1];
          });
        });
      });
    } else {
      work.each_leaf([&](int place) {
        Complex v[S::r] = {};
        each_part(block.index(), [&](const Complex* from) {
          unrolled<S::r>(
              [&](auto e) { v[e] = v[e] + block.load_complex(from + e * S::M + place); });
        });
        unrolled<S::r>([&](auto e) { work.points.put(W::leaf(place, e), v[e]); });
      });
      work.last_back();
    }
    work.back([&](int thread, int i, const float* y) {
      const int kernel = unit_of<S>(units(conv), block.index(), thread);
      each_lag<S>(conv.grad_kernel, conv, kernel, thread, i, [&](auto j, char* to) {
        put_number<Block>(block, conv.grad_kernel.type, to, y[j]);
      });
    });
  }
};

// Sums of grad · x over some steps of a sample, a channel to a thread: what the gradient of the
// skip is summed from, however the sequence is convolved.
struct Skips {
  static constexpr int threads = 256, shared = 0, steps = 256;

  FASTMIX_HD static int parts(const FftConv& conv) { return (conv.steps + steps - 1) / steps; }

  FASTMIX_HD static int64_t sums(const FftConv& conv) {
    return int64_t{conv.batch} * parts(conv) * conv.heads * conv.channels;
  }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const FftConv& conv) {
    block.own([&](int thread) {
      const int64_t item = int64_t{block.index()} * threads + thread;
      if (item >= sums(conv)) return;
      const int channels = conv.heads * conv.channels, channel = item % channels;
      const int part = item / channels % parts(conv), first = part * steps,
                count = conv.steps - first < steps ? conv.steps - first : steps;
      const int bytes = conv.x.type == Type::f32 ? 4 : 2;
      const auto row = [&](const View& view) {
        return static_cast<const char*>(view.data) +
               bytes * (item / channels / parts(conv) * view.b + first * view.n +
                        channel / conv.channels * view.h + channel % conv.channels * view.d);
      };
      const char *x = row(conv.x), *grad = row(conv.grad);
      float sum = 0;
      FASTMIX_ROLLED for (int t = 0; t < count; t += 8) {
        float few = 0;
        unrolled<8>([&](auto j) {
          if (t + j >= count) return;
          const int64_t at = bytes * (t + j);
          few += number(block, conv.x.type, x + at * conv.x.n) *
                 number(block, conv.grad.type, grad + at * conv.grad.n);
        });
        sum += few;
      }
      block.template store_one<4>(conv.skip_sums + item, as_bits(sum));
    });
  }
};

// ---- which shape a sequence takes

// build.py reads these names and compiles one kernel at a time, in this order.
enum class Kernel {
  backward,
  forward,
  spectra,
  lags,
  skips,
  columns_in,  // this and those after it are of fft_long.h
  columns_out,
  row_backward,
  row_forward,
  row_spectra,
  row_lags,
};

constexpr int kLongest = 16384;
constexpr int64_t kRoomy = 160 << 10;  // shared bytes of a block that consumer cards have not

// The transform's length for n steps, or 0 if there is none on a device whose blocks may have
// `shared` bytes.
inline int length_for(int64_t n, int64_t shared) {
  int length = 256;
  while (length < n && length < kLongest) length *= 2;
  return length < n || (length == kLongest && shared < kRoomy) ? 0 : length;
}

// Calls f with the Shape for sequences of `length`, of this table: the points of a transform, how
// many transforms a sequence takes, groups of 256 threads, words of a row that are read at once,
// and whether spectra of x wait in shared memory.
//
// Words: forward reads 16 bytes of a row. Backward holds rows of two tensors. Kernels and their
// gradients are few, so a block has one number of them at a time, as float32.
template <Kernel kernel, int bytes, class F>
auto with_shape(int length, int64_t shared, F f) {
  constexpr bool two = kernel == Kernel::backward, wide = kernel == Kernel::forward;
  constexpr int words = wide ? 4 : two ? 2 : 1;
  switch (length) {
    // Of 16 bits, most of which are multiplied anyway, four words would be a register too many.
    case 256: return f(Shape < bytes, 256, 1, 1, wide && bytes == 2 ? 2 : words > {});
    case 512: return f(Shape<bytes, 512, 1, 1, words>{});
    case 1024: return f(Shape<bytes, 1024, 1, 1, words>{});
    case 2048: return f(Shape<bytes, 2048, 1, 1, words>{});
    case 4096: return f(Shape<bytes, 4096, 1, 1, words>{});
    // Twice as many steps to a thread, so half as many words, here and below. Backward has a group
    // to a transform, and spectra of x in shared memory, where a block may have enough of it.
    case 8192:
      if constexpr (two) {
        if (shared >= kRoomy) return f(Shape<bytes, 4096, 2, 2, 2>{});
        return f(Shape<bytes, 4096, 2, 1, 1, false>{});
      } else {
        return f(Shape<bytes, 4096, 2, 1, wide ? 2 : 1>{});
      }
    // Spectra of x would take as much shared memory again as the four transforms, 136 KB.
    default: return f(Shape<bytes, 4096, 4, 2, wide ? 2 : 1, !two>{});
  }
}

template <Kernel kernel, class F>
auto with_shape(Type type, int length, int64_t shared, F f) {
  constexpr bool one = kernel == Kernel::spectra || kernel == Kernel::lags;
  if constexpr (one) return with_shape<kernel, 4>(length, shared, f);
  else if (type == Type::f32) return with_shape<kernel, 4>(length, shared, f);
  else return with_shape<kernel, 2>(length, shared, f);
}

// f(the kernel, its shape, how many blocks)
template <Kernel kernel, class F>
void with_kernel(int length, int64_t shared, const FftConv& args, F f) {
  if constexpr (kernel == Kernel::skips)
    f(Skips{}, Skips{}, (Skips::sums(args) + Skips::threads - 1) / Skips::threads);
  else
    with_shape<kernel>(args.x.type, length, shared, [&](auto shape) {
      using S = decltype(shape);
      auto call = [&](auto k) { f(k, shape, (k.units(args) + S::teams - 1) / S::teams); };
      if constexpr (kernel == Kernel::spectra) call(Spectra<S>{});
      if constexpr (kernel == Kernel::forward) call(Forward<S>{});
      if constexpr (kernel == Kernel::backward) call(Backward<S>{});
      if constexpr (kernel == Kernel::lags) call(Lags<S>{});
    });
}

}  // namespace fastmix::cuda
