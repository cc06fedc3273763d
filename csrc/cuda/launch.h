// Between the registration, which knows torch, and the kernels, which know CUDA.

#pragma once

#include "fft_long.h"
#include "toeplitz_conv.h"

namespace fastmix::cuda {

struct Device {
  int64_t shared;  // bytes that a block may have
  int multiprocessors;
  int64_t scratch;  // bytes that a slab of long sequences may take
  int capability;   // 90 for 9.0
};

Device device(int index);

#ifdef __CUDACC__
// Two numbers of a type, the first one low.
template <Type type>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  uint32_t word;
  if constexpr (type == Type::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

// Queues a kernel on the current device; what went wrong, or nullptr.
template <Kernel kernel>
const char* launch(int length, const Args<kernel>& args, const Device& on, void* stream);
template <template <Type> class Kernel>
const char* launch(const Toeplitz& args, void* stream);

}  // namespace fastmix::cuda
