// Numbers in SIMD registers, and those of 16 bits that tensors store.
//
// Everything in here has internal linkage: one copy per file and instruction set.

#pragma once

#ifdef FASTMIX_CPU

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastmix::FASTMIX_CPU {
namespace {

#define FASTMIX_INLINE inline __attribute__((always_inline))
#define FASTMIX_LAMBDA __attribute__((always_inline))

// Bytes of a SIMD register.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

FASTMIX_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTMIX_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class C>
struct Simd {
  typedef C Vector __attribute__((vector_size(kRegister)));
  static constexpr int64_t lanes = kRegister / sizeof(C);
};

template <class C>
struct Complex {
  C re, im;
};

// Indices<count>() is an Indices<0, 0, …, count - 1>: what a shuffle's lanes are made from.
template <int count, int... I>
struct Indices : Indices<count - 1, count - 1, I...> {};
template <int... I>
struct Indices<0, I...> {};

// As many numbers of 16 bits as a register has of 32.
typedef uint16_t Halves __attribute__((vector_size(kRegister / 2)));
typedef uint32_t Words __attribute__((vector_size(kRegister)));
typedef Simd<float>::Vector Floats;

struct Bf16 {
  uint16_t bits;

  static FASTMIX_INLINE float wide(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
  static FASTMIX_INLINE Floats wide(Halves bits) { return wide(bits, Indices<kRegister / 2>()); }

  // A shuffle with zeros: half the work of an integer conversion and a shift.
  template <int... I>
  static FASTMIX_INLINE Floats wide(Halves bits, Indices<0, I...>) {
    constexpr int zero = sizeof...(I) / 2;
    return (Floats)__builtin_shufflevector(bits, Halves{}, (I % 2 ? I / 2 : zero)...);
  }

  static FASTMIX_INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
  }
  static FASTMIX_INLINE Halves narrow(Floats values) {
    const Words bits = (Words)values, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(values == values ? rounded : Words{} + 0x7fc0, Halves);
  }
};

// In integer arithmetic where the hardware does not convert.
struct F16 {
  uint16_t bits;

  static FASTMIX_INLINE float wide(uint16_t bits) {
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
  static FASTMIX_INLINE Floats wide(Halves bits) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)bits);
#else
    Floats values;
    for (int i = 0; i < Simd<float>::lanes; ++i) values[i] = wide(bits[i]);
    return values;
#endif
  }

  static FASTMIX_INLINE uint16_t narrow(float value) {
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
  static FASTMIX_INLINE Halves narrow(Floats values) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
#else
    Halves bits;
    for (int i = 0; i < Simd<float>::lanes; ++i) bits[i] = narrow(values[i]);
    return bits;
#endif
  }
};

template <class T>
constexpr bool kHalf = false;
template <>
constexpr bool kHalf<Bf16> = true;
template <>
constexpr bool kHalf<F16> = true;

// What numbers stored as T are computed with.
template <class T, bool half = kHalf<T>>
struct Computing {
  typedef T type;
};
template <class T>
struct Computing<T, true> {
  typedef float type;
};
template <class T>
using Computed = typename Computing<T>::type;

// V is a number or a vector of them; what is stored in 16 bits is a float.
template <class V, class T>
FASTMIX_INLINE V load(const T* p) {
  if constexpr (kHalf<T>) {
    if constexpr (sizeof(V) == sizeof(float)) return T::wide(p->bits);
    else return T::wide(load<Halves>(&p->bits));
  } else {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class V, class T>
FASTMIX_INLINE void store(T* p, V v) {
  if constexpr (kHalf<T>) store(&p->bits, T::narrow(v));
  else memcpy(p, &v, sizeof v);
}

// Past the caches, for rows that nothing reads soon: no line is fetched to be overwritten.
// Needs p aligned to what is stored, and `streamed` at the end of a unit of work.
template <class V, class T>
FASTMIX_INLINE void stream(T* p, V v) {
  if constexpr (kHalf<T>) return stream(&p->bits, T::narrow(v));
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#endif
  store(p, v);
}

FASTMIX_INLINE void streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Calls f(zero, c) for channels c …: zero is a vector while one fits, and then a number.
template <class C, class F>
FASTMIX_INLINE void each_vector(int64_t count, F f) {
  int64_t c = 0;
  for (; c + Simd<C>::lanes <= count; c += Simd<C>::lanes) f(typename Simd<C>::Vector{}, c);
  for (; c < count; ++c) f(C(0), c);
}

// Σ term(c), sixteen sums at once and each by itself in order: what a compiler may vectorise.
template <class C, class F>
FASTMIX_INLINE double sum_over(int64_t count, F term) {
  C part[16] = {};
  int64_t c = 0;
  for (; c + 16 <= count; c += 16)
    for (int j = 0; j < 16; ++j) part[j] += term(c + j);
  for (; c < count; ++c) part[0] += term(c);
  double sum[16];
  for (int j = 0; j < 16; ++j) sum[j] = part[j];
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  return sum[0];
}

// Lanes i of b and i + s of a change places, for every i without the bit s.
template <int s, class V, int... I>
FASTMIX_INLINE void exchange(V& a, V& b, Indices<0, I...>) {
  constexpr int lanes = sizeof...(I);
  const V first = __builtin_shufflevector(a, b, (I & s ? lanes + I - s : I)...);
  b = __builtin_shufflevector(a, b, (I & s ? lanes + I : I + s)...);
  a = first;
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif
