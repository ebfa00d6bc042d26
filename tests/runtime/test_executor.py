"""Plans run: values, memory, threads, errors. Kernels are the hand-written C++ of conftest.py."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch

from fxopt.errors import CacheError, PlanError
from fxopt.ir.exprs import floordiv
from fxopt.ir.graph import Role
from fxopt.ir.kernel import Artifact
from fxopt.ir.region import Alias, Call, Ref, Size
from fxopt.runtime import executor
from fxopt.runtime.executor import Executor
from fxopt.runtime.memory import plan_memory
from fxopt.runtime.plan import InputSpec, Plan, SymbolSource
from tests.runtime.plans import S0, buffer, increment, launch, plan, tensor

Kernels = dict[str, Artifact]


def bind(made: Plan, kernels: Kernels, **kwargs: Any) -> Executor:
    return Executor(Plan.from_json(plan_memory(made).to_json()), kernels, **kwargs)


def test_runs_a_plan(kernels: Kernels) -> None:
    steps = [launch("axpy", "x", "y", "a", sizes=(6,)), Call("aten::mul.Tensor", (Ref("a"), 3.0), outputs=("out",))]
    run = bind(plan([tensor("x", 2, 3), tensor("y", 2, 3)], [buffer("a", 2, 3)], steps, [Ref("out"), None, 7]), kernels)
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    inputs = [x, y]
    out, nothing, seven = run(inputs)
    torch.testing.assert_close(out, (2 * x + y) * 3)
    assert (nothing, seven) == (None, 7) and inputs == []


def test_only_a_plan_from_bytes_runs(kernels: Kernels) -> None:
    with pytest.raises(PlanError, match="from_json"):
        Executor(plan([], [], [], []), kernels)


def test_a_long_chain_shares_storage_and_stays_right(kernels: Kernels) -> None:
    names = ["x", *(f"b{i}" for i in range(9))]
    steps = [increment(a, b, 64, inplace=((b, a),) if i % 3 else ()) for i, (a, b) in enumerate(pairwise(names))]
    run = bind(plan([tensor("x", 64)], [buffer(n, 64) for n in names[1:]], steps, [Ref("b8"), Ref("b3")]), kernels)
    assert run.plan.slots
    x = torch.randn(64)
    for _ in range(3):
        last, middle = run([x])
        torch.testing.assert_close(last, x + 9)
        torch.testing.assert_close(middle, x + 4)


def test_different_layouts_in_one_storage(kernels: Kernels) -> None:
    """Tensors seen by library calls, of other shapes and dtypes than the storage's first tenant."""
    steps = [
        increment("x", "a", 60),
        increment("a", "b", 60),
        Call("aten::sum.dim_IntList", (Ref("b"), [0]), outputs=("s",)),
        increment("b", "c", 60),
        Call("aten::sum.dim_IntList", (Ref("c"), [1]), outputs=("t",)),
    ]
    buffers = [buffer("a", 60), buffer("b", 5, 12), buffer("c", 12, 5, strides=(1, 12))]
    run = bind(plan([tensor("x", 60)], buffers, steps, [Ref("s"), Ref("t")]), kernels)
    assert run.plan.placement["a"] == run.plan.placement["c"]
    x = torch.randn(60)
    s, t = run([x])
    torch.testing.assert_close(s, (x + 2).view(5, 12).sum(0))
    torch.testing.assert_close(t, (x + 3).as_strided((12, 5), (1, 12)).sum(1))


@pytest.mark.parametrize("rows", [S0, 6], ids=["symbolic", "static"])
def test_matrix_products_between_kernels(kernels: Kernels, rows: Any) -> None:
    """Library results, kernel results and views of both share the workspace; parameters may require gradients."""
    steps: list[Any] = [
        increment("x", "a", rows, 4),
        Call("aten::addmm.default", (Ref("bias"), Ref("a"), Ref("w")), {"beta": 2}, ("b",)),
        increment("b", "c", rows, 4),
        Alias("v", "c", (rows, 2), (4, 1), 2),
        Call("aten::mm.default", (Ref("v"), Ref("u")), outputs=("d",)),
        increment("d", "e", rows, 4),
        increment("e", "f", rows, 4),
    ]
    inputs = [tensor("x", rows, 4), tensor("bias", 4), tensor("w", 4, 4), tensor("u", 2, 4)]
    symbols = [SymbolSource("s0", 0)] if rows is S0 else []
    run = bind(plan(inputs, [buffer(n, rows, 4) for n in "abcdef"], steps, [Ref("f")], symbols=symbols), kernels)
    assert sorted(run.plan.placement) == list("abcde") and len(run.plan.slots) == 2
    bias, w, u = (torch.randn(*shape, requires_grad=True) for shape in ((4,), (4, 4), (2, 4)))
    for n in (6, 6) if rows == 6 else (3, 9, 1):
        x = torch.randn(n, 4)
        wanted = ((x + 1) @ w + 2 * bias + 1)[:, 2:] @ u + 2
        torch.testing.assert_close(run([x, bias, w, u])[0], wanted.detach())


def test_views_of_weights_are_those_of_the_call_whatever_other_threads_remember() -> None:
    steps: list[Any] = [
        Alias("turned", "w", (4, 4), (1, 4), 0),
        Call("aten::mm.default", (Ref("x"), Ref("turned")), outputs=("a",)),
    ]
    made = plan([tensor("x", 4, 4), tensor("w", 4, 4, role=Role.PARAMETER)], [buffer("a", 4, 4)], steps, [Ref("a")])
    run = bind(made, {})
    x, w, others = torch.randn(3, 4, 4)
    names = run._run.__globals__
    (remembered,) = (name for name, value in names.items() if value == [(None, None)])

    class Raced(list[Any]):
        """After each entry another thread puts in its own."""

        def __setitem__(self, at: Any, entry: Any) -> None:
            super().__setitem__(at, (others.data_ptr(), others.t()))

    names[remembered] = Raced([(None, None)])
    for _ in range(2):
        torch.testing.assert_close(run([x, w])[0], x @ w.t())
    torch.testing.assert_close(run([x, others])[0], x @ others.t())


def test_symbolic_sizes(kernels: Kernels) -> None:
    half = floordiv(S0 + 1, 2)
    steps = [
        increment("x", "a", S0, 4),
        Alias("view", "a", (half, 2), (2, 1), 1),
        Call("aten::clone.default", (Ref("view"),), outputs=("c",)),
        Call("aten::full.default", ([Size(half), 2], 1.5), outputs=("f",)),
    ]
    outputs = [Ref("a"), Ref("c"), Ref("f"), Size(S0 * 2 + half)]
    made = plan(
        [tensor("x", S0, 4), InputSpec("n", "int")], [buffer("a", S0, 4)], steps, outputs, symbols=[SymbolSource("s0", 0)]
    )
    run = bind(made, kernels)
    for n in (3, 8, 1, 0):
        x = torch.randn(n, 4)
        a, c, f, size = run([x, n])
        torch.testing.assert_close(a, x + 1)
        torch.testing.assert_close(c, (x + 1).flatten()[1:].as_strided(((n + 1) // 2, 2), (2, 1)))
        assert f.shape == ((n + 1) // 2, 2) and size == 2 * n + (n + 1) // 2


def test_an_integer_input_gives_a_size(kernels: Kernels) -> None:
    steps = [increment("x", "a", S0)]
    made = plan(
        [InputSpec("n", "int"), tensor("x", S0)],
        [buffer("a", S0)],
        steps,
        [Ref("a")],
        symbols=[SymbolSource("s0", 0, "value")],
    )
    torch.testing.assert_close(bind(made, kernels)([3, torch.zeros(3)])[0], torch.ones(3))


@pytest.mark.parametrize("seen", [True, False], ids=["tensor", "address"])
def test_a_view_counts_from_the_first_element(kernels: Kernels, seen: bool) -> None:
    """The input itself starts in the middle of its storage."""
    steps: list[Any] = [Alias("view", "x", (3,), (1,), 2), increment("view", "a", 3)]
    if seen:
        steps.append(Call("aten::neg.default", (Ref("view"),), outputs=("n",)))
    run = bind(plan([tensor("x", 5)], [buffer("a", 3)], steps, [Ref("a")]), kernels)
    x = torch.arange(10.0)[4:9]
    torch.testing.assert_close(run([x])[0], torch.tensor([7.0, 8.0, 9.0]))


def test_a_view_of_freed_input_stays_valid(kernels: Kernels) -> None:
    steps = [Alias("view", "x", (3,), (1,), 1), increment("y", "a", 4), increment("view", "b", 3)]
    run = bind(
        plan([tensor("x", 4), tensor("y", 4)], [buffer("a", 4), buffer("b", 3)], steps, [Ref("a"), Ref("b")]), kernels
    )
    torch.testing.assert_close(run([torch.arange(4.0).clone(), torch.zeros(4)])[1], torch.tensor([2.0, 3.0, 4.0]))


def test_constants_are_bound_by_name(kernels: Kernels) -> None:
    steps = [launch("axpy", "w", "x", "a", sizes=(4,)), Call("aten::add.Tensor", (Ref("a"), Ref("w")), outputs=("b",))]
    made = plan([tensor("x", 4)], [buffer("a", 4)], steps, [Ref("b"), Ref("w")], constants=[buffer("w", 4)])
    w, x = torch.randn(4), torch.randn(4)
    out, same = bind(made, kernels, constants={"w": w})([x])
    torch.testing.assert_close(out, 3 * w + x)
    assert same is w


@pytest.mark.parametrize(
    "given", [{}, {"w": torch.zeros(5)}, {"w": torch.zeros(4, dtype=torch.float64)}, {"w": torch.zeros(8)[::2]}]
)
def test_a_constant_that_does_not_fit_is_named(kernels: Kernels, given: dict[str, torch.Tensor]) -> None:
    made = plan(
        [tensor("x", 4)],
        [buffer("a", 4)],
        [launch("axpy", "w", "x", "a", sizes=(4,))],
        [Ref("a")],
        constants=[buffer("w", 4)],
    )
    with pytest.raises(PlanError, match=r"plan\.constants\.w"):
        bind(made, kernels, constants=given)


def test_an_index_out_of_bounds_raises_what_the_kernel_says(kernels: Kernels) -> None:
    index = tensor("i", 3, dtype=torch.int64)
    step = launch("gather", "x", "i", "a", sizes=(4, 3), errors=("first", "index out of bounds for dimension of size 4"))
    run = bind(plan([tensor("x", 4), index], [buffer("a", 3)], [step], [Ref("a")]), kernels)
    x = torch.arange(4.0)
    with pytest.raises(IndexError, match="index out of bounds for dimension of size 4"):
        run([x, torch.tensor([0, 4, 1])])
    torch.testing.assert_close(run([x, torch.tensor([3, 0, 1])])[0], torch.tensor([3.0, 0.0, 1.0]))


def test_inputs_are_freed_as_soon_as_possible(kernels: Kernels) -> None:
    seen = []
    first = torch.randn(4)
    alive = weakref.ref(first)

    def probe(x: torch.Tensor) -> torch.Tensor:
        seen.append(alive() is not None)
        return x.clone()

    steps = [Call("local:probe", (Ref("x"),), outputs=("y",)), Call("local:probe", (Ref("y"),), outputs=("z",))]
    run = bind(plan([tensor("x", 4)], [], steps, [Ref("z")]), kernels, local_ops={"probe": probe})
    inputs = [first]
    del first
    run(inputs)
    assert seen == [True, False]


def test_intermediates_are_freed_at_their_last_use(kernels: Kernels) -> None:
    def live() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (1237,))

    counts: list[int] = []

    def probe(x: torch.Tensor) -> torch.Tensor:
        counts.append(live())
        return x.clone()

    steps = [Call("local:probe", (Ref(a),), outputs=(b,)) for a, b in (("x", "b"), ("b", "c"), ("c", "d"), ("d", "e"))]
    before = live()
    bind(plan([tensor("x", 1237)], [], steps, [Ref("e")]), kernels, local_ops={"probe": probe})([torch.zeros(1237)])
    assert [c - before for c in counts] == [1, 1, 1, 1]


def test_results_of_several_values(kernels: Kernels) -> None:
    steps = [
        Call("aten::max.dim", (Ref("x"), 1), outputs=("values", None)),
        Call("aten::split.Tensor", (Ref("x"), 2), outputs=("all",)),
        Call("local:nested", (Ref("x"),), outputs=("p", "q", "n")),
    ]
    outputs = [Ref("values"), Ref("all"), Ref("p"), Ref("q"), Ref("n")]
    nested = {"nested": lambda x: (x + 1, [x + 2, 5])}
    run = bind(plan([tensor("x", 2, 3)], [], steps, outputs), kernels, local_ops=nested)
    x = torch.randn(2, 3)
    values, whole, p, q, n = run([x])
    torch.testing.assert_close(values, x.max(1).values)
    for found, wanted in ((whole, x), (p, x + 1), (q, x + 2)):
        torch.testing.assert_close(found, wanted)
    assert n == 5


def test_a_result_with_other_strides_takes_the_plans(kernels: Kernels) -> None:
    def transposed(x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous().t()

    steps = [Call("local:f", (Ref("x"),), outputs=("y",)), increment("y", "a", 6)]
    run = bind(
        plan([tensor("x", 2, 3)], [buffer("y", 2, 3), buffer("a", 2, 3)], steps, [Ref("a"), Ref("y")]),
        kernels,
        local_ops={"f": transposed},
    )
    x = torch.randn(2, 3)
    a, y = run([x])
    torch.testing.assert_close(a, x + 1)
    assert y.stride() == (3, 1)


def test_keyword_arguments_with_odd_names(kernels: Kernels) -> None:
    seen: dict[str, Any] = {}
    step = Call("local:f", (Ref("x"),), {"from": 1, "dtype": torch.float64, "inf": float("inf")})
    bind(plan([tensor("x", 1)], [], [step], []), kernels, local_ops={"f": lambda x, **kw: seen.update(kw)})([torch.zeros(1)])
    assert seen == {"from": 1, "dtype": torch.float64, "inf": float("inf")}


def test_views_that_leave_a_plan_share_their_bases_version(kernels: Kernels) -> None:
    """Autograd compares versions to see whether what it has saved was changed since."""
    steps = [increment("x", "a", 6), Alias("inner", "a", (4,), (1,), 1), Alias("outer", "inner", (2,), (1,), 3)]
    a, outer = bind(plan([tensor("x", 6)], [buffer("a", 6)], steps, [Ref("a"), Ref("outer")]), kernels)([torch.zeros(6)])
    before = outer._version
    a.add_(1)
    assert outer._version > before and outer.data_ptr() == a[4:].data_ptr()


def test_what_an_op_writes_through_a_view_of_an_input_counts_as_its_change(kernels: Kernels) -> None:
    steps: list[Any] = [Alias("view", "x", (2,), (1,), 1), Call("aten::add_.Scalar", (Ref("view"), 5), writes=("view",))]
    x = torch.zeros(4)
    before = x._version
    bind(plan([tensor("x", 4)], [], steps, []), kernels)([x])
    assert x._version > before and x.tolist() == [0, 5, 5, 0]


@pytest.mark.parametrize("quick", [True, False])
def test_allocations_and_views_with_and_without_functions_in_c(
    quick: bool, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quick:
        monkeypatch.setattr(executor, "_HELPERS", {k: v for k, v in executor._HELPERS.items() if k not in executor._QUICK})
    steps: list[Any] = [
        increment("x", "a", 6),
        Alias("inner", "a", (2, 2), (1, 2), 1),
        Alias("given", "x", (2, 2), (2, 1), 1),
        Call("aten::add.Tensor", (Ref("inner"), Ref("given")), outputs=("sum",)),
    ]
    made = bind(plan([tensor("x", 6)], [buffer("a", 6), buffer("sum", 2, 2)], steps, [Ref("sum"), Ref("a")]), kernels)
    assert ("reinterpret(" in made.source) == quick and ("empty_cpu(" in made.source) == quick
    x = torch.arange(8.0)[2:]
    found, a = made([x])
    torch.testing.assert_close((found, a), (a[1:5].view(2, 2).t() + x[1:5].view(2, 2), x + 1))


def test_writes_into_an_input_are_announced_to_autograd(kernels: Kernels) -> None:
    step = launch("increment", "x", "x", sizes=(4,))
    run = bind(plan([tensor("x", 4)], [], [step], []), kernels)
    x = torch.zeros(4)
    version = x._version
    assert run([x]) == ()
    assert x._version > version and x.tolist() == [1] * 4
    with torch.inference_mode():
        y = torch.zeros(4)
    run([y])
    assert y.tolist() == [1] * 4


def test_nothing_to_write_is_not_launched() -> None:
    made = plan([tensor("x", 0, 3)], [buffer("a", 0, 3)], [launch("missing", "x", "a", sizes=(0,))], [Ref("a")])
    with pytest.raises(PlanError, match="missing"):
        bind(made, {})


def test_empty_outputs(kernels: Kernels) -> None:
    made = plan([tensor("x", 0, 3)], [buffer("a", 0, 3)], [increment("x", "a", 0, 3)], [Ref("a")])
    run = bind(made, kernels)
    assert run([torch.zeros(0, 3)])[0].shape == (0, 3) and "P[" not in run.source


def test_many_threads_at_once(kernels: Kernels) -> None:
    names = ["x", *(f"b{i}" for i in range(6))]
    steps = [increment(a, b, 5000) for a, b in pairwise(names)]
    run = bind(plan([tensor("x", 5000)], [buffer(n, 5000) for n in names[1:]], steps, [Ref("b5")]), kernels)
    wrong: list[float] = []

    def work(start: float) -> None:
        for i in range(50):
            x = torch.full((5000,), start + i)
            wrong.extend((run([x])[0] - (x + 6)).abs().amax().unsqueeze(0).tolist())

    threads = [threading.Thread(target=work, args=(1000.0 * i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(wrong) == 400 and max(wrong) == 0


def test_what_is_missing_is_named(kernels: Kernels, library: Any) -> None:
    with pytest.raises(PlanError, match="aten::no_such_op"):
        bind(plan([], [], [Call("aten::no_such_op.default", ())], []), kernels)
    with pytest.raises(PlanError, match="local:7"):
        bind(plan([], [], [Call("local:7", ())], []), kernels)
    step = [increment("x", "a", 4)]
    with pytest.raises(CacheError, match="increment"):
        bind(plan([tensor("x", 4)], [buffer("a", 4)], step, []), {"increment": Artifact("k", "cpp", "increment_x", library)})


def test_names_in_a_plan_cannot_become_code(kernels: Kernels) -> None:
    evil = "x'); raise SystemExit #"
    step = Call("local:f", (Ref(evil), evil), {evil: evil}, (evil + "2",))
    run = bind(
        plan([tensor(evil, 2)], [], [step], [Ref(evil + "2")]), kernels, local_ops={"f": lambda x, *a, **k: (x, a, k)[0]}
    )
    assert run([torch.ones(2)])[0].tolist() == [1, 1]


def test_profiling_names_each_launch(kernels: Kernels) -> None:
    made = plan([tensor("x", 4)], [buffer("a", 4)], [increment("x", "a", 4, label="layer norm")], [Ref("a")])
    run = bind(made, kernels, profile=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run([torch.zeros(4)])
    assert "layer norm" in {event.key for event in profile.key_averages()}
    assert "record_function" not in bind(made, kernels).source


def test_a_packed_weight_is_a_constant_too(kernels: Kernels) -> None:
    """oneDNN's own layout has no strides; its products never alias their arguments."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    w, x = torch.randn(8, 4), torch.randn(6, 4)
    packed = torch.ops.mkldnn._reorder_linear_weight(w, 6)
    args = (Ref("a"), Ref("w"), None, "none", [], "")
    steps = [
        increment("x", "a", 6, 4),
        Call("mkldnn::_linear_pointwise.default", args, outputs=("b",)),
        increment("b", "c", 6, 8),
    ]
    made = plan(
        [tensor("x", 6, 4)],
        [buffer("a", 6, 4), buffer("b", 6, 8), buffer("c", 6, 8)],
        steps,
        [Ref("c")],
        constants=[buffer("w", 8, 4)],
    )
    run = bind(made, kernels, constants={"w": packed})
    torch.testing.assert_close(run([x])[0], (x + 1) @ w.t() + 1)
    assert "a" in run.plan.placement
