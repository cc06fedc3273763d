// What a call of fft_conv is given, the shapes of work that its blocks take, and how a thread
// reads and writes its rows of channels.

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
  int lags;                  // of the kernel that matter: at most `steps`
  int kernels;               // batch, or 1: one kernel for all
  int parts, share;          // that a head's channels are cut into, backward; channels of a part
  View x, grad, out;         // (b, n, h, d); out is of the dtype of x
  View kernel, grad_kernel;  // (b or 1, m, 1, h): its heads are channels
  const float* skip;         // (h, channels), or null
  int wrapped;               // how many values of a spectrum are there times u as well: r - 1, or 0
  Complex* spectra;          // (kernels, h, wrapped + r, M)
  Complex* sums;             // (b, h, parts, r, M): of the kernels' gradients
  Complex* kept;             // (blocks, r, M): spectra of x, where shared memory is short
  float* skip_sums;          // (b, parts of the steps, h, channels): of the skip's gradient
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
  static constexpr int words = row_words;            // of 32 bits, read from each time step at once
  static constexpr int at_once = 4 * words / bytes;  // channels that are in them
  static constexpr int buffers = r == 1 ? slots : r;
  static constexpr bool keeps_shared = keeps;
  static constexpr int room = buffers * Stages::room;  // of all transforms
  static constexpr int shared = 8 * (Stages::tables + room);
  static constexpr int shared_backward = shared + (keeps ? 8 * room : 0);

  // The buffer of a thread's i-th subsequence, and that subsequence's index.
  static FASTMIX_HD int buffer(int thread, int i) { return thread / slot + i * slots; }
  static FASTMIX_HD int subsequence(int thread, int i) { return r == 1 ? 0 : buffer(thread, i); }
  // Its sixteen time steps of that one: the first, and how far they are apart.
  static FASTMIX_HD int first_step(int thread, int i) {
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

FASTMIX_HD float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

FASTMIX_HD uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Two numbers of 16 bits, the first one low.
template <class Block>
FASTMIX_HD uint32_t pack(Type type, float low, float high) {
  return type == Type::bf16 ? Block::template pack<Type::bf16>(low, high)
                            : Block::template pack<Type::f16>(low, high);
}

// The first channel of a row; what is behind it moves up, with `bits` at the end.
template <class S>
FASTMIX_HD uint32_t first_of(const uint32_t* row) {
  return S::bytes == 4 ? row[0] : row[0] & 0xffff;
}

template <class S>
FASTMIX_HD void queue_up(uint32_t* row, uint32_t bits) {
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
FASTMIX_HD void peek(const Queue<S>& queue, int i, Type type, float* x) {
  unrolled<16>([&](auto j) {
    const uint32_t bits = first_of<S>(queue.word[16 * i + j]);
    x[j] = S::bytes == 4        ? as_float(bits)
           : type == Type::bf16 ? as_float(bits << 16)
                                : Block::from_half(bits);
  });
}

// Drops that channel, and queues y at the end.
template <class Block, class S>
FASTMIX_HD void push(Queue<S>& queue, int i, Type type, const float* y) {
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
FASTMIX_HD float number(Block& block, Type type, const char* from) {
  if (type == Type::f32) return as_float(block.template load_one<4>(from));
  const uint32_t bits = block.template load_one<2>(from);
  return type == Type::bf16 ? as_float(bits << 16) : Block::from_half(bits);
}

template <class Block>
FASTMIX_HD void put_number(Block& block, Type type, char* to, float x) {
  if (type == Type::f32) return block.template store_one<4>(to, as_bits(x));
  block.template store_one<2>(to, pack<Block>(type, x, 0));
}

// Some neighbouring channels of a head: what a slot of threads reads and writes at once.
struct Channels {
  int b, h, c, count;  // count 0: nothing to do
};

// Whether rows of words can be read and written whole.
template <class S>
FASTMIX_HD bool has_whole_rows(const View& view, int channels) {
  constexpr int bytes = 4 * S::words;
  return view.d == 1 && channels % S::at_once == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && view.b * S::bytes % bytes == 0 &&
         view.n * S::bytes % bytes == 0 && view.h * S::bytes % bytes == 0;
}

// f(address, row) for each time step of a thread that there is; `channels` are its head's.
template <class S, class Rows, class F>
FASTMIX_HD void each_row(const View& view, int steps, Channels at, int thread, Rows& queue, F f) {
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
FASTMIX_HD void read(Block& block, const View& view, int channels, int steps, Channels at,
                     int thread, Queue<S>& queue) {
  unrolled<S::rows>([&](auto i) { unrolled<S::words>([&](auto k) { queue.word[i][k] = 0; }); });
  if (has_whole_rows<S>(view, channels)) {
    each_row<S>(view, steps, at, thread, queue,
                [&](const char* from, uint32_t* row) { block.template load<S::words>(from, row); });
  } else {
    FASTMIX_ROLLED for (int c = 0; c < S::at_once; ++c) each_row<S>(
        view, steps, at, block.again(thread), queue, [&](const char* row, uint32_t* to) {
          const char* from = row + c * S::bytes * view.d;
          queue_up<S>(to, c < at.count ? block.template load_one<S::bytes>(from) : 0);
        });
  }
}

template <class Block, class S>
FASTMIX_HD void write(Block& block, const View& view, int channels, int steps, Channels at,
                      int thread, Queue<S>& queue) {
  if (has_whole_rows<S>(view, channels)) {
    each_row<S>(view, steps, at, thread, queue,
                [&](char* to, uint32_t* row) { block.template store<S::words>(to, row); });
  } else {
    // Of fewer channels than fit, all are at the end.
    const int skipped = channels < S::at_once ? S::at_once - channels : 0;
    FASTMIX_ROLLED for (int k = 0; k < S::words; ++k)
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

}  // namespace fastmix::cuda
