"""The text of a few C++ kernels. Accept a change with EXPECTTEST_ACCEPT=1."""
# ruff: noqa: E501

from __future__ import annotations

from expecttest import TestCase

from fxopt.codegen.cpp import print_nest
from tests.codegen import triton_nests as nests
from tests.codegen.cpp_harness import Capability
from tests.codegen.triton_nests import BF16, F32, Case

WIDE = Capability("AVX512")


def text(case: Case) -> str:
    return print_nest(case.region, WIDE).text


class Goldens(TestCase):
    def test_layer_norm(self) -> None:
        """Three passes over a row: the sum, the squares, the result; statistics stored once per row."""
        self.assertExpectedInline(
            text(nests.layer_norm(1024, 384, F32)),
            """\
extern "C" int64_t fx_223d39954102714a(void** buffers, [[maybe_unused]] const int64_t* sizes) {
  constexpr int W = 16;
  struct A0 { fx::Sum<float, W> a0; void merge(const A0& o) { a0.merge(o.a0); } };
  struct A1 { fx::Sum<float, W> a0; void merge(const A1& o) { a0.merge(o.a0); } };
  const int64_t count = 1024;
  return fx::parallel(count, fx::team_size(count, fx::grain(6934)), [&](int64_t begin, int64_t end, int64_t) -> int64_t {
    auto* const b0 = static_cast<const float*>(buffers[0]);
    auto* const b1 = static_cast<const float*>(buffers[1]);
    auto* const b2 = static_cast<float*>(buffers[2]);
    auto* const b3 = static_cast<const float*>(buffers[3]);
    auto* const b4 = static_cast<const float*>(buffers[4]);
    auto* const b5 = static_cast<float*>(buffers[5]);
    auto* const b6 = static_cast<float*>(buffers[6]);
    const auto t8 = fx::cast<float>(int64_t(384));
    for (int64_t at = begin; at < end; ++at) {
      const int64_t p0 = at;
      A0 acc0[4];
      if (const int64_t error = fx::sweep<W, 4, false, false>(0, 384, acc0, [&](int64_t r0, [[maybe_unused]] auto on, A0& acc) FX_STEP -> int64_t {
        const auto t1 = fx::load<W>(b0 + (384 * p0 + r0), on);
        const auto t2 = fx::load<W>(b1 + (384 * p0 + r0), on);
        const auto t3 = (t1 + t2);
        acc.a0.add(t3, on);
        return 0;
      })) return error;
      fx::gather_ways(acc0);
      const auto t4 = acc0[0].a0.total();
      const auto t9 = (t4 / t8);
      const auto t10 = fx::splat<W>(t9);
      A1 acc1[4];
      if (const int64_t error = fx::sweep<W, 4, false, false>(0, 384, acc1, [&](int64_t r0, [[maybe_unused]] auto on, A1& acc) FX_STEP -> int64_t {
        const auto t5 = fx::load<W>(b0 + (384 * p0 + r0), on);
        const auto t6 = fx::load<W>(b1 + (384 * p0 + r0), on);
        const auto t7 = (t5 + t6);
        const auto t11 = (t7 - t10);
        const auto t12 = (t11 * t11);
        acc.a0.add(t12, on);
        return 0;
      })) return error;
      fx::gather_ways(acc1);
      const auto t13 = acc1[0].a0.total();
      const auto t18 = (t13 / t8);
      const auto t19 = (t18 + 9.999999747378752e-06f);
      const auto t20 = fx::rsqrt(t19);
      const auto t21 = fx::splat<W>(t20);
      if (const int64_t error = fx::each<W, false>(0, 384, [&](int64_t r0, [[maybe_unused]] auto on) FX_STEP -> int64_t {
        const auto t14 = fx::load<W>(b0 + (384 * p0 + r0), on);
        const auto t15 = fx::load<W>(b1 + (384 * p0 + r0), on);
        const auto t16 = (t14 + t15);
        const auto t17 = (t16 - t10);
        const auto t22 = (t17 * t21);
        const auto t23 = fx::load<W>(b3 + r0, on);
        const auto t24 = (t22 * t23);
        const auto t25 = fx::load<W>(b4 + r0, on);
        const auto t26 = (t24 + t25);
        fx::store(b2 + (384 * p0 + r0), t26, on);
        return 0;
      })) return error;
      fx::store1(b5 + p0, t9);
      fx::store1(b6 + p0, t20);
    }
    return 0;
  });
}
""",
        )

    def test_softmax_bfloat16(self) -> None:
        """The exponentials of the second pass are kept for the third."""
        self.assertExpectedInline(
            text(nests.softmax(12, 1000, BF16)),
            """\
extern "C" int64_t fx_4b8782c8a3cef410(void** buffers, [[maybe_unused]] const int64_t* sizes) {
  constexpr int W = 16;
  struct A0 { fx::Max<float, W> a0; void merge(const A0& o) { a0.merge(o.a0); } };
  struct A1 { fx::Sum<float, W> a0; void merge(const A1& o) { a0.merge(o.a0); } };
  const int64_t count = 12;
  return fx::parallel(count, fx::team_size(count, fx::grain(29002)), [&](int64_t begin, int64_t end, int64_t) -> int64_t {
    auto* const b0 = static_cast<const fx::bf16*>(buffers[0]);
    auto* const b1 = static_cast<fx::bf16*>(buffers[1]);
    const fx::Scratch<float> kept0(1000);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t p0 = at;
      A0 acc0[4];
      if (const int64_t error = fx::sweep<W, 4, true, false>(0, 1000, acc0, [&](int64_t r0, [[maybe_unused]] auto on, A0& acc) FX_STEP -> int64_t {
        const auto t1 = fx::load<W>(b0 + (1000 * p0 + r0), on);
        acc.a0.add(t1, on);
        return 0;
      })) return error;
      fx::gather_ways(acc0);
      const auto t2 = acc0[0].a0.total();
      const auto t4 = fx::splat<W>(t2);
      A1 acc1[4];
      if (const int64_t error = fx::sweep<W, 4, true, false>(0, 1000, acc1, [&](int64_t r0, [[maybe_unused]] auto on, A1& acc) FX_STEP -> int64_t {
        const auto t3 = fx::load<W>(b0 + (1000 * p0 + r0), on);
        const auto t5 = (t3 - t4);
        const auto t6 = fx::exp(t5);
        fx::store(kept0.data + r0, t6, on);
        acc.a0.add(t6, on);
        return 0;
      })) return error;
      fx::gather_ways(acc1);
      const auto t7 = acc1[0].a0.total();
      const auto t8 = fx::splat<W>(t7);
      if (const int64_t error = fx::each<W, true>(0, 1000, [&](int64_t r0, [[maybe_unused]] auto on) FX_STEP -> int64_t {
        const auto t9 = (fx::load<W>(kept0.data + r0, on) / t8);
        fx::store(b1 + (1000 * p0 + r0), t9, on);
        return 0;
      })) return error;
    }
    return 0;
  });
}
""",
        )

    def test_column_sums(self) -> None:
        """Four vectors of columns side by side."""
        self.assertExpectedInline(
            text(nests.reduction("sum", 384, 1000, F32, columns=True)),
            """\
extern "C" int64_t fx_e28b5a4a2600c953(void** buffers, [[maybe_unused]] const int64_t* sizes) {
  constexpr int W = 16;
  struct A0 { fx::LongSum<float, W> a0; void merge(const A0& o) { a0.merge(o.a0); } void flush() { a0.flush(); } };
  const int64_t count = 6;
  return fx::parallel(count, fx::team_size(count, fx::grain(256128)), [&](int64_t begin, int64_t end, int64_t) -> int64_t {
    auto* const b0 = static_cast<const float*>(buffers[0]);
    auto* const b1 = static_cast<float*>(buffers[1]);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t p0_lo = at * 64;
      const int64_t p0_hi = fx::min_of(p0_lo + 64, 384);
      if (const int64_t error = fx::tiles<W, 4, false>(p0_lo, p0_hi, [&](int64_t p0_at, [[maybe_unused]] auto count, [[maybe_unused]] auto on) -> int64_t {
        A0 acc[count.value];
        int run = 0;
        for (int64_t r0 = 0; r0 < 1000; ++r0) {
          #pragma GCC unroll 8
          for (int u = 0; u < count.value; ++u) {
            const int64_t p0 = p0_at + u * W;
            const auto t1 = fx::load<W>(b0 + (384 * r0 + p0), on);
            acc[u].a0.add(t1, on);
          }
          if (++run == fx::RUN) {
            run = 0;
            for (auto& one : acc) one.flush();
          }
        }
        for (int u = 0; u < count.value; ++u) {
          const int64_t p0 = p0_at + u * W;
          const auto t2 = acc[u].a0.lanes();
          fx::store(b1 + p0, t2, on);
        }
        return 0;
      })) return error;
    }
    return 0;
  });
}
""",
        )

    def test_gather(self) -> None:
        """Rows of a table: the index is checked once per row."""
        self.assertExpectedInline(
            text(nests.gather()),
            """\
extern "C" int64_t fx_b274abcee8822b1a(void** buffers, [[maybe_unused]] const int64_t* sizes) {
  constexpr int W = 16;
  const int64_t count = 9;
  return fx::parallel(count, fx::team_size(count, fx::grain(204)), [&](int64_t begin, int64_t end, int64_t) -> int64_t {
    auto* const b0 = static_cast<float*>(buffers[0]);
    auto* const b1 = static_cast<const int64_t*>(buffers[1]);
    auto* const b2 = static_cast<const float*>(buffers[2]);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t p0 = at;
      const auto t1 = fx::load1(b1 + p0);
      const auto t2 = fx::wrapped(t1, int64_t(20));
      if (fx::outside(t2, int64_t(20), fx::All{})) return 1;
      if (const int64_t error = fx::each<W, true>(0, 12, [&](int64_t p1, [[maybe_unused]] auto on) FX_STEP -> int64_t {
        const auto t3 = fx::load<W>(b2 + (12 * t2 + p1), on);
        fx::store(b0 + (12 * p0 + p1), t3, on);
        return 0;
      })) return error;
    }
    return 0;
  });
}
""",
        )

    def test_transposed(self) -> None:
        """Square tiles, transposed in registers."""
        self.assertExpectedInline(
            text(nests.transposed(F32, 128, 128)),
            """\
extern "C" int64_t fx_ba9b4628bc124c2c(void** buffers, [[maybe_unused]] const int64_t* sizes) {
  constexpr int W = 16;
  const int64_t count = 4;
  return fx::parallel(count, fx::team_size(count, fx::grain(28672)), [&](int64_t begin, int64_t end, int64_t) -> int64_t {
    auto* const b0 = static_cast<const float*>(buffers[0]);
    auto* const b1 = static_cast<float*>(buffers[1]);
    auto* const b2 = static_cast<const float*>(buffers[2]);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t p1_lo = at % (2) * 64;
      const int64_t p1_hi = fx::min_of(p1_lo + 64, 128);
      const int64_t p0_lo = at / (2) * 64;
      const int64_t p0_hi = fx::min_of(p0_lo + 64, 128);
      for (int64_t p0_at = p0_lo; p0_at < p0_hi; p0_at += W) {
        const int64_t p0_end = fx::min_of(p0_at + W, p0_hi);
        if (const int64_t error = fx::each<W, false>(p1_lo, p1_hi, [&](int64_t p1, [[maybe_unused]] auto on) FX_STEP -> int64_t {
          alignas(64) float tile0[W * W];
          fx::load_transposed<W>(tile0, b0 + (128 * p1 + p0_at), 128, p0_end - p0_at, on);
          for (int64_t p0 = p0_at; p0 < p0_end; ++p0) {
            const auto t1 = fx::load<W>(b2 + (128 * p0 + p1), on);
            const auto t2 = (fx::load<W>(tile0 + (p0 - p0_at) * W, on) + t1);
            fx::store(b1 + (128 * p0 + p1), t2, on);
          }
          return 0;
        })) return error;
      }
    }
    return 0;
  });
}
""",
        )
