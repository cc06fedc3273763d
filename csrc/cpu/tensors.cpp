#include "tensors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
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
#include <string>

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

#if defined(__linux__) && defined(__x86_64__) && __has_include(<amxtileintrin.h>) && \
    !defined(FASTMIX_NO_MATRIX_UNIT)
// ARCH_GET_XCOMP_SUPP, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
constexpr long kStatesThere = 0x1021, kAskForState = 0x1023, kTileData = 18;

// Whether kernels are compiled for a matrix unit (matrix_unit.h), and the processor and Linux know
// it. Only looks.
bool has_matrix_unit() {
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;
  unsigned a, b, c, d;
  uint64_t states = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tiles) &&
         syscall(SYS_arch_prctl, kStatesThere, &states) == 0 && (states >> kTileData & 1);
}

bool granted() {
  return has_matrix_unit() && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#else
bool has_matrix_unit() { return false; }
bool granted() { return false; }
#endif

std::atomic<bool> refused{false};

// Whether Linux lets this process use the matrix unit, which must be asked for: its registers are
// large. Asks once.
bool may_use_matrix_unit() {
  static const bool may = granted();
  refused = !may;
  return may;
}

#if defined(__x86_64__) && !defined(FASTMIX_ONLY)
// Whether the processor has what is asked of cpuid's leaf 7, and fused and half-precision
// arithmetic, and the system keeps the registers (of xgetbv). By hand, because what
// __builtin_cpu_supports calls is not linked everywhere.
bool has(unsigned features, unsigned registers) {
  constexpr unsigned others = 1u << 12 | 1u << 27 | 1u << 29;  // fma, osxsave, f16c
  unsigned a, b, c, d, kept, rest;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & others) != others) return false;
  __asm__("xgetbv" : "=a"(kept), "=d"(rest) : "c"(0));
  return (kept & registers) == registers && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (b & features) == features;
}
#endif

// The matrix unit aside.
int best_instruction_set() {
#if defined(FASTMIX_ONLY)
  return FASTMIX_ONLY_INDEX;
#elif defined(__x86_64__)
#if !defined(FASTMIX_NO_AVX512)
  constexpr unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, zmm = 0xe6;
  if (has(avx512, zmm)) return kAvx512;
#endif
  constexpr unsigned avx2 = 1u << 5, ymm = 0x06;
  if (has(avx2, ymm)) return 1;
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

#ifdef MADV_HUGEPAGE
// Has the system clear memory before kernels write into it, each thread other huge pages: threads
// that come to a page at the same time would each clear one.
void populate(uintptr_t begin, uintptr_t end) {
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, since Linux 5.14; else it does nothing
  constexpr uintptr_t huge = 2 << 20;
  const auto ask = [&](int64_t first, int64_t last) {
    const uintptr_t from = std::max(begin, first * huge), to = std::min(end, last * huge);
    madvise(reinterpret_cast<void*>(from), to - from, populate_write);
  };
  const int64_t first = begin / huge, last = (end + huge - 1) / huge;
  may_use_threads() ? torch::stable::parallel_for(first, last, 1, ask) : ask(first, last);
}
#endif

}  // namespace

Tensor fresh(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  Tensor x = torch::stable::new_empty(like, shape, type);
#ifdef MADV_HUGEPAGE
  static const uintptr_t page = sysconf(_SC_PAGESIZE);          // aarch64's may be larger than 4 KB
  constexpr uintptr_t large = 4 << 20, mapped_anew = 32 << 20;  // of glibc, in each call
  const uintptr_t data = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page, bytes = x.numel() * x.element_size();
  if (bytes >= large) {
    const uintptr_t length = (bytes - page) / page * page;
    madvise(reinterpret_cast<void*>(begin), length, MADV_HUGEPAGE);
    if (bytes >= mapped_anew) populate(begin, begin + length);
  }
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

void Checks::require(bool fits, const char* argument, const char* expected, int64_t got) const {
  STD_TORCH_CHECK(fits, "fastmix::", name, ": ", argument, " must be ", expected, ", got ", got,
                  ": fastmix.ops.", name, " calls it with arguments that fit");
}

void Checks::tensor(const char* argument, const Tensor& x, Shape shape, Types types) const {
  const auto sizes = x.sizes();
  bool fits = sizes.size() == shape.size() && (types & only(x.scalar_type()));
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == kAny || shape[i] == sizes[i];
  if (fits) return;
  std::string expected, came, allowed;
  for (size_t i = 0; i < shape.size(); ++i)
    expected += (i ? ", " : "") + (shape[i] == kAny ? "any" : std::to_string(shape[i]));
  for (size_t i = 0; i < sizes.size(); ++i) came += (i ? ", " : "") + std::to_string(sizes[i]);
  for (int type = 0; type < 64; ++type)
    if (types >> type & 1)
      allowed += (allowed.empty() ? "" : " or ") +
                 std::string(torch::headeronly::toString(static_cast<ScalarType>(type)));
  STD_TORCH_CHECK(false, "fastmix::", name, ": ", argument, " must have shape (", expected, ") of ",
                  allowed, ", got (", came, ") of ", torch::headeronly::toString(x.scalar_type()),
                  ": fastmix.ops.", name, " calls it with arguments that fit");
}

void Checks::carries(int64_t carry_every, bool backward, int64_t most) const {
  require(carry_every % 64 == 0 && carry_every <= most && carry_every >= (backward ? 64 : 0),
          "carry_every",
          most == 64 ? "64, or 0 without backward"
                     : "a multiple of 64, 4096 at most, or 0 without backward",
          carry_every);
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

int instruction_set() {
  const int set = chosen.load(std::memory_order_relaxed);
  if (set >= 0) return std::min(set, kAvx512);
  static const int best = best_instruction_set();
  return best;
}

// Linux is asked by the first kernel that would use it: a permission that nobody needs would make
// the signal stacks of threads that start later too small.
bool matrix_unit() {
  const int set = chosen.load(std::memory_order_relaxed);
  if (set >= 0 ? set != kAmx : instruction_set() != kAvx512) return false;
  return may_use_matrix_unit();
}

}  // namespace fastmix

// The best instruction set of this machine, whose matrix unit is not asked for; and, for tests, the
// choice of a lesser one (-1: the best again), or of that unit: 0 where Linux refuses it.
#if defined(_WIN32)
#define FASTMIX_EXPORTED extern "C" __declspec(dllexport)
#else
#define FASTMIX_EXPORTED extern "C" __attribute__((visibility("default")))
#endif
FASTMIX_EXPORTED int fastmix_best_instruction_set() {
  const int best = fastmix::best_instruction_set();
  const bool unit = best == fastmix::kAvx512 && fastmix::has_matrix_unit() && !fastmix::refused;
  return unit ? fastmix::kAmx : best;
}
#if defined(FASTMIX_ONLY)
FASTMIX_EXPORTED int fastmix_least_instruction_set() { return FASTMIX_ONLY_INDEX; }
#else
FASTMIX_EXPORTED int fastmix_least_instruction_set() { return 0; }
#endif
FASTMIX_EXPORTED int fastmix_choose_instruction_set(int set) {
  if (set == fastmix::kAmx && !fastmix::may_use_matrix_unit()) return 0;
  fastmix::chosen = set;
  return 1;
}
