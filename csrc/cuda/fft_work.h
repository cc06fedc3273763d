// A block's transforms of what its threads have read, between shared memory and their rows.

#pragma once

#include "fft_rows.h"

namespace fastmix::cuda {

template <class S, class Block>
struct Work {
  using Stages = typename S::Stages;
  using Shared = typename Block::Shared;
  template <class T>
  using Own = typename Block::template Own<T>;  // a T of each thread

  Block& block;
  Shared table, points, kept;

  FASTMIX_HD explicit Work(Block& block)
      : block(block), table(block.shared(0)), points(block.shared(Stages::tables)),
        kept(block.shared(Stages::tables + S::room)) {}

  FASTMIX_HD static Shared of(Shared buffers, int thread, int i) {
    return buffers.at(S::buffer(thread, i) * Stages::room);
  }

  FASTMIX_HD void tabulate(int thread) {
    for (int i = thread; i < Stages::tables; i += S::threads) Stages::tabulate(table, i);
  }

  // Where the j-th pair of a thread's sixteen values lies where r is 1: the j-th pairs of all
  // threads lie side by side.
  FASTMIX_HD static int pair(int thread, int j) { return 2 * (S::slot * j + thread % S::slot); }

  // f(thread, i) for each subsequence of each thread, then a barrier.
  template <class F>
  FASTMIX_HD void each_subsequence(F f) {
    block.phase([&](int thread) { unrolled<S::subsequences>([&](auto i) { f(thread, i); }); });
  }

  // Transforms what get(thread, i, x) says is in sixteen time steps, up to the last stage.
  template <class F>
  FASTMIX_HD void forward(F get) {
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
  FASTMIX_HD void back(F put) {
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
  FASTMIX_HD void forward(Own<Queue<S>>& queue, Type type) {
    forward([&](int thread, int i, float* x) { peek<Block>(queue.of(thread), i, type, x); });
  }
  FASTMIX_HD void back(Own<Queue<S>>& queue, Type type) {
    back([&](int thread, int i, const float* y) { push<Block>(queue.of(thread), i, type, y); });
  }

  // Drops the first channel of `queue`: nothing takes its place.
  FASTMIX_HD void drop(Own<Queue<S>>& queue, Type type) {
    block.own([&](int thread) {
      const float nothing[16] = {};
      unrolled<S::subsequences>([&](auto i) { push<Block>(queue.of(thread), i, type, nothing); });
    });
  }

  // The last stage alone, from points to `to`.
  FASTMIX_HD void last(Shared to) {
    each_subsequence([&](int thread, int i) {
      Shared buffer = of(to, thread, i);
      Stages::third_in(of(points, thread, i), thread % S::slot, [&](auto first, Complex* v) {
        unrolled<Stages::last>(
            [&](auto j) { buffer.put(17 * (thread % S::slot) + first + j, v[j]); });
      });
    });
  }

  FASTMIX_HD void last_back() {
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
  FASTMIX_HD void third(int thread, F f) {
    Stages::third(of(points, thread, 0), thread % S::slot, pairs(f));
  }
  template <class F>
  FASTMIX_HD void third_in(int thread, F f) {
    Stages::third_in(of(points, thread, 0), thread % S::slot, pairs(f));
  }
  template <class F>
  FASTMIX_HD void third_back(int thread, F f) {
    Stages::third_back(of(points, thread, 0), thread % S::slot, pairs(f));
  }
  template <class F>
  FASTMIX_HD static auto pairs(F& f) {
    return [&](auto first, Complex* v) {
      unrolled<Stages::last / 2>(
          [&](auto j) { f(std::integral_constant<int, first + 2 * j>{}, v + 2 * j); });
    };
  }

  // f(place) for every place, by some thread.
  template <class F>
  FASTMIX_HD void each_leaf(F f) {
    block.phase([&](int thread) {
      for (int place = thread; place < S::M; place += S::threads) f(place);
    });
  }

  FASTMIX_HD static int leaf(int place, int e) { return e * Stages::room + padded(place); }
};

}  // namespace fastmix::cuda
