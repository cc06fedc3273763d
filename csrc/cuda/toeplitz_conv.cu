// The kernels of toeplitz_conv.h, for CUDA.

#include <cuda_fp16.h>

#include "launch.h"

namespace fastmix::cuda {
namespace {

// What a thread has is that of its lane and of its warp.
struct Block {
  template <class T>
  struct Lanes {
    T value;
    __device__ __forceinline__ T& of(int) { return value; }
  };
  template <class T>
  struct OfWarp {
    T value;
    __device__ __forceinline__ explicit OfWarp(Block&) {}
    __device__ __forceinline__ T& of(int) { return value; }
  };

  __device__ __forceinline__ int index() const { return blockIdx.x; }

  template <class F>
  __device__ __forceinline__ void own(F f) {
    f(static_cast<int>(threadIdx.x));
  }
  template <class F>
  __device__ __forceinline__ void warps(F f) {
    f(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0));
  }
  template <class F>
  __device__ __forceinline__ void lanes(F f) {
    f(static_cast<int>(threadIdx.x) % 32);
  }
  __device__ __forceinline__ void barrier() { __syncthreads(); }

  // Shared memory, by bytes.
  static __device__ __forceinline__ char* at(int place) {
    extern __shared__ float4 memory[];
    return reinterpret_cast<char*>(memory) + place;
  }
  static __device__ __forceinline__ uint32_t address(int place) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at(place)));
  }
  template <int words>
  __device__ __forceinline__ void get(int place, uint32_t* to) {
    if constexpr (words == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(at(place));
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
      *to = *reinterpret_cast<const uint32_t*>(at(place));
    }
  }
  template <int words>
  __device__ __forceinline__ void put(int place, const uint32_t* from) {
    if constexpr (words == 2) *reinterpret_cast<uint2*>(at(place)) = {from[0], from[1]};
    else *reinterpret_cast<uint32_t*>(at(place)) = *from;
  }
  __device__ __forceinline__ void put_half(int place, uint32_t bits) {
    *reinterpret_cast<uint16_t*>(at(place)) = bits;
  }

  // Copies 16 bytes, zeros from `bytes` on, that are there after a wait only.
  __device__ __forceinline__ void copy(int to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void commit(int) {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <int pending>
  __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
    __syncthreads();
  }

  // Four of 8 by 8 numbers, a row at the address of each lane; transposed if wanted.
  template <bool transposed, class F>
  __device__ __forceinline__ void load_matrices(Lanes<uint32_t>* to, F place) {
    const uint32_t from = address(place(static_cast<int>(threadIdx.x) % 32));
    if constexpr (transposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0].value), "=r"(to[1].value), "=r"(to[2].value), "=r"(to[3].value)
                   : "r"(from)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0].value), "=r"(to[1].value), "=r"(to[2].value), "=r"(to[3].value)
                   : "r"(from)
                   : "memory");
  }

  // sums += a b, 16 by 16 times 16 by 8.
  template <Type type>
  __device__ __forceinline__ void multiply(Lanes<float>* sums, Lanes<uint32_t> a0,
                                           Lanes<uint32_t> a1, Lanes<uint32_t> a2,
                                           Lanes<uint32_t> a3, Lanes<uint32_t> b0,
                                           Lanes<uint32_t> b1) {
#define FASTMIX_MULTIPLY(type)                                                             \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                               \
      ".f32 "                                                                              \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
      : "+f"(sums[0].value), "+f"(sums[1].value), "+f"(sums[2].value), "+f"(sums[3].value) \
      : "r"(a0.value), "r"(a1.value), "r"(a2.value), "r"(a3.value), "r"(b0.value), "r"(b1.value))
    if constexpr (type == Type::bf16) FASTMIX_MULTIPLY("bf16");
    else FASTMIX_MULTIPLY("f16");
#undef FASTMIX_MULTIPLY
  }

  template <Type type>
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return packed<type>(low, high);
  }
  // The low one.
  template <Type type>
  static __device__ __forceinline__ float unpack(uint32_t both) {
    if constexpr (type == Type::bf16) return as_float(both << 16);
    return __half2float(__ushort_as_half(both));
  }

  template <int words>
  __device__ __forceinline__ void store(void* to, const uint32_t* from) {
    static_assert(words == 4);
    *static_cast<uint4*>(to) = {from[0], from[1], from[2], from[3]};
  }
  template <int bytes>
  __device__ __forceinline__ uint32_t load_one(const void* from) {
    static_assert(bytes == 2);
    return __ldg(static_cast<const uint16_t*>(from));
  }
  template <int bytes>
  __device__ __forceinline__ void store_one(void* to, uint32_t bits) {
    if constexpr (bytes == 4) *static_cast<uint32_t*>(to) = bits;
    else *static_cast<uint16_t*>(to) = bits;
  }
  __device__ __forceinline__ float load_float(const float* from) { return *from; }
};

template <class K>
__global__ void __launch_bounds__(K::threads, K::resident)
    toeplitz(const __grid_constant__ Toeplitz args) {
  Block block;
  K::run(block, args);
}

template <class K>
cudaError_t start(const Toeplitz& args, void* stream) {
  const int shared = K::shared(args);
  const cudaError_t error =
      cudaFuncSetAttribute(toeplitz<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  toeplitz<K><<<K::blocks(args), K::threads, shared, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaPeekAtLastError();
}

}  // namespace

template <template <Type> class K>
const char* launch(const Toeplitz& args, void* stream) {
  const cudaError_t error = args.x.type == Type::bf16 ? start<K<Type::bf16>>(args, stream)
                                                      : start<K<Type::f16>>(args, stream);
  if (error != cudaSuccess) cudaGetLastError();  // reported here, not by the next kernel
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* launch<Product>(const Toeplitz&, void*);
template const char* launch<Diagonals>(const Toeplitz&, void*);
template const char* launch<Totals>(const Toeplitz&, void*);

}  // namespace fastmix::cuda
