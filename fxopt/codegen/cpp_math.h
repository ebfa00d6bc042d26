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
FX_UNARY(asinh, asinh, u10)
FX_UNARY(acosh, acosh, u10)
FX_UNARY(atanh, atanh, u10)
FX_UNARY(erfc, erfc, u15)
FX_UNARY(lgamma, lgamma, u10)
FX_BINARY(atan2, atan2, u10)
FX_BINARY(hypot, hypot, u05)

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

// a*b + c, rounded once where the hardware can.
template <class X> FX_INLINE X fma(X a, X b, X c) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<X, V<float, 16>>) return (X)_mm512_fmadd_ps(a, b, c);
#endif
#ifdef __FMA__
  if constexpr (std::is_same_v<X, V<float, 8>>) return (X)_mm256_fmadd_ps(a, b, c);
#endif
  return a * b + c;
}
// The polynomial with these coefficients, lowest first, at x.
template <class X, int N> FX_INLINE X polynomial(X x, const float (&c)[N]) {
  X out = splat<lanes<X>>(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) out = fma(out, x, splat<lanes<X>>(c[i]));
  return out;
}
// 2**n * x for n in [-151, 129], rounding once into the subnormals.
template <class X> FX_INLINE X scaled(X x, X n) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<X, V<float, 16>>) return (X)_mm512_scalef_ps(x, n);
#endif
  using I = V<int32_t, lanes<X>>;
  const I whole = __builtin_convertvector(n, I), half = whole >> 1;
  return x * bits_as<X>((half + 127) << 23) * bits_as<X>((whole - half + 127) << 23);
}
template <class X> constexpr bool is_float_vector = is_vector<X> && std::is_same_v<Elem<X>, float>;

// float32 vectors of the functions that models use most are computed in place, which leaves the caller's registers alone. The
// polynomials are minimax fits on the ranges given (relative error below 5e-9); results are within 2 units in the last place.
// exp for x in [-104, 89].
template <class X> FX_INLINE X exp_inside(X x) {
  constexpr float c[] = {0.5f, 0.166665181517601f, 0.04166620224714279f, 0.008369024842977524f, 0.0013950724387541413f};
  constexpr int N = lanes<X>;
  const X n = round_(x * splat<N>(1.44269504f));
  const X r = fma(n, splat<N>(2.12194440e-4f), fma(n, splat<N>(-0.693359375f), x));  // x - n*log(2), log(2) in two parts
  return scaled(fma(r * r, polynomial(r, c), r) + splat<N>(1.0f), n);
}
// x, or the limit beyond it; NaN stays.
template <class X> FX_INLINE X at_most(X x, X limit) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<X, V<float, 16>>) return (X)_mm512_min_ps(limit, x);
#endif
  return select(x > limit, limit, x);
}
template <class X> FX_INLINE X at_least(X x, X limit) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<X, V<float, 16>>) return (X)_mm512_max_ps(limit, x);
#endif
  return select(x < limit, limit, x);
}
template <class X> FX_INLINE X exp(X x) {
  if constexpr (is_float_vector<X>) {
    constexpr int N = lanes<X>;
    return exp_inside(at_least(at_most(x, splat<N>(89.0f)), splat<N>(-104.0f)));
  } else {
    if constexpr (is_vector<X>) {
      FX_SLEEF16(X, exp, u10, x)
      FX_SLEEF8(X, exp, u10, x)
    }
    return map<Elem<X>>([](Elem<X> v) { return std::exp(v); }, x);
  }
}
template <class X> FX_INLINE X with_sign_of(X magnitude, X sign) {
  using I = V<int32_t, lanes<X>>;
  return bits_as<X>(bits_as<I>(magnitude) | (bits_as<I>(sign) & std::numeric_limits<int32_t>::min()));
}
template <class X> FX_INLINE X magnitude_of(X x) {
  using I = V<int32_t, lanes<X>>;
  return bits_as<X>(bits_as<I>(x) & std::numeric_limits<int32_t>::max());
}
template <class X> FX_INLINE X erf(X x) {
  if constexpr (is_float_vector<X>) {
    constexpr int N = lanes<X>;
    constexpr float low[] = {0.12837916612625122f, -0.37612634897232056f, 0.11283694207668304f, -0.02685927040874958f,
                             0.005200634244829416f, -0.0008137437398545444f, 8.345225069206208e-05f};  // erf(t)/t - 1 in t*t, t <= 0.93
    constexpr float high[] = {-0.12864848971366882f, -0.6351513266563416f, -0.10623688995838165f, 0.02376207523047924f,
                              -0.0036424649879336357f, 0.000322805397445336f, -1.1231465578021016e-05f};  // log(erfc(t))/t + 1, t <= 4
    const X t = magnitude_of(x);
    const X near = fma(polynomial(x * x, low), x, x);
    const X cut = at_most(t, splat<N>(4.0f));
    const X far = splat<N>(1.0f) - exp_inside(fma(polynomial(cut, high), cut, -cut));
    return select(t > splat<N>(0.93f), with_sign_of(far, x), near);
  } else {
    if constexpr (is_vector<X>) {
      FX_SLEEF16(X, erf, u10, x)
      FX_SLEEF8(X, erf, u10, x)
    }
    return map<Elem<X>>([](Elem<X> v) { return std::erf(v); }, x);
  }
}
template <class X> FX_INLINE X tanh(X x) {
  if constexpr (is_float_vector<X>) {
    constexpr int N = lanes<X>;
    constexpr float low[] = {-0.3333328366279602f, 0.13331490755081177f, -0.05374349653720856f, 0.020650578662753105f,
                             -0.005717036779969931f};  // (tanh(t)/t - 1)/(t*t) in t*t, t <= 0.625
    const X t = magnitude_of(x), s = x * x;
    const X near = fma(polynomial(s, low) * s, x, x);
    const X far = splat<N>(1.0f) - splat<N>(2.0f) / (exp(t + t) + splat<N>(1.0f));
    return select(t > splat<N>(0.625f), with_sign_of(far, x), near);
  } else {
    if constexpr (is_vector<X>) {
      FX_SLEEF16(X, tanh, u10, x)
      FX_SLEEF8(X, tanh, u10, x)
    }
    return map<Elem<X>>([](Elem<X> v) { return std::tanh(v); }, x);
  }
}

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
  for (int i = 0; i < 2; ++i) {  // near 1, erfc against the exact 1 - |v| keeps the digits that erf would lose
    const double slope = 1.1283791670955126 * std::exp(-x * x);
    const double missed = std::fabs(v) <= 0.7 ? std::erf(x) - v : std::copysign(1.0, v) * ((1.0 - std::fabs(v)) - std::erfc(std::fabs(x)));
    x -= missed / slope;
  }
  return static_cast<T>(x);
}
template <class X> FX_INLINE X erfinv(X x) { return map<Elem<X>>([](Elem<X> v) { return erfinv_scalar(v); }, x); }

// ---- random numbers: Philox4x32-10 (Salmon et al., SC 2011), as fxopt/ir/random_ops.py ----

struct Words { uint32_t first, second, third, fourth; };
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
  return {c0, c1, c2, c3};
}
template <class X> FX_INLINE auto rand(X seed, X counter) {
  return map<float>([](int64_t s, int64_t c) {
    const Words w = philox(s, c >> 2);  // shared by four neighbours
    const uint32_t even = c & 2 ? w.third : w.first, odd = c & 2 ? w.fourth : w.second;
    return static_cast<float>((c & 1 ? odd : even) >> 8) * 0x1p-24f;
  }, seed, counter);
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
