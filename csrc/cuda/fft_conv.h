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

#include "fft_stages.h"

namespace fastmix::cuda {

enum class Type : int { f32, bf16, f16 };

// A tensor (b, n, h, d) with any strides, counted in elements.
struct View {
  void* data;
  Type type;
  int64_t b, n, h, d;
};

struct FftConv {
  int batch, steps, heads, channels;
  int lags;           // of the kernel that matter: at most `steps`
  int kernels;        // batch, or 1: one kernel for all
  int parts, share;   // that a head's channels are cut into, backward; channels of a part
  View x, grad, out;  // (b, n, h, d); out is of the dtype of x
  View kernel, grad_kernel;  // (b or 1, m, 1, h): its heads are channels
  const float* skip;  // (h, channels), or null
  int wrapped;        // how many values of a spectrum are there times u as well: r - 1, or 0
  Complex* spectra;   // (kernels, h, wrapped + r, M)
  Complex* sums;      // (b, h, parts, r, M): of the kernels' gradients
  Complex* kept;      // (blocks, r, M): spectra of x, where shared memory is short
  float* skip_sums;   // (b, parts of the steps, h, channels): of the skip's gradient
};

// How a sequence of up to `length` steps, of numbers of so many bytes, is worked at by a block.
template <int number, int points, int interleaved, int groups, int row_words, bool keeps = true>
struct Shape {
  using Stages = Transform<points>;
  static constexpr int M = points, r = interleaved, length = M * r;
  static constexpr int threads = 256 * groups;
  // A transform takes `slot` threads. Blocks of short sequences work at several of them; those of
  // long ones have some for each subsequence, or for every other.
  static constexpr int slot = Stages::threads, slots = threads / slot;
  static constexpr int teams = r == 1 ? slots : 1;
  static constexpr int subsequences = r == 1 ? 1 : r / slots;  // of a thread
  static constexpr int rows = 16 * subsequences;               // time steps of a thread
  static constexpr int bytes = number;
  static constexpr int words = row_words;  // of 32 bits, read from each time step at once
  static constexpr int at_once = 4 * words / bytes;  // channels that are in them
  static constexpr int buffers = r == 1 ? slots : r;
  static constexpr bool keeps_shared = keeps;
  static constexpr int room = buffers * Stages::room;  // of all transforms
  static constexpr int shared = 8 * (Stages::tables + room);
  static constexpr int shared_backward = shared + (keeps ? 8 * room : 0);

  // The buffer of a thread's i-th subsequence, and that subsequence's index.
  static HD int buffer(int thread, int i) { return thread / slot + i * slots; }
  static HD int subsequence(int thread, int i) { return r == 1 ? 0 : buffer(thread, i); }
  // Its sixteen time steps of that one: the first, and how far they are apart.
  static HD int first_step(int thread, int i) {
    return thread % slot * r + subsequence(thread, i);
  }
  static constexpr int stride = slot * r;
};

// What a thread has read: a row of channels for each time step. They leave it at the front, to
// be transformed, and come back in at the end: after at_once of them all are results, in order.
template <class S>
struct Queue {
  uint32_t word[S::rows][S::words];
};

HD float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

HD uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Two numbers of 16 bits, the first one low.
template <class Block>
HD uint32_t pack(Type type, float low, float high) {
  return type == Type::bf16 ? Block::template pack<Type::bf16>(low, high)
                            : Block::template pack<Type::f16>(low, high);
}

// The first channel of a row; what is behind it moves up, with `bits` at the end.
template <class S>
HD uint32_t first_of(const uint32_t* row) {
  return S::bytes == 4 ? row[0] : row[0] & 0xffff;
}

template <class S>
HD void queue_up(uint32_t* row, uint32_t bits) {
  constexpr int end = S::words - 1;
  if (S::bytes == 4) {
    unrolled<end>([&](auto k) { row[k] = row[k + 1]; });
    row[end] = bits;
  } else {
    unrolled<end>([&](auto k) { row[k] = row[k] >> 16 | row[k + 1] << 16; });
    row[end] = row[end] >> 16 | bits << 16;
  }
}

// The first channel of sixteen time steps.
template <class Block, class S>
HD void peek(const Queue<S>& queue, int i, Type type, float* x) {
  unrolled<16>([&](auto j) {
    const uint32_t bits = first_of<S>(queue.word[16 * i + j]);
    x[j] = S::bytes == 4         ? as_float(bits)
           : type == Type::bf16 ? as_float(bits << 16) : Block::from_half(bits);
  });
}

// Drops that channel, and queues y at the end.
template <class Block, class S>
HD void push(Queue<S>& queue, int i, Type type, const float* y) {
  unrolled<8>([&](auto j) {
    uint32_t* rows[] = {queue.word[16 * i + 2 * j], queue.word[16 * i + 2 * j + 1]};
    const float low = y[2 * j], high = y[2 * j + 1];
    const uint32_t both = S::bytes == 4 ? 0 : pack<Block>(type, low, high);
    queue_up<S>(rows[0], S::bytes == 4 ? as_bits(low) : both);
    queue_up<S>(rows[1], S::bytes == 4 ? as_bits(high) : both >> 16);
  });
}

// A single number of any type.
template <class Block>
HD float number(Block& block, Type type, const char* from) {
  if (type == Type::f32) return as_float(block.template load_one<4>(from));
  const uint32_t bits = block.template load_one<2>(from);
  return type == Type::bf16 ? as_float(bits << 16) : Block::from_half(bits);
}

template <class Block>
HD void put_number(Block& block, Type type, char* to, float x) {
  if (type == Type::f32) return block.template store_one<4>(to, as_bits(x));
  block.template store_one<2>(to, pack<Block>(type, x, 0));
}

// Some neighbouring channels of a head: what a slot of threads reads and writes at once.
struct Channels {
  int b, h, c, count;  // count 0: nothing to do
};

// Whether rows of words can be read and written whole.
template <class S>
HD bool has_whole_rows(const View& view, int channels) {
  constexpr int bytes = 4 * S::words;
  return view.d == 1 && channels % S::at_once == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && view.b * S::bytes % bytes == 0 &&
         view.n * S::bytes % bytes == 0 && view.h * S::bytes % bytes == 0;
}

// f(address, row) for each time step of a thread that there is; `channels` are its head's.
template <class S, class Rows, class F>
HD void each_row(const View& view, int steps, Channels at, int thread, Rows& queue, F f) {
  if (at.count == 0) return;
  const int64_t stride = S::bytes * S::stride * view.n;
  unrolled<S::subsequences>([&](auto i) {
    const int t = S::first_step(thread, i);
    char* row = static_cast<char*>(view.data) +
                S::bytes * (at.b * view.b + t * view.n + at.h * view.h + at.c * view.d);
    unrolled<16>([&](auto j) {
      if (t + j * S::stride < steps) f(row, queue.word[16 * i + j]);
      row += stride;
    });
  });
}

template <class Block, class S>
HD void read(Block& block, const View& view, int channels, int steps, Channels at, int thread,
             Queue<S>& queue) {
  unrolled<S::rows>([&](auto i) { unrolled<S::words>([&](auto k) { queue.word[i][k] = 0; }); });
  if (has_whole_rows<S>(view, channels)) {
    each_row<S>(view, steps, at, thread, queue, [&](const char* from, uint32_t* row) {
      block.template load<S::words>(from, row);
    });
  } else {
    ROLLED for (int c = 0; c < S::at_once; ++c)
      each_row<S>(view, steps, at, block.again(thread), queue, [&](const char* row, uint32_t* to) {
        const char* from = row + c * S::bytes * view.d;
        queue_up<S>(to, c < at.count ? block.template load_one<S::bytes>(from) : 0);
      });
  }
}

template <class Block, class S>
HD void write(Block& block, const View& view, int channels, int steps, Channels at, int thread,
              Queue<S>& queue) {
  if (has_whole_rows<S>(view, channels)) {
    each_row<S>(view, steps, at, thread, queue, [&](char* to, uint32_t* row) {
      block.template store<S::words>(to, row);
    });
  } else {
    // Of fewer channels than fit, all are at the end.
    const int skipped = channels < S::at_once ? S::at_once - channels : 0;
    ROLLED for (int k = 0; k < S::words; ++k)
      each_row<S>(view, steps, at, block.again(thread), queue, [&](char* to, uint32_t* row) {
        uint32_t word = row[0];
        unrolled<S::words>([&](auto i) { word = i == k ? row[i] : word; });
        unrolled<4 / S::bytes>([&](auto half) {
          const int c = k * 4 / S::bytes + half - skipped;
          if (c >= 0 && c < at.count)
            block.template store_one<S::bytes>(to + c * S::bytes * view.d, word >> 16 * half);
        });
      });
  }
}

// ---- what the kernels have in common

template <class S, class Block>
struct Work {
  using Stages = typename S::Stages;
  using Shared = typename Block::Shared;
  template <class T>
  using Own = typename Block::template Own<T>;  // a T of each thread

  Block& block;
  Shared table, points, kept;

  HD explicit Work(Block& block)
      : block(block), table(block.shared(0)), points(block.shared(Stages::tables)),
        kept(block.shared(Stages::tables + S::room)) {}

  HD static Shared of(Shared buffers, int thread, int i) {
    return buffers.at(S::buffer(thread, i) * Stages::room);
  }

  HD void tabulate(int thread) {
    for (int i = thread; i < Stages::tables; i += S::threads) Stages::tabulate(table, i);
  }

  // Where the j-th pair of a thread's sixteen values lies, r = 1: pairs of all threads together.
  HD static int pair(int thread, int j) { return 2 * (S::slot * j + thread % S::slot); }

  // f(thread, i) for each subsequence of each thread, then a barrier.
  template <class F>
  HD void each_subsequence(F f) {
    block.stretch([&](int thread) { unrolled<S::subsequences>([&](auto i) { f(thread, i); }); });
  }

  // Transforms what get(thread, i, x) says is in sixteen time steps, up to the last stage.
  template <class F>
  HD void forward(F get) {
    each_subsequence([&](int thread, int i) {
      float x[16];
      get(thread, i, x);
      Stages::first(x, of(points, thread, i), table, thread % S::slot);
    });
    if (Stages::R > 1)
      each_subsequence([&](int thread, int i) {
        Stages::second(of(points, thread, i), table, thread % S::slot);
      });
  }

  // And back from there: put(thread, i, y).
  template <class F>
  HD void back(F put) {
    if (Stages::R > 1)
      each_subsequence([&](int thread, int i) {
        Stages::second_back(of(points, thread, i), table, thread % S::slot);
      });
    // It reads where the same thread's next first stage writes: no barrier is needed.
    block.own([&](int thread) {
      unrolled<S::subsequences>([&](auto i) {
        float y[16];
        Stages::first_back(y, of(points, thread, i), table, thread % S::slot);
        put(thread, i, y);
      });
    });
  }

  // From the front of a queue, and into its end.
  HD void forward(Own<Queue<S>>& queue, Type type) {
    forward([&](int thread, int i, float* x) { peek<Block>(queue.of(thread), i, type, x); });
  }
  HD void back(Own<Queue<S>>& queue, Type type) {
    back([&](int thread, int i, const float* y) { push<Block>(queue.of(thread), i, type, y); });
  }

  // Drops the first channel of `queue`: nothing takes its place.
  HD void drop(Own<Queue<S>>& queue, Type type) {
    block.own([&](int thread) {
      const float nothing[16] = {};
      unrolled<S::subsequences>([&](auto i) { push<Block>(queue.of(thread), i, type, nothing); });
    });
  }

  // The last stage alone, from points to `to`.
  HD void last(Shared to) {
    each_subsequence([&](int thread, int i) {
      Shared buffer = of(to, thread, i);
      Stages::third_in(of(points, thread, i), thread % S::slot, [&](auto first, Complex* v) {
        unrolled<Stages::last>(
            [&](auto j) { buffer.put(17 * (thread % S::slot) + first + j, v[j]); });
      });
    });
  }

  HD void last_back() {
    each_subsequence([&](int thread, int i) {
      Shared buffer = of(points, thread, i);
      Stages::third_back(buffer, thread % S::slot, [&](auto first, Complex* v) {
        unrolled<Stages::last>(
            [&](auto j) { v[j] = buffer.get(17 * (thread % S::slot) + first + j); });
      });
    });
  }

  // The last stage of r = 1 with f(i, the i-th and the next value) in it; or on one way only.
  template <class F>
  HD void third(int thread, F f) {
    Stages::third(of(points, thread, 0), thread % S::slot, pairs(f));
  }
  template <class F>
  HD void third_in(int thread, F f) {
    Stages::third_in(of(points, thread, 0), thread % S::slot, pairs(f));
  }
  template <class F>
  HD void third_back(int thread, F f) {
    Stages::third_back(of(points, thread, 0), thread % S::slot, pairs(f));
  }
  template <class F>
  HD static auto pairs(F& f) {
    return [&](auto first, Complex* v) {
      unrolled<Stages::last / 2>([&](auto j) {
        f(std::integral_constant<int, first + 2 * j>{}, v + 2 * j);
      });
    };
  }

  // f(place) for every place, by some thread.
  template <class F>
  HD void each_leaf(F f) {
    block.stretch([&](int thread) {
      for (int place = thread; place < S::M; place += S::threads) f(place);
    });
  }

  HD static int leaf(int place, int e) { return e * Stages::room + padded(place); }
};

// ---- the kernels

// Which of `units` a slot of threads works at, or -1: the last block's may have none.
template <class S>
HD int unit_of(int units, int block, int thread) {
  if (S::teams == 1) return block;
  const int unit = block * S::teams + thread / S::slot;
  return unit < units ? unit : -1;
}

// Of all heads of all samples one: its channels from c on, if there are any …
template <class S>
HD Channels channels_of(const FftConv& f, int head, int c) {
  if (c < 0 || c >= f.channels) return {0, 0, 0, 0};
  return {head / f.heads, head % f.heads, c,
          f.channels - c < S::at_once ? f.channels - c : S::at_once};
}

// … the i-th one's skip …
template <class Block, class Conv>
HD float skip_of(Block& block, const Conv& f, Channels at, int i) {
  if (f.skip == nullptr || i >= at.count) return 0;
  return as_float(block.template load_one<4>(f.skip + at.h * f.channels + at.c + i));
}

// … and its kernel, whose spectra are here.
HD int kernel_of(const FftConv& f, int head) { return f.kernels == 1 ? head % f.heads : head; }

template <class S, bool wrapped>
HD const Complex* spectrum_of(const FftConv& f, int kernel) {
  return f.spectra + int64_t{kernel} * (wrapped ? 2 * S::r - 1 : S::r) * S::M;
}

// f(j, address) for those of a thread's sixteen lags that such a kernel has.
template <class S, class F>
HD void each_lag(const View& view, const FftConv& args, int kernel, int thread, int i, F f) {
  const int lags = kernel < 0 ? 0 : args.lags, first = S::first_step(thread, i);
  unrolled<16>([&](auto j) {
    const int t = first + j * S::stride;
    char* address = static_cast<char*>(view.data) +
                    (view.type == Type::f32 ? 4 : 2) * (kernel / args.heads * view.b + t * view.n +
                                                        kernel % args.heads * view.d);
    if (t < lags) f(j, address);
  });
}

// Spectra of kernels, as the others read them: for r = 1 values in pairs of all threads
// together; else the r values of a point, and before them the last r - 1 of them times u.
template <class S>
struct Spectra {
  static constexpr int shared = S::shared;

  HD static int units(const FftConv& f) { return f.kernels * f.heads; }

  template <class Block>
  HD static void run(Block& block, const FftConv& f) {
    using W = Work<S, Block>;
    W work(block);
    block.stretch([&](int thread) { work.tabulate(thread); });
    work.forward([&](int thread, int i, float* x) {
      unrolled<16>([&](auto j) { x[j] = 0; });
      const int kernel = unit_of<S>(units(f), block.index(), thread);
      each_lag<S>(f.kernel, f, kernel, thread, i, [&](auto j, const char* from) {
        x[j] = number<Block>(block, f.kernel.type, from);
      });
    });
    if constexpr (S::r == 1) {
      block.stretch([&](int thread) {
        const int kernel = unit_of<S>(units(f), block.index(), thread);
        Complex* to = kernel < 0 ? nullptr : f.spectra + int64_t{kernel} * S::M;
        work.third_in(thread, [&](auto i, Complex* v) {
          if (to != nullptr) block.store_pair(to + W::pair(thread, i / 2), v);
        });
      });
    } else {
      work.last(work.points);
      Complex* to = f.spectra + int64_t{block.index()} * (f.wrapped + S::r) * S::M;
      work.each_leaf([&](int place) {
        const Complex u = S::Stages::point(place);
        unrolled<S::r>([&](auto e) {
          const Complex k = work.points.get(W::leaf(place, e));
          block.store_complex(to + (f.wrapped + e) * S::M + place, k);
          if (e > 0 && f.wrapped > 0) block.store_complex(to + (e - 1) * S::M + place, u * k);
        });
      });
    }
  }
};

template <class S>
struct Forward {
  static constexpr int shared = S::shared;

  HD static int groups(const FftConv& f) {
    return (f.channels + S::at_once - 1) / S::at_once;
  }

  HD static int units(const FftConv& f) { return f.batch * f.heads * groups(f); }

  template <class Block>
  HD static void run(Block& block, const FftConv& f) {
    using W = Work<S, Block>;
    W work(block);
    const Type type = f.x.type;
    auto unit = [&](int thread) { return unit_of<S>(units(f), block.index(), thread); };
    auto at = [&](int thread) {
      const int own = unit(thread);
      return channels_of<S>(f, own / groups(f), own < 0 ? -1 : own % groups(f) * S::at_once);
    };
    auto kernel_at = [&](int thread) {
      return kernel_of(f, (unit(thread) < 0 ? 0 : unit(thread)) / groups(f));
    };
    const int only = kernel_at(0);  // of a block with one unit: the compiler divides just once
    auto spectrum = [&](int thread) {
      return spectrum_of<S, true>(f, S::teams == 1 ? only : kernel_at(thread));
    };
    typename W::template Own<Queue<S>> queue(block);
    block.stretch([&](int thread) {
      work.tabulate(thread);
      read<Block, S>(block, f.x, f.channels, f.steps, at(thread), thread, queue.of(thread));
    });
    const int all = S::at_once < f.channels ? S::at_once : f.channels;
    ROLLED for (int c = 0; c < all; ++c) {
      work.forward(queue, type);
      if constexpr (S::r == 1) {
        block.stretch([&](int thread) {
          const Complex* kernel = spectrum(thread);
          const float skip = skip_of(block, f, at(thread), c);
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
        const float skip = skip_of(block, f, at(0), c);
        work.each_leaf([&](int place) {
          Complex a[S::r], k[2 * S::r - 1];
          unrolled<2 * S::r - 1>([&](auto e) {
            k[e] = block.load_complex(kernel + (e - (S::r - 1)) * S::M + place);
          });
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
      write<Block, S>(block, f.out, f.channels, f.steps, at(thread), thread, queue.of(thread));
    });
  }
};

// The gradient of x, from conjugated spectra; and of each kernel the spectrum, summed over
// a part of the head's channels.
template <class S>
struct Backward {
  static constexpr int shared = S::shared_backward;

  HD static int units(const FftConv& f) { return f.batch * f.heads * f.parts; }

  template <class Block>
  HD static void run(Block& block, const FftConv& f) {
    using W = Work<S, Block>;
    W work(block);
    const Type type = f.x.type;
    auto unit = [&](int thread) { return unit_of<S>(units(f), block.index(), thread); };
    auto at = [&](int thread, int first) {
      const int own = unit(thread);
      return channels_of<S>(f, own / f.parts, own < 0 ? -1 : own % f.parts * f.share + first);
    };
    auto spectrum = [&](int thread) {
      return spectrum_of<S, false>(
          f, kernel_of(f, (unit(thread) < 0 ? 0 : unit(thread)) / f.parts));
    };
    auto sums = [&](int thread) { return f.sums + int64_t{unit(thread)} * S::length; };
    typename W::template Own<Queue<S>> x(block), grad(block);
    block.stretch([&](int thread) { work.tabulate(thread); });
    ROLLED for (int c = 0; c < f.share; ++c) {
      if (c % S::at_once == 0)
        block.own([&](int thread) {
          read<Block, S>(block, f.x, f.channels, f.steps, at(thread, c), thread, x.of(thread));
          read<Block, S>(block, f.grad, f.channels, f.steps, at(thread, c), thread,
                         grad.of(thread));
        });
      work.forward(x, type);
      work.drop(x, type);
      if constexpr (S::keeps_shared) {
        work.last(work.kept);
      } else {
        work.last(work.points);
        work.each_leaf([&](int place) {
          unrolled<S::r>([&](auto e) {
            block.store_complex(f.kept + (int64_t{block.index()} * S::r + e) * S::M + place,
                                work.points.get(W::leaf(place, e)));
          });
        });
      }
      work.forward(grad, type);
      if constexpr (S::r == 1) {
        block.stretch([&](int thread) {
          typename W::Shared kept = W::of(work.kept, thread, 0);
          const Complex* kernel = spectrum(thread);
          const float skip = skip_of(block, f, at(thread, c), 0);
          Complex* to = unit(thread) < 0 ? nullptr : sums(thread);
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
      } else {
        work.last(work.points);
        const Complex* kernel = spectrum(0);
        const float skip = skip_of(block, f, at(0, c), 0);
        Complex* to = sums(0);
        work.each_leaf([&](int place) {
          Complex w[S::r], a[S::r];
          unrolled<S::r>([&](auto e) {
            w[e] = work.points.get(W::leaf(place, e));
            const Complex* far = f.kept + (int64_t{block.index()} * S::r + e) * S::M + place;
            a[e] = S::keeps_shared ? work.kept.get(W::leaf(place, e)) : block.load_complex(far);
          });
          // The kernel's e-th value met a_j in w_{j+e}, times u where that passes the end.
          const Complex u = S::Stages::point(place);
          unrolled<S::r>([&](auto e) {
            Complex sum = conj(a[0]) * w[e], wrapped{0, 0};
            unrolled<S::r - 1>([&](auto j) {
              const Complex product = conj(a[j + 1]) * w[(e + j + 1) % S::r];
              if (e + j + 1 < S::r)
                sum = sum + product;
              else
                wrapped = wrapped + product;
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
        work.last_back();
      }
      work.back(grad, type);
      if (c % S::at_once == S::at_once - 1 || c == f.share - 1)
        block.own([&](int thread) {
          write<Block, S>(block, f.out, f.channels, f.steps,
                          at(thread, c / S::at_once * S::at_once), thread, grad.of(thread));
        });
    }
  }
};

// The gradients of kernels from their spectra, summed over parts (and over the batch, where
// it shares a kernel).
template <class S>
struct Lags {
  static constexpr int shared = S::shared;

  HD static int units(const FftConv& f) { return f.kernels * f.heads; }

  template <class Block>
  HD static void run(Block& block, const FftConv& f) {
    using W = Work<S, Block>;
    W work(block);
    block.stretch([&](int thread) { work.tabulate(thread); });
    // add(sums) for each part of each sample whose kernel this is.
    auto each_part = [&](int kernel, auto&& add) {
      const int samples = kernel < 0 ? 0 : f.kernels == 1 ? f.batch : 1;
      for (int b = 0; b < samples; ++b)
        for (int part = 0; part < f.parts; ++part)
          add(f.sums + (int64_t{b * f.heads + kernel} * f.parts + part) * S::length);
    };
    if constexpr (S::r == 1) {
      block.stretch([&](int thread) {
        const int kernel = unit_of<S>(units(f), block.index(), thread);
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
          unrolled<S::r>([&](auto e) {
            v[e] = v[e] + block.load_complex(from + e * S::M + place);
          });
        });
        unrolled<S::r>([&](auto e) { work.points.put(W::leaf(place, e), v[e]); });
      });
      work.last_back();
    }
    work.back([&](int thread, int i, const float* y) {
      const int kernel = unit_of<S>(units(f), block.index(), thread);
      each_lag<S>(f.grad_kernel, f, kernel, thread, i, [&](auto j, char* to) {
        put_number<Block>(block, f.grad_kernel.type, to, y[j]);
      });
    });
  }
};

// Sums of grad · x over some steps of a sample, a channel to a thread: what the gradient of the
// skip is summed from, however the sequence is convolved.
struct Skips {
  static constexpr int threads = 256, shared = 0, steps = 256;

  HD static int parts(const FftConv& f) { return (f.steps + steps - 1) / steps; }

  HD static int64_t sums(const FftConv& f) {
    return int64_t{f.batch} * parts(f) * f.heads * f.channels;
  }

  template <class Block>
  HD static void run(Block& block, const FftConv& f) {
    block.own([&](int thread) {
      const int64_t item = int64_t{block.index()} * threads + thread;
      if (item >= sums(f)) return;
      const int channels = f.heads * f.channels, channel = item % channels;
      const int part = item / channels % parts(f), first = part * steps,
                count = f.steps - first < steps ? f.steps - first : steps;
      const int bytes = f.x.type == Type::f32 ? 4 : 2;
      const auto row = [&](const View& view) {
        return static_cast<const char*>(view.data) +
               bytes * (item / channels / parts(f) * view.b + first * view.n +
                        channel / f.channels * view.h + channel % f.channels * view.d);
      };
      const char *x = row(f.x), *grad = row(f.grad);
      float sum = 0;
      ROLLED for (int t = 0; t < count; t += 8) {
        float few = 0;
        unrolled<8>([&](auto j) {
          if (t + j >= count) return;
          const int64_t at = bytes * (t + j);
          few += number(block, f.x.type, x + at * f.x.n) *
                 number(block, f.grad.type, grad + at * f.grad.n);
        });
        sum += few;
      }
      block.template store_one<4>(f.skip_sums + item, as_bits(sum));
    });
  }
};

// ---- which shape a sequence takes

enum class Kernel {
  spectra, forward, backward, lags, skips,
  columns_in, columns_out, row_spectra, row_forward, row_backward, row_lags,  // of fft_long.h
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

// f(the Shape for sequences of `length`). Kernels and their gradients are few, and go one by
// one, as float32; backward two sequences are in a block's hands. Of the shortest sequences of 16
// bits, most of which are multiplied anyway, four words would be one register too many.
template <Kernel kernel, int bytes, class F>
auto with_shape(int length, int64_t shared, F f) {
  constexpr bool two = kernel == Kernel::backward, wide = kernel == Kernel::forward;
  constexpr int words = wide ? 4 : two ? 2 : 1;
  switch (length) {
    case 256: return f(Shape<bytes, 256, 1, 1, wide && bytes == 2 ? 2 : words>{});
    case 512: return f(Shape<bytes, 512, 1, 1, words>{});
    case 1024: return f(Shape<bytes, 1024, 1, 1, words>{});
    case 2048: return f(Shape<bytes, 2048, 1, 1, words>{});
    case 4096: return f(Shape<bytes, 4096, 1, 1, words>{});
    case 8192:
      if constexpr (two) {
        if (shared >= kRoomy) return f(Shape<bytes, 4096, 2, 2, 2>{});
        return f(Shape<bytes, 4096, 2, 1, 1, false>{});
      } else {
        return f(Shape<bytes, 4096, 2, 1, wide ? 2 : 1>{});
      }
    default: return f(Shape<bytes, 4096, 4, 2, wide ? 2 : 1, !two>{});
  }
}

template <Kernel kernel, class F>
auto with_shape(Type type, int length, int64_t shared, F f) {
  constexpr bool one = kernel == Kernel::spectra || kernel == Kernel::lags;
  if constexpr (one)
    return with_shape<kernel, 4>(length, shared, f);
  else if (type == Type::f32)
    return with_shape<kernel, 4>(length, shared, f);
  else
    return with_shape<kernel, 2>(length, shared, f);
}

// f(the kernel, its shape, how many blocks)
template <Kernel kernel, class F>
void with_kernel(int length, int64_t shared, const FftConv& args, F f) {
  if constexpr (kernel == Kernel::skips)
    f(Skips{}, Skips{}, (Skips::sums(args) + Skips::threads - 1) / Skips::threads);
  else with_shape<kernel>(args.x.type, length, shared, [&](auto shape) {
    using S = decltype(shape);
    auto call = [&](auto k) { f(k, shape, (k.units(args) + S::teams - 1) / S::teams); };
    if constexpr (kernel == Kernel::spectra) call(Spectra<S>{});
    if constexpr (kernel == Kernel::forward) call(Forward<S>{});
    if constexpr (kernel == Kernel::backward) call(Backward<S>{});
    if constexpr (kernel == Kernel::lags) call(Lags<S>{});
  });
}

}  // namespace fastmix::cuda
