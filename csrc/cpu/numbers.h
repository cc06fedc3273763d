// Numbers in SIMD registers, and those of 16 bits that tensors store.
//
// Everything in here has internal linkage: one copy per file and instruction set.

#pragma once

#ifdef FASTMIX_CPU

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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

// SIMD registers that there are.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
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
typedef Simd<double>::Vector Doubles;

// Of a number or a vector of them: the number, and whole numbers of as many bits.
template <class V>
struct Parts;
template <>
struct Parts<float> {
  typedef float Number;
  typedef uint32_t Bits;
};
template <>
struct Parts<double> {
  typedef double Number;
  typedef uint64_t Bits;
};
template <>
struct Parts<Floats> {
  typedef float Number;
  typedef Words Bits;
};
template <>
struct Parts<Doubles> {
  typedef double Number;
  typedef Simd<uint64_t>::Vector Bits;
};
template <class V>
using NumberOf = typename Parts<V>::Number;
template <class V>
constexpr bool kVector = sizeof(V) != sizeof(NumberOf<V>);

struct Bf16 {
  uint16_t bits;

  static FASTMIX_INLINE float wide(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
  // From memory one shuffle and a shift, where compilers take two or three shuffles with zeros.
  static FASTMIX_INLINE Floats wide(Halves bits) {
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#elif defined(__aarch64__)
    return (Floats)vshll_n_u16((uint16x4_t)bits, 16);
#else
    return wide(bits, Indices<kRegister / 2>());
#endif
  }
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
  // Rounded, in the upper half of each word.
  static FASTMIX_INLINE Words rounded(Floats values) {
    const Words bits = (Words)values;
    return values == values ? bits + 0x7fff + ((bits >> 16) & 1) : Words{} + 0x7fc00000;
  }
  static FASTMIX_INLINE Halves narrow(Floats values) {
    const Words words = rounded(values) >> 16;
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)words);
#elif defined(__AVX2__)
    const __m256i all = (__m256i)words;
    return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
#else
    return __builtin_convertvector(words, Halves);
#endif
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
#elif defined(__aarch64__)
    return (Floats)vcvt_f32_f16((float16x4_t)bits);
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
#elif defined(__aarch64__)
    return (Halves)vcvt_f16_f32((float32x4_t)values);
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

template <class T>
constexpr bool kBf16 = false;
template <>
constexpr bool kBf16<Bf16> = true;

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

// The first numbers of as many pairs as V has numbers, and the second ones. Pairs lie in a, then b.
template <class V, int... I>
FASTMIX_INLINE Complex<V> apart(V a, V b, Indices<0, I...>) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof a[0] == 4) {  // halves of the vectors first: compilers take six shuffles
    const __m256 low = _mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20),
                 high = _mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
    return {(V)_mm256_shuffle_ps(low, high, 0x88), (V)_mm256_shuffle_ps(low, high, 0xdd)};
  }
#endif
  return {__builtin_shufflevector(a, b, (2 * I)...), __builtin_shufflevector(a, b, (2 * I + 1)...)};
}

// The reverse: pairs of the numbers of a and b.
template <class V, int... I>
FASTMIX_INLINE Complex<V> together(V a, V b, Indices<0, I...>) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof a[0] == 4) {
    const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b),
                 high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    return {(V)_mm256_permute2f128_ps(low, high, 0x20), (V)_mm256_permute2f128_ps(low, high, 0x31)};
  }
#endif
  constexpr int lanes = sizeof...(I);
  return {__builtin_shufflevector(a, b, (I / 2 + I % 2 * lanes)...),
          __builtin_shufflevector(a, b, ((lanes + I) / 2 + I % 2 * lanes)...)};
}

// The larger of two numbers; b where one is NaN.
template <class V>
FASTMIX_INLINE V largest(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(NumberOf<V>) == 4)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  if constexpr (sizeof(V) == 32 && sizeof(NumberOf<V>) == 4)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <class V, class T>
FASTMIX_INLINE Complex<V> load_pairs(const T* p) {
  if constexpr (!kVector<V>) {
    return {load<V>(p), load<V>(p + 1)};
  } else if constexpr (kBf16<T>) {
    const Words pairs = load<Words>(&p->bits);
    return {(V)(pairs << 16), (V)(pairs & 0xffff0000)};
  } else {
    constexpr int lanes = sizeof(V) / sizeof(NumberOf<V>);
    return apart(load<V>(p), load<V>(p + lanes), Indices<lanes>());
  }
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

// Σ of a power of two numbers, each half added to the other: loops of fixed length stay in
// registers.
template <int count, class C>
FASTMIX_INLINE double total(const C* part) {
  if constexpr (count == 1) {
    return part[0];
  } else {
    double half[count / 2];
    for (int j = 0; j < count / 2; ++j)
      half[j] = static_cast<double>(part[j]) + static_cast<double>(part[j + count / 2]);
    return total<count / 2>(half);
  }
}

// Σ of a vector's numbers.
template <class V>
FASTMIX_INLINE double total(V v) {
  NumberOf<V> part[sizeof v / sizeof v[0]];
  store(part, v);
  return total<sizeof v / sizeof v[0]>(part);
}

// Σ term(c), sixteen sums at once and each by itself in order: what a compiler may vectorise.
template <class C, class F>
FASTMIX_INLINE double sum_over(int64_t count, F term) {
  C part[16] = {}, rest = 0;
  int64_t c = 0;
  for (; c + 16 <= count; c += 16)
    for (int j = 0; j < 16; ++j) part[j] += term(c + j);
  for (; c < count; ++c) rest += term(c);
  return total<16>(part) + rest;
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
