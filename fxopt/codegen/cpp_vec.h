// Vectors of generated C++ kernels: types, lane sets, loads, stores, conversions. Part of cpp_runtime.h.
//
// Values are the compiler's own vector types (GCC and Clang), so arithmetic is written with operators and every element type has
// a vector form. A value of N = 1 lane is a plain scalar; every function here takes either. A bool vector is a mask: an integer
// vector with lanes 0 or -1, of whatever width the comparison that made it had.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#define FX_INLINE inline __attribute__((always_inline))
#define FX_STEP __attribute__((always_inline))
#define FX_TRY(call)                                 \
  do {                                               \
    if (const int64_t fx_error = (call)) return fx_error; \
  } while (0)

namespace fx {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class T, int N> struct VecOf { typedef T type __attribute__((vector_size(N * sizeof(T)))); };
template <class T> struct VecOf<T, 1> { using type = T; };
template <int N> struct VecOf<bool, N> { typedef int8_t type __attribute__((vector_size(N))); };
template <> struct VecOf<bool, 1> { using type = bool; };
template <int N> struct VecOf<bf16, N> : VecOf<float, N> {};
template <int N> struct VecOf<f16, N> : VecOf<float, N> {};
template <> struct VecOf<bf16, 1> { using type = float; };
template <> struct VecOf<f16, 1> { using type = float; };
// The value of N lanes whose elements are stored as T.
template <class T, int N> using V = typename VecOf<T, N>::type;

template <class X> constexpr bool is_vector = !std::is_arithmetic_v<X>;
template <class X, bool = is_vector<X>> struct Shape { using elem = X; static constexpr int lanes = 1; };
template <class X> struct Shape<X, true> {
  using elem = std::decay_t<decltype(std::declval<X>()[0])>;
  static constexpr int lanes = sizeof(X) / sizeof(elem);
};
template <class X> using Elem = typename Shape<X>::elem;
template <class X> constexpr int lanes = Shape<X>::lanes;
template <size_t S> struct SignedOf;
template <> struct SignedOf<1> { using type = int8_t; };
template <> struct SignedOf<2> { using type = int16_t; };
template <> struct SignedOf<4> { using type = int32_t; };
template <> struct SignedOf<8> { using type = int64_t; };
// The mask that comparing values of type X gives.
template <class X> using MaskOf = std::conditional_t<is_vector<X>, V<typename SignedOf<sizeof(Elem<X>)>::type, lanes<X>>, bool>;

template <class To, class From> FX_INLINE To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "bitcast between types of one width");
  To out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}

// x in all N lanes.
template <int N, class T> FX_INLINE V<T, N> splat(T x) {
  if constexpr (N == 1) return x;
  else if constexpr (std::is_same_v<T, bool>) return V<T, N>{} - static_cast<int8_t>(x);
  else return x - V<T, N>{};
}

// Apply a scalar function to every lane.
template <class R, class F, class X, class... Xs> FX_INLINE auto map(F f, X x, Xs... xs) {
  if constexpr (!is_vector<X>) {
    return static_cast<R>(f(x, xs...));
  } else {
    V<R, lanes<X>> out;
    for (int i = 0; i < lanes<X>; ++i) out[i] = f(x[i], xs[i]...);
    return out;
  }
}

// ---- masks ----

template <class M, class From> FX_INLINE M mask_as(From m) {
  if constexpr (std::is_same_v<M, From>) return m;
  else return __builtin_convertvector(m, M);
}
template <class M, class X> FX_INLINE X select(M m, X a, X b) {
  if constexpr (!is_vector<M>) return m ? a : b;
  else return mask_as<MaskOf<X>>(m) ? a : b;
}
template <class A, class B> FX_INLINE A mask_and(A a, B b) { return a & mask_as<A>(b); }
template <class A, class B> FX_INLINE A mask_or(A a, B b) { return a | mask_as<A>(b); }
template <class A, class B> FX_INLINE A mask_xor(A a, B b) { return a ^ mask_as<A>(b); }
template <class A> FX_INLINE A mask_not(A a) {
  if constexpr (is_vector<A>) return ~a;
  else return !a;
}
template <class M, class A, class B> FX_INLINE M mask_select(M m, A a, B b) {
  return mask_or(mask_and(m, a), mask_and(mask_not(m), b));
}

// ---- lane sets: which lanes of a step exist ----

struct All {};
struct First { int64_t count; };
template <int N> struct Some { V<int8_t, N> mask; };

template <int N> FX_INLINE V<int8_t, N> lane_mask(All) { return V<int8_t, N>{} - static_cast<int8_t>(1); }
template <int N> FX_INLINE V<int8_t, N> lane_mask(First on) {
  V<int8_t, N> lane;
  for (int i = 0; i < N; ++i) lane[i] = static_cast<int8_t>(i);
  return lane < static_cast<int8_t>(on.count);
}
template <int N> FX_INLINE V<int8_t, N> lane_mask(Some<N> on) { return on.mask; }
FX_INLINE constexpr bool has(All, int) { return true; }
FX_INLINE bool has(First on, int i) { return i < on.count; }
template <int N> FX_INLINE bool has(const Some<N>& on, int i) { return on.mask[i] != 0; }

// The lanes of `on` where `m` holds.
template <class M, class On> FX_INLINE Some<lanes<M>> narrow(M m, On on) {
  constexpr int N = lanes<M>;
  return {mask_as<V<int8_t, N>>(m) & lane_mask<N>(on)};
}
// x in the lanes of `on`, `other` elsewhere.
template <class X> FX_INLINE X keep(All, X x, X) { return x; }
template <class On, class X> FX_INLINE X keep(On on, X x, X other) { return select(lane_mask<lanes<X>>(on), x, other); }

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
template <class M> FX_INLINE uint64_t mask_bits(M m) {
  if constexpr (sizeof(M) == 64 && sizeof(Elem<M>) == 1) return _mm512_movepi8_mask((__m512i)m);
  else if constexpr (sizeof(M) == 32 && sizeof(Elem<M>) == 1) return _mm256_movepi8_mask((__m256i)m);
  else if constexpr (sizeof(M) == 16 && sizeof(Elem<M>) == 1) return _mm_movepi8_mask((__m128i)m);
  else {
    uint64_t bits = 0;
    for (int i = 0; i < lanes<M>; ++i) bits |= uint64_t(m[i] & 1) << i;
    return bits;
  }
}
template <int N> FX_INLINE uint64_t lane_bits(First on) { return on.count >= 64 ? ~uint64_t(0) : (uint64_t(1) << on.count) - 1; }
template <int N> FX_INLINE uint64_t lane_bits(Some<N> on) { return mask_bits(on.mask); }
#define FX_MASKED_MEMORY 1
#endif

template <class M, class On> FX_INLINE bool any(M m, On on) {
  if constexpr (!is_vector<M>) {
    return m;
  } else {
    const auto live = narrow(m, on).mask;
    uint64_t words[(sizeof(live) + 7) / 8] = {};
    std::memcpy(words, &live, sizeof(live));
    uint64_t joined = 0;
    for (uint64_t word : words) joined |= word;
    return joined != 0;
  }
}

// ---- memory ----

template <class X> FX_INLINE X raw_load(const void* p, All) {
  X out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
template <class X> FX_INLINE void raw_store(void* p, X x, All) { std::memcpy(p, &x, sizeof(x)); }

template <class X, class On> FX_INLINE X raw_load(const void* p, On on) {
#ifdef FX_MASKED_MEMORY
  [[maybe_unused]] const uint64_t k = lane_bits<lanes<X>>(on);
#define FX_LOAD(BYTES, WIDTH, PREFIX, TYPE) \
  if constexpr (sizeof(X) == BYTES && sizeof(Elem<X>) * 8 == WIDTH) return (X)PREFIX##_maskz_loadu_epi##WIDTH(k, p);
  FX_LOAD(64, 8, _mm512, __m512i) FX_LOAD(64, 16, _mm512, __m512i) FX_LOAD(64, 32, _mm512, __m512i) FX_LOAD(64, 64, _mm512, __m512i)
  FX_LOAD(32, 8, _mm256, __m256i) FX_LOAD(32, 16, _mm256, __m256i) FX_LOAD(32, 32, _mm256, __m256i) FX_LOAD(32, 64, _mm256, __m256i)
  FX_LOAD(16, 8, _mm, __m128i) FX_LOAD(16, 16, _mm, __m128i) FX_LOAD(16, 32, _mm, __m128i) FX_LOAD(16, 64, _mm, __m128i)
#undef FX_LOAD
#endif
  X out{};
  for (int i = 0; i < lanes<X>; ++i) {
    if (has(on, i)) out[i] = static_cast<const Elem<X>*>(p)[i];
  }
  return out;
}
template <class X, class On> FX_INLINE void raw_store(void* p, X x, On on) {
#ifdef FX_MASKED_MEMORY
  [[maybe_unused]] const uint64_t k = lane_bits<lanes<X>>(on);
#define FX_STORE(BYTES, WIDTH, PREFIX, TYPE) \
  if constexpr (sizeof(X) == BYTES && sizeof(Elem<X>) * 8 == WIDTH) return PREFIX##_mask_storeu_epi##WIDTH(p, k, (TYPE)x);
  FX_STORE(64, 8, _mm512, __m512i) FX_STORE(64, 16, _mm512, __m512i) FX_STORE(64, 32, _mm512, __m512i) FX_STORE(64, 64, _mm512, __m512i)
  FX_STORE(32, 8, _mm256, __m256i) FX_STORE(32, 16, _mm256, __m256i) FX_STORE(32, 32, _mm256, __m256i) FX_STORE(32, 64, _mm256, __m256i)
  FX_STORE(16, 8, _mm, __m128i) FX_STORE(16, 16, _mm, __m128i) FX_STORE(16, 32, _mm, __m128i) FX_STORE(16, 64, _mm, __m128i)
#undef FX_STORE
#endif
  for (int i = 0; i < lanes<X>; ++i) {
    if (has(on, i)) static_cast<Elem<X>*>(p)[i] = x[i];
  }
}

// Stored form of T: what its N lanes are in memory.
template <class T> struct Stored { using type = T; };
template <> struct Stored<bool> { using type = uint8_t; };
template <> struct Stored<bf16> { using type = uint16_t; };
template <> struct Stored<f16> { using type = uint16_t; };
template <class T, int N> using Raw = V<typename Stored<T>::type, N>;

template <class T, class X> FX_INLINE auto widen(X raw) {  // memory form -> value
  constexpr int N = lanes<X>;
  if constexpr (std::is_same_v<T, bool>) {
    return raw != 0;
  } else if constexpr (std::is_same_v<T, bf16>) {
    if constexpr (N == 1) return bits_as<float>(static_cast<uint32_t>(raw) << 16);
    else return bits_as<V<float, N>>(__builtin_convertvector(raw, V<uint32_t, N>) << 16);
  } else if constexpr (std::is_same_v<T, f16>) {
#ifdef __AVX512F__
    if constexpr (N == 16) return (V<float, 16>)_mm512_cvtph_ps((__m256i)raw);
#endif
#ifdef __F16C__
    if constexpr (N == 8) return (V<float, 8>)_mm256_cvtph_ps((__m128i)raw);
#endif
    return map<float>([](uint16_t h) { return static_cast<float>(bits_as<_Float16>(h)); }, raw);
  } else {
    return raw;
  }
}
template <class T, class X> FX_INLINE auto shrink(X x) {  // value -> memory form, rounding to nearest even
  constexpr int N = lanes<X>;
  if constexpr (std::is_same_v<T, bool>) {
    if constexpr (N == 1) return static_cast<uint8_t>(x);
    else return __builtin_convertvector(x & 1, V<uint8_t, N>);
  } else if constexpr (std::is_same_v<T, bf16>) {
    using U = V<uint32_t, N>;
    const U bits = bits_as<U>(x);
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U safe = select(x != x, (bits & 0u) + 0x7fc0u, rounded);
    if constexpr (N == 1) return static_cast<uint16_t>(safe);
    else return __builtin_convertvector(safe, V<uint16_t, N>);
  } else if constexpr (std::is_same_v<T, f16>) {
#ifdef __AVX512F__
    if constexpr (N == 16) return (V<uint16_t, 16>)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
#ifdef __F16C__
    if constexpr (N == 8) return (V<uint16_t, 8>)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
    return map<uint16_t>([](float f) { return bits_as<uint16_t>(static_cast<_Float16>(f)); }, x);
  } else {
    return x;
  }
}

template <int N, class T, class On> FX_INLINE auto load(const T* p, On on) {
  return widen<T>(raw_load<Raw<T, N>>(p, on));
}
// Element p[at + i*stride] in lane i.
template <int N, class T, class On> FX_INLINE auto load_strided(const T* p, int64_t stride, On on) {
  Raw<T, N> raw{};
  for (int i = 0; i < N; ++i) {
    if (has(on, i)) raw[i] = raw_load<typename Stored<T>::type>(p + i * stride, All{});
  }
  return widen<T>(raw);
}
template <class X, size_t... I> FX_INLINE X every_second(X low, X high, std::index_sequence<I...>) {
  return __builtin_shufflevector(low, high, static_cast<int>(2 * I < sizeof...(I) ? 2 * I : 2 * I + 1)...);
}
// Element p[2*i] in lane i: two plain loads, of which the second ends with the last element wanted.
template <int N, class T, class On> FX_INLINE auto load_every_second(const T* p, On on) {
  if constexpr (N > 1 && std::is_same_v<On, All>) {
    using R = Raw<T, N>;
    return widen<T>(every_second(raw_load<R>(p, on), raw_load<R>(p + N - 1, on), std::make_index_sequence<N>{}));
  } else {
    return load_strided<N>(p, 2, on);
  }
}
template <class T, class I, class On> FX_INLINE auto gather(const T* p, I index, On on) {
  Raw<T, lanes<I>> raw{};
  for (int i = 0; i < lanes<I>; ++i) {
    if (has(on, i)) raw[i] = raw_load<typename Stored<T>::type>(p + index[i], All{});
  }
  return widen<T>(raw);
}
template <class T> FX_INLINE V<T, 1> load1(const T* p) { return widen<T>(raw_load<typename Stored<T>::type>(p, All{})); }

template <class T, class X, class On> FX_INLINE void store(T* p, X x, On on) { raw_store(p, shrink<T>(x), on); }
template <class T, class X> FX_INLINE void store1(T* p, X x) { raw_store(p, shrink<T>(x), All{}); }
template <class T, class X, class On> FX_INLINE void store_strided(T* p, int64_t stride, X x, On on) {
  const auto raw = shrink<T>(x);
  for (int i = 0; i < lanes<X>; ++i) {
    if (has(on, i)) std::memcpy(p + i * stride, &reinterpret_cast<const Elem<decltype(raw)>*>(&raw)[i], sizeof(T));
  }
}
template <class T, class X, class I, class On> FX_INLINE void scatter(T* p, I index, X x, On on) {
  const auto raw = shrink<T>(x);
  for (int i = 0; i < lanes<X>; ++i) {
    if (has(on, i)) std::memcpy(p + index[i], &reinterpret_cast<const Elem<decltype(raw)>*>(&raw)[i], sizeof(T));
  }
}
// What is in memory after adding x to it, as bool adds: or.
template <class T, class X> FX_INLINE X sum_of(X old, X x) {
  if constexpr (std::is_same_v<T, bool>) return old | x;
  else return static_cast<X>(old + x);
}
template <class T, class X> FX_INLINE void add1(T* p, X x) { store1(p, sum_of<T>(load1(p), static_cast<V<T, 1>>(x))); }
template <class T, class X, class On> FX_INLINE void add(T* p, X x, On on) {
  const auto old = load<lanes<X>>(p, on);
  if constexpr (std::is_same_v<T, bool>) store(p, mask_or(old, x), on);
  else store(p, old + x, on);
}
// One lane after the other, because lanes may meet in one element.
template <class T, class X, class I, class On> FX_INLINE void scatter_add(T* p, I index, X x, On on) {
  for (int i = 0; i < lanes<X>; ++i) {
    if (has(on, i)) add1(p + index[i], x[i]);
  }
}
template <class T, class X, class On> FX_INLINE void add_strided(T* p, int64_t stride, X x, On on) {
  for (int i = 0; i < lanes<X>; ++i) {
    if (has(on, i)) add1(p + i * stride, x[i]);
  }
}
template <int Base, class X, size_t... I> FX_INLINE X interleaved(X a, X b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, static_cast<int>((I % 2) * sizeof...(I) + Base + I / 2)...);
}
// even[i] at p[2*i] and odd[i] at p[2*i + 1].
template <class T, class X, class On> FX_INLINE void store_pairs(T* p, X even, X odd, On on) {
  constexpr int N = lanes<X>;
  if constexpr (N > 1 && std::is_same_v<On, All>) {
    const auto a = shrink<T>(even), b = shrink<T>(odd);
    raw_store(p, interleaved<0>(a, b, std::make_index_sequence<N>{}), on);
    raw_store(p + N, interleaved<N / 2>(a, b, std::make_index_sequence<N>{}), on);
  } else {
    store_strided(p, 2, even, on);
    store_strided(p + 1, 2, odd, on);
  }
}
// The perfect-shuffle transpose of N vectors: log2(N) rounds of interleaving row i with row i + N/2.
template <int Rounds, class X, int N> FX_INLINE void transpose(X (&row)[N]) {
  if constexpr (Rounds > 0) {
    X next[N];
#pragma GCC unroll 64
    for (int i = 0; i < N / 2; ++i) {
      next[2 * i] = interleaved<0>(row[i], row[i + N / 2], std::make_index_sequence<N>{});
      next[2 * i + 1] = interleaved<N / 2>(row[i], row[i + N / 2], std::make_index_sequence<N>{});
    }
    transpose<Rounds - 1>(next);
#pragma GCC unroll 64
    for (int i = 0; i < N; ++i) row[i] = next[i];
  }
}
constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }
// tile[r*N + i] = p[i*stride + r] for r < rows and the lanes i of `on`: columns of memory become vectors.
template <int N, class T, class On> FX_INLINE void load_transposed(T* tile, const T* p, int64_t stride, int64_t rows, On on) {
  if constexpr (std::is_same_v<On, All>) {
    if (rows == N) {
      using X = Raw<T, N>;
      X row[N];
#pragma GCC unroll 64
      for (int i = 0; i < N; ++i) row[i] = raw_load<X>(p + i * stride, All{});
      transpose<log2_of(N)>(row);
#pragma GCC unroll 64
      for (int i = 0; i < N; ++i) raw_store(tile + i * N, row[i], All{});
      return;
    }
  }
  for (int i = 0; i < N; ++i) {
    if (has(on, i)) {
      for (int64_t r = 0; r < rows; ++r) tile[r * N + i] = p[i * stride + r];
    }
  }
}
// first, first + step, ... in N lanes.
template <class T, int N> FX_INLINE V<T, N> iota(int64_t first, int64_t step) {
  V<T, N> out;
  for (int i = 0; i < N; ++i) out[i] = static_cast<T>(i);
  return out * static_cast<T>(step) + static_cast<T>(first);
}

// ---- conversions ----

// To element type T as torch's .to() on a CPU: truncation, wrapping, and the hardware's answer for what does not fit.
template <class T, class X> FX_INLINE auto cast(X x) {
  constexpr int N = lanes<X>;
  using From = Elem<X>;
  if constexpr (std::is_same_v<From, T>) {
    return x;
  } else if constexpr (N == 1) {
    if constexpr (std::is_floating_point_v<From> && std::is_integral_v<T> && sizeof(T) < 4) {
      return static_cast<T>(static_cast<std::conditional_t<std::is_unsigned_v<T>, int64_t, int32_t>>(x));
    } else {
      return static_cast<T>(x);
    }
  } else if constexpr (std::is_floating_point_v<From> && std::is_integral_v<T> && sizeof(T) < 4) {
    using Wide = std::conditional_t<std::is_unsigned_v<T>, int64_t, int32_t>;
    return __builtin_convertvector(__builtin_convertvector(x, V<Wide, N>), V<T, N>);
  } else {
    return __builtin_convertvector(x, V<T, N>);
  }
}
template <class T, class M> FX_INLINE auto from_bool(M m) {
  if constexpr (!is_vector<M>) return static_cast<V<T, 1>>(m);
  else return cast<Elem<V<T, lanes<M>>>>(m & 1);
}
template <class X> FX_INLINE auto to_bool(X x) { return x != 0; }

}  // namespace fx
