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

// Queues a kernel on the current device; what went wrong, or nullptr.
template <Kernel kernel>
const char* launch(int length, const Args<kernel>& args, const Device& on, void* stream);
template <template <Type> class Kernel>
const char* launch(const Toeplitz& args, void* stream);

}  // namespace fastmix::cuda
