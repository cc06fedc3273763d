// Between the registration, which knows torch, and the kernels, which know CUDA.

#pragma once

#include "fft_conv.h"

namespace fastmix::cuda {

struct Device {
  int64_t shared;  // bytes that a block may have
  int multiprocessors;
};

Device device(int index);

// Queues a kernel; what went wrong, or nullptr.
template <Kernel kernel>
const char* launch(int length, const FftConv& args, int device, void* stream);

}  // namespace fastmix::cuda
