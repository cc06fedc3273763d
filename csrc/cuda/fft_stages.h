// The transforms of fft_conv.cu, as what a thread does between two barriers. Plain C++, so that
// a test can run them on a CPU.
//
// Real numbers x_0 … x_{M-1} are a polynomial modulo u^M = -i. Coefficients M … 2M-1 of a
// product come out as imaginary parts, so its real part is the causal convolution: from M
// complex points, with no zeros to pad. Its value at u_k = e^{-2πi (k + ¼) / M}, k < M, is the
// transform here, M = 16 · 16 · R: radix 16 with the quarter, radix 16, radix R. Sixteen points
// at a time are in a thread; in between they lie in shared memory, where place p is followed by
// a gap every sixteen, which keeps all accesses free of bank conflicts. Values stay in the
// places that they are computed in: place p = 16R k₁ + R k₂ + k₃ holds k = k₁ + 16 k₂ + 256 k₃.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#define FASTMIX_HD __host__ __device__ __forceinline__
#define FASTMIX_ROLLED _Pragma("unroll 1")
#else
#define FASTMIX_HD inline
#define FASTMIX_ROLLED
#endif

namespace fastmix::cuda {

struct alignas(8) Complex {
  float re, im;
};

FASTMIX_HD Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
FASTMIX_HD Complex operator+(Complex a, float b) { return {a.re + b, a.im}; }
FASTMIX_HD Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
FASTMIX_HD Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
FASTMIX_HD Complex conj(Complex a) { return {a.re, -a.im}; }

// Calls f(0), f(1), … f(count - 1) with constants.
template <class F, int... I>
FASTMIX_HD void unrolled(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int count, class F>
FASTMIX_HD void unrolled(F&& f) {
  unrolled(f, std::make_integer_sequence<int, count>{});
}

constexpr double kPi = 3.14159265358979323846;

// cos and sin of 2π part / whole, 0 ≤ part < whole, when compiled.
constexpr double series(double x, double term, int first) {
  double sum = 0;
  for (int i = first; i < 40; i += 2) {
    sum += term;
    term *= -x * x / ((i + 1) * (i + 2));
  }
  return sum;
}
constexpr double cosine(int part, int whole) { return series(2 * kPi * part / whole, 1, 0); }
constexpr double sine(int part, int whole) {
  return series(2 * kPi * part / whole, 2 * kPi * part / whole, 1);
}

// e^{-2πi part / whole} where it is known when running only.
FASTMIX_HD Complex root(int part, int whole) {
#ifdef __CUDA_ARCH__
  Complex e;
  sincospif(-2.f * part / whole, &e.im, &e.re);  // exact: whole is a power of two
  return e;
#else
  const double angle = -2 * kPi * part / whole;
  return {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))};
#endif
}

// ---- transforms in registers: sign -1 forward, 1 back

template <int sign>
FASTMIX_HD Complex times_i(Complex a) {
  return sign > 0 ? Complex{-a.im, a.re} : Complex{a.im, -a.re};
}

// a · e^{sign 2πi part / 16}
template <int sign, int part>
FASTMIX_HD Complex turned(Complex a) {
  if constexpr (part == 0) {
    return a;
  } else if constexpr (part == 4) {
    return times_i<sign>(a);
  } else {
    constexpr float re = cosine(part, 16), im = sign * sine(part, 16);
    return a * Complex{re, im};
  }
}

template <int sign>
FASTMIX_HD void transform2(Complex& a, Complex& b) {
  const Complex difference = a - b;
  a = a + b;
  b = difference;
}

template <int sign>
FASTMIX_HD void transform4(Complex& a, Complex& b, Complex& c, Complex& d) {
  const Complex even = a + c, odd = a - c, sum = b + d, turn = times_i<sign>(b - d);
  a = even + sum;
  b = odd + turn;
  c = even - sum;
  d = odd - turn;
}

// v_0 … v_{radix-1}, in place and in order.
template <int radix, int sign>
FASTMIX_HD void transform(Complex* v) {
  if constexpr (radix == 2) {
    transform2<sign>(v[0], v[1]);
  } else if constexpr (radix == 4) {
    transform4<sign>(v[0], v[1], v[2], v[3]);
  } else if constexpr (radix > 4) {
    constexpr int columns = radix / 4;
    unrolled<columns>([&](auto i) {
      transform4<sign>(v[i], v[i + columns], v[i + 2 * columns], v[i + 3 * columns]);
      unrolled<4>([&](auto k) {
        Complex& a = v[i + k * columns];
        a = turned<sign, i * k * 16 / radix>(a);
      });
    });
    Complex in_order[radix];
    unrolled<4>([&](auto k) {
      Complex* row = v + k * columns;
      transform<columns, sign>(row);
      unrolled<columns>([&](auto q) { in_order[k + 4 * q] = row[q]; });
    });
    unrolled<radix>([&](auto k) { v[k] = in_order[k]; });
  }
}

// v_i times first · w^i, i < 16, or with those conjugated for sign 1.
template <int sign>
FASTMIX_HD void times_powers(Complex* v, Complex w, Complex w2, Complex w4, Complex w8,
                             const Complex* first = nullptr) {
  auto turn = [](Complex a) { return sign > 0 ? conj(a) : a; };
  w = turn(w), w2 = turn(w2), w4 = turn(w4), w8 = turn(w8);
  unrolled<8>([&](auto i) { v[i + 8] = v[i + 8] * w8; });
  Complex power[4];
  if (first != nullptr) {
    power[0] = turn(*first);
    power[1] = power[0] * w;
    power[2] = power[0] * w2;
    v[0] = v[0] * power[0];
    v[8] = v[8] * power[0];
  } else {
    power[1] = w;
    power[2] = w2;
  }
  power[3] = power[1] * w2;
  unrolled<3>([&](auto i) {
    v[i + 1] = v[i + 1] * power[i + 1];
    v[i + 9] = v[i + 9] * power[i + 1];
  });
  unrolled<4>([&](auto i) {
    const Complex high = i == 0 && first == nullptr ? w4 : power[i] * w4;
    v[i + 4] = v[i + 4] * high;
    v[i + 12] = v[i + 12] * high;
  });
}

// ---- the stages of one transform of M points by M / 16 threads

FASTMIX_HD constexpr int padded(int place) { return place + place / 16; }

template <int M>
struct Transform {
  static constexpr int threads = M / 16, R = M / 256, last = R > 1 ? R : 16;
  static constexpr int room = padded(M);  // in Complex
  static constexpr int tables = 5 * threads + 4 * R;

  // The powers that times_powers asks for, for each thread of the first and second stage.
  // `table` is of all transforms; entry i of `tables`.
  template <class Shared>
  static FASTMIX_HD void tabulate(Shared table, int i) {
    if (i < 5 * threads) {
      constexpr int all = 4 * M;
      const int row = i / threads, thread = i % threads;
      table.put(i, root(row == 0 ? thread : thread << (row + 1), all));
    } else {
      const int j = i - 5 * threads;
      table.put(i, root((j % R) << (j / R), 16 * R));
    }
  }

  template <int sign, class Shared>
  static FASTMIX_HD void turn_first(Complex* v, Shared table, int thread) {
    const Complex first = table.get(thread);
    times_powers<sign>(v, table.get(threads + thread), table.get(2 * threads + thread),
                       table.get(3 * threads + thread), table.get(4 * threads + thread), &first);
  }

  template <int sign, class Shared>
  static FASTMIX_HD void turn_second(Complex* v, Shared table, int column) {
    const int at = 5 * threads + column;
    times_powers<sign>(v, table.get(at), table.get(at + R), table.get(at + 2 * R),
                       table.get(at + 3 * R));
  }

  // The first stage of `thread`, which takes in the numbers x_{thread + M/16 j}, j < 16.
  template <class Shared>
  static FASTMIX_HD void first(const float* x, Shared points, Shared table, int thread) {
    Complex v[16];
    unrolled<16>([&](auto j) {
      constexpr float re = cosine(j, 64), im = -sine(j, 64);
      v[j] = {x[j] * re, x[j] * im};
    });
    transform<16, -1>(v);
    turn_first<-1>(v, table, thread);
    unrolled<16>([&](auto k) { points.put(padded(thread) + k * padded(threads), v[k]); });
  }

  // The inverse of `first`, divided by M.
  template <class Shared>
  static FASTMIX_HD void first_back(float* x, Shared points, Shared table, int thread) {
    Complex v[16];
    unrolled<16>([&](auto k) { v[k] = points.get(padded(thread) + k * padded(threads)); });
    turn_first<1>(v, table, thread);
    transform<16, 1>(v);
    unrolled<16>([&](auto j) {
      constexpr float re = cosine(j, 64) / M, im = sine(j, 64) / M;
      x[j] = v[j].re * re - v[j].im * im;
    });
  }

  // The same without the quarter, of complex numbers.
  template <int sign, class Shared>
  static FASTMIX_HD void turn_plain(Complex* v, Shared table, int thread) {
    times_powers<sign>(v, table.get(threads + thread), table.get(2 * threads + thread),
                       table.get(3 * threads + thread), table.get(4 * threads + thread));
  }

  template <class Shared>
  static FASTMIX_HD void first_plain(Complex* v, Shared points, Shared table, int thread) {
    transform<16, -1>(v);
    turn_plain<-1>(v, table, thread);
    unrolled<16>([&](auto k) { points.put(padded(thread) + k * padded(threads), v[k]); });
  }

  template <class Shared>
  static FASTMIX_HD void first_plain_back(Complex* v, Shared points, Shared table, int thread) {
    unrolled<16>([&](auto k) { v[k] = points.get(padded(thread) + k * padded(threads)); });
    turn_plain<1>(v, table, thread);
    transform<16, 1>(v);
  }

  static FASTMIX_HD int second_place(int thread) {
    return thread / R * padded(16 * R) + thread % R;
  }
  // A step of the second stage crosses a gap every 16 / R of them.
  static FASTMIX_HD constexpr int second_step(int j) { return padded(j * R); }

  template <class Shared>
  static FASTMIX_HD void second(Shared points, Shared table, int thread) {
    if constexpr (R > 1) {
      Complex v[16];
      const int place = second_place(thread);
      unrolled<16>([&](auto j) { v[j] = points.get(place + second_step(j)); });
      transform<16, -1>(v);
      turn_second<-1>(v, table, thread % R);
      unrolled<16>([&](auto k) { points.put(place + second_step(k), v[k]); });
    }
  }

  template <class Shared>
  static FASTMIX_HD void second_back(Shared points, Shared table, int thread) {
    if constexpr (R > 1) {
      Complex v[16];
      const int place = second_place(thread);
      unrolled<16>([&](auto k) { v[k] = points.get(place + second_step(k)); });
      turn_second<1>(v, table, thread % R);
      transform<16, 1>(v);
      unrolled<16>([&](auto j) { points.put(place + second_step(j), v[j]); });
    }
  }

  // The last stage, of places 16 thread …: f(i, v), in between, has v_0 … v_{last-1}, which are
  // those from the i-th on. Few of them are in registers at a time.
  template <class Shared, class F>
  static FASTMIX_HD void third(Shared points, int thread, F f) {
    third_in(points, thread, [&](auto i, Complex* v) {
      f(i, v);
      transform<last, 1>(v);
      unrolled<last>([&](auto j) { points.put(17 * thread + i + j, v[j]); });
    });
  }

  template <class Shared, class F>
  static FASTMIX_HD void third_in(Shared points, int thread, F f) {
    unrolled<16 / last>([&](auto batch) {
      constexpr int i = batch * last;
      Complex v[last];
      unrolled<last>([&](auto j) { v[j] = points.get(17 * thread + i + j); });
      transform<last, -1>(v);
      f(std::integral_constant<int, i>{}, v);
    });
  }

  template <class Shared, class F>
  static FASTMIX_HD void third_back(Shared points, int thread, F f) {
    unrolled<16 / last>([&](auto batch) {
      constexpr int i = batch * last;
      Complex v[last];
      f(std::integral_constant<int, i>{}, v);
      transform<last, 1>(v);
      unrolled<last>([&](auto j) { points.put(17 * thread + i + j, v[j]); });
    });
  }

  // u_k of a place.
  static FASTMIX_HD Complex point(int place) {
    const int k1 = place / (M / 16), k2 = R > 1 ? place / R % 16 : place % 16,
              k3 = R > 1 ? place % R : 0;
    return root(4 * (k1 + 16 * k2 + 256 * k3) + 1, 4 * M);
  }
};

}  // namespace fastmix::cuda
