// What kernels see of tensors: rows of channels, read into and written from the numbers
// they compute with.
//
// An operator's .cpp is compiled once per instruction set, with FASTMIX_CPU naming it, for
// its kernels, and once without for its registration (tensors.h). Kernels share no inline
// function or template with other files or with the standard library: a linker merges
// those, and would hand AVX-512 code to a machine without it.

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
// chunk: it learns what the chunk adds to the state, waits for the state that enters, hands
// the next one on, and only then writes, from rows that still lie in its cache. Chunks are
// claimed in order of time, so whoever waits, waits for one that a thread is at work on.
struct Chain {
  int64_t blocks, block, channels;  // of a batch entry; channels of a block, of all
  int64_t steps, chunks;            // of a chunk; of a batch entry
  int64_t* claimed;                 // a counter
  int64_t* handed;                  // (b, blocks): chunks that have handed a state on
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
#else
#define FASTMIX_KERNEL(name, Arguments) FASTMIX_DECLARE(portable, name, Arguments)
#endif

#ifdef FASTMIX_CPU

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Everything in here has internal linkage: one copy per file and instruction set.
namespace fastmix::FASTMIX_CPU {
namespace {

#define INLINE inline __attribute__((always_inline))
#define LAMBDA __attribute__((always_inline))

// Bytes of a SIMD register.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

INLINE bool present(const Source& s) { return s.data != nullptr; }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class C>
struct Simd {
  typedef C Vector __attribute__((vector_size(kRegister)));
  static constexpr int64_t lanes = kRegister / sizeof(C);
};

// V is a number or a vector of them.
template <class V, class C>
INLINE V load(const C* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class C>
INLINE void store(C* p, V v) {
  memcpy(p, &v, sizeof v);
}

// Past the caches, for rows that nothing reads soon: no line is fetched to be overwritten.
// Needs p aligned to a vector, and `streamed` at the end of a unit of work.
template <class V, class C>
INLINE void stream(C* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  if constexpr (sizeof v == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#endif
  store(p, v);
}

INLINE void streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Calls f(zero, c) for channels c …: zero is a vector while one fits, and then a number.
template <class C, class F>
INLINE void each_vector(int64_t count, F f) {
  int64_t c = 0;
  for (; c + Simd<C>::lanes <= count; c += Simd<C>::lanes) f(typename Simd<C>::Vector{}, c);
  for (; c < count; ++c) f(C(0), c);
}

template <class C>
struct Complex {
  C re, im;
};

// The part of a chain that a thread works on. `order` is the chunk's place in the scan.
struct Link {
  int64_t b, order, c0, count;
  int64_t* handed;
  double* state;
};

INLINE Link claim(const Chain& chain) {
  const int64_t index = __atomic_fetch_add(chain.claimed, 1, __ATOMIC_RELAXED);
  Link link;
  const int64_t block = index % chain.blocks;
  link.order = index / chain.blocks % chain.chunks;
  link.b = index / chain.blocks / chain.chunks;
  link.c0 = block * chain.block;
  link.count = smaller(chain.block, chain.channels - link.c0);
  link.handed = chain.handed + link.b * chain.blocks + block;
  link.state = chain.state + link.b * chain.channels + link.c0;
  return link;
}

// Does `count` chunks by work(link, next), where `next` is what this thread will do then.
// Claiming that ahead blocks nobody: a thread's chunks are done in order.
template <class F>
INLINE void each_link(const Chain& chain, int64_t count, F work) {
  Link link = claim(chain), next{};
  for (; count > 0; --count, link = next) {
    next = count > 1 ? claim(chain) : Link{};
    work(link, next);
  }
}

// Until the state that enters this chunk is there.
INLINE void await(const Link& link) {
  int spins = 0;
  while (__atomic_load_n(link.handed, __ATOMIC_ACQUIRE) < link.order)
    if (++spins > 1000) sched_yield(), spins = 1000;
}

INLINE void hand_on(const Link& link) {
  __atomic_store_n(link.handed, link.order + 1, __ATOMIC_RELEASE);
}

// Working memory for a kernel, aligned to cache lines.
class Scratch {
 public:
  ~Scratch() {
    while (used_ > 0) free(blocks_[--used_]);
  }

  template <class C>
  C* take(int64_t count) {
    size_t bytes = (static_cast<size_t>(count) * sizeof(C) + 127) / 64 * 64;
    void* block = aligned_alloc(64, bytes);
    if (block == nullptr || used_ == 64) abort();
    blocks_[used_++] = block;
    return static_cast<C*>(block);
  }

 private:
  void* blocks_[64];
  int used_ = 0;
};

INLINE float from_bf16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// Half precision in integer arithmetic, for where the hardware does not convert.
INLINE float from_f16(uint16_t bits) {
  uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
  uint32_t shifted = rest << 13;
  if (rest >= 0x7c00) {
    shifted |= 0x7f800000;
  } else if (rest >= 0x400) {
    shifted += 112u << 23;
  } else {
    float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&shifted, &small, 4);
  }
  shifted |= sign;
  float value;
  memcpy(&value, &shifted, 4);
  return value;
}

INLINE uint16_t to_f16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000) {  // subnormal: adding ½ leaves the rounded value in the low bits
    float size;
    memcpy(&size, &bits, 4);
    size += 0.5f;
    memcpy(&bits, &size, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((bits - (112u << 23)) >> 13));
}

// A contiguous run of numbers, widened and narrowed.
template <class C, class T>
INLINE void convert(const T* __restrict from, C* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(from[i]);
}

template <class C>
void widen_bf16(const uint16_t* __restrict from, C* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(from[i]);
}

template <class C>
void narrow_bf16(const C* __restrict from, uint16_t* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_bf16(static_cast<float>(from[i]));
}

template <class C>
void widen_f16(const uint16_t* __restrict from, C* __restrict to, int64_t count) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    float eight[8];
    _mm256_storeu_ps(eight,
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    convert(eight, to + i, 8);
  }
#endif
  for (; i < count; ++i) to[i] = from_f16(from[i]);
}

template <class C>
void narrow_f16(const C* __restrict from, uint16_t* __restrict to, int64_t count) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    float eight[8];
    convert(from + i, eight, 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(eight), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) to[i] = to_f16(static_cast<float>(from[i]));
}

template <class C>
constexpr Type type_of();
template <>
constexpr Type type_of<double>() { return Type::f64; }
template <>
constexpr Type type_of<float>() { return Type::f32; }
template <>
constexpr Type type_of<Complex<double>>() { return Type::c128; }
template <>
constexpr Type type_of<Complex<float>>() { return Type::c64; }

INLINE int64_t bytes_of(Type type) {
  switch (type) {
    case Type::c128: return 16;
    case Type::f64: case Type::c64: return 8;
    case Type::f32: return 4;
    default: return 2;
  }
}

INLINE const char* address(const Source& s, int64_t b, int64_t t, int64_t h, int64_t d) {
  return static_cast<const char*>(s.data) +
         (b * s.b + t * s.n + h * s.h + d * s.d) * bytes_of(s.type);
}

template <class C>
INLINE C widened(const char* p, Type type) {
  switch (type) {
    case Type::f64: return static_cast<C>(*reinterpret_cast<const double*>(p));
    case Type::f32: return static_cast<C>(*reinterpret_cast<const float*>(p));
    case Type::bf16: return static_cast<C>(from_bf16(*reinterpret_cast<const uint16_t*>(p)));
    default: return static_cast<C>(from_f16(*reinterpret_cast<const uint16_t*>(p)));
  }
}

// Real and complex numbers alike, with a real one read as a complex one where asked for.
template <class C>
struct Reader {
  static void run(const char* p, Type type, C* to, int64_t count) {
    switch (type) {
      case Type::f64: return convert(reinterpret_cast<const double*>(p), to, count);
      case Type::f32: return convert(reinterpret_cast<const float*>(p), to, count);
      case Type::bf16: return widen_bf16(reinterpret_cast<const uint16_t*>(p), to, count);
      default: return widen_f16(reinterpret_cast<const uint16_t*>(p), to, count);
    }
  }
  static C one(const char* p, Type type) { return widened<C>(p, type); }
};

template <class C>
struct Reader<Complex<C>> {
  static Complex<C> one(const char* p, Type type) {
    if (type == type_of<Complex<C>>()) return *reinterpret_cast<const Complex<C>*>(p);
    return {widened<C>(p, type), C(0)};
  }
  static void run(const char* p, Type type, Complex<C>* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = one(p + i * bytes_of(type), type);
  }
};

// Whether the channels of a step lie side by side.
INLINE bool dense(const Source& s) {
  return s.d_size == 1 ? s.h == 1 : s.d == 1 && s.h == s.d_size;
}

// Asks the second-level cache for a row that will be read soon: hardware does not foresee
// the jump from a part of one row to the next, and fetches what other threads will read.
INLINE void prefetch(const Source& s, int64_t b, int64_t t, int64_t c0, int64_t count) {
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
    if (s.type == type_of<C>()) return reinterpret_cast<const C*>(p);
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

// Channels c0 … of one step, rounded to the tensor's dtype.
template <class C>
void write(const Sink& s, int64_t b, int64_t t, int64_t c0, int64_t count,
                  const C* values) {
  char* p = static_cast<char*>(s.data) +
            ((b * s.n_size + t) * s.channels + c0) * bytes_of(s.type);
  // A row that starts within a vector, as a head's may, is stored the common way.
  if (s.type == type_of<C>() && s.streaming && reinterpret_cast<uintptr_t>(p) % kRegister == 0) {
    C* to = reinterpret_cast<C*>(p);
    return each_vector<C>(count, [&](auto zero, int64_t c) LAMBDA {
      stream(to + c, load<decltype(zero)>(values + c));
    });
  }
  switch (s.type) {
    case Type::f64: return convert(values, reinterpret_cast<double*>(p), count);
    case Type::f32: return convert(values, reinterpret_cast<float*>(p), count);
    case Type::bf16: return narrow_bf16(values, reinterpret_cast<uint16_t*>(p), count);
    default: return narrow_f16(values, reinterpret_cast<uint16_t*>(p), count);
  }
}

// Complex values, into a complex tensor or the real part of them into a real one.
template <class C>
void write(const Sink& s, int64_t b, int64_t t, int64_t c0, int64_t count,
                  const Complex<C>* values) {
  char* p = static_cast<char*>(s.data) +
            ((b * s.n_size + t) * s.channels + c0) * bytes_of(s.type);
  if (s.type == type_of<Complex<C>>()) {
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
