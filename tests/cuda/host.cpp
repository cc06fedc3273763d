// The kernels of csrc/cuda on a CPU: every phase between two barriers for every thread in
// order, from poisoned shared memory. Two threads that meet in a phase are an error. Counts
// what a GPU would pay for: shared accesses that wait for a bank, global accesses by their width.

#include "warps.h"

namespace fastmix::cuda {
namespace {

int64_t pretended_shared = 227 << 10, pretended_scratch = 32 << 20;
int pretended_capability = 0;  // of no tensor cores

struct Block {
  struct Access {
    int place;
    bool written;
  };
  struct Shared {
    Block* block;
    int from;
    Complex get(int i) const { return block->visit(from + i, false); }
    void put(int i, Complex v) const { block->visit(from + i, true) = v; }
    Shared at(int i) const { return {block, from + i}; }
  };
  template <class T>
  struct Own {
    std::vector<T> values;
    explicit Own(Block& block) : values(block.threads) {
      memset(static_cast<void*>(values.data()), 0xff, sizeof(T) * values.size());
    }
    T& of(int thread) { return values[thread]; }
  };

  int number, threads, thread = 0;
  std::vector<Complex> memory;
  std::vector<std::vector<Access>> accesses;

  Block(int number, int threads, int bytes)
      : number(number), threads(threads), memory(bytes / 8, Complex{NAN, NAN}), accesses(threads) {}

  int index() const { return number; }
  int again(int same) const { return same; }
  void in_order() const {}
  Shared shared(int from) { return {this, from}; }

  Complex& visit(int place, bool written) {
    if (place < 0 || place >= static_cast<int>(memory.size())) {
      counts.error = "shared memory ends before " + std::to_string(place);
      place = 0;
    }
    accesses[thread].push_back({place, written});
    return memory[place];
  }

  template <class F>
  void own(F f) {
    for (thread = 0; thread < threads; ++thread) f(thread);
  }

  template <class F>
  void phase(F f) {
    own(f);
    check();
    ++counts.barriers;
    for (auto& list : accesses) list.clear();
  }

  void check() {
    std::unordered_map<int, int> written;
    for (int t = 0; t < threads; ++t)
      for (const Access& a : accesses[t])
        if (a.written) {
          auto [entry, fresh] = written.emplace(a.place, t);
          if (!fresh && entry->second != t) counts.error = "two threads write one place";
        }
    for (int t = 0; t < threads; ++t)
      for (const Access& a : accesses[t])
        if (auto entry = written.find(a.place); entry != written.end() && entry->second != t)
          counts.error = "a thread reads what another writes in the same phase";
    // Eight bytes a thread: half a warp at a time, sixteen banks of that width.
    for (int first = 0; first < threads; first += 16) {
      const int end = std::min(first + 16, threads);
      size_t most = 0;
      for (int t = first; t < end; ++t) most = std::max(most, accesses[t].size());
      for (size_t k = 0; k < most; ++k) {
        std::vector<int> places[16];
        size_t turns = 1;
        for (int t = first; t < end; ++t) {
          if (k >= accesses[t].size()) continue;
          auto& bank = places[accesses[t][k].place % 16];
          if (std::find(bank.begin(), bank.end(), accesses[t][k].place) == bank.end())
            bank.push_back(accesses[t][k].place);
          turns = std::max(turns, bank.size());
        }
        ++counts.shared;
        counts.waits += turns - 1;
      }
    }
  }

  template <int words>
  void load(const void* from, uint32_t* to) {
    count("load", 4 * words);
    if (reinterpret_cast<uintptr_t>(from) % (4 * words)) counts.error = "misaligned load";
    memcpy(to, from, 4 * words);
  }
  template <int words>
  void store(void* to, const uint32_t* from) {
    store_words(words, to, from);
  }
  template <class T>
  static T read_one(const void* from) {
    T v;
    memcpy(&v, from, sizeof v);
    count("load", sizeof v);
    return v;
  }
  template <class T>
  static void write_one(void* to, T v) {
    memcpy(to, &v, sizeof v);
    count("store", sizeof v);
  }
  template <int bytes>
  uint32_t load_one(const void* from) {
    return read_one<std::conditional_t<bytes == 4, uint32_t, uint16_t>>(from);
  }
  template <int bytes>
  void store_one(void* to, uint32_t bits) {
    write_one(to, static_cast<std::conditional_t<bytes == 4, uint32_t, uint16_t>>(bits));
  }
  Complex load_complex(const Complex* from) { return read_one<Complex>(from); }
  void store_complex(Complex* to, Complex v) { write_one(to, v); }
  struct alignas(16) Pair {
    Complex of[2];
  };
  void load_pair(const Complex* from, Complex* to) {
    if (reinterpret_cast<uintptr_t>(from) % 16) counts.error = "misaligned pair";
    const Pair pair = read_one<Pair>(from);
    to[0] = pair.of[0], to[1] = pair.of[1];
  }
  void store_pair(Complex* to, const Complex* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16) counts.error = "misaligned pair";
    write_one(to, Pair{{from[0], from[1]}});
  }

  static float from_half(uint32_t bits) { return cuda::from_half(bits); }
  template <Type type>
  static uint32_t pack(float low, float high) {
    return packed<type>(low, high);
  }
};

}  // namespace

Device device(int) { return {pretended_shared, 4, pretended_scratch, pretended_capability}; }

template <Kernel which>
const char* launch(int length, const Args<which>& args, const Device&, void*) {
  with_kernel<which>(length, pretended_shared, args, [&](auto k, auto shape, int blocks) {
    for (int i = 0; i < blocks; ++i) {
      Block block(i, shape.threads, k.shared);
      k.run(block, args);
      block.check();  // the last phase ends without a barrier
    }
    counts.blocks += blocks;
  });
  return counts.error.empty() ? nullptr : counts.error.c_str();
}

template const char* launch<Kernel::spectra>(int, const FftConv&, const Device&, void*);
template const char* launch<Kernel::forward>(int, const FftConv&, const Device&, void*);
template const char* launch<Kernel::backward>(int, const FftConv&, const Device&, void*);
template const char* launch<Kernel::lags>(int, const FftConv&, const Device&, void*);
template const char* launch<Kernel::skips>(int, const FftConv&, const Device&, void*);
template const char* launch<Kernel::columns_in>(int, const LongConv&, const Device&, void*);
template const char* launch<Kernel::columns_out>(int, const LongConv&, const Device&, void*);
template const char* launch<Kernel::row_spectra>(int, const LongConv&, const Device&, void*);
template const char* launch<Kernel::row_forward>(int, const LongConv&, const Device&, void*);
template const char* launch<Kernel::row_backward>(int, const LongConv&, const Device&, void*);
template const char* launch<Kernel::row_lags>(int, const LongConv&, const Device&, void*);

}  // namespace fastmix::cuda

#define FASTMIX_EXPORTED extern "C" __attribute__((visibility("default")))

FASTMIX_EXPORTED void fastmix_host_start(int64_t shared, int capability) {
  fastmix::cuda::counts = {};
  fastmix::cuda::pretended_shared = shared;
  fastmix::cuda::pretended_capability = capability;
}

FASTMIX_EXPORTED void fastmix_host_scratch(int64_t bytes) {
  fastmix::cuda::pretended_scratch = bytes;
}

// blocks, barriers, accesses of shared memory by so many threads as take a turn, turns waited,
// products of matrices, loads of matrices
FASTMIX_EXPORTED void fastmix_host_counts(int64_t* to) {
  const auto& c = fastmix::cuda::counts;
  to[0] = c.blocks, to[1] = c.barriers, to[2] = c.shared, to[3] = c.waits;
  to[4] = c.products, to[5] = c.matrices;
}

FASTMIX_EXPORTED int64_t fastmix_host_global(const char* what) {
  return fastmix::cuda::counts.global[what];
}
