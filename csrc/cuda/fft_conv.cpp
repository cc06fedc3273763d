// fft_conv on CUDA tensors, for torch: fresh outputs and scratch, and kernels queued in order.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "launch.h"

// Weak: torch without CUDA has none, and must load this library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace fastmix::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: return Type::f32;
  }
}

// x (b, n, h, d)
View view(const Tensor& x) {
  // Strides that are never taken say nothing of how rows lie.
  auto stride = [&](int64_t axis) { return x.size(axis) == 1 ? 0 : x.stride(axis); };
  return {const_cast<void*>(x.const_data_ptr()), type_of(x), stride(0), stride(1), stride(2),
          x.size(3) == 1 ? 1 : x.stride(3)};
}

// kernel (b, m, h) or (m, h)
View kernel_view(const Tensor& kernel) {
  const int64_t last = kernel.dim() - 1;
  return {const_cast<void*>(kernel.const_data_ptr()),
          type_of(kernel),
          last == 2 ? kernel.stride(0) : 0,
          kernel.stride(last - 1),
          0,
          kernel.stride(last)};
}

Tensor like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes(), x.scalar_type()); }

// `count` complex numbers on the device of x.
Tensor scratch(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(x, {2 * count}, ScalarType::Float);
}

Complex* data(const Tensor& scratch) { return static_cast<Complex*>(scratch.mutable_data_ptr()); }

#ifdef FASTMIX_HOST  // a test runs all this on the CPU
struct Guard {
  explicit Guard(int) {}
};
void* stream_of(int) { return nullptr; }
#else
using Guard = torch::stable::accelerator::DeviceGuard;

void* stream_of(int index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr &&
          aoti_torch_get_current_cuda_stream(index, &stream) == AOTI_TORCH_SUCCESS,
      "fft_conv on CUDA: torch does not say which stream is current: install a torch with CUDA");
  return stream;
}
#endif

// The device and the stream of x, where kernels are queued.
struct Launcher {
  int index;
  Guard guard;
  Device on;
  void* stream;

  explicit Launcher(const Tensor& x)
      : index(x.get_device_index()), guard(index), on(device(index)), stream(stream_of(index)) {
    STD_TORCH_CHECK(x.size(0) * x.size(2) * x.size(3) <= 1 << 30,
                    "fft_conv on CUDA: x must have at most 2^30 channels of all samples, got ",
                    x.size(0) * x.size(2) * x.size(3), ": split the batch");
  }

  template <Kernel kernel>
  void run(int length, const Args<kernel>& args) {
    const char* error = launch<kernel>(length, args, on, stream);
    STD_TORCH_CHECK(error == nullptr, "fft_conv on CUDA: ", error);
  }
};

// (h, d), float32 and dense
const float* skip_data(const OptionalTensor& skip) {
  return skip ? static_cast<const float*>(skip->const_data_ptr()) : nullptr;
}

// What transforms and products both need: sizes, the kernel and the skip.
template <class Conv>
void describe(Conv& conv, const Tensor& x, const Tensor& kernel, const OptionalTensor& skip) {
  conv.batch = x.size(0), conv.heads = x.size(2), conv.channels = x.size(3);
  conv.steps = x.size(1);
  conv.lags = std::min(x.size(1), kernel.size(-2));
  conv.kernels = kernel.dim() == 3 ? conv.batch : 1;
  conv.kernel = kernel_view(kernel);
  conv.skip = skip_data(skip);
}

struct Call : Launcher {
  FftConv conv{};
  int length, r;

  Call(const Tensor& x, const Tensor& kernel, const OptionalTensor& skip) : Launcher(x) {
    describe(conv, x, kernel, skip);
    conv.x = view(x);
    length = length_for(conv.steps, on.shared);
    r = std::max(1, length / 4096);
  }

  template <Kernel kernel>
  void run() {
    Launcher::run<kernel>(length, conv);
  }

  // The backward multiplies by u itself.
  Tensor spectra(const Tensor& x, bool wrapped) {
    conv.wrapped = wrapped ? r - 1 : 0;
    Tensor made =
        scratch(x, int64_t{conv.kernels} * conv.heads * (conv.wrapped + r) * (length / r));
    conv.spectra = data(made);
    run<Kernel::spectra>();
    return made;
  }
};

// Sequences that no block can hold: slabs of channels, one after another through the same scratch.
struct LongCall : Launcher {
  LongConv conv{}, k{};  // of x; of kernels, as (b or 1, m, h, 1)
  int64_t steps, lags;
  int all_kernels, kernels, units;  // of kernels all; of a slab at most
  Tensor spectra;

  // `buffers` of scratch are in use at once.
  LongCall(const Tensor& x, const Tensor& kernel, const OptionalTensor& skip, int buffers)
      : Launcher(x), steps(x.size(1)), lags(std::min(steps, kernel.size(-2))) {
    conv.length = long_length_for(steps);
    STD_TORCH_CHECK(conv.length != 0, "fft_conv on CUDA: x must have at most 2^20 steps, got ",
                    steps, ": split the sequence");
    conv.heads = x.size(2), conv.channels = x.size(3);
    conv.skip = skip_data(skip);
    conv.samples = kernel.dim() == 3 ? 1 : x.size(0);
    with_columns(type_of(x), conv.length,
                 [&](auto shape) { conv.width = std::min<int>(shape.at_once, conv.channels); });
    all_kernels = x.size(0) / conv.samples * conv.heads;
    units = std::max<int64_t>(1, on.scratch / 8 / buffers / conv.width / conv.length);
    kernels = std::clamp(units / conv.units_of_kernel(), 1, all_kernels);
    units = std::min(units, kernels * conv.units_of_kernel());
    spectra = scratch(x, int64_t{kernels} * conv.length);
    conv.spectra = data(spectra);
    k.length = conv.length, k.heads = conv.heads;
    k.channels = k.samples = k.width = 1;
  }

  template <Kernel kernel>
  void run() {
    Launcher::run<kernel>(conv.length, conv);
  }

  template <Kernel kernel>
  void columns(LongConv args, const View& tensor, int64_t most, Complex* numbers) {
    args.view = tensor, args.steps = most, args.columns = numbers;
    Launcher::run<kernel>(args.length, args);
  }

  template <Kernel kernel>
  void columns_of_kernels(View tensor) {
    tensor.h = tensor.d, tensor.d = 0;
    columns<kernel>(k, tensor, lags, conv.spectra);
  }

  // slab() for each slab of channels, done() when those of some kernels are through.
  template <class Slab, class Done>
  void each_slab(const View& kernel, Slab slab, Done done) {
    for (int first = 0; first < all_kernels; first += kernels) {
      conv.first_kernel = k.first_kernel = first;
      conv.kernels = k.kernels = k.units = std::min(kernels, all_kernels - first);
      columns_of_kernels<Kernel::columns_in>(kernel);
      run<Kernel::row_spectra>();
      const int all = conv.kernels * conv.units_of_kernel();
      for (conv.first_unit = 0; conv.first_unit < all; conv.first_unit += units) {
        conv.units = std::min(units, all - conv.first_unit);
        slab();
      }
      done();
    }
  }

  Tensor numbers(const Tensor& x) { return scratch(x, int64_t{units} * conv.width * conv.length); }
};

// The longest sequence whose products on tensor cores, n / 2 a number and what tiles waste, are
// taken for cheaper than its transforms; 0 where there are none. Counted, not measured: 110 to
// 125 instructions transform a number, at 60 % of what a multiprocessor issues in 1.6 cycles. In
// those mma.sync multiplies 1900 pairs on Hopper (60 % of the peak), 1400 on A100 (85 %), 350 on
// consumer cards.
int64_t longest_product(int capability) {
  if (capability == 80 || capability == 90) return 2048;
  if (capability / 10 == 10) return 1024;
  return capability >= 80 ? 512 : 0;
}

// Channels come by 64; of a short kernel the lags count, however long the sequence.
bool takes_product(int64_t steps, int64_t lags, int64_t channels, int capability) {
  const double a_number = lags - lags * lags / (2. * steps),
               wasted = static_cast<double>(cut(channels, kTile)) * kTile / channels;
  return 2 * a_number * wasted <= longest_product(capability);
}

// Sequences that are multiplied with a matrix.
struct ProductCall : Launcher {
  Toeplitz conv{};

  ProductCall(const Tensor& x, const Tensor& kernel, const OptionalTensor& skip) : Launcher(x) {
    describe(conv, x, kernel, skip);
  }

  static bool takes(const Tensor& x, const Tensor& kernel) {
    return x.scalar_type() == kernel.scalar_type() && type_of(x) != Type::f32 &&
           takes_product(x.size(1), std::min(x.size(1), kernel.size(-2)), x.size(3),
                         device(x.get_device_index()).capability);
  }

  template <template <Type> class K>
  void run() {
    const char* error = launch<K>(conv, stream);
    STD_TORCH_CHECK(error == nullptr, "fft_conv on CUDA: ", error);
  }

  // x, or a copy of it whose rows tensor cores' tiles can be copied from.
  static Tensor with_whole_octets(const Tensor& x) {
    if (has_whole_octets(view(x))) return x;
    const int64_t channels = x.size(3), padded = (channels + 7) / 8 * 8;
    Tensor copy =
        torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), padded}, x.scalar_type());
    copy = torch::stable::narrow(copy, 3, 0, channels);
    return torch::stable::copy_(copy, x);
  }

  void multiply(const View& x, const View& out) {
    conv.x = x, conv.out = out;
    run<Product>();
  }

  void forward(const Tensor& x, const Tensor& out) {
    const Tensor rows = with_whole_octets(x);
    multiply(view(rows), view(out));
  }

  void backward(const Tensor& grad, const Tensor& x, const Tensor& grad_x,
                const Tensor& grad_kernel) {
    const Tensor rows_of_grad = with_whole_octets(grad), rows_of_x = with_whole_octets(x);
    conv.grad = view(rows_of_grad);
    multiply(backward_in_time(conv.grad), backward_in_time(view(grad_x)));
    conv.x = view(rows_of_x), conv.grad_kernel = kernel_view(grad_kernel);
    const Tensor sums = scratch(grad_kernel, Diagonals<Type::bf16>::sums(conv) / 2);
    conv.sums = static_cast<float*>(sums.mutable_data_ptr());
    run<Diagonals>();
    run<Totals>();
  }

  View backward_in_time(View view) const {
    view.data = static_cast<char*>(view.data) + 2 * (conv.steps - 1) * view.n;
    view.n = -view.n;
    return view;
  }
};

bool is_long(const Tensor& x) {
  return length_for(x.size(1), device(x.get_device_index()).shared) == 0;
}

void long_forward(const Tensor& x, const Tensor& kernel, const OptionalTensor& skip,
                  const Tensor& out) {
  LongCall call(x, kernel, skip, 1);
  const Tensor numbers = call.numbers(x);
  LongConv& conv = call.conv;
  conv.columns = data(numbers);
  call.each_slab(
      kernel_view(kernel),
      [&] {
        call.columns<Kernel::columns_in>(conv, view(x), call.steps, conv.columns);
        call.run<Kernel::row_forward>();
        call.columns<Kernel::columns_out>(conv, view(out), call.steps, conv.columns);
      },
      [] {});
}

void long_backward(const Tensor& grad, const Tensor& x, const Tensor& kernel,
                   const OptionalTensor& skip, const Tensor& grad_x, const Tensor& grad_kernel) {
  LongCall call(x, kernel, skip, 2);
  const Tensor numbers = call.numbers(x), numbers_of_grad = call.numbers(x);
  LongConv& conv = call.conv;
  conv.columns = data(numbers);
  conv.grad_columns = data(numbers_of_grad);
  // Parts enough for two blocks at once on every multiprocessor.
  const int own = std::min(call.units, conv.units_of_kernel()) * conv.width,
            blocks = call.kernels * (conv.length / 4096),
            most = std::max(1, 2 * call.on.multiprocessors / blocks);
  conv.share = (own + most - 1) / most;
  conv.parts = (own + conv.share - 1) / conv.share;
  const Tensor sums = scratch(x, int64_t{call.kernels} * conv.parts * conv.length);
  conv.sums = data(sums);
  call.each_slab(
      kernel_view(kernel),
      [&] {
        call.columns<Kernel::columns_in>(conv, view(x), call.steps, conv.columns);
        call.columns<Kernel::columns_in>(conv, view(grad), call.steps, conv.grad_columns);
        call.run<Kernel::row_backward>();
        call.columns<Kernel::columns_out>(conv, view(grad_x), call.steps, conv.grad_columns);
      },
      [&] {
        call.run<Kernel::row_lags>();
        call.columns_of_kernels<Kernel::columns_out>(kernel_view(grad_kernel));
      });
}

Tensor fft_conv(Tensor x, Tensor kernel, OptionalTensor skip) {
  Tensor out = like(x);
  if (x.numel() == 0) return out;
  if (ProductCall::takes(x, kernel)) {
    ProductCall(x, kernel, skip).forward(x, out);
    return out;
  }
  if (is_long(x)) {
    long_forward(x, kernel, skip, out);
    return out;
  }
  Call call(x, kernel, skip);
  call.conv.out = view(out);
  const Tensor spectra = call.spectra(x, true);
  call.run<Kernel::forward>();
  return out;
}

// Parts of the skip's gradient (b · parts, h, d), to be summed: none without a skip.
Tensor skip_sums(const Tensor& grad, const Tensor& x, const Tensor& kernel,
                 const OptionalTensor& skip) {
  FftConv conv{};
  describe(conv, x, kernel, skip);
  conv.x = view(x), conv.grad = view(grad);
  const int64_t parts = skip ? x.size(0) * Skips::parts(conv) : 0;
  Tensor sums = torch::stable::new_empty(x, {parts, x.size(2), x.size(3)}, ScalarType::Float);
  conv.skip_sums = static_cast<float*>(sums.mutable_data_ptr());
  if (sums.numel() > 0) Launcher(x).run<Kernel::skips>(0, conv);
  return sums;
}

// The gradients of x and of the kernel, and parts of that of the skip.
std::tuple<Tensor, Tensor, Tensor> fft_conv_backward(Tensor grad, Tensor x, Tensor kernel,
                                                     OptionalTensor skip) {
  Tensor grad_x = like(x), grad_kernel = like(kernel), grad_skip = skip_sums(grad, x, kernel, skip);
  if (x.numel() == 0 || kernel.size(-2) > x.size(1)) torch::stable::zero_(grad_kernel);
  if (x.numel() == 0) return {grad_x, grad_kernel, grad_skip};
  if (ProductCall::takes(x, kernel)) {
    ProductCall(x, kernel, skip).backward(grad, x, grad_x, grad_kernel);
    return {grad_x, grad_kernel, grad_skip};
  }
  if (is_long(x)) {
    long_backward(grad, x, kernel, skip, grad_x, grad_kernel);
    return {grad_x, grad_kernel, grad_skip};
  }
  Call call(x, kernel, skip);
  FftConv& conv = call.conv;
  conv.grad = view(grad);
  conv.out = view(grad_x);
  conv.grad_kernel = kernel_view(grad_kernel);
  const Tensor spectra = call.spectra(x, false);
  int64_t kept = 0;
  with_shape<Kernel::backward>(conv.x.type, call.length, call.on.shared, [&](auto shape) {
    using S = decltype(shape);
    // Parts enough for blocks everywhere at once, 512 threads to a multiprocessor.
    const int groups = (conv.channels + S::at_once - 1) / S::at_once,
              heads = std::max(1, conv.batch * conv.heads / S::teams),
              blocks = call.on.multiprocessors * 512 / S::threads;
    const int share = (groups + std::max(1, blocks / heads) - 1) / std::max(1, blocks / heads);
    conv.parts = (groups + share - 1) / share;
    conv.share = groups == 1 ? std::min(conv.channels, S::at_once) : share * S::at_once;
    if (!S::keeps_shared) kept = int64_t{conv.batch} * conv.heads * conv.parts * S::length;
  });
  const Tensor sums = scratch(x, int64_t{conv.batch} * conv.heads * conv.parts * call.length),
               spectra_of_x = scratch(x, kept);
  conv.sums = data(sums);
  conv.kept = data(spectra_of_x);
  call.run<Kernel::backward>();
  call.run<Kernel::lags>();
  return {grad_x, grad_kernel, grad_skip};
}

}  // namespace

#define FASTMIX_DEFINE(name, m) STABLE_TORCH_LIBRARY(name, m)
#define FASTMIX_IMPLEMENT(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
#ifdef FASTMIX_HOST
#define FASTMIX_NAMESPACE fastmix_cuda_host
#define FASTMIX_KEY CPU
#else
#define FASTMIX_NAMESPACE fastmix_cuda
#define FASTMIX_KEY CUDA
#endif

FASTMIX_DEFINE(FASTMIX_NAMESPACE, m) {
  m.def("fft_conv(Tensor x, Tensor kernel, Tensor? skip) -> Tensor");
  m.def(
      "fft_conv_backward(Tensor grad, Tensor x, Tensor kernel, Tensor? skip) "
      "-> (Tensor, Tensor, Tensor)");
}

FASTMIX_IMPLEMENT(FASTMIX_NAMESPACE, FASTMIX_KEY, m) {
  m.impl("fft_conv", TORCH_BOX(&fft_conv));
  m.impl("fft_conv_backward", TORCH_BOX(&fft_conv_backward));
}

}  // namespace fastmix::cuda

// What a block takes of a sequence of n steps, of numbers of so many bytes, on such a device:
// its threads, bytes of shared memory, and channels at once. Whether it is transformed (1),
// multiplied with a kernel of the same numbers (2), or goes through scratch (0).
extern "C" __attribute__((visibility("default"))) int fastmix_fft_conv_shape(
    int64_t n, int64_t shared, int capability, int bytes, int backward, int* block) {
  using namespace fastmix::cuda;
  if (bytes == 2 && takes_product(n, n, kTile, capability)) {
    Toeplitz conv{};
    conv.batch = conv.heads = 1, conv.steps = conv.lags = n, conv.channels = kTile;
    block[0] = kThreads, block[2] = kTile;
    block[1] = backward ? Diagonals<Type::bf16>::shared(conv) : Product<Type::bf16>::shared(conv);
    return 2;
  }
  const int length = length_for(n, shared);
  if (length == 0) return 0;
  const Type type = bytes == 4 ? Type::f32 : Type::bf16;
  auto tell = [&](auto kernel, auto shape) {
    block[0] = shape.threads, block[1] = kernel.shared, block[2] = shape.at_once;
  };
  if (backward)
    with_shape<Kernel::backward>(type, length, shared,
                                 [&](auto shape) { tell(Backward<decltype(shape)>{}, shape); });
  else
    with_shape<Kernel::forward>(type, length, shared,
                                [&](auto shape) { tell(Forward<decltype(shape)>{}, shape); });
  return 1;
}
