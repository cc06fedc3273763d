// What a GPU would pay for, counted; and numbers of 16 bits.

#pragma once

#include "../../csrc/cuda/launch.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace fastmix::cuda {
namespace {

struct Counts {
  int64_t shared = 0, waits = 0;  // warps' accesses of shared memory; extra turns at a bank
  int64_t barriers = 0, blocks = 0;
  int64_t products = 0, matrices = 0;     // mma.m16n8k16; ldmatrix.x4
  std::map<std::string, int64_t> global;  // threads' loads and stores by bytes
  std::string error;
} counts;

inline void count(const char* what, int bytes) { ++counts.global[what + std::to_string(bytes)]; }

inline void store_words(int words, void* to, const uint32_t* from) {
  count("store", 4 * words);
  if (reinterpret_cast<uintptr_t>(to) % (4 * words)) counts.error = "misaligned store";
  memcpy(to, from, 4 * words);
}

inline uint32_t to_bfloat16(float x) {
  const uint32_t bits = as_bits(x);
  return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

inline float from_half(uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(fraction, -24)
                                     : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}
inline uint32_t to_half(float x) {
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (!(size == size)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size == 0) return sign;
  int exponent;
  std::frexp(size, &exponent);
  const int step = std::max(exponent - 11, -24);  // nearbyint rounds halves to even
  const int count = std::nearbyint(std::ldexp(size, -step));
  return sign | (step == -24 ? count : (step + 24 << 10) + count);
}

template <Type type>
uint32_t packed(float low, float high) {
  if (type == Type::bf16) return to_bfloat16(low) | to_bfloat16(high) << 16;
  return to_half(low) | to_half(high) << 16;
}

}  // namespace
}  // namespace fastmix::cuda
