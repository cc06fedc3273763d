// fft_conv on CUDA tensors, for torch: fresh outputs and scratch, and kernels queued in order.

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "launch.h"

// Weak: torch without CUDA has none, and must load this library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                    void** stream);

namespace fastmix::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: return Type::f32;
  }
}

// x (b, n, h, d)
View view(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), type_of(x), x.stride(0), x.stride(1), x.stride(2),
          x.stride(3)};
}

// kernel (b, m, h) or (m, h)
View kernel_view(const Tensor& kernel) {
  const int64_t last = kernel.dim() - 1;
  return {const_cast<void*>(kernel.const_data_ptr()), type_of(kernel),
          last == 2 ? kernel.stride(0) : 0, kernel.stride(last - 1), 0, kernel.stride(last)};
}

Tensor like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes(), x.scalar_type()); }

// `count` complex numbers on the device of x.
Tensor scratch(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(x, {2 * count}, ScalarType::Float);
}

Complex* data(const Tensor& scratch) { return static_cast<Complex*>(scratch.mutable_data_ptr()); }

struct Call {
  FftConv f{};
  int index, length, r;
  Device on;
  void* stream = nullptr;

  Call(const Tensor& x, const Tensor& kernel) {
    const int64_t most = std::numeric_limits<int>::max();
    STD_TORCH_CHECK(x.size(0) * x.size(2) * x.size(3) <= most,
                    "fft_conv: too many channels for the CUDA kernel");
    f.batch = x.size(0), f.heads = x.size(2), f.channels = x.size(3);
    f.steps = std::min(most, x.size(1));
    f.lags = std::min<int64_t>(f.steps, kernel.size(-2));
    f.kernels = kernel.dim() == 3 ? f.batch : 1;
    f.x = view(x);
    f.kernel = kernel_view(kernel);
    index = x.get_device_index();
    on = device(index);
    length = length_for(f.steps, on.shared);
    STD_TORCH_CHECK(length != 0, "fft_conv: ", f.steps, " steps are too many for the CUDA kernel");
    r = std::max(1, length / 4096);
    if (aoti_torch_get_current_cuda_stream != nullptr)
      aoti_torch_get_current_cuda_stream(index, &stream);
  }

  template <Kernel kernel>
  void run() {
    const char* error = launch<kernel>(length, f, index, stream);
    STD_TORCH_CHECK(error == nullptr, "fft_conv on CUDA: ", error);
  }

  Tensor spectra(const Tensor& x) {
    Tensor made = scratch(x, int64_t{f.kernels} * f.heads * (2 * r - 1) * (length / r));
    f.spectra = data(made);
    run<Kernel::spectra>();
    return made;
  }
};

Tensor fft_conv(Tensor x, Tensor kernel) {
  Tensor out = like(x);
  if (x.numel() == 0) return out;
  Call call(x, kernel);
  call.f.out = view(out);
  const Tensor spectra = call.spectra(x);
  call.run<Kernel::forward>();
  return out;
}

std::tuple<Tensor, Tensor> fft_conv_backward(Tensor grad, Tensor x, Tensor kernel) {
  Tensor grad_x = like(x), grad_kernel = like(kernel);
  if (x.numel() == 0 || kernel.size(-2) > x.size(1)) torch::stable::zero_(grad_kernel);
  if (x.numel() == 0) return {grad_x, grad_kernel};
  Call call(x, kernel);
  FftConv& f = call.f;
  f.grad = view(grad);
  f.out = view(grad_x);
  f.grad_kernel = kernel_view(grad_kernel);
  const Tensor spectra = call.spectra(x);
  int64_t kept = 0;
  with_shape<Kernel::backward>(f.x.type, call.length, call.on.shared, [&](auto shape) {
    using S = decltype(shape);
    // Parts enough for two blocks on every multiprocessor.
    const int groups = (f.channels + S::at_once - 1) / S::at_once,
              blocks = std::max(1, f.batch * f.heads / S::teams);
    f.parts = std::min(groups, (2 * call.on.multiprocessors + blocks - 1) / blocks);
    f.share = (groups + f.parts - 1) / f.parts;
    if (!S::keeps_shared) kept = int64_t{f.batch} * f.heads * f.parts * S::length;
  });
  const Tensor sums = scratch(x, int64_t{f.batch} * f.heads * f.parts * call.length),
               spectra_of_x = scratch(x, kept);
  f.sums = data(sums);
  f.kept = data(spectra_of_x);
  call.run<Kernel::backward>();
  call.run<Kernel::lags>();
  return {grad_x, grad_kernel};
}

}  // namespace

#ifndef FASTMIX_CUDA_KEY  // a test runs all this on the CPU
#define FASTMIX_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY(fastmix_cuda, m) {
  m.def("fft_conv(Tensor x, Tensor kernel) -> Tensor");
  m.def("fft_conv_backward(Tensor grad, Tensor x, Tensor kernel) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmix_cuda, FASTMIX_CUDA_KEY, m) {
  m.impl("fft_conv", TORCH_BOX(&fft_conv));
  m.impl("fft_conv_backward", TORCH_BOX(&fft_conv_backward));
}

}  // namespace fastmix::cuda
