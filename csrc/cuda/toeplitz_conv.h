// fft_conv without transforms, for 16 bits and few lags: products on tensor cores. Written for
// any Block that has warps, shared memory and barriers; a test runs them on a CPU.
//
// y = T x with T[i, j] = kernel[i - j], a band of a lower triangle: tiles of 64 by 64 of T meet
// tiles of 64 steps by 64 channels of x; on the diagonal a skip times x is added. The gradient of
// x is the same product with time running backward, which strides say. That of the kernel sums the
// diagonals of grad xᵀ: its tiles of one difference I - J are all added up, in the registers of a
// warp, before their diagonals are.
//
// Fragments are those of PTX's mma.m16n8k16: in lane 4 g + q are A's rows g and g + 8, columns
// 2q, 2q + 1, 2q + 8 and 2q + 9; B's rows are its columns, and B's columns g. What such a lane
// holds of T depends on i - j only: one word serves for all of T's rows and columns, eight apart.
//
// Beyond the ends of x and of the kernel there are zeros. They meet numbers of up to 63 steps
// later and of lags that T has not: NaN or infinity spreads as far.

#pragma once

#include "fft_conv.h"

#ifdef __CUDACC__
#define FASTMIX_UNROLLED _Pragma("unroll")
#else
#define FASTMIX_UNROLLED
#endif

namespace fastmix::cuda {

struct Toeplitz {
  int batch, steps, heads, channels;
  int lags;           // of the kernel that matter: at most `steps`
  int kernels;        // batch, or 1: one kernel for all
  View x, grad, out;  // (b, n, h, d) of one type, which the kernel is of as well; channels lie
                      // side by side, those of x and grad in whole octets
  View kernel, grad_kernel;  // (b or 1, m, 1, h): its heads are channels
  const float* skip;         // (h, channels), or null
  float* sums;  // (b, h, tiles of channels, parts, groups, 320): of the kernels' gradients
};

constexpr int kWarps = 4;  // of a block: as many tiles, one below the other
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 64;  // steps, and channels
constexpr int kTileBytes = 2 * kTile * kTile;

FASTMIX_HD int cut(int64_t whole, int by) { return (whole + by - 1) / by; }

FASTMIX_HD int tiles_of_steps(const Toeplitz& conv) { return cut(conv.steps, kTile); }
FASTMIX_HD int tiles_of_channels(const Toeplitz& conv) { return cut(conv.channels, kTile); }

// Tiles of T below the diagonal that have any lags.
FASTMIX_HD int band(const Toeplitz& conv) { return cut(conv.lags + kTile - 1, kTile) - 1; }

// Where a row of a tile, 128 bytes, has an octet, 8 channels: eight rows of one octet lie in
// different banks.
FASTMIX_HD int place(int row, int octet) { return row * 2 * kTile + ((octet ^ (row & 7)) << 4); }

// Whether octets can be read and written whole.
FASTMIX_HD bool has_whole_octets(const View& view) {
  return view.d == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.b % 8 == 0 &&
         view.n % 8 == 0 && view.h % 8 == 0;
}

// Rows of a tensor: of a sample, a head and a tile of channels.
struct Rows16 {
  char* data;
  int64_t step;         // in bytes
  int steps, channels;  // that there are from here on

  FASTMIX_HD Rows16(const View& view, const Toeplitz& conv, int unit) {
    const int c = unit % tiles_of_channels(conv) * kTile, head = unit / tiles_of_channels(conv);
    data = static_cast<char*>(view.data) +
           2 * (head / conv.heads * view.b + head % conv.heads * view.h + c);
    step = 2 * view.n;
    steps = conv.steps, channels = conv.channels - c;
  }

  FASTMIX_HD static int units(const Toeplitz& conv) {
    return conv.batch * conv.heads * tiles_of_channels(conv);
  }

  // Channels of an octet that there are.
  FASTMIX_HD int count(int t, int octet) const {
    const int left = channels - 8 * octet;
    return t >= steps || left < 0 ? 0 : left < 8 ? left : 8;
  }
};

// Has a tile copied into shared memory, with zeros where there is nothing. A thread's part.
template <class Block>
FASTMIX_HD void copy_tile(Block& block, const Rows16& rows, int tile, int to, int thread) {
  const int octet = thread % 8, first = thread / 8;
  const char* from = rows.data + (tile * kTile + first) * rows.step + 16 * octet;
  FASTMIX_UNROLLED for (int k = 0; k < kTile * 8 / kThreads; ++k) {
    const int row = first + kThreads / 8 * k;
    block.copy(to + place(row, octet), from, 2 * rows.count(tile * kTile + row, octet));
    from += kThreads / 8 * rows.step;
  }
}

// 64 by 64 sums of a warp, by fragments: 16 rows by 8 columns.
template <class Block>
struct Sums {
  typename Block::template Lanes<float> of[4][8][4];

  FASTMIX_HD void clear(Block& block) {
    block.lanes([&](int lane) {
      FASTMIX_UNROLLED for (int i = 0; i < 4; ++i) {
        FASTMIX_UNROLLED for (int j = 0; j < 8; ++j) {
          FASTMIX_UNROLLED for (int e = 0; e < 4; ++e) of[i][j][e].of(lane) = 0;
        }
      }
    });
  }
};

// y = T x: a block has four tiles of rows, and takes the tiles of x that they meet one by one.
// The longest come first.
template <Type type>
struct Product {
  static constexpr int threads = kThreads, resident = 2;  // blocks on a multiprocessor
  static constexpr int buffers = 4;                       // for x; at the end for the results
  static constexpr int lags_at = buffers * kTileBytes;

  FASTMIX_HD static int row_blocks(const Toeplitz& conv) {
    return cut(tiles_of_steps(conv), kWarps);
  }
  FASTMIX_HD static int64_t blocks(const Toeplitz& conv) {
    return int64_t{row_blocks(conv)} * Rows16::units(conv);
  }

  // Lags lie backward, so that a pair of columns of T is a word, from `top` to -63: once with
  // odd lags first in words, then with even ones. Banks of the two are 16 apart.
  FASTMIX_HD static int words_of_lags(int span) { return kTile / 2 * (span + 1) + 16; }
  FASTMIX_HD static int shared(const Toeplitz& conv) {
    const int most = kWarps * (row_blocks(conv) - 1), wide = band(conv);
    return lags_at + 8 * words_of_lags(kWarps + (most < wide ? most : wide));
  }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const Toeplitz& conv) {
    const int units = Rows16::units(conv), unit = block.index() % units;
    const int above = kWarps * (row_blocks(conv) - 1 - block.index() / units),  // tiles of rows
        wide = above < band(conv) ? above : band(conv), all = tiles_of_steps(conv),
              below = above + kWarps;
    const int first = above - wide, end = below < all ? below : all;  // of x
    const Rows16 x(conv.x, conv, unit);

    auto queue = [&](int tile) {
      block.own([&](int thread) {
        if (tile < end)
          copy_tile(block, x, tile, ((tile - first) & (buffers - 1)) * kTileBytes, thread);
        block.commit(thread);
      });
    };
    FASTMIX_ROLLED for (int i = 0; i < buffers - 1; ++i) queue(first + i);

    const int top = kTile * (kWarps + wide) - 1, second = 4 * words_of_lags(kWarps + wide);
    const int head = unit / tiles_of_channels(conv);
    load_lags(block, conv, head, top, second);

    typename Block::template OfWarp<Sums<Block>> sums(block);
    block.warps([&](int warp) { sums.of(warp).clear(block); });
    FASTMIX_ROLLED for (int tile = first; tile < end; ++tile) {
      block.template wait<buffers - 2>();
      queue(tile + buffers - 1);
      block.warps([&](int warp) {
        const int down = above + warp - tile;  // from the diagonal
        if (down < 0 || down > band(conv) || above + warp >= all) return;
        const int from = ((tile - first) & (buffers - 1)) * kTileBytes;
        multiply_tile(block, sums.of(warp), from, (top - kTile * down - 57) / 2, second);
        if (down > 0 || conv.skip == nullptr) return;
        const float* skip =
            conv.skip + head % conv.heads * conv.channels + unit % tiles_of_channels(conv) * kTile;
        add_skip(block, sums.of(warp), from, skip, x.channels);
      });
    }

    block.template wait<0>();
    block.warps([&](int warp) { put_sums(block, sums.of(warp), warp); });
    block.barrier();
    write_rows(block, Rows16(conv.out, conv, unit), has_whole_octets(conv.out), above * kTile);
  }

 private:
  // The lags from `top` to -63, twice, into shared memory; zeros where the kernel has none.
  template <class Block>
  FASTMIX_HD static void load_lags(Block& block, const Toeplitz& conv, int head, int top,
                                   int second) {
    const char* kernel =
        static_cast<const char*>(conv.kernel.data) +
        2 * (head / conv.heads * conv.kernel.b + head % conv.heads * conv.kernel.d);
    block.own([&](int thread) {
      constexpr int at_once = 8;  // loads
      FASTMIX_ROLLED for (int first = thread; first < top + kTile; first += at_once * kThreads) {
        uint32_t k[at_once];
        FASTMIX_UNROLLED for (int i = 0; i < at_once; ++i) {
          const int lag = top - first - i * kThreads;
          const bool known = lag >= 0 && lag < conv.lags;
          k[i] = known ? block.template load_one<2>(kernel + 2 * lag * conv.kernel.n) : 0;
        }
        FASTMIX_UNROLLED for (int i = 0; i < at_once; ++i) {
          const int at = first + i * kThreads;
          if (at < top + kTile) {
            block.put_half(lags_at + 2 * at, k[i]);
            block.put_half(lags_at + second + 2 * (at - 1), k[i]);
          }
        }
      }
    });
  }

  // Adds a tile of T times the tile of x at `from`. The lags of T's tile begin at word `lags`.
  template <class Block>
  FASTMIX_HD static void multiply_tile(Block& block, Sums<Block>& sums, int from, int lags,
                                       int second) {
    // T eight by eight, from top down the differences i - j.
    typename Block::template Lanes<uint32_t> t[15], b[4];
    block.lanes([&](int lane) {
      const int g = lane / 4, q = lane % 4, word = lags - g / 2 + q;
      const int at = lags_at + (g % 2 ? 0 : second) + 4 * word;
      FASTMIX_UNROLLED for (int u = 0; u < 15; ++u) {
        block.template get<1>(at + 16 * u, &t[u].of(lane));
      }
    });
    FASTMIX_UNROLLED for (int k = 0; k < 4; ++k) {
      FASTMIX_UNROLLED for (int pair = 0; pair < 4; ++pair) {
        block.template load_matrices<true>(
            b, [&](int lane) { return from + place(16 * k + lane % 16, 2 * pair ^ lane / 16); });
        FASTMIX_UNROLLED for (int i = 0; i < 4; ++i) {
          const int u = 7 - 2 * i + 2 * k;
          FASTMIX_UNROLLED for (int j = 0; j < 2; ++j) {
            block.template multiply<type>(sums.of[i][2 * pair + j], t[u], t[u - 1], t[u + 1], t[u],
                                          b[2 * j], b[2 * j + 1]);
          }
        }
      }
    }
  }

  // Adds the skip of each channel times the tile of x at `from`.
  template <class Block>
  FASTMIX_HD static void add_skip(Block& block, Sums<Block>& sums, int from, const float* skip,
                                  int channels) {
    block.lanes([&](int lane) {
      const int row = lane / 4, q = lane % 4;
      FASTMIX_UNROLLED for (int j = 0; j < 8; ++j) {
        float d[2];
        FASTMIX_UNROLLED for (int e = 0; e < 2; ++e) {
          const int c = 8 * j + 2 * q + e;
          d[e] = c < channels ? block.load_float(skip + c) : 0;
        }
        FASTMIX_UNROLLED for (int i = 0; i < 8; ++i) {
          uint32_t both;
          block.template get<1>(from + place(8 * i + row, j) + 4 * q, &both);
          auto* sum = sums.of[i / 2][j] + 2 * (i % 2);
          sum[0].of(lane) += d[0] * Block::template unpack<type>(both);
          sum[1].of(lane) += d[1] * Block::template unpack<type>(both >> 16);
        }
      }
    });
  }

  // Rounds a warp's sums into its tile of shared memory.
  template <class Block>
  FASTMIX_HD static void put_sums(Block& block, Sums<Block>& sums, int warp) {
    FASTMIX_UNROLLED for (int i = 0; i < 4; ++i) {
      FASTMIX_UNROLLED for (int j = 0; j < 8; ++j) {
        FASTMIX_UNROLLED for (int half = 0; half < 2; ++half) {
          auto* pair = sums.of[i][j] + 2 * half;
          block.lanes([&](int lane) {
            const int row = kTile * warp + 16 * i + 8 * half + lane / 4;
            const uint32_t word = Block::template pack<type>(pair[0].of(lane), pair[1].of(lane));
            block.template put<1>(place(row, j) + lane % 4 * 4, &word);
          });
        }
      }
    }
  }

  // Writes the tiles of all warps out as the rows from `first` on, by octets where those are whole.
  template <class Block>
  FASTMIX_HD static void write_rows(Block& block, const Rows16& out, bool whole, int first) {
    block.own([&](int thread) {
      FASTMIX_ROLLED for (int i = thread; i < kWarps * kTile * 8; i += kThreads) {
        const int row = i / 8, octet = i % 8, t = first + row, count = out.count(t, octet);
        char* to = out.data + t * out.step + 16 * octet;
        uint32_t words[4];
        block.template get<4>(place(row, octet), words);
        if (whole && count == 8) block.template store<4>(to, words);
        else FASTMIX_UNROLLED for (int e = 0; e < 8; ++e) {
            if (e < count) block.template store_one<2>(to + 2 * e, words[e / 2] >> 16 * (e % 2));
          }
      }
    });
  }
};

// The diagonals of grad xᵀ: each warp of a block takes another difference of tiles. A block sums
// over a part of the steps.
template <Type type>
struct Diagonals {
  static constexpr int threads = kThreads, resident = 2;
  static constexpr int ahead = 2, x_buffers = 1 + ahead, grad_buffers = kWarps + ahead;
  static constexpr int grad_at = x_buffers * kTileBytes;
  static constexpr int share = 16;                   // tiles of a part
  static constexpr int lags = kTile * (kWarps + 1);  // of a group, from -63 to 256
  static constexpr int plane = 8 * 17;               // see `diagonal`

  FASTMIX_HD static int groups(const Toeplitz& conv) {
    const int all = tiles_of_steps(conv), wide = band(conv) + 1;
    return cut(all < wide ? all : wide, kWarps);
  }
  FASTMIX_HD static int parts(const Toeplitz& conv, int group) {
    return cut(tiles_of_steps(conv) - kWarps * group, share);
  }
  FASTMIX_HD static int64_t sums(const Toeplitz& conv) { return blocks(conv) * lags; }
  FASTMIX_HD static int64_t blocks(const Toeplitz& conv) {
    return int64_t{groups(conv)} * parts(conv, 0) * Rows16::units(conv);
  }
  FASTMIX_HD static int shared(const Toeplitz&) { return (x_buffers + grad_buffers) * kTileBytes; }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const Toeplitz& conv) {
    const int units = Rows16::units(conv), unit = block.index() % units,
              part = block.index() / units % parts(conv, 0),
              group = block.index() / units / parts(conv, 0);
    if (part >= parts(conv, group)) return;
    const int all = tiles_of_steps(conv), down = kWarps * group, first = part * share,
              end = first + share < all - down ? first + share : all - down;  // tiles of x
    const Rows16 x(conv.x, conv, unit), grad(conv.grad, conv, unit);

    auto queue_grad = [&](int thread, int tile, int buffer) {
      if (tile < all) copy_tile(block, grad, tile, grad_at + buffer * kTileBytes, thread);
    };
    auto queue = [&](int tile, int x_buffer, int grad_buffer) {
      block.own([&](int thread) {
        if (tile < end) {
          copy_tile(block, x, tile, x_buffer * kTileBytes, thread);
          queue_grad(thread, tile + down + kWarps - 1, grad_buffer);
        }
        block.commit(thread);
      });
    };
    block.own([&](int thread) {
      FASTMIX_ROLLED for (int i = 0; i < kWarps - 1; ++i) queue_grad(thread, first + down + i, i);
    });
    FASTMIX_ROLLED for (int i = 0; i < ahead; ++i) queue(first + i, i, kWarps - 1 + i);

    typename Block::template OfWarp<Sums<Block>> sums(block);
    block.warps([&](int warp) { sums.of(warp).clear(block); });
    int x_buffer = 0, grad_buffer = 0;
    FASTMIX_ROLLED for (int tile = first; tile < end; ++tile) {
      block.template wait<ahead - 1>();
      // What is read next lies where the last tile's were.
      queue(tile + ahead, x_buffer == 0 ? x_buffers - 1 : x_buffer - 1,
            grad_buffer == 0 ? grad_buffers - 1 : grad_buffer - 1);
      block.warps([&](int warp) {
        if (tile + down + warp >= all || down + warp > band(conv)) return;
        const int mine = grad_buffer + warp,
                  buffer = mine < grad_buffers ? mine : mine - grad_buffers,
                  of_grad = grad_at + buffer * kTileBytes, of_x = x_buffer * kTileBytes;
        multiply_tile(block, sums.of(warp), of_grad, of_x);
      });
      x_buffer = x_buffer == x_buffers - 1 ? 0 : x_buffer + 1;
      grad_buffer = grad_buffer == grad_buffers - 1 ? 0 : grad_buffer + 1;
    }

    block.template wait<0>();
    block.warps([&](int warp) { put_diagonals(block, sums.of(warp), warp); });
    block.barrier();
    float* to = conv.sums + ((int64_t{unit} * parts(conv, 0) + part) * groups(conv) + group) * lags;
    block.own([&](int thread) {
      for (int i = thread; i < lags; i += kThreads) {
        const int warp = i / kTile, rest = i % kTile;  // of two warps' diagonals
        float sum = 0;
        if (warp < kWarps) sum = diagonal(block, warp, rest - (kTile - 1));
        if (warp > 0 && rest < kTile - 1) sum += diagonal(block, warp - 1, rest + 1);
        block.template store_one<4>(to + i, as_bits(sum));
      }
    });
  }

 private:
  // Adds the tile of grad times the tile of x, transposed.
  template <class Block>
  FASTMIX_HD static void multiply_tile(Block& block, Sums<Block>& sums, int of_grad, int of_x) {
    using Word = typename Block::template Lanes<uint32_t>;
    FASTMIX_UNROLLED for (int k = 0; k < 4; ++k) {
      Word a[4][4], b[4];
      FASTMIX_UNROLLED for (int i = 0; i < 4; ++i) {
        block.template load_matrices<false>(
            a[i], [&](int lane) { return of_grad + place(16 * i + lane % 16, 2 * k ^ lane / 16); });
      }
      FASTMIX_UNROLLED for (int pair = 0; pair < 4; ++pair) {
        block.template load_matrices<false>(b, [&](int lane) {
          return of_x + place(16 * pair + lane / 16 * 8 + lane % 8, 2 * k ^ lane / 8 % 2);
        });
        FASTMIX_UNROLLED for (int i = 0; i < 4; ++i) {
          FASTMIX_UNROLLED for (int j = 0; j < 2; ++j) {
            block.template multiply<type>(sums.of[i][2 * pair + j], a[i][0], a[i][1], a[i][2],
                                          a[i][3], b[2 * j], b[2 * j + 1]);
          }
        }
      }
    }
  }

  // Puts a warp's diagonals into shared memory. The places of a diagonal that are eight by eight
  // apart are in the same lane: those are summed first.
  template <class Block>
  FASTMIX_HD static void put_diagonals(Block& block, Sums<Block>& sums, int warp) {
    FASTMIX_UNROLLED for (int u = 0; u < 17; ++u) {
      const int far = u - 8;  // rows of eight below the diagonal
      const int least = far < 0 ? 0 : far, most = far < 0 ? 8 + far : 8;
      block.lanes([&](int lane) {
        float pair[2] = {0, 0};
        FASTMIX_UNROLLED for (int i = 0; i < most - least; ++i) {
          const int row = least + i, column = row - far;
          FASTMIX_UNROLLED for (int e = 0; e < 2; ++e) {
            pair[e] += sums.of[row / 2][column][row % 2 * 2 + e].of(lane);
          }
        }
        const uint32_t words[2] = {as_bits(pair[0]), as_bits(pair[1])};
        block.template put<2>(4 * diagonal(warp, u, lane / 4, lane % 4 * 2), words);
      });
    }
  }

  // Where a warp's sum of the places (g, c) eight by eight is: no two of 32 neighbouring
  // diagonals that have the same g are in one bank.
  FASTMIX_HD static int diagonal(int warp, int u, int g, int c) {
    return ((warp * 8 + g) * plane) + 8 * u + c;
  }

  // The sum of the diagonal i - j = `lag` of a warp's 64 by 64.
  template <class Block>
  FASTMIX_HD static float diagonal(Block& block, int warp, int lag) {
    float sum = 0;
    FASTMIX_UNROLLED for (int g = 0; g < 8; ++g) {
      const int c = (g - lag) & 7, u = (lag - g + c) / 8 + 8;
      uint32_t bits;
      block.template get<1>(4 * diagonal(warp, u, g, c), &bits);
      sum += as_float(bits);
    }
    return sum;
  }
};

// The gradients of kernels: a thread adds up what blocks found of a lag, of all samples where
// they share a kernel.
template <Type type>
struct Totals {
  static constexpr int threads = kThreads, resident = 1;

  FASTMIX_HD static int64_t blocks(const Toeplitz& conv) {
    return (int64_t{conv.kernels} * conv.heads * conv.lags + threads - 1) / threads;
  }
  FASTMIX_HD static int shared(const Toeplitz&) { return 0; }

  template <class Block>
  FASTMIX_HD static void run(Block& block, const Toeplitz& conv) {
    using From = Diagonals<type>;
    const int groups = From::groups(conv), parts = From::parts(conv, 0),
              tiles = tiles_of_channels(conv);
    block.own([&](int thread) {
      const int64_t item = int64_t{block.index()} * threads + thread;
      if (item >= int64_t{conv.kernels} * conv.heads * conv.lags) return;
      const int kernel = item / conv.lags, lag = item % conv.lags;
      constexpr int width = kTile * kWarps;
      const int group = lag / width, i = lag % width + kTile - 1;
      const int samples = conv.kernels == 1 ? conv.batch : 1;
      float sum = 0;
      for (int b = 0; b < samples; ++b) {
        const int64_t head = int64_t{b} * conv.heads + kernel;
        for (int row = 0; row < tiles * parts; ++row) {
          const float* from =
              conv.sums + ((head * tiles * parts + row) * groups + group) * From::lags;
          const int part = row % parts;
          if (part < From::parts(conv, group)) sum += block.load_float(from + i);
          if (i >= width && group + 1 < groups && part < From::parts(conv, group + 1))
            sum += block.load_float(from + From::lags + i - width);
        }
      }
      char* to = static_cast<char*>(conv.grad_kernel.data) +
                 2 * (kernel / conv.heads * conv.grad_kernel.b + lag * conv.grad_kernel.n +
                      kernel % conv.heads * conv.grad_kernel.d);
      block.template store_one<2>(to, Block::template pack<type>(sum, 0));
    });
  }
};

}  // namespace fastmix::cuda
