// What kernels see of tensors: rows of channels, read into and written from the numbers
// they compute with.
//
// An operator's .cpp is compiled once per instruction set, with FASTMIX_CPU naming it, for
// its kernels, and once without for its registration (tensors.h). Kernels share no inline
// function or template with other files or with the standard library: a linker merges
// those, and would give AVX-512 code to a machine without it.

#pragma once

#include <stdint.h>

namespace fastmix {

enum class Type : int8_t { f64, f32, bf16, f16, c128, c64 };

// A tensor (b, n, h, d) with any strides, counted in elements. A channel is c = h · d_size + d.
struct Source {
  const void* data;
  Type type;
  int64_t b, n, h, d;  // strides
  int64_t d_size;
};

// A fresh, contiguous tensor (b, n, channels).
struct Sink {
  void* data;
  Type type;
  int64_t n_size, channels;
  bool streaming;  // too large for the caches
};

// A scan cut into chunks of time, whose channels lie in blocks. Any thread works on any
// chunk: it learns what the chunk adds to the state, waits for the state that enters, passes
// the next one on, and only then writes, from rows that still lie in its cache. Chunks are
// claimed in order of time, so whoever waits, waits for one that a thread is at work on.
struct Chain {
  int64_t blocks, block, channels;  // of a batch entry; channels of a block, of all
  int64_t steps, chunks;            // of a chunk; of a batch entry
  int64_t* claimed;                 // a counter
  int64_t* passed_on;               // (b, blocks): chunks whose last state has been passed on
  double* state;                    // (b, channels): the state that enters the next chunk
};

}  // namespace fastmix

// FASTMIX_KERNEL(name, Arguments) declares name(arguments, begin, end) for every
// instruction set; each does the units of work begin … end-1.
#define FASTMIX_DECLARE(cpu, name, Arguments) \
  namespace fastmix::cpu { void name(const Arguments&, int64_t, int64_t); }
#if defined(__x86_64__)
#define FASTMIX_KERNEL(name, Arguments)      \
  FASTMIX_DECLARE(portable, name, Arguments) \
  FASTMIX_DECLARE(avx2, name, Arguments)     \
  FASTMIX_DECLARE(avx512, name, Arguments)
#elif defined(__aarch64__)
#define FASTMIX_KERNEL(name, Arguments) FASTMIX_DECLARE(neon, name, Arguments)
#else
#define FASTMIX_KERNEL(name, Arguments) FASTMIX_DECLARE(portable, name, Arguments)
#endif

#ifdef FASTMIX_CPU

#include <stdlib.h>
#if defined(_WIN32)
#include <malloc.h>
extern "C" __declspec(dllimport) int __stdcall SwitchToThread();
#else
#include <sched.h>
#endif

#include "numbers.h"

namespace fastmix::FASTMIX_CPU {
namespace {

// What each system calls: another thread's turn, and memory aligned to cache lines.
#if defined(_WIN32)
FASTMIX_INLINE void let_others_run() { SwitchToThread(); }
FASTMIX_INLINE void* allocated(size_t bytes) { return _aligned_malloc(bytes, 64); }
FASTMIX_INLINE void release(void* block) { _aligned_free(block); }
#else
FASTMIX_INLINE void let_others_run() { sched_yield(); }
FASTMIX_INLINE void* allocated(size_t bytes) { return aligned_alloc(64, bytes); }
FASTMIX_INLINE void release(void* block) { free(block); }
#endif

FASTMIX_INLINE bool present(const Source& s) { return s.data != nullptr; }

// The part of a chain that a thread works on. `order` is the chunk's place in the scan.
struct Link {
  int64_t b, order, c0, count;
  int64_t* passed_on;
  double* state;
};

FASTMIX_INLINE Link claim(const Chain& chain) {
  const int64_t index = __atomic_fetch_add(chain.claimed, 1, __ATOMIC_RELAXED);
  Link link;
  const int64_t block = index % chain.blocks;
  link.order = index / chain.blocks % chain.chunks;
  link.b = index / chain.blocks / chain.chunks;
  link.c0 = block * chain.block;
  link.count = smaller(chain.block, chain.channels - link.c0);
  link.passed_on = chain.passed_on + link.b * chain.blocks + block;
  link.state = chain.state + link.b * chain.channels + link.c0;
  return link;
}

// Does `count` chunks by work(link, next), where `next` is what this thread will do then.
// Claiming that ahead blocks nobody: a thread's chunks are done in order.
template <class F>
FASTMIX_INLINE void each_link(const Chain& chain, int64_t count, F work) {
  Link link = claim(chain), next{};
  for (; count > 0; --count, link = next) {
    next = count > 1 ? claim(chain) : Link{};
    work(link, next);
  }
}

// Waits until the chunk before has passed its state on.
FASTMIX_INLINE void await(const Link& link) {
  int spins = 0;
  while (__atomic_load_n(link.passed_on, __ATOMIC_ACQUIRE) < link.order)
    if (++spins > 1000) let_others_run(), spins = 1000;
}

FASTMIX_INLINE void pass_on(const Link& link) {
  __atomic_store_n(link.passed_on, link.order + 1, __ATOMIC_RELEASE);
}

// Working memory for a kernel, aligned to cache lines.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    while (used_ > 0) release(blocks_[--used_]);
  }

  // Uninitialised numbers.
  template <class C>
  C* take(int64_t count) {
    size_t bytes = (static_cast<size_t>(count) * sizeof(C) + 127) / 64 * 64;
    void* block = allocated(bytes);
    if (block == nullptr || used_ == 64) abort();
    blocks_[used_++] = block;
    return static_cast<C*>(block);
  }

  template <class C>
  C* zeros(int64_t count) {
    C* numbers = take<C>(count);
    memset(numbers, 0, count * sizeof(C));
    return numbers;
  }

 private:
  void* blocks_[64];
  int used_ = 0;
};

// The Type of a tensor of C.
template <class C>
constexpr Type kType = Type::f64;
template <>
constexpr Type kType<float> = Type::f32;
template <>
constexpr Type kType<Bf16> = Type::bf16;
template <>
constexpr Type kType<F16> = Type::f16;
template <>
constexpr Type kType<Complex<double>> = Type::c128;
template <>
constexpr Type kType<Complex<float>> = Type::c64;

// Calls f(zero) with a number as real tensors of that type store it.
template <class F>
FASTMIX_INLINE void by_type(Type type, F f) {
  switch (type) {
    case Type::f64: return f(double{});
    case Type::f32: return f(float{});
    case Type::bf16: return f(Bf16{});
    default: return f(F16{});
  }
}

FASTMIX_INLINE int64_t bytes_of(Type type) {
  switch (type) {
    case Type::c128: return 16;
    case Type::f64:
    case Type::c64: return 8;
    case Type::f32: return 4;
    default: return 2;
  }
}

FASTMIX_INLINE const char* address(const Source& s, int64_t b, int64_t t, int64_t h, int64_t d) {
  return static_cast<const char*>(s.data) +
         (b * s.b + t * s.n + h * s.h + d * s.d) * bytes_of(s.type);
}

// A number of a tensor, as a C.
template <class C>
FASTMIX_INLINE C widened(const char* p, Type type) {
  C number;
  by_type(type, [&](auto stored) {
    using T = decltype(stored);
    number = static_cast<C>(load<Computed<T>>(reinterpret_cast<const T*>(p)));
  });
  return number;
}

template <class T, class C>
void widen(const char* p, C* __restrict to, int64_t count) {
  const T* from = reinterpret_cast<const T*>(p);
  if constexpr (sizeof(Computed<T>) == sizeof(C)) {
    each_vector<C>(count, [&](auto zero, int64_t c)
                              FASTMIX_LAMBDA { store(to + c, load<decltype(zero)>(from + c)); });
  } else {
    for (int64_t c = 0; c < count; ++c) to[c] = static_cast<C>(load<Computed<T>>(from + c));
  }
}

// Converts stored numbers of any type to C; a real number becomes a complex one if C is complex.
template <class C, bool half = kHalf<C>>
struct Reader {
  static void run(const char* p, Type type, C* to, int64_t count) {
    by_type(type, [&](auto stored) { widen<decltype(stored)>(p, to, count); });
  }
  static C one(const char* p, Type type) { return widened<C>(p, type); }
};

template <class T>
struct Reader<T, true> {
  static T one(const char* p, Type type) {
    if (type == kType<T>) return *reinterpret_cast<const T*>(p);
    T number;
    store(&number, widened<float>(p, type));
    return number;
  }
  static void run(const char* p, Type type, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = one(p + i * bytes_of(type), type);
  }
};

template <class C>
struct Reader<Complex<C>, false> {
  static Complex<C> one(const char* p, Type type) {
    if (type == kType<Complex<C>>) return *reinterpret_cast<const Complex<C>*>(p);
    return {widened<C>(p, type), C(0)};
  }
  static void run(const char* p, Type type, Complex<C>* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = one(p + i * bytes_of(type), type);
  }
};

// Whether the channels of a step lie side by side.
FASTMIX_INLINE bool dense(const Source& s) {
  return s.d_size == 1 ? s.h == 1 : s.d == 1 && s.h == s.d_size;
}

// Asks the second-level cache for a row that will be read soon: hardware does not foresee
// the jump from a part of one row to the next, and fetches what other threads will read.
FASTMIX_INLINE void prefetch(const Source& s, int64_t b, int64_t t, int64_t c0, int64_t count) {
  if (!dense(s)) return;
  const char* p = address(s, b, t, 0, 0) + c0 * bytes_of(s.type);
  for (int64_t i = 0; i < count * bytes_of(s.type); i += 64) __builtin_prefetch(p + i, 0, 2);
}

constexpr int64_t kAhead = 12;  // steps between asking for a row and reading it

// Channels c0 … c0+count-1 of one step: the tensor's own memory where that will do, else
// a copy in `scratch`.
template <class C>
const C* read(const Source& s, int64_t b, int64_t t, int64_t c0, int64_t count, C* scratch) {
  if (dense(s)) {
    const char* p = address(s, b, t, 0, 0) + c0 * bytes_of(s.type);
    if (s.type == kType<C>) return reinterpret_cast<const C*>(p);
    Reader<C>::run(p, s.type, scratch, count);
    return scratch;
  }
  int64_t h = c0 / s.d_size, d = c0 % s.d_size;
  for (int64_t i = 0; i < count; ++h, d = 0) {
    const int64_t run = smaller(s.d_size - d, count - i);
    const char* p = address(s, b, t, h, d);
    if (s.d == 1) {
      Reader<C>::run(p, s.type, scratch + i, run);
    } else {
      for (int64_t j = 0; j < run; ++j)
        scratch[i + j] = Reader<C>::one(p + j * s.d * bytes_of(s.type), s.type);
    }
    i += run;
  }
  return scratch;
}

// The same, always copied to `to`.
template <class C>
FASTMIX_INLINE void read_into(const Source& s, int64_t b, int64_t t, int64_t c0, int64_t count,
                              C* to) {
  const C* from = read(s, b, t, c0, count, to);
  if (from != to) memcpy(static_cast<void*>(to), from, count * sizeof(C));
}

// Channels c0 … of one step, to be written vector by vector.
template <class T>
struct Row {
  T* to;
  bool streaming;

  Row(const Sink& s, int64_t b, int64_t t, int64_t c0)
      : to(static_cast<T*>(s.data) + (b * s.n_size + t) * s.channels + c0) {
    // A row that starts within a vector, as a head's may, is stored the common way.
    constexpr uintptr_t bytes = sizeof(T) * Simd<Computed<T>>::lanes;
    streaming = s.streaming && reinterpret_cast<uintptr_t>(to) % bytes == 0;
  }

  template <class V>
  FASTMIX_INLINE void put(int64_t c, V v) const {
    streaming ? stream(to + c, v) : store(to + c, v);
  }
};

// The same of a sink of pairs, whose channels are the numbers in them; c counts pairs.
template <class T>
struct PairRow {
  T* to;
  bool streaming;

  PairRow(const Sink& s, int64_t b, int64_t t, int64_t c0)
      : to(static_cast<T*>(s.data) + (b * s.n_size + t) * s.channels + 2 * c0) {
    constexpr uintptr_t bytes = 2 * sizeof(T) * Simd<Computed<T>>::lanes;
    streaming = s.streaming && reinterpret_cast<uintptr_t>(to) % bytes == 0;
  }

  template <class V>
  FASTMIX_INLINE void put(int64_t c, Complex<V> v) const {
    if constexpr (!kVector<V>) {
      store(to + 2 * c, v.re);
      store(to + 2 * c + 1, v.im);
    } else if constexpr (kBf16<T>) {
      const Words pairs = (T::rounded(v.re) >> 16) | (T::rounded(v.im) & 0xffff0000);
      streaming ? stream(&to[2 * c].bits, pairs) : store(&to[2 * c].bits, pairs);
    } else {
      constexpr int lanes = Simd<NumberOf<V>>::lanes;
      const Complex<V> pairs = together(v.re, v.im, Indices<lanes>());
      T* const p = to + 2 * c;
      streaming ? stream(p, pairs.re) : store(p, pairs.re);
      streaming ? stream(p + lanes, pairs.im) : store(p + lanes, pairs.im);
    }
  }
};

template <class T, class C>
void narrow(const C* __restrict values, int64_t count, Row<T> row) {
  using To = Computed<T>;
  if constexpr (sizeof(To) == sizeof(C)) {
    each_vector<C>(count, [&](auto zero, int64_t c)
                              FASTMIX_LAMBDA { row.put(c, load<decltype(zero)>(values + c)); });
  } else {
    for (int64_t c = 0; c < count; ++c) store(row.to + c, static_cast<To>(values[c]));
  }
}

// Channels c0 … of one step, rounded to the tensor's dtype.
template <class C>
void write(const Sink& s, int64_t b, int64_t t, int64_t c0, int64_t count, const C* values) {
  by_type(s.type, [&](auto stored) { narrow(values, count, Row<decltype(stored)>(s, b, t, c0)); });
}

// Complex values, into a complex tensor or the real part of them into a real one.
template <class C>
void write(const Sink& s, int64_t b, int64_t t, int64_t c0, int64_t count,
           const Complex<C>* values) {
  char* p = static_cast<char*>(s.data) + ((b * s.n_size + t) * s.channels + c0) * bytes_of(s.type);
  if (s.type == kType<Complex<C>>) {
    memcpy(p, values, count * sizeof(Complex<C>));
    return;
  }
  C part[64];
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t run = smaller(64, count - i);
    for (int64_t j = 0; j < run; ++j) part[j] = values[i + j].re;
    write(s, b, t, c0 + i, run, part);
  }
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif  // FASTMIX_CPU
