#include "tensors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__linux__)
#include <dirent.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>

namespace fastmix {

namespace {

// Calls f(i, offset) for every element of x, in order.
template <class F>
void each_element(const Tensor& x, F f) {
  const int64_t count = x.numel();
  if (x.is_contiguous()) {
    for (int64_t element = 0; element < count; ++element) f(element, element);
    return;
  }
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t dim = x.dim();
  std::vector<int64_t> index(dim);
  for (int64_t element = 0; element < count; ++element) {
    int64_t at = 0;
    for (int64_t i = 0; i < dim; ++i) at += index[i] * strides[i];
    f(element, at);
    for (int64_t i = dim - 1; i >= 0 && ++index[i] == sizes[i]; --i) index[i] = 0;
  }
}

template <class T>
void gather(const Tensor& x, std::vector<double>& to) {
  const T* data = static_cast<const T*>(x.const_data_ptr());
  each_element(x, [&](int64_t i, int64_t at) { to[i] = static_cast<double>(data[at]); });
}

template <class T>
void scatter(const Tensor& x, const std::vector<double>& from, int64_t first) {
  T* data = static_cast<T*>(x.mutable_data_ptr()) + first;
  for (size_t i = 0; i < from.size(); ++i) data[i] = static_cast<T>(from[i]);
}

// Numbers of instruction sets; kernels are compiled for those up to AVX-512, which know the
// matrix unit.
constexpr int kAvx512 = 2, kAmx = 3;

// Whether kernels are compiled for a matrix unit (matrix_unit.h), the processor has it, and Linux
// lets this process use it, which must be asked for: its registers are large.
bool may_use_matrix_unit() {
#if defined(__linux__) && defined(__x86_64__) && __has_include(<amxtileintrin.h>)
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;
  constexpr long ask_for_state = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tiles) &&
         syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
#else
  return false;
#endif
}

int best_instruction_set() {
#if defined(FASTMIX_ONLY)
  if (FASTMIX_ONLY_INDEX < kAvx512) return FASTMIX_ONLY_INDEX;
  return may_use_matrix_unit() ? kAmx : kAvx512;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return may_use_matrix_unit() ? kAmx : kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

std::atomic<int> chosen{-1};

bool threads_lost = false;

#if defined(__linux__)
// fork() copies torch's record of its thread pool, but none of the threads: the child would wait
// for them for ever. The parent has a pool if it has more than one thread.
bool lost_in_parent;
void before_fork() {
  lost_in_parent = threads_lost;
  int threads = 0;
  if (DIR* folder = opendir("/proc/self/task")) {
    while (const dirent* entry = readdir(folder)) threads += entry->d_name[0] != '.';
    closedir(folder);
  }
  threads_lost = threads_lost || threads != 1;
}

void after_fork_in_parent() { threads_lost = lost_in_parent; }

const int registered = pthread_atfork(before_fork, after_fork_in_parent, nullptr);
#endif

}  // namespace

Tensor fresh(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  Tensor x = torch::stable::new_empty(like, shape, type);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096, large = 4 << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page, bytes = x.numel() * x.element_size();
  if (bytes >= large)
    madvise(reinterpret_cast<void*>(begin), (bytes - page) / page * page, MADV_HUGEPAGE);
#endif
  return x;
}

std::vector<double> values(const Tensor& parameter) {
  std::vector<double> numbers(parameter.numel());
  switch (parameter.scalar_type()) {
    case ScalarType::Double: gather<double>(parameter, numbers); break;
    case ScalarType::Float: gather<float>(parameter, numbers); break;
    case ScalarType::BFloat16: gather<torch::headeronly::BFloat16>(parameter, numbers); break;
    default: gather<torch::headeronly::Half>(parameter, numbers);
  }
  return numbers;
}

void assign(const Tensor& x, const std::vector<double>& results, int64_t first) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return scatter<double>(x, results, first);
    case ScalarType::Float: return scatter<float>(x, results, first);
    case ScalarType::BFloat16: return scatter<torch::headeronly::BFloat16>(x, results, first);
    default: return scatter<torch::headeronly::Half>(x, results, first);
  }
}

Tensor totals(const std::vector<double>& parts, const Tensor& parameter, int64_t d) {
  std::vector<double> sums(parameter.numel());
  for (size_t i = 0; i < parts.size(); ++i) sums[i / d % sums.size()] += parts[i];
  Tensor grad = fresh(parameter);
  assign(grad, sums);
  return grad;
}

bool may_use_threads() { return !threads_lost; }

Tensor dense(const Tensor& x) {
  if (may_use_threads() || x.is_contiguous()) return torch::stable::contiguous(x);
  Tensor copy = fresh(x);
  const int64_t size = x.element_size();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(copy.mutable_data_ptr());
  each_element(x,
               [&](int64_t i, int64_t at) { std::memcpy(to + i * size, from + at * size, size); });
  return copy;
}

Tensor converted(const Tensor& x, ScalarType type) {
  if (may_use_threads() || x.scalar_type() == type) return torch::stable::to(x, type);
  Tensor copy = fresh(x, {x.sizes().begin(), x.sizes().end()}, type);
  assign(copy, values(x));
  return copy;
}

Tensor reshaped(const Tensor& x, std::vector<int64_t> shape) {
  return torch::stable::reshape(may_use_threads() ? x : dense(x), shape);
}

static int chosen_or_best() {
  const int set = chosen.load(std::memory_order_relaxed);
  if (set >= 0) return set;
  static const int best = best_instruction_set();
  return best;
}

int instruction_set() { return std::min(chosen_or_best(), kAvx512); }

bool matrix_unit() { return chosen_or_best() == kAmx; }

}  // namespace fastmix

// The best instruction set of this machine; and, for tests, the choice of a lesser one
// (-1: the best again).
#define FASTMIX_EXPORTED extern "C" __attribute__((visibility("default")))
FASTMIX_EXPORTED int fastmix_best_instruction_set() { return fastmix::best_instruction_set(); }
#if defined(FASTMIX_ONLY)
FASTMIX_EXPORTED int fastmix_least_instruction_set() { return FASTMIX_ONLY_INDEX; }
#else
FASTMIX_EXPORTED int fastmix_least_instruction_set() { return 0; }
#endif
FASTMIX_EXPORTED void fastmix_choose_instruction_set(int set) { fastmix::chosen = set; }
