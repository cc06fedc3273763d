// Sequences that no block can hold, up to 2²⁰ steps: two transforms, with scratch in between.
//
// With N = A T, t = t₂ + T t₁ and k = k₁ + A k₂ the value at e^{-2πi (k + ¼) / N} is
//   Σ_{t₂} e^{-2πi t₂ k₂ / T} · e^{-2πi t₂ (k₁ + ¼) / N} Σ_{t₁} x_t e^{-2πi t₁ (k₁ + ¼) / A}.
// Columns go in: the inner sums of A real numbers and the factor before them, into A rows of T
// numbers. A = 16 B: radix 16, and radix B where there are that many. Each row then has a plain
// transform of its own, a product and the way back, in place; and columns come out.
//
// Channels go through scratch a slab at a time; each takes N numbers of it: [k₁][t₂]. A slab fits
// into the L2 cache of a large GPU: some 32 bytes a number pass through that, while memory sees x
// and y once. A cluster of blocks would pass 18 through each other's shared memory instead, with
// four more barriers for each channel: so little that Hopper has no algorithm of its own.

#pragma once

#include "fft_conv.h"

namespace fastmix::cuda {

struct LongConv {
  int length;                 // N
  int heads, channels;        // of a tensor (b, n, h, d)
  int samples;                // that share a kernel
  int first_kernel, kernels;  // the heads of kernels whose spectra are at hand
  int first_unit, units;      // the slab: groups of `width` channels, counted from that kernel on
  int width;
  View view;          // what columns read or write
  int steps;          // of `view` that matter
  const float* skip;  // (h, channels), or null
  Complex* columns;   // (units, width, N)
  Complex* grad_columns;
  Complex* spectra;  // (kernels, N)
  Complex* sums;     // (kernels, parts, N): of the kernels' gradients
  int parts, share;  // of a kernel's channels in a slab; channels of a part

  FASTMIX_HD int groups() const { return (channels + width - 1) / width; }
  FASTMIX_HD int units_of_kernel() const { return samples * groups(); }
  FASTMIX_HD Channels at(int unit) const {
    const int own = first_unit + unit, kernel = first_kernel + own / units_of_kernel(),
              c = own % groups() * width, rest = channels - c;
    return {kernel / heads + own / groups() % samples, kernel % heads, c,
            rest < width ? rest : width};
  }
};

// ---- columns

// Of sequences of N steps. A thread has the steps that are N / 16 apart; a block, neighbours t₂.
template <int number, int points, int row_words>
struct Columns {
  static constexpr int length = points, T = length < 65536 ? length / 16 : 4096;
  static constexpr int A = length / T, B = A / 16;
  static constexpr int threads = 256, across = threads / B, tiles = T / across;
  static constexpr int bytes = number, words = row_words, at_once = 4 * words / bytes;
  static constexpr int subsequences = 1, rows = 16, stride = length / 16;
  static constexpr int tables = (B > 1 ? 6 : 5) * threads;
  static constexpr int shared = 8 * (tables + (B > 1 ? 16 * threads : 0));

  static FASTMIX_HD int first_step(int thread, int) {
    return thread % across + T * (thread / across);
  }

  // The powers for a thread's sixteen points, and e^{-2πi t₂ q / (T B)} for the second radix.
  template <class Shared>
  static FASTMIX_HD void tabulate(Shared table, int tile, int thread) {
    const int t = tile * across + first_step(thread, 0);
    table.put(thread, root(t, 4 * length));
    unrolled<4>([&](auto i) { table.put((i + 1) * threads + thread, root(t << i, length)); });
    if (B > 1)
      table.put(5 * threads + thread,
                root((tile * across + thread % across) * (thread / across), T * B));
  }

  template <int sign, class Shared>
  static FASTMIX_HD void turn(Complex* v, Shared table, int thread) {
    const Complex first = table.get(thread);
    times_powers<sign>(v, table.get(threads + thread), table.get(2 * threads + thread),
                       table.get(3 * threads + thread), table.get(4 * threads + thread), &first);
  }

  template <class Shared>
  static FASTMIX_HD Complex turn_second(Shared table, int q, int thread) {
    return table.get(5 * threads + q * across + thread % across);
  }

  // Radix 16 of the steps of a thread, and back from there, divided by N.
  template <class Shared>
  static FASTMIX_HD void first(const float* x, Complex* v, Shared table, int thread) {
    unrolled<16>([&](auto j) {
      constexpr float re = cosine(j, 64), im = -sine(j, 64);
      v[j] = {x[j] * re, x[j] * im};
    });
    transform<16, -1>(v);
    turn<-1>(v, table, thread);
  }

  template <class Shared>
  static FASTMIX_HD void first_back(float* x, Complex* v, Shared table, int thread) {
    turn<1>(v, table, thread);
    transform<16, 1>(v);
    unrolled<16>([&](auto j) {
      constexpr float re = cosine(j, 64) / length, im = sine(j, 64) / length;
      x[j] = v[j].re * re - v[j].im * im;
    });
  }

  // f(p, v) for each p < 16 whose radix B is a thread's: places p B + j, or numbers k₁ = p + 16 q.
  template <class F>
  static FASTMIX_HD void second(int thread, F f) {
    unrolled<16 / B>([&](auto i) {
      Complex v[B];
      f(thread / across + B * i, v);
    });
  }

  static FASTMIX_HD int slot(int p, int j, int thread) {
    return tables + (p * B + j) * across + thread % across;
  }

  // A tensor from a tile's first step on.
  static FASTMIX_HD View from(const View& view, int tile) {
    View rest = view;
    rest.data = static_cast<char*>(view.data) + tile * across * (view.n * bytes);
    return rest;
  }

  // Where a tile of a channel's first row begins in scratch.
  static FASTMIX_HD int64_t column(const LongConv& conv, int unit, int c, int tile) {
    return (int64_t{unit} * conv.width + c) * length + tile * across;
  }
};

template <class S>
struct ColumnsIn {
  static constexpr int shared = S::shared;

  FASTMIX_HD static int blocks(const LongConv& conv) { return conv.units * S::tiles; }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const LongConv& conv) {
    const Type type = conv.view.type;
    const int tile = block.index() % S::tiles, unit = block.index() / S::tiles;
    const Channels at = conv.at(unit);
    const auto table = block.shared(0);
    typename Block::template Own<Queue<S>> queue(block);
    block.phase([&](int thread) {
      S::tabulate(table, tile, thread);
      read<Block, S>(block, S::from(conv.view, tile), conv.channels, conv.steps - tile * S::across,
                     at, thread, queue.of(thread));
    });
    FASTMIX_ROLLED for (int c = 0; c < at.count; ++c) {
      Complex* to = conv.columns + S::column(conv, unit, c, tile);
      block.phase([&](int thread) {
        const float nothing[16] = {};
        float x[16];
        Complex v[16];
        peek<Block>(queue.of(thread), 0, type, x);
        push<Block>(queue.of(thread), 0, type, nothing);
        S::first(x, v, table, thread);
        unrolled<16>([&](auto p) {
          if constexpr (S::B == 1) block.store_complex(to + thread + p * S::T, v[p]);
          else table.put(S::tables + p * S::threads + thread, v[p]);
        });
      });
      if constexpr (S::B > 1)
        block.phase([&](int thread) {
          S::second(thread, [&](int p, Complex* v) {
            unrolled<S::B>([&](auto j) { v[j] = table.get(S::slot(p, j, thread)); });
            transform<S::B, -1>(v);
            unrolled<S::B>([&](auto q) {
              block.store_complex(to + thread % S::across + (p + 16 * q) * S::T,
                                  v[q] * S::turn_second(table, q, thread));
            });
          });
        });
    }
  }
};

template <class S>
struct ColumnsOut {
  static constexpr int shared = S::shared;

  FASTMIX_HD static int blocks(const LongConv& conv) { return conv.units * S::tiles; }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const LongConv& conv) {
    const Type type = conv.view.type;
    const int tile = block.index() % S::tiles, unit = block.index() / S::tiles;
    const Channels at = conv.at(unit);
    const auto table = block.shared(0);
    typename Block::template Own<Queue<S>> queue(block);
    block.phase([&](int thread) {
      S::tabulate(table, tile, thread);
      unrolled<16>(
          [&](auto i) { unrolled<S::words>([&](auto k) { queue.of(thread).word[i][k] = 0; }); });
    });
    // A group of fewer channels than others fills up with whatever comes.
    FASTMIX_ROLLED for (int c = 0; c < conv.width; ++c) {
      const Complex* from = conv.columns + S::column(conv, unit, c < at.count ? c : 0, tile);
      if constexpr (S::B > 1)
        block.phase([&](int thread) {
          S::second(thread, [&](int p, Complex* v) {
            unrolled<S::B>([&](auto q) {
              v[q] = block.load_complex(from + thread % S::across + (p + 16 * q) * S::T) *
                     conj(S::turn_second(table, q, thread));
            });
            transform<S::B, 1>(v);
            unrolled<S::B>([&](auto j) { table.put(S::slot(p, j, thread), v[j]); });
          });
        });
      block.phase([&](int thread) {
        float y[16];
        Complex v[16];
        unrolled<16>([&](auto p) {
          if constexpr (S::B == 1) v[p] = block.load_complex(from + thread + p * S::T);
          else v[p] = table.get(S::tables + p * S::threads + thread);
        });
        S::first_back(y, v, table, thread);
        push<Block>(queue.of(thread), 0, type, y);
      });
    }
    block.own([&](int thread) {
      write<Block, S>(block, S::from(conv.view, tile), conv.channels, conv.steps - tile * S::across,
                      at, thread, queue.of(thread));
    });
  }
};

// ---- rows: a block has `per_block` numbers of a channel, one row or more

template <class S>
FASTMIX_HD int blocks_of(const LongConv& conv, int channels) {
  return channels * (conv.length / (S::teams * S::M));
}

template <class S, class Block>
struct Rows {
  using Stages = typename S::Stages;
  using W = Work<S, Block>;
  static constexpr int per_block = S::teams * S::M;

  const LongConv& conv;
  Block& block;
  W work;
  const int from, item;  // the first of the numbers; the channel, or whatever has N of them

  FASTMIX_HD Rows(Block& block, const LongConv& conv)
      : conv(conv), block(block), work(block),
        from(block.index() % (conv.length / per_block) * per_block),
        item(block.index() / (conv.length / per_block)) {
    block.phase([&](int thread) { work.tabulate(thread); });
  }

  // The numbers of the index-th of all in scratch that have N of them; an int counts them all.
  FASTMIX_HD Complex* of(Complex* all, int index) const {
    return all + (index * conv.length + from);
  }

  // A thread's row begins here; and there is the i-th of its pairs of a spectrum.
  FASTMIX_HD static int row(int thread) { return thread / S::slot * S::M; }
  FASTMIX_HD static int pair(int thread, int i) { return row(thread) + W::pair(thread, i / 2); }

  FASTMIX_HD auto kept(int thread) const { return W::of(work.kept, thread, 0); }

  FASTMIX_HD void forward(const Complex* numbers) {
    block.phase([&](int thread) {
      Complex v[16];
      const Complex* mine = numbers + row(thread) + thread % S::slot;
      unrolled<16>([&](auto j) { v[j] = block.load_complex(mine + j * S::slot); });
      Stages::first_plain(v, W::of(work.points, thread, 0), work.table, thread % S::slot);
    });
    work.each_subsequence([&](int thread, int i) {
      Stages::second(W::of(work.points, thread, i), work.table, thread % S::slot);
    });
  }

  FASTMIX_HD void back(Complex* numbers) {
    work.each_subsequence([&](int thread, int i) {
      Stages::second_back(W::of(work.points, thread, i), work.table, thread % S::slot);
    });
    block.own([&](int thread) {
      Complex v[16];
      Complex* mine = numbers + row(thread) + thread % S::slot;
      Stages::first_plain_back(v, W::of(work.points, thread, 0), work.table, thread % S::slot);
      unrolled<16>([&](auto j) { block.store_complex(mine + j * S::slot, v[j]); });
    });
  }
};

// Spectra of kernels, in place and in the order in which threads have them.
template <class S>
struct RowSpectra {
  static constexpr int shared = S::shared;

  FASTMIX_HD static int blocks(const LongConv& conv) { return blocks_of<S>(conv, conv.kernels); }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const LongConv& conv) {
    Rows<S, Block> rows(block, conv);
    Complex* spectrum = rows.of(conv.spectra, rows.item);
    rows.forward(spectrum);
    block.phase([&](int thread) {
      rows.work.third_in(thread, [&](auto i, Complex* v) {
        block.store_pair(spectrum + rows.pair(thread, i), v);
      });
    });
  }
};

template <class S>
struct RowForward {
  static constexpr int shared = S::shared;

  FASTMIX_HD static int blocks(const LongConv& conv) {
    return blocks_of<S>(conv, conv.units * conv.width);
  }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const LongConv& conv) {
    Rows<S, Block> rows(block, conv);
    const int unit = rows.item / conv.width;
    if (rows.item % conv.width >= conv.at(unit).count) return;
    Complex* numbers = rows.of(conv.columns, rows.item);
    const Complex* kernel =
        rows.of(conv.spectra, (conv.first_unit + unit) / conv.units_of_kernel());
    const float skip = skip_of(block, conv, conv.at(unit), rows.item % conv.width);
    rows.forward(numbers);
    block.phase([&](int thread) {
      rows.work.third(thread, [&](auto i, Complex* v) {
        Complex k[2];
        block.load_pair(kernel + rows.pair(thread, i), k);
        v[0] = v[0] * (k[0] + skip);
        v[1] = v[1] * (k[1] + skip);
      });
    });
    rows.back(numbers);
  }
};

// The gradient of x, and a part's share of that of the kernel's spectrum.
template <class S>
struct RowBackward {
  static constexpr int shared = S::shared_backward;

  FASTMIX_HD static int blocks(const LongConv& conv) {
    return blocks_of<S>(conv, conv.kernels * conv.parts);
  }

  struct Sums {
    Complex value[16];
  };

  template <class Block>
  FASTMIX_HD static void run(Block& block, const LongConv& conv) {
    Rows<S, Block> rows(block, conv);
    const int kernel_at = rows.item / conv.parts, part = rows.item % conv.parts;
    const Complex* kernel = rows.of(conv.spectra, kernel_at);
    // Slabs hold all channels of each of their kernels, or some of only one kernel's.
    const int all = conv.units / conv.kernels * conv.width, more = (part + 1) * conv.share,
              end = kernel_at * all + (more < all ? more : all);
    typename Block::template Own<Sums> sums(block);
    block.own([&](int thread) {
      unrolled<8>([&](auto i) {
        Complex* sum = sums.of(thread).value + 2 * i;
        sum[0] = sum[1] = {0, 0};
        if (conv.first_unit > 0)
          block.load_pair(rows.of(conv.sums, rows.item) + rows.pair(thread, 2 * i), sum);
      });
    });
    FASTMIX_ROLLED for (int channel = kernel_at * all + part * conv.share; channel < end;
                        ++channel) {
      const Channels at = conv.at(channel / conv.width);
      if (channel % conv.width >= at.count) continue;
      const float skip = skip_of(block, conv, at, channel % conv.width);
      rows.forward(rows.of(conv.columns, channel));
      block.phase([&](int thread) {
        const auto kept = rows.kept(thread);
        rows.work.third_in(thread, [&](auto i, Complex* v) {
          unrolled<2>([&](auto j) { kept.put(17 * (thread % S::slot) + i + j, v[j]); });
        });
      });
      rows.forward(rows.of(conv.grad_columns, channel));
      block.phase([&](int thread) {
        const auto kept = rows.kept(thread);
        Complex* sum = sums.of(thread).value;
        rows.work.third(thread, [&](auto i, Complex* v) {
          Complex k[2];
          block.load_pair(kernel + rows.pair(thread, i), k);
          unrolled<2>([&](auto j) {
            const Complex a = kept.get(17 * (thread % S::slot) + i + j);
            sum[i + j] = {sum[i + j].re + a.re * v[j].re + a.im * v[j].im,
                          sum[i + j].im + a.re * v[j].im - a.im * v[j].re};
            v[j] = v[j] * (conj(k[j]) + skip);
          });
          if (S::Stages::last == 16) block.in_order();
        });
      });
      rows.back(rows.of(conv.grad_columns, channel));
    }
    block.own([&](int thread) {
      unrolled<8>([&](auto i) {
        block.store_pair(rows.of(conv.sums, rows.item) + rows.pair(thread, 2 * i),
                         sums.of(thread).value + 2 * i);
      });
    });
  }
};

// Transforms the spectra of kernels' gradients back, and leaves them where the kernels' own were.
template <class S>
struct RowLags {
  static constexpr int shared = S::shared;

  FASTMIX_HD static int blocks(const LongConv& conv) { return blocks_of<S>(conv, conv.kernels); }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const LongConv& conv) {
    Rows<S, Block> rows(block, conv);
    block.phase([&](int thread) {
      rows.work.third_back(thread, [&](auto i, Complex* v) {
        v[0] = v[1] = {0, 0};
        for (int part = 0; part < conv.parts; ++part) {
          Complex more[2];
          block.load_pair(rows.of(conv.sums, rows.item * conv.parts + part) + rows.pair(thread, i),
                          more);
          v[0] = v[0] + more[0];
          v[1] = v[1] + more[1];
        }
      });
    });
    rows.back(rows.of(conv.spectra, rows.item));
  }
};

// ---- which of them a sequence takes

constexpr int kLongestOfAll = 1 << 20;

// The transform's length for n steps, or 0 if there is none.
inline int long_length_for(int64_t n) {
  int length = 16384;
  while (length < n && length < kLongestOfAll) length *= 2;
  return length < n ? 0 : length;
}

// f(the Columns for sequences of `length`): words of a row that are read at once, four wherever
// slabs of that many channels fit into the scratch, which a few of the longest sequences fill.
template <int bytes, class F>
auto with_columns(int length, F f) {
  constexpr int few = bytes == 2 ? 2 : 4;
  switch (length) {
    case 1 << 14: return f(Columns<bytes, 1 << 14, 4>{});
    case 1 << 15: return f(Columns<bytes, 1 << 15, 4>{});
    case 1 << 16: return f(Columns<bytes, 1 << 16, 4>{});
    case 1 << 17: return f(Columns<bytes, 1 << 17, 4>{});
    case 1 << 18: return f(Columns<bytes, 1 << 18, 4>{});
    case 1 << 19: return f(Columns<bytes, 1 << 19, few>{});
    default: return f(Columns<bytes, 1 << 20, few>{});
  }
}

template <class F>
auto with_columns(Type type, int length, F f) {
  return type == Type::f32 ? with_columns<4>(length, f) : with_columns<2>(length, f);
}

// f(the Shape of the rows of sequences of `length`): a transform to a row. Rows are complex numbers
// in scratch, so no words of a tensor are read.
template <class F>
auto with_rows(int length, F f) {
  switch (length) {
    case 1 << 14: return f(Shape<4, 1024, 1, 1, 1>{});
    case 1 << 15: return f(Shape<4, 2048, 1, 1, 1>{});
    default: return f(Shape<4, 4096, 1, 1, 1>{});
  }
}

// f(the kernel, its shape, how many blocks)
template <Kernel kernel, class F>
void with_kernel(int length, int64_t, const LongConv& args, F f) {
  auto call = [&](auto k, auto shape) { f(k, shape, k.blocks(args)); };
  if constexpr (kernel == Kernel::columns_in || kernel == Kernel::columns_out)
    with_columns(args.view.type, length, [&](auto shape) {
      using S = decltype(shape);
      if constexpr (kernel == Kernel::columns_in) call(ColumnsIn<S>{}, shape);
      if constexpr (kernel == Kernel::columns_out) call(ColumnsOut<S>{}, shape);
    });
  else
    with_rows(length, [&](auto shape) {
      using S = decltype(shape);
      if constexpr (kernel == Kernel::row_spectra) call(RowSpectra<S>{}, shape);
      if constexpr (kernel == Kernel::row_forward) call(RowForward<S>{}, shape);
      if constexpr (kernel == Kernel::row_backward) call(RowBackward<S>{}, shape);
      if constexpr (kernel == Kernel::row_lags) call(RowLags<S>{}, shape);
    });
}

// What a kernel takes.
template <Kernel kernel>
using Args = std::conditional_t<(kernel < Kernel::columns_in), FftConv, LongConv>;

}  // namespace fastmix::cuda
