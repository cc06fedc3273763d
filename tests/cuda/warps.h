// The Block of toeplitz_conv.h on a CPU: all lanes of a warp one after another, between barriers
// that all threads wait at. Shared memory is poisoned, and so is the target of a copy until it is
// waited for. Fragments are as PTX has them for ldmatrix and mma.m16n8k16.

#pragma once

#include "counts.h"

namespace fastmix::cuda {
namespace {

struct WarpBlock {
  template <class T>
  struct Lanes {
    T values[32];
    Lanes() { memset(values, 0xff, sizeof values); }
    T& of(int lane) { return values[lane]; }
  };
  template <class T>
  struct OfWarp {
    std::vector<T> values;
    explicit OfWarp(WarpBlock& block) : values(block.threads / 32) {}
    T& of(int warp) { return values[warp]; }
  };
  struct Access {
    int place, bytes;
  };
  struct Copy {
    int group, to;
    unsigned char data[16];
  };
  struct Half {  // of a word: who wrote and read it since the last barrier, -1 nobody, -2 several
    int wrote = -1, read = -1;
    bool awaited = false;
  };

  int number, threads, thread = 0;
  std::vector<unsigned char> memory;
  std::vector<Half> halves;
  std::vector<int> touched;
  std::vector<std::vector<Access>> accesses;
  std::vector<std::vector<Copy>> copies;
  std::vector<int> groups;

  WarpBlock(int number, int threads, int bytes)
      : number(number), threads(threads), memory(bytes, 0xff), halves(bytes / 2), accesses(threads),
        copies(threads), groups(threads) {}

  int index() const { return number; }

  template <class F>
  void own(F f) {
    for (thread = 0; thread < threads; ++thread) f(thread);
  }
  template <class F>
  void warps(F f) {
    for (int warp = 0; warp < threads / 32; ++warp) thread = 32 * warp, f(warp);
  }
  template <class F>
  void lanes(F f) {
    const int first = thread;
    for (int lane = 0; lane < 32; ++lane) thread = first + lane, f(lane);
    thread = first;
  }

  // ---- shared memory

  bool visit(int place, int bytes, bool written, bool copied = false) {
    if (place < 0 || place + bytes > static_cast<int>(memory.size())) {
      counts.error = "shared memory ends before byte " + std::to_string(place);
      return false;
    }
    if (place % bytes) counts.error = "misaligned shared access";
    for (int i = place / 2; i < (place + bytes) / 2; ++i) {
      Half& half = halves[i];
      if (half.wrote == -1 && half.read == -1) touched.push_back(i);
      if (half.awaited) counts.error = "a copy is not waited for";
      if (half.wrote != -1 && half.wrote != thread) counts.error = "two threads meet";
      if (written && half.read != -1 && half.read != thread)
        counts.error = "a thread writes what another reads in the same phase";
      if (written) half.wrote = thread;
      else half.read = half.read == -1 || half.read == thread ? thread : -2;
      half.awaited = copied;
    }
    return true;
  }
  template <int words>
  void get(int place, uint32_t* to) {
    accesses[thread].push_back({place, 4 * words});
    if (visit(place, 4 * words, false)) memcpy(to, &memory[place], 4 * words);
  }
  template <int words>
  void put(int place, const uint32_t* from) {
    accesses[thread].push_back({place, 4 * words});
    if (visit(place, 4 * words, true)) memcpy(&memory[place], from, 4 * words);
  }
  void put_half(int place, uint32_t bits) {
    accesses[thread].push_back({place, 2});
    if (visit(place, 2, true)) memcpy(&memory[place], &bits, 2);
  }

  // Turns that some lanes' accesses of one width take, 128 bytes at a time at most.
  static void take(const std::vector<Access>& lanes) {
    std::vector<int> words[32];
    size_t turns = 1;
    for (const Access& a : lanes)
      for (int word = a.place / 4; word <= (a.place + a.bytes - 1) / 4; ++word) {
        auto& bank = words[word & 31];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        turns = std::max(turns, bank.size());
      }
    ++counts.shared;
    counts.waits += turns - 1;
  }

  void barrier() {
    for (int first = 0; first < threads; first += 32) {
      size_t most = 0;
      for (int t = first; t < first + 32; ++t) most = std::max(most, accesses[t].size());
      for (size_t k = 0; k < most; ++k) {
        std::vector<Access> lanes;
        for (int t = first; t < first + 32; ++t) {
          if (k < accesses[t].size()) lanes.push_back(accesses[t][k]);
          const bool full = !lanes.empty() && lanes.size() * lanes[0].bytes >= 128;
          if (!lanes.empty() && (full || t == first + 31)) take(lanes), lanes.clear();
        }
      }
    }
    for (auto& list : accesses) list.clear();
    for (int i : touched) halves[i].wrote = halves[i].read = -1;
    touched.clear();
    ++counts.barriers;
  }

  // ---- copies

  void copy(int to, const void* from, int bytes) {
    Copy made{groups[thread], to, {}};
    if (bytes > 0) memcpy(made.data, from, bytes);
    if (bytes < 0 || bytes > 16) counts.error = "a copy of more than 16 bytes";
    if (reinterpret_cast<uintptr_t>(from) % 16 && bytes > 0) counts.error = "misaligned copy";
    count("load", 16);
    accesses[thread].push_back({to, 16});
    if (visit(to, 16, true, true)) memset(&memory[to], 0xff, 16), copies[thread].push_back(made);
  }
  void commit(int thread) { ++groups[thread]; }
  template <int pending>
  void wait() {
    for (int t = 0; t < threads; ++t) {
      auto& list = copies[t];
      while (!list.empty() && list.front().group < groups[t] - pending) {
        const int to = list.front().to;
        memcpy(&memory[to], list.front().data, 16);
        for (int i = to / 2; i < to / 2 + 8; ++i) halves[i].awaited = false;
        list.erase(list.begin());
      }
    }
    barrier();
  }
  void finish() {
    barrier();
    for (const auto& list : copies)
      if (!list.empty()) counts.error = "a copy is never waited for";
  }

  // ---- matrices

  template <bool transposed, class F>
  void load_matrices(Lanes<uint32_t>* to, F place) {
    const int first = thread;
    ++counts.matrices;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t rows[8][8];
      std::vector<Access> lanes;
      for (int row = 0; row < 8; ++row) {
        const int from = place(8 * matrix + row);
        thread = first + 8 * matrix + row;
        lanes.push_back({from, 16});
        if (visit(from, 16, false)) memcpy(rows[row], &memory[from], 16);
      }
      take(lanes);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        const uint32_t low = transposed ? rows[2 * q][g] : rows[g][2 * q],
                       high = transposed ? rows[2 * q + 1][g] : rows[g][2 * q + 1];
        to[matrix].of(lane) = low | high << 16;
      }
    }
    thread = first;
  }

  template <Type type>
  static float decoded(uint32_t bits) {
    bits &= 0xffff;
    if (type == Type::bf16) return as_float(bits << 16);
    static const std::vector<float> known = [] {
      std::vector<float> all;
      for (int i = 0; i < 1 << 16; ++i) all.push_back(from_half(i));
      return all;
    }();
    return known[bits];
  }

  template <Type type>
  void multiply(Lanes<float>* sums, Lanes<uint32_t>& a0, Lanes<uint32_t>& a1, Lanes<uint32_t>& a2,
                Lanes<uint32_t>& a3, Lanes<uint32_t>& b0, Lanes<uint32_t>& b1) {
    ++counts.products;
    double a[16][16], b[8][16];  // b by its columns
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int e = 0; e < 2; ++e) {
        a[g][2 * q + e] = decoded<type>(a0.of(lane) >> 16 * e);
        a[g + 8][2 * q + e] = decoded<type>(a1.of(lane) >> 16 * e);
        a[g][2 * q + 8 + e] = decoded<type>(a2.of(lane) >> 16 * e);
        a[g + 8][2 * q + 8 + e] = decoded<type>(a3.of(lane) >> 16 * e);
        b[g][2 * q + e] = decoded<type>(b0.of(lane) >> 16 * e);
        b[g][2 * q + 8 + e] = decoded<type>(b1.of(lane) >> 16 * e);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        double sum = sums[e].of(lane);
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
        sums[e].of(lane) = sum;
      }
  }

  template <Type type>
  static uint32_t pack(float low, float high) {
    return packed<type>(low, high);
  }
  template <Type type>
  static float unpack(uint32_t both) {
    return decoded<type>(both);
  }

  // ---- tensors

  template <int words>
  void store(void* to, const uint32_t* from) {
    store_words(words, to, from);
  }
  template <int bytes>
  uint32_t load_one(const void* from) {
    uint32_t bits = 0;
    count("load", bytes);
    memcpy(&bits, from, bytes);
    return bits;
  }
  template <int bytes>
  void store_one(void* to, uint32_t bits) {
    count("store", bytes);
    memcpy(to, &bits, bytes);
  }
  float load_float(const float* from) { return as_float(load_one<4>(from)); }
};

}  // namespace

template <template <Type> class K>
const char* launch(const Toeplitz& args, void*) {
  auto run = [&](auto k) {
    for (int i = 0; i < k.blocks(args); ++i) {
      WarpBlock block(i, k.threads, k.shared(args));
      k.run(block, args);
      block.finish();
    }
    counts.blocks += k.blocks(args);
  };
  if (args.x.type == Type::bf16) run(K<Type::bf16>{});
  else run(K<Type::f16>{});
  return counts.error.empty() ? nullptr : counts.error.c_str();
}

template const char* launch<Product>(const Toeplitz&, void*);
template const char* launch<Diagonals>(const Toeplitz&, void*);
template const char* launch<Totals>(const Toeplitz&, void*);

}  // namespace fastmix::cuda
