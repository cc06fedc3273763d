// The kernels of fft_conv.h and fft_long.h, for CUDA.

#include <cuda_fp16.h>

#include "launch.h"

namespace fastmix::cuda {
namespace {

struct Block {
  struct Shared {
    Complex* data;
    __device__ __forceinline__ Complex get(int i) const {
      const float2 v = reinterpret_cast<const float2*>(data)[i];
      return {v.x, v.y};
    }
    __device__ __forceinline__ void put(int i, Complex v) const {
      reinterpret_cast<float2*>(data)[i] = {v.re, v.im};
    }
    __device__ __forceinline__ Shared at(int i) const { return {data + i}; }
  };

  template <class T>
  struct Own {
    T value;
    __device__ __forceinline__ explicit Own(Block&) {}
    __device__ __forceinline__ T& of(int) { return value; }
  };

  __device__ __forceinline__ int index() const { return blockIdx.x; }
  __device__ __forceinline__ Shared shared(int from) const {
    extern __shared__ float4 memory[];
    return {reinterpret_cast<Complex*>(memory) + from};
  }

  // The thread's index, read anew: what was derived from it need not stay in registers.
  __device__ __forceinline__ int again(int) const {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    __builtin_assume(index >= 0);
    return index;
  }

  // Without a barrier: for places that no other thread touches till the next phase ends.
  template <class F>
  __device__ __forceinline__ void own(F f) {
    f(again(0));
  }
  template <class F>
  __device__ __forceinline__ void phase(F f) {
    f(again(0));
    __syncthreads();
  }

  template <int words>
  __device__ __forceinline__ void load(const void* from, uint32_t* to) {
    if constexpr (words == 4) {
      const uint4 v = __ldg(static_cast<const uint4*>(from));
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (words == 2) {
      const uint2 v = __ldg(static_cast<const uint2*>(from));
      to[0] = v.x, to[1] = v.y;
    } else {
      to[0] = __ldg(static_cast<const uint32_t*>(from));
    }
  }
  template <int words>
  __device__ __forceinline__ void store(void* to, const uint32_t* from) {
    if constexpr (words == 4) *static_cast<uint4*>(to) = {from[0], from[1], from[2], from[3]};
    else if constexpr (words == 2) *static_cast<uint2*>(to) = {from[0], from[1]};
    else *static_cast<uint32_t*>(to) = from[0];
  }
  template <int bytes>
  __device__ __forceinline__ uint32_t load_one(const void* from) {
    if constexpr (bytes == 4) return __ldg(static_cast<const uint32_t*>(from));
    return __ldg(static_cast<const uint16_t*>(from));
  }
  template <int bytes>
  __device__ __forceinline__ void store_one(void* to, uint32_t bits) {
    if constexpr (bytes == 4) *static_cast<uint32_t*>(to) = bits;
    else *static_cast<uint16_t*>(to) = bits;
  }

  // Loads that come later wait, instead of taking up registers.
  __device__ __forceinline__ void in_order() { __syncwarp(); }

  // Values that other kernels have written, or this thread itself.
  __device__ __forceinline__ Complex load_complex(const Complex* from) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    return {v.x, v.y};
  }
  __device__ __forceinline__ void store_complex(Complex* to, Complex v) {
    *reinterpret_cast<float2*>(to) = {v.re, v.im};
  }
  __device__ __forceinline__ void load_pair(const Complex* from, Complex* to) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = {v.x, v.y}, to[1] = {v.z, v.w};
  }
  __device__ __forceinline__ void store_pair(Complex* to, const Complex* from) {
    *reinterpret_cast<float4*>(to) = {from[0].re, from[0].im, from[1].re, from[1].im};
  }

  static __device__ __forceinline__ float from_half(uint32_t bits) {
    return __half2float(__ushort_as_half(bits));
  }
  template <Type type>
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return packed<type>(low, high);
  }
};

// Two blocks of 256 threads, or one of 512, to a multiprocessor: 128 registers.
template <class K, class S, class Args>
__global__ void __launch_bounds__(S::threads, 512 / S::threads)
    kernel(const __grid_constant__ Args args) {
  Block block;
  K::run(block, args);
}

}  // namespace

#ifdef FASTMIX_KERNEL  // one of the kernels is compiled at a time, side by side
template <Kernel which>
const char* launch(int length, const Args<which>& args, const Device& on, void* stream) {
  cudaError_t error = cudaSuccess;
  with_kernel<which>(length, on.shared, args, [&](auto k, auto shape, int blocks) {
    using K = decltype(k);
    using S = decltype(shape);
    constexpr auto run = kernel<K, S, Args<which>>;
    error = cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, K::shared);
    if (error == cudaSuccess && blocks > 0) {
      run<<<blocks, S::threads, K::shared, static_cast<cudaStream_t>(stream)>>>(args);
      error = cudaPeekAtLastError();
    }
    if (error != cudaSuccess) cudaGetLastError();  // reported here, not by the next kernel
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* launch<Kernel::FASTMIX_KERNEL>(int, const Args<Kernel::FASTMIX_KERNEL>&,
                                                    const Device&, void*);
#else
Device device(int index) {
  int shared = 0, multiprocessors = 0, major = 0, minor = 0;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  return {shared, multiprocessors, 32 << 20, 10 * major + minor};
}
#endif

}  // namespace fastmix::cuda
