// What generated C++ kernels are made of: vectors and element functions (included), accumulators, scans, loops, threads.
#pragma once
#include <atomic>
#include <new>
#include <omp.h>
#include "cpp_math.h"

namespace fx {

// ---- accumulators: add(value, lanes), merge(other); lanes() per lane, total() over the lanes ----

template <class T, class X, class F> FX_INLINE T fold(X x, F f) {
  if constexpr (!is_vector<X>) {
    return x;
  } else {
    constexpr int N = lanes<X>;
    if constexpr (N == 2) {
      return f(static_cast<T>(x[0]), static_cast<T>(x[1]));
    } else {
      using Half = V<Elem<X>, N / 2>;
      Half halves[2];
      std::memcpy(halves, &x, sizeof(x));
      return fold<T>(f(halves[0], halves[1]), f);
    }
  }
}

// The sum of a vector's elements, float ones in double: of a short row's sum this is most of the rounding.
template <class T, class X> FX_INLINE T sum_of(X x) {
  const auto add = [](auto a, auto b) { return a + b; };
  if constexpr (std::is_same_v<T, float>) return static_cast<float>(fold<double>(cast<double>(x), add));
  else return fold<T>(x, add);
}

#define FX_FOLDING(NAME, IDENTITY, COMBINE)                                             \
  template <class T, int N> struct NAME {                                               \
    using X = V<T, N>;                                                                  \
    X acc = splat<N>(static_cast<T>(IDENTITY));                                         \
    template <class Y> static FX_INLINE Y combine(Y a, Y b) { return COMBINE; }         \
    FX_INLINE void add(X x, All) { acc = combine(acc, x); }                             \
    template <class On> FX_INLINE void add(X x, On on) { acc = keep(on, combine(acc, x), acc); } \
    FX_INLINE void merge(const NAME& o) { acc = combine(acc, o.acc); }                  \
    FX_INLINE void flush() {}                                                           \
    FX_INLINE X lanes() const { return acc; }                                           \
    FX_INLINE T total() const { return fold<T>(acc, [](auto a, auto b) { return combine(a, b); }); } \
  };
template <class T> constexpr T lowest = std::numeric_limits<T>::has_infinity ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::lowest();
template <class T> constexpr T highest = std::numeric_limits<T>::has_infinity ? std::numeric_limits<T>::infinity() : std::numeric_limits<T>::max();
FX_FOLDING(FewSum, 0, static_cast<Y>(a + b))
FX_FOLDING(Prod, 1, static_cast<Y>(a * b))
FX_FOLDING(Max, lowest<T>, maximum(a, b))
FX_FOLDING(Min, highest<T>, minimum(a, b))

// A sum of few terms in each lane.
template <class T, int N> struct Sum : FewSum<T, N> {
  FX_INLINE T total() const { return sum_of<T>(this->acc); }
};

// A sum of float terms, in double. It costs up to twice a plain sum, so only sums over several loops take it: those are the
// statistics of batch and group norms, which eager's kernels add up in double, and whose gradients cancel out.
template <int N> struct WideSum {
  using X = V<float, N>;
  V<double, N> acc{};
  FX_INLINE void add(X x, All) { acc = static_cast<V<double, N>>(acc + cast<double>(x)); }
  template <class On> FX_INLINE void add(X x, On on) { add(keep(on, x, X{}), All{}); }
  FX_INLINE void merge(const WideSum& o) { acc = static_cast<V<double, N>>(acc + o.acc); }
  FX_INLINE void flush() {}
  FX_INLINE X lanes() const { return cast<float>(acc); }
  FX_INLINE float total() const { return static_cast<float>(sum_of<double>(acc)); }
};

// A sum of many floating-point terms: short runs are added plainly, then joined with the rounding errors kept (Knuth's two-sum).
template <class T, int N> struct LongSum {
  using X = V<T, N>;
  X run{}, high{}, low{};
  FX_INLINE void add(X x, All) { run += x; }
  template <class On> FX_INLINE void add(X x, On on) { run += keep(on, x, X{}); }
  FX_INLINE void join(X x) {
    const X sum = high + x, back = sum - high;
    low += (high - (sum - back)) + (x - back);
    high = sum;
  }
  FX_INLINE void flush() {
    join(run);
    run = X{};
  }
  FX_INLINE void merge(LongSum o) {
    o.flush();
    flush();
    join(o.high);
    low += o.low;
  }
  // Once an infinity has come in, the error term is NaN and means nothing.
  FX_INLINE X lanes() const {
    LongSum all = *this;
    all.flush();
    return select(all.low == all.low, all.high + all.low, all.high);
  }
  FX_INLINE T total() const { return sum_of<T>(lanes()); }
};

template <int N, bool IsAny> struct Flags {
  V<bool, N> acc = splat<N>(!IsAny);
  template <class M> FX_INLINE void add(M m, All) {
    if constexpr (IsAny) acc = mask_or(acc, m);
    else acc = mask_and(acc, m);
  }
  template <class M, class On> FX_INLINE void add(M m, On on) {
    if constexpr (IsAny) add(mask_and(m, lane_mask<N>(on)), All{});
    else add(mask_or(m, mask_not(lane_mask<N>(on))), All{});
  }
  FX_INLINE void merge(const Flags& o) { add(o.acc, All{}); }
  FX_INLINE void flush() {}
  FX_INLINE V<bool, N> lanes() const { return acc; }
  FX_INLINE bool total() const {
    if constexpr (IsAny) return any(acc, All{});
    else return !any(mask_not(acc), All{});
  }
};
template <class, int N> struct Any : Flags<N, true> {};
template <class, int N> struct Every : Flags<N, false> {};

// The first extreme element: NaN, then the larger (smaller) value, then the smaller index.
template <class T, int N, bool IsMax> struct Arg {
  using X = V<T, N>;
  using I = V<int64_t, N>;
  X best = splat<N>(IsMax ? lowest<T> : highest<T>);
  I where = splat<N>(std::numeric_limits<int64_t>::max());
  template <class Y, class J> static FX_INLINE auto precedes(Y x, J i, Y y, J j) {
    const auto ahead = IsMax ? x > y : x < y;
    const auto equal = mask_and(x == y, i < j);
    if constexpr (!is_float<Y>) return mask_or(ahead, equal);
    else return mask_or(mask_or(mask_and(ahead, y == y), equal),
                        mask_and(x != x, mask_or(y == y, i < j)));
  }
  FX_INLINE void add(X x, I i, All) {
    const auto take = precedes(x, i, best, where);
    best = select(take, x, best);
    where = select(take, i, where);
  }
  template <class On> FX_INLINE void add(X x, I i, On on) {
    const auto take = narrow(precedes(x, i, best, where), on).mask;
    best = select(take, x, best);
    where = select(take, i, where);
  }
  FX_INLINE void merge(const Arg& o) { add(o.best, o.where, All{}); }
  FX_INLINE void flush() {}
  FX_INLINE I lanes() const { return where; }
  FX_INLINE int64_t total() const {
    if constexpr (N == 1) {
      return where;
    } else {
      Arg<T, 1, IsMax> all;
      for (int i = 0; i < N; ++i) all.add(static_cast<T>(best[i]), static_cast<int64_t>(where[i]), All{});
      return all.where;
    }
  }
};
template <class T, int N> struct ArgMax : Arg<T, N, true> {};
template <class T, int N> struct ArgMin : Arg<T, N, false> {};

// ---- scans: step(value) is the result up to and with this value ----

template <class T> using ScanElem = std::conditional_t<std::is_same_v<T, float>, double, T>;  // torch accumulates in double
template <class T, int N> struct CumSum {
  V<ScanElem<T>, N> acc{};
  FX_INLINE V<T, N> step(V<T, N> x) { return cast<T>(acc = static_cast<V<ScanElem<T>, N>>(acc + cast<ScanElem<T>>(x))); }
};
template <class T, int N> struct CumProd {
  V<ScanElem<T>, N> acc = splat<N>(ScanElem<T>(1));
  FX_INLINE V<T, N> step(V<T, N> x) { return cast<T>(acc = static_cast<V<ScanElem<T>, N>>(acc * cast<ScanElem<T>>(x))); }
};
template <class T, int N> struct CumMax {
  V<T, N> acc = splat<N>(lowest<T>);
  FX_INLINE V<T, N> step(V<T, N> x) { return acc = maximum(acc, x); }
};
template <class T, int N> struct CumMin {
  V<T, N> acc = splat<N>(highest<T>);
  FX_INLINE V<T, N> step(V<T, N> x) { return acc = minimum(acc, x); }
};
template <class T, int N> struct LogCumSumExp {
  V<ScanElem<T>, N> acc = splat<N>(lowest<ScanElem<T>>);
  FX_INLINE V<T, N> step(V<T, N> x) {
    using W = ScanElem<T>;
    const auto high = maximum(acc, cast<W>(x)), low = minimum(acc, cast<W>(x));
    const auto infinite = mask_and(high == low, mask_or(high == splat<N>(lowest<W>), high == splat<N>(highest<W>)));
    acc = select(infinite, high, static_cast<V<W, N>>(high + log1p(exp(static_cast<V<W, N>>(low - high)))));
    return cast<T>(acc);
  }
};

// ---- checks ----

// i + size where i is negative.
template <class X> FX_INLINE X wrapped(X i, X size) { return select(i < 0, i + size, i); }
template <class X, class On> FX_INLINE bool outside(X i, X size, On on) { return any(mask_or(i < 0, i >= size), on); }
template <class X, class On> FX_INLINE bool has_zero(X x, On on) { return any(x == 0, on); }

// ---- integer expressions (divisors are positive) ----

template <class X> FX_INLINE X index_div(X a, X b) {
  if constexpr (!is_vector<X>) {
    const X quotient = a / b;
    return quotient - (quotient * b > a);
  } else {
    return int_floordiv(a, b);
  }
}
template <class X> FX_INLINE X index_mod(X a, X b) { return a - index_div(a, b) * b; }
template <class X> FX_INLINE X index_min(X a, X b) { return select(a < b, a, b); }
template <class X> FX_INLINE X index_max(X a, X b) { return select(a > b, a, b); }

// ---- loops ----

template <int U> struct Count { static constexpr int value = U; };
constexpr int RUN = 32;  // additions of one lane between two flushes of a long sum

// step(i, lanes, accumulator) for i = lo, lo + W, ... below hi; U accumulators hide the latency of dependent additions.
template <int W, int U, bool Tail, bool Flush, class A, class F> FX_INLINE int64_t sweep(int64_t lo, int64_t hi, A (&acc)[U], F step) {
  int64_t i = lo;
  for ([[maybe_unused]] int run = 0; i + U * W <= hi; i += U * W) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) FX_TRY(step(i + u * W, All{}, acc[u]));
    if constexpr (Flush) {
      if (++run == RUN) {
        run = 0;
        for (int u = 0; u < U; ++u) acc[u].flush();
      }
    }
  }
  for (; i + W <= hi; i += W) FX_TRY(step(i, All{}, acc[0]));
  if constexpr (Tail && W > 1) {
    if (i < hi) FX_TRY(step(i, First{hi - i}, acc[0]));
  }
  return 0;
}
// All accumulators that took turns, into the first.
template <class A, int U> FX_INLINE void gather_ways(A (&acc)[U]) {
  for (int u = 1; u < U; ++u) acc[0].merge(acc[u]);
}
// step(i, lanes) for i = lo, lo + W, ... below hi.
template <int W, bool Tail, class F> FX_INLINE int64_t each(int64_t lo, int64_t hi, F step) {
  int64_t i = lo;
  for (; i + W <= hi; i += W) FX_TRY(step(i, All{}));
  if constexpr (Tail && W > 1) {
    if (i < hi) FX_TRY(step(i, First{hi - i}));
  }
  return 0;
}
// tile(i, Count<vectors side by side>, lanes): tiles of U vectors, then single vectors.
template <int W, int U, bool Tail, class F> FX_INLINE int64_t tiles(int64_t lo, int64_t hi, F tile) {
  int64_t i = lo;
  for (; i + U * W <= hi; i += U * W) FX_TRY(tile(i, Count<U>{}, All{}));
  if constexpr (U > 1) {
    for (; i + W <= hi; i += W) FX_TRY(tile(i, Count<1>{}, All{}));
  }
  if constexpr (Tail && W > 1) {
    if (i < hi) FX_TRY(tile(i, Count<1>{}, First{hi - i}));
  }
  return 0;
}

FX_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- threads ----

// Iterations a thread should at least get when one costs `cost` units (a cheap operation on one element).
constexpr int64_t grain(int64_t cost) { return cost >= 262144 ? 1 : 262144 / (cost > 0 ? cost : 1); }

FX_INLINE int64_t team_size(int64_t n, int64_t grain) {
  if (n <= grain || omp_in_parallel()) return 1;
  return min_of(omp_get_max_threads(), (n + grain - 1) / grain);
}
// body(begin, end, member) over consecutive parts of [0, n); returns the first error met.
template <class F> int64_t parallel(int64_t n, int64_t team, F body) {
  if (n <= 0) return 0;
  std::atomic<int64_t> error{0};
#pragma omp parallel num_threads(static_cast<int>(team)) if (team > 1)
  {
    const int64_t members = omp_get_num_threads(), member = omp_get_thread_num();
    const int64_t begin = n * member / members, end = n * (member + 1) / members;
    if (begin < end) {
      const int64_t code = body(begin, end, member);
      if (code) error.store(code, std::memory_order_relaxed);
    }
  }
  return error.load(std::memory_order_relaxed);
}

// Memory of one thread, for values that later passes over the same row need again.
template <class T> struct Scratch {
  T* data;
  explicit Scratch(int64_t n) : data(static_cast<T*>(::operator new(static_cast<size_t>(n > 0 ? n : 1) * sizeof(T), std::align_val_t{64}))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data, std::align_val_t{64}); }
};
// One accumulator for each member of a team, joined in order, so that the result depends on the team's size only.
template <class A> struct Partials {
  Scratch<A> all;
  int64_t count;
  explicit Partials(int64_t team) : all(team), count(team) {
    for (int64_t i = 0; i < team; ++i) new (all.data + i) A{};
  }
  FX_INLINE A joined() const {
    A out = all.data[0];
    for (int64_t i = 1; i < count; ++i) out.merge(all.data[i]);
    return out;
  }
};

}  // namespace fx
