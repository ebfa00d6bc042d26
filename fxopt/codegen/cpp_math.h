// Element functions of generated C++ kernels, with the results of torch's CPU kernels. Part of cpp_runtime.h.
#pragma once
#include <cmath>
#include "cpp_vec.h"
#if __has_include(<sleef.h>) && defined(__x86_64__)
#include <sleef.h>
#define FX_HAVE_SLEEF 1
#endif

namespace fx {

#if defined(FX_HAVE_SLEEF) && defined(__AVX512F__)
#define FX_SLEEF16(X, F, ACC, ...) \
  if constexpr (sizeof(X) == 64 && std::is_same_v<Elem<X>, float>) return (X)Sleef_##F##f16_##ACC(__VA_ARGS__); \
  if constexpr (sizeof(X) == 64 && std::is_same_v<Elem<X>, double>) return (X)Sleef_##F##d8_##ACC(__VA_ARGS__);
#else
#define FX_SLEEF16(X, F, ACC, ...)
#endif
#if defined(FX_HAVE_SLEEF) && defined(__AVX2__)
#define FX_SLEEF8(X, F, ACC, ...) \
  if constexpr (sizeof(X) == 32 && std::is_same_v<Elem<X>, float>) return (X)Sleef_##F##f8_##ACC(__VA_ARGS__); \
  if constexpr (sizeof(X) == 32 && std::is_same_v<Elem<X>, double>) return (X)Sleef_##F##d4_##ACC(__VA_ARGS__);
#else
#define FX_SLEEF8(X, F, ACC, ...)
#endif

// NAME(x): Sleef's function of accuracy ACC (units in the last place, in tenths) where torch ships one of this width.
#define FX_UNARY(NAME, F, ACC)                                       \
  template <class X> FX_INLINE X NAME(X x) {                         \
    if constexpr (is_vector<X>) {                                    \
      FX_SLEEF16(X, F, ACC, x)                                       \
      FX_SLEEF8(X, F, ACC, x)                                        \
    }                                                                \
    return map<Elem<X>>([](Elem<X> v) { return std::NAME(v); }, x);  \
  }
#define FX_BINARY(NAME, F, ACC)                                                             \
  template <class X> FX_INLINE X NAME(X x, X y) {                                           \
    if constexpr (is_vector<X>) {                                                           \
      FX_SLEEF16(X, F, ACC, x, y)                                                           \
      FX_SLEEF8(X, F, ACC, x, y)                                                            \
    }                                                                                       \
    return map<Elem<X>>([](Elem<X> a, Elem<X> b) { return std::NAME(a, b); }, x, y);        \
  }

FX_UNARY(exp2, exp2, u10)
FX_UNARY(expm1, expm1, u10)
FX_UNARY(log, log, u10)
FX_UNARY(log2, log2, u10)
FX_UNARY(log10, log10, u10)
FX_UNARY(log1p, log1p, u10)
FX_UNARY(sin, sin, u10)
FX_UNARY(cos, cos, u10)
FX_UNARY(tan, tan, u10)
FX_UNARY(asin, asin, u10)
FX_UNARY(acos, acos, u10)
FX_UNARY(atan, atan, u10)
FX_UNARY(sinh, sinh, u10)
FX_UNARY(cosh, cosh, u10)
FX_UNARY(tanh, tanh, u10)
FX_UNARY(asinh, asinh, u10)
FX_UNARY(acosh, acosh, u10)
FX_UNARY(atanh, atanh, u10)
FX_UNARY(erf, erf, u10)
FX_UNARY(erfc, erfc, u15)
FX_UNARY(lgamma, lgamma, u10)
FX_BINARY(atan2, atan2, u10)
FX_BINARY(hypot, hypot, u05)

template <class X> FX_INLINE X exp(X x) {
  if constexpr (is_vector<X>) {
    FX_SLEEF16(X, exp, u10, x)
    FX_SLEEF8(X, exp, u10, x)
  }
  return map<Elem<X>>([](Elem<X> v) { return std::exp(v); }, x);
}

// NAME by one instruction where there is one.
#define FX_HARDWARE(NAME, SCALAR, ZMM_PS, ZMM_PD, YMM_PS, YMM_PD)                                    \
  template <class X> FX_INLINE X NAME(X x) {                                                         \
    if constexpr (is_vector<X>) {                                                                    \
      ZMM_PS ZMM_PD YMM_PS YMM_PD                                                                    \
    }                                                                                                \
    return map<Elem<X>>([](Elem<X> v) { return SCALAR(v); }, x);                                     \
  }
#ifdef __AVX512F__
#define FX_ZMM(T, CALL) if constexpr (sizeof(X) == 64 && std::is_same_v<Elem<X>, T>) return (X)CALL;
#else
#define FX_ZMM(T, CALL)
#endif
#ifdef __AVX2__
#define FX_YMM(T, CALL) if constexpr (sizeof(X) == 32 && std::is_same_v<Elem<X>, T>) return (X)CALL;
#else
#define FX_YMM(T, CALL)
#endif
#define FX_ROUND(NAME, SCALAR, MODE)                                                                   \
  FX_HARDWARE(NAME, SCALAR, FX_ZMM(float, _mm512_roundscale_ps(x, MODE)), FX_ZMM(double, _mm512_roundscale_pd(x, MODE)), \
              FX_YMM(float, _mm256_round_ps(x, MODE)), FX_YMM(double, _mm256_round_pd(x, MODE)))
FX_HARDWARE(sqrt, std::sqrt, FX_ZMM(float, _mm512_sqrt_ps(x)), FX_ZMM(double, _mm512_sqrt_pd(x)),
            FX_YMM(float, _mm256_sqrt_ps(x)), FX_YMM(double, _mm256_sqrt_pd(x)))
FX_ROUND(floor_, std::floor, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)
FX_ROUND(ceil_, std::ceil, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)
FX_ROUND(trunc_, std::trunc, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)
FX_ROUND(round_, std::nearbyint, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

template <class X> constexpr bool is_float = std::is_floating_point_v<Elem<X>>;
template <class X> FX_INLINE X floor(X x) { if constexpr (is_float<X>) return floor_(x); else return x; }
template <class X> FX_INLINE X ceil(X x) { if constexpr (is_float<X>) return ceil_(x); else return x; }
template <class X> FX_INLINE X trunc(X x) { if constexpr (is_float<X>) return trunc_(x); else return x; }
template <class X> FX_INLINE X round(X x) { if constexpr (is_float<X>) return round_(x); else return x; }

template <class X> FX_INLINE X constant(Elem<X> c) { return splat<lanes<X>>(c); }
template <class X> FX_INLINE X reciprocal(X x) { return constant<X>(1) / x; }
template <class X> FX_INLINE X rsqrt(X x) { return constant<X>(1) / sqrt(x); }
template <class X> FX_INLINE X neg(X x) { return static_cast<X>(-x); }
template <class X> FX_INLINE X sigmoid(X x) { return constant<X>(1) / (constant<X>(1) + exp(-x)); }
template <class X> FX_INLINE X bitwise_not(X x) { return static_cast<X>(~x); }
template <class X> using BitsOf = std::conditional_t<sizeof(Elem<X>) == 8, V<uint64_t, lanes<X>>, V<uint32_t, lanes<X>>>;
template <class X> FX_INLINE X abs(X x) {
  if constexpr (is_float<X>) return bits_as<X>(bits_as<BitsOf<X>>(x) & (~constant<BitsOf<X>>(0) >> 1));
  else if constexpr (std::is_unsigned_v<Elem<X>>) return x;
  else return select(x < 0, neg(x), x);
}
template <class X> FX_INLINE X copysign(X x, X y) {
  const auto magnitude = ~constant<BitsOf<X>>(0) >> 1;
  return bits_as<X>((bits_as<BitsOf<X>>(x) & magnitude) | (bits_as<BitsOf<X>>(y) & ~magnitude));
}
template <class X> FX_INLINE X sign(X x) {
  const X zero{}, unit = constant<X>(1);
  if constexpr (std::is_unsigned_v<Elem<X>>) return select(x > zero, unit, zero);
  else return select(x > zero, unit, select(x < zero, neg(unit), zero));
}
template <class X> FX_INLINE auto isnan(X x) { return x != x; }
template <class X> FX_INLINE auto isinf(X x) {
  return abs(x) == constant<X>(std::numeric_limits<Elem<X>>::infinity());
}
template <class X> FX_INLINE auto signbit(X x) {
  if constexpr (is_float<X>) {
    using I = V<typename SignedOf<sizeof(Elem<X>)>::type, lanes<X>>;
    return bits_as<I>(x) < 0;
  } else {
    return x < 0;
  }
}
// The NaN of either side wins.
template <class X> FX_INLINE X maximum(X a, X b) {
  if constexpr (is_float<X>) return select(mask_or(a > b, a != a), a, b);
  else return select(a > b, a, b);
}
template <class X> FX_INLINE X minimum(X a, X b) {
  if constexpr (is_float<X>) return select(mask_or(a < b, a != a), a, b);
  else return select(a < b, a, b);
}
template <class X> FX_INLINE X fmod(X a, X b) {
  if constexpr (is_vector<X>) {
    FX_SLEEF16(X, fmod, , a, b)
    FX_SLEEF8(X, fmod, , a, b)
  }
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) { return std::fmod(p, q); }, a, b);
}
template <class X> FX_INLINE X remainder(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) {
    const Elem<X> r = std::fmod(p, q);
    return r != 0 && (q < 0) != (r < 0) ? r + q : r;
  }, a, b);
}
template <class T> FX_INLINE T floor_quotient(T a, T b) {
  if (b == 0) return a / b;
  const T mod = std::fmod(a, b);
  T quotient = (a - mod) / b;
  if (mod != 0 && (b < 0) != (mod < 0)) quotient -= 1;
  if (quotient == 0) return std::copysign(T(0), a / b);
  const T low = std::floor(quotient);
  return quotient - low > T(0.5) ? low + 1 : low;
}
template <class X> FX_INLINE X floordiv(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) { return floor_quotient(p, q); }, a, b);
}
template <class X> FX_INLINE X truncdiv(X a, X b) { return trunc(a / b); }
template <class X> FX_INLINE X nextafter(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) { return std::nextafter(p, q); }, a, b);
}
// The neighbour in the 16-bit type T: its bits, ordered as sign and magnitude, move by one.
template <class T> FX_INLINE float nextafter16_scalar(float a, float b) {
  if (a != a || b != b) return a + b;
  if (a == b) return b;
  const uint16_t bits = shrink<T>(a);
  if ((bits & 0x7fff) == 0) return widen<T>(static_cast<uint16_t>(b > 0 ? 1 : 0x8001));
  const bool outward = (a < b) == (a > 0);
  return widen<T>(static_cast<uint16_t>(outward ? bits + 1 : bits - 1));
}
template <class T, class X> FX_INLINE X nextafter16(X a, X b) {
  return map<float>([](float p, float q) { return nextafter16_scalar<T>(p, q); }, a, b);
}

// Integer division; a zero divisor is reported by the caller before.
template <class T> FX_INLINE T int_quotient(T a, T b) {
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return static_cast<T>(-a);
  }
  return b == 0 ? T(0) : static_cast<T>(a / b);
}
template <class T> FX_INLINE T int_rest(T a, T b) {
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return b == 0 ? T(0) : static_cast<T>(a % b);
}
template <class X> FX_INLINE X int_truncdiv(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) { return int_quotient(p, q); }, a, b);
}
template <class X> FX_INLINE X int_fmod(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) { return int_rest(p, q); }, a, b);
}
template <class X> FX_INLINE X int_floordiv(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) {
    const Elem<X> quotient = int_quotient(p, q), rest = int_rest(p, q);
    return static_cast<Elem<X>>(quotient - (rest != 0 && (rest < 0) != (q < 0)));
  }, a, b);
}
template <class X> FX_INLINE X int_remainder(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) {
    const Elem<X> rest = int_rest(p, q);
    return static_cast<Elem<X>>(rest != 0 && (rest < 0) != (q < 0) ? rest + q : rest);
  }, a, b);
}
template <class X> FX_INLINE X pow(X a, X b) {
  if constexpr (is_vector<X>) {
    FX_SLEEF16(X, pow, u10, a, b)
    FX_SLEEF8(X, pow, u10, a, b)
  }
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) { return std::pow(p, q); }, a, b);
}
template <class T> FX_INLINE T power(T base, T exponent) {
  if constexpr (std::is_signed_v<T>) {
    if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent & 1 ? -1 : 1) : 0;
  }
  T out = 1;
  for (; exponent; exponent = static_cast<T>(exponent >> 1), base = static_cast<T>(base * base)) {
    if (exponent & 1) out = static_cast<T>(out * base);
  }
  return out;
}
template <class X> FX_INLINE X int_pow(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) { return power(p, q); }, a, b);
}
template <class X> FX_INLINE X lshift(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) {
    constexpr Elem<X> width = sizeof(Elem<X>) * 8;
    return static_cast<Elem<X>>(q < 0 || q >= width ? 0 : static_cast<std::make_unsigned_t<Elem<X>>>(p) << q);
  }, a, b);
}
template <class X> FX_INLINE X rshift(X a, X b) {
  return map<Elem<X>>([](Elem<X> p, Elem<X> q) {
    constexpr Elem<X> width = sizeof(Elem<X>) * 8;
    constexpr Elem<X> last = width - std::is_signed_v<Elem<X>>;
    if (q < 0 || q >= width) return static_cast<Elem<X>>(std::is_signed_v<Elem<X>> ? p >> last : 0);
    return static_cast<Elem<X>>(p >> q);
  }, a, b);
}

// Inverse error function: Giles' rational start (as in torch's calc_erfinv), two Newton steps in the value's own precision.
template <class T> inline T erfinv_scalar(T y) {
  if (!(std::fabs(y) < 1)) return std::fabs(y) == 1 ? std::copysign(std::numeric_limits<T>::infinity(), y)
                                                     : std::numeric_limits<T>::quiet_NaN();
  constexpr double central_top[] = {0.886226899, -1.645349621, 0.914624893, -0.140543331};
  constexpr double central_bottom[] = {-2.118377725, 1.442710462, -0.329097515, 0.012229801};
  constexpr double tail_top[] = {-1.970840454, -1.624906493, 3.429567803, 1.641345311};
  constexpr double tail_bottom[] = {3.543889200, 1.637067800};
  const double v = y;
  double x;
  if (std::fabs(v) <= 0.7) {
    const double z = v * v;
    x = v * (((central_top[3] * z + central_top[2]) * z + central_top[1]) * z + central_top[0]) /
        ((((central_bottom[3] * z + central_bottom[2]) * z + central_bottom[1]) * z + central_bottom[0]) * z + 1.0);
  } else {
    const double z = std::sqrt(-std::log((1.0 - std::fabs(v)) / 2.0));
    x = std::copysign(((tail_top[3] * z + tail_top[2]) * z + tail_top[1]) * z + tail_top[0], v) /
        ((tail_bottom[1] * z + tail_bottom[0]) * z + 1.0);
  }
  for (int i = 0; i < 2; ++i) x -= (std::erf(x) - v) / (1.1283791670955126 * std::exp(-x * x));
  return static_cast<T>(x);
}
template <class X> FX_INLINE X erfinv(X x) { return map<Elem<X>>([](Elem<X> v) { return erfinv_scalar(v); }, x); }

// ---- random numbers: Philox4x32-10 (Salmon et al., SC 2011), words 0 and 1, as fxopt/ir/random_ops.py ----

struct Words { uint32_t first, second; };
FX_INLINE Words philox(int64_t seed, int64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(static_cast<uint64_t>(counter) >> 32), c2 = 0, c3 = 0;
  for (int i = 0; i < 10; ++i) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}
template <class X> FX_INLINE auto rand(X seed, X counter) {
  return map<float>([](int64_t s, int64_t c) { return static_cast<float>(philox(s, c).first >> 8) * 0x1p-24f; }, seed, counter);
}
template <class X> FX_INLINE auto randn(X seed, X counter) {  // Box-Muller; u is in (0, 1], so that its logarithm is finite
  const auto u = map<float>(
      [](int64_t s, int64_t c) { return static_cast<float>((philox(s, c).first >> 8) + 1) * 0x1p-24f; }, seed, counter);
  const auto angle = map<float>(
      [](int64_t s, int64_t c) { return static_cast<float>(philox(s, c).second >> 8) * 3.7450702e-07f; }, seed, counter);
  return sqrt(log(u) * -2.0f) * cos(angle);
}
template <class X> FX_INLINE X randint(X seed, X counter, X low, X high) {
  return map<int64_t>([](int64_t s, int64_t c, int64_t lo, int64_t hi) {
    const Words w = philox(s, c);
    const uint64_t span = static_cast<uint64_t>(hi) - static_cast<uint64_t>(lo);
    const uint64_t word = (static_cast<uint64_t>(w.second) << 32) | w.first;
    return static_cast<int64_t>((span ? word % span : word) + static_cast<uint64_t>(lo));
  }, seed, counter, low, high);
}

}  // namespace fx
