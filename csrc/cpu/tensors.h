// What an operator's registration needs: tensors as kernels see them, fresh outputs, and
// the units of work spread over torch's threads.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "rows.h"

namespace fastmix {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::ComplexDouble: return Type::c128;
    default: return Type::c64;
  }
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

// The dtype of sums, states and spectra of x.
inline ScalarType wide(const Tensor& x) {
  return is_double(x) ? ScalarType::Double : ScalarType::Float;
}

inline ScalarType wide_complex(const Tensor& x) {
  return is_double(x) ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
}

// x (b, n, h, d), or fewer trailing axes: (b, n, h) has d = 1.
inline Source source(const Tensor& x) {
  return {x.const_data_ptr(),
          type_of(x.scalar_type()),
          x.stride(0),
          x.stride(1),
          x.dim() > 2 ? x.stride(2) : 1,
          x.dim() > 3 ? x.stride(3) : 1,
          x.dim() > 3 ? std::max<int64_t>(1, x.size(3)) : 1};
}

// x (b, h, d), as a source of one step.
inline Source state_source(const Tensor& x) {
  return {x.const_data_ptr(),
          type_of(x.scalar_type()),
          x.stride(0),
          0,
          x.stride(1),
          x.dim() > 2 ? x.stride(2) : 1,
          x.dim() > 2 ? std::max<int64_t>(1, x.size(2)) : 1};
}

inline Source state_source(const OptionalTensor& x) { return x ? state_source(*x) : Source{}; }

inline Sink sink(const Tensor& x, int64_t n, int64_t channels) {
  const bool streaming = x.numel() * static_cast<int64_t>(x.element_size()) >= 8 << 20;
  return {x.mutable_data_ptr(), type_of(x.scalar_type()), n, channels, streaming};
}

// A new tensor on huge pages if it is large: faults of small ones can cost more than a scan.
Tensor fresh(const Tensor& like, std::vector<int64_t> shape, ScalarType type);

inline Tensor fresh(const Tensor& like) {
  return fresh(like, {like.sizes().begin(), like.sizes().end()}, like.scalar_type());
}

// An empty tensor: what operators return in place of a gradient that does not exist, because
// their schemas have no optional results.
inline Tensor nothing(const Tensor& like) { return fresh(like, {0}, like.scalar_type()); }

inline void clear(const Tensor& x) {
  std::memset(x.mutable_data_ptr(), 0, x.numel() * x.element_size());
}

// The values of a parameter with any dtype and strides, in double.
std::vector<double> values(const Tensor& parameter);

// `results` into the fresh tensor x, from its element `first` on.
void assign(const Tensor& x, const std::vector<double>& results, int64_t first = 0);

// A parameter's gradient: the sums of `parts`, (…, elements of the parameter, d).
Tensor totals(const std::vector<double>& parts, const Tensor& parameter, int64_t d = 1);

// What kernels take on trust: they go by the sizes and the type of one tensor. fastmix.ops gives
// them none that do not fit; programs that call torch.ops.fastmix themselves get an error from
// here.
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;
constexpr int64_t kAny = -1;  // size

using Types = uint64_t;  // a bit for each
constexpr Types only(ScalarType type) { return Types(1) << static_cast<int>(type); }
constexpr Types kReal = only(ScalarType::Double) | only(ScalarType::Float) |
                        only(ScalarType::BFloat16) | only(ScalarType::Half);
constexpr Types kComplex = only(ScalarType::ComplexFloat) | only(ScalarType::ComplexDouble);

struct Checks {
  const char* name;  // the operator's

  void require(bool fits, const char* argument, const char* expected, int64_t got) const;
  void tensor(const char* argument, const Tensor& x, Shape shape, Types types) const;
  void tensor(const char* argument, const OptionalTensor& x, Shape shape, Types types) const {
    if (x) tensor(argument, *x, shape, types);
  }
  // carry_every: a kernel's chunks are some of 64 steps, and carries stand between chunks; `most`
  // bounds what backward keeps.
  void carries(int64_t carry_every, bool backward, int64_t most = 64) const;
};

// How many carries forward keeps: the state before every carry_every-th step, and the last one.
inline int64_t carry_count(int64_t n, int64_t carry_every) {
  return carry_every ? (n + carry_every - 1) / carry_every + 1 : 0;
}

template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t, int64_t);

// 0 portable, 1 AVX2, 2 AVX-512: the best that this machine runs, or a test's choice.
int instruction_set();

// Whether the kernels for AVX-512 may use the matrix unit: this machine has one, lets the process
// use it, and no lesser set has been chosen.
bool matrix_unit();

// False after fork() from a process with several threads: the child has no thread pool.
bool may_use_threads();

// Calls the kernel of this machine for all units, which one thread would do in roughly
// `nanoseconds`: in parallel if that gives each thread more work than waking it costs.
template <class Arguments>
void spread(std::initializer_list<Kernel<Arguments>> kernels, const Arguments& arguments,
            int64_t units, double nanoseconds) {
  constexpr double least = 10'000;  // of a thread
  const Kernel<Arguments> kernel = kernels.begin()[kernels.size() > 1 ? instruction_set() : 0];
  if (units == 0) return;
  if (!may_use_threads() || nanoseconds < 2 * least) return kernel(arguments, 0, units);
  const int64_t grain = std::max<int64_t>(1, units * least / nanoseconds);
  torch::stable::parallel_for(0, units, grain,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// A library compiled on first use has the kernels of one instruction set, which build.py names; for
// tests those of all that the machine has.
#if defined(FASTMIX_ONLY)
#define FASTMIX_KERNELS(name) {FASTMIX_ONLY::name}
#elif defined(FASTMIX_NO_AVX512)
#define FASTMIX_KERNELS(name) {portable::name, avx2::name}
#elif defined(__x86_64__)
#define FASTMIX_KERNELS(name) {portable::name, avx2::name, avx512::name}
#elif defined(__aarch64__)
#define FASTMIX_KERNELS(name) {neon::name}
#else
#define FASTMIX_KERNELS(name) {portable::name}
#endif

// x contiguous, x (real) in another dtype, x in another shape: x itself or a copy. torch copies,
// except where it would wait for a thread pool that does not exist.
Tensor dense(const Tensor& x);
inline OptionalTensor dense(const OptionalTensor& x) { return x ? OptionalTensor(dense(*x)) : x; }
Tensor converted(const Tensor& x, ScalarType type);
Tensor reshaped(const Tensor& x, std::vector<int64_t> shape);

// Channels of a unit of work where a channel's result does not depend on its unit: enough
// units for every thread, of whole cache lines.
inline int64_t channel_block(int64_t batches, int64_t channels, int64_t most) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::max<int64_t>(1, threads / std::max<int64_t>(1, batches));
  const int64_t share = ((channels + parts - 1) / parts + 31) / 32 * 32;
  return std::max<int64_t>(32, std::min(most, share));
}

// Elsewhere work is cut by shape alone: results must not depend on the number of threads.

// A Chain with its counters and its states, which `first` starts (zeros if it is empty).
struct ChainStorage {
  Chain chain{};
  int64_t batches;
  std::vector<int64_t> counters;
  std::vector<double> state;

  ChainStorage(int64_t batches, int64_t n, int64_t channels, std::vector<double> first = {})
      : batches(batches), state(std::move(first)) {
    constexpr int64_t most = 1024, numbers = 1 << 16;  // channels of a block; of a chunk
    chain.channels = channels;
    chain.block = std::min(most, std::max<int64_t>(1, channels));
    chain.blocks = (channels + chain.block - 1) / chain.block;
    chain.steps = numbers / chain.block / 64 * 64;
    chain.chunks = (n + chain.steps - 1) / chain.steps;
    counters.resize(1 + batches * chain.blocks);
    state.resize(batches * channels);
    chain.claimed = counters.data();
    chain.passed_on = counters.data() + 1;
    chain.state = state.data();
  }

  int64_t units() const { return batches * chain.blocks * chain.chunks; }
};

}  // namespace fastmix
