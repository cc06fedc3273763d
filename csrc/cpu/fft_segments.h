// Causal products of sequences whose magnitudes one transform cannot hold.
//
// A transform carries rounding of its largest number, NaN and infinity to every output. Outputs
// of a causal product depend on no later input, so a sequence is cut wherever its largest
// magnitude so far has grown by a few powers of two: a segment's product with another segment
// counts from the sum of their first steps on, and rounds relative to numbers that were there
// by then. A segment is scaled by a power of two, so that neither large nor tiny numbers leave
// the range of a transform. NaN and infinity are taken out and put back where they reach.

#pragma once

#include "fft.h"

namespace fastmix {

// Outputs at the beginning that are computed as the sums of products that they are.
constexpr int64_t kEarly = 16;

}  // namespace fastmix

#ifdef FASTMIX_CPU

namespace fastmix::FASTMIX_CPU {
namespace {

template <class C>
struct Format;
template <>
struct Format<float> {
  static constexpr int mantissa = 23, bias = 127;
  static constexpr int growth = 5;  // powers of two from one segment to the next
};
template <>
struct Format<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr int growth = 20;
};

// 2^exponent as bits, which are a magnitude's; exponents of normal numbers only.
template <class C, class I>
FASTMIX_INLINE I power_bits(I exponent) {
  return (exponent + Format<C>::bias) << Format<C>::mantissa;
}

template <class C>
FASTMIX_INLINE Ints<C> ints(int64_t number) {
  return Ints<C>{} + static_cast<decltype(Ints<C>{}[0] + 0)>(number);
}

template <class C>
FASTMIX_INLINE Ints<C> finite(Ints<C> magnitudes) {
  return magnitudes < power_bits<C>(ints<C>(Format<C>::bias + 1));
}

template <class I>
FASTMIX_INLINE bool any(I mask) {
  uint64_t words[sizeof mask / 8], all = 0;
  memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

// What a transform asks before it goes on: check(i, magnitudes of input i).
template <class C, class Check>
struct Checked {
  typedef Magnitudes<C> Largest;
  Check check;
  bool operator()(int i, const Largest& largest) const { return check(i, largest); }
};

template <class C, class Check>
Checked<C, Check> checked(Check check) {
  return {check};
}

// v, or zero in lanes that begin with more than t zeros.
template <class C>
FASTMIX_INLINE Vector<C> nonzero(Vector<C> v, Ints<C> zeros, int64_t t) {
  return (Vector<C>)((Ints<C>)v & (zeros <= ints<C>(t)));
}

// `count` steps of lanes, in order or from the last one on; zero after them.
template <class C>
struct Sequence {
  Lanes<C> lanes;
  int64_t count;
  bool from_last;

  FASTMIX_INLINE Vector<C> operator()(int64_t t) const {
    return t < count ? lanes(from_last ? count - 1 - t : t) : Vector<C>{};
  }
};

// How each lane begins: with `zeros` zeros, and up to the step `ready`, a few steps later at most,
// with magnitudes below its largest.
template <class C>
struct Beginning {
  static constexpr int64_t most_late = kEarly / 2;  // of each factor of a product
  Ints<C> zeros{}, ready{};

  FASTMIX_INLINE Ints<C> late() const { return ready - zeros; }
};

// A lane is refused by a transform unless it is finite, of a size whose products stay in range,
// and not far below its largest magnitude for longer than a few steps.
template <class C>
Ints<C> refusals(const Sequence<C>& in, const Magnitudes<C>& largest, Beginning<C>& begins) {
  typedef Ints<C> I;
  // Half the exponents for each factor, less some for sums of products.
  constexpr int half = Format<C>::bias / 2;
  const I largest_fitting = power_bits<C>(ints<C>(half - 13)),
          least_fitting = power_bits<C>(ints<C>(3 - half)),
          growth = ints<C>(Format<C>::growth) << Format<C>::mantissa,
          power = ints<C>(1) << Format<C>::mantissa, most_late = ints<C>(begins.most_late);
  I all{}, before{};
  for (int64_t k = 0; k < largest.parts; ++k) all = larger_of(all, largest.of[k]);
  I refused = (all > largest_fitting) | ((all != 0) & (all < least_fitting));
  for (int64_t k = 0; k < largest.parts; ++k) {
    before = larger_of(before, largest.of[in.from_last ? largest.parts - 1 - k : k]);
    refused |= (before != 0) & (before < all - growth);
  }
  begins = {};
  I most{};
  for (int64_t t = 0; t < in.count; ++t) {
    most = larger_of(most, magnitude<C>(in(t)));
    const I late = (most < all - growth + power) & (begins.late() < most_late);
    if (!any(late)) break;
    begins.zeros -= late & (most == 0);
    begins.ready -= late;
    refused |= (begins.late() == most_late) & (most < all - growth - 2 * power);
  }
  return refused;
}

// The first outputs of a causal product, of lanes that begin with numbers far below their
// largest: a transform rounds relative to that.
template <class C>
struct EarlyOutputs {
  static constexpr int64_t lanes = Simd<C>::lanes;
  int64_t end = 0;  // of all lanes
  Ints<C> first{}, end_of_lane{};
  C values[kEarly][lanes];

  // From a, b and a gain of a's own step.
  void compute(const Sequence<C>& a, const Beginning<C>& of_a, const Sequence<C>& b,
               const Beginning<C>& of_b, const Vector<C>* gain) {
    const Ints<C> zeros_of_b = gain == nullptr ? of_b.zeros : Ints<C>{};
    first = of_a.zeros + zeros_of_b;
    end_of_lane = of_a.ready + of_b.ready;
    end = 0;
    for (int64_t i = 0; i < lanes; ++i) {
      end_of_lane[i] = smaller(end_of_lane[i], first[i] + kEarly);  // if b's zeros do not count
      end = larger(end, end_of_lane[i]);
      for (int64_t t = 0; t < end_of_lane[i] - first[i]; ++t) {
        C sum = gain == nullptr ? C(0) : (*gain)[i] * a(of_a.zeros[i] + t)[i];
        for (int64_t s = 0; s <= t; ++s)
          sum += a(of_a.zeros[i] + s)[i] * b(zeros_of_b[i] + t - s)[i];
        values[t][i] = sum;
      }
    }
  }

  // What output t is, where a transform gives v.
  Vector<C> operator()(int64_t t, Vector<C> v) const {
    v = nonzero<C>(v, first, t);
    for (int64_t i = 0; i < lanes; ++i)
      if (t >= first[i] && t < end_of_lane[i]) v[i] = values[t - first[i]][i];
    return v;
  }
};

// A lane's numbers of one segment, times a power of two.
template <class C>
struct Segment {
  const Sequence<C>* sequence;
  Ints<C> first, end, exponent;

  FASTMIX_INLINE void prefetch(int64_t) const {}
  FASTMIX_INLINE Vector<C> operator()(int64_t t) const {
    const Vector<C> v = (*sequence)(t);
    const Ints<C> step = ints<C>(t);
    const Ints<C> taken = (first <= step) & (end > step) & finite<C>(magnitude<C>(v));
    return (Vector<C>)((Ints<C>)v & taken) * (Vector<C>)power_bits<C>(-exponent);
  }
};

// The segments of a sequence, as many as the lane with the most has.
template <class C>
struct Segments {
  static constexpr int64_t lanes = Simd<C>::lanes;
  // More than there are steps of `growth` from the smallest to the largest number.
  static constexpr int most = 2 * Format<C>::bias / Format<C>::growth + 2;
  const Sequence<C>* sequence;
  int count = 0;
  int64_t length, first[most][lanes], exponent[most][lanes];

  Segments(const Sequence<C>& s, int64_t n) : sequence(&s), length(n) {
    int segments[lanes] = {};
    int64_t reached[lanes];  // a lane's segment by the exponent of its largest magnitude so far
    for (int64_t& r : reached) r = -1;
    for (int64_t t = 0; t < n; ++t) {
      const Ints<C> bits = magnitude<C>(s(t));
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t raised = bits[i] >> Format<C>::mantissa;
        if (bits[i] == 0 || raised > 2 * Format<C>::bias) continue;
        int& of_lane = segments[i];
        if (raised / Format<C>::growth > reached[i]) {
          reached[i] = raised / Format<C>::growth;
          first[of_lane++][i] = t;
          exponent[of_lane - 1][i] = 1 - Format<C>::bias;
        }
        int64_t& largest = exponent[of_lane - 1][i];
        // 2^-exponent is to be a normal number as well.
        largest = larger(largest, smaller(raised, 2 * Format<C>::bias - 1) - Format<C>::bias);
      }
    }
    for (int of_lane : segments) count = of_lane > count ? of_lane : count;
    for (int64_t i = 0; i < lanes; ++i)
      for (int j = segments[i]; j < count; ++j) first[j][i] = n, exponent[j][i] = 0;
  }

  Segment<C> operator[](int j) const {
    Segment<C> segment{sequence, {}, {}, {}};
    for (int64_t i = 0; i < lanes; ++i) {
      segment.first[i] = first[j][i];
      segment.end[i] = j + 1 < count ? first[j + 1][i] : length;
      segment.exponent[i] = exponent[j][i];
    }
    return segment;
  }
};

// sum_t = Σ_{s ≤ t} a_s b_{t-s} for t < n, n no more than the plan's length. `product` is the leaf
// that multiplies two inputs.
template <class C, class Product>
void causal_product(const FftPlan& p, const Sequence<C>& a, const Sequence<C>& b, int64_t n, C* sum,
                    C* const* at, C* tile, const Product& product) {
  typedef Vector<C> V;
  typedef Ints<C> I;
  constexpr int64_t lanes = Simd<C>::lanes;
  memset(sum, 0, n * lanes * sizeof(C));
  const Segments<C> of_a(a, n), of_b(b, n);
  for (int i = 0; i < of_a.count; ++i)
    for (int j = 0; j < of_b.count; ++j) {
      const Segment<C> in[2] = {of_a[i], of_b[j]};
      const I first = in[0].first + in[1].first, exponent = in[0].exponent + in[1].exponent;
      const V half = (V)power_bits<C>(exponent >> 1),
              rest = (V)power_bits<C>(exponent - (exponent >> 1));
      transform(p, in, at, tile, n, product, [&](int64_t t, V v) {
        const I counts = first <= ints<C>(t);
        C* to = sum + t * lanes;
        store(to, load<V>(to) + (V)((I)(v * half * rest) & counts));
      });
    }
  // What is not finite reaches as many outputs as the other sequence has steps.
  const I nan = power_bits<C>(ints<C>(Format<C>::bias + 1)) |
                ints<C>(int64_t(1) << (Format<C>::mantissa - 1));
  I nan_until{};
  for (int64_t t = 0; t < n; ++t) {
    const I reach_a = ~finite<C>(magnitude<C>(a(t))) & ints<C>(t + b.count),
            reach_b = ~finite<C>(magnitude<C>(b(t))) & ints<C>(t + a.count);
    nan_until = larger_of(nan_until, larger_of(reach_a, reach_b));
    C* to = sum + t * lanes;
    store(to, (V)((I)load<V>(to) | (nan & (nan_until > ints<C>(t)))));
  }
}

}  // namespace
}  // namespace fastmix::FASTMIX_CPU

#endif  // FASTMIX_CPU
