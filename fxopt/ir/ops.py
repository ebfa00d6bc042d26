"""Facts about ATen operators: category, purity, aliasing. The table of ops that a functional graph is made of.

Capture decomposes into these ops, `lower/` has a rule for each generated category, and whatever is not listed is a
`library` op: legal, and run as the call that it is.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

Target = Callable[..., Any]

CATEGORIES: dict[str, frozenset[str]] = {
    # one output element from the elements at the same (broadcast) position
    "pointwise": frozenset(
        "abs acos acosh add addcdiv addcmul alias_copy asin asinh atan atan2 atanh bitwise_and bitwise_left_shift "
        "bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clone copy "
        "copysign cos cosh deg2rad digamma div elu elu_backward eq erf erfc erfinv exp exp2 expm1 fill floor "
        "floor_divide fmax fmin fmod frac ge gelu gelu_backward glu gt hardsigmoid hardsigmoid_backward hardswish "
        "hardswish_backward hardtanh hardtanh_backward heaviside hypot isfinite isinf isnan isneginf isposinf le "
        "leaky_relu leaky_relu_backward lerp lgamma log log10 log1p log2 log_sigmoid_backward log_sigmoid_forward "
        "logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum "
        "mish mul mvlgamma nan_to_num native_dropout_backward ne neg nextafter pow prelu rad2deg reciprocal relu "
        "relu6 remainder round rsqrt rsub selu sgn sigmoid sigmoid_backward sign signbit silu silu_backward sin "
        "sinc sinh softplus softplus_backward softshrink sqrt square sub tan tanh tanh_backward threshold "
        "threshold_backward true_divide trunc where xlogy _to_copy _conj_physical conj_physical frexp i0 polygamma "
        "special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 "
        "special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v "
        "special_chebyshev_polynomial_w special_erfcx special_hermite_polynomial_h special_hermite_polynomial_he "
        "special_i0e special_i1 special_i1e special_laguerre_polynomial_l special_legendre_polynomial_p "
        "special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1 "
        "special_ndtri special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 "
        "special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u "
        "special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w special_spherical_bessel_j0 "
        "special_zeta".split()
    ),
    # one output element from a range of input elements
    "reduction": frozenset(
        "all amax amin aminmax any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean median min "
        "norm prod std std_mean sum var var_mean _softmax _log_softmax _softmax_backward_data "
        "_log_softmax_backward_data native_layer_norm native_layer_norm_backward native_group_norm "
        "native_group_norm_backward native_batch_norm native_batch_norm_backward _native_batch_norm_legit "
        "_native_batch_norm_legit_no_training _fused_rms_norm nansum".split()
    ),
    "scan": frozenset("cumsum cumprod cummax cummin logcumsumexp".split()),
    # the same storage under another shape: only index arithmetic (`_unsafe_view` too, whatever its schema says)
    "view": frozenset(
        "alias as_strided detach diagonal expand expand_as flatten imag lift_fresh movedim narrow permute real "
        "reshape select slice split split_with_sizes squeeze swapaxes t transpose unbind unfold unsqueeze view "
        "view_as _unsafe_view _reshape_alias chunk unflatten numpy_T mT contiguous".split()
    ),
    # elements moved by a rule or by an index tensor
    "indexing": frozenset(
        "_unsafe_index _unsafe_index_put as_strided_scatter cat constant_pad_nd diagonal_copy diagonal_scatter "
        "embedding embedding_dense_backward expand_copy flip gather index index_add index_copy index_fill "
        "index_put index_select masked_select permute_copy reflection_pad1d reflection_pad2d reflection_pad3d "
        "repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d roll scatter scatter_add "
        "scatter_reduce select_backward select_copy select_scatter slice_backward slice_copy slice_scatter stack "
        "take tril triu unsqueeze_copy view_copy pixel_shuffle pixel_unshuffle channel_shuffle upsample_nearest1d "
        "upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d".split()
    ),
    # values from nothing but sizes and scalars
    "factory": frozenset(
        "arange empty empty_like empty_strided eye full full_like linspace logspace new_empty new_empty_strided "
        "new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices triu_indices zeros zeros_like".split()
    ),
    "random": frozenset(
        "bernoulli dropout multinomial native_dropout normal normal_functional poisson rand rand_like randint "
        "randint_like randn randn_like randperm rrelu_with_noise uniform exponential seed".split()
    ),
    # sums of products: matrix units, templates and libraries compete for these
    "contraction": frozenset(
        "addbmm addmm addmv addr baddbmm bmm convolution convolution_backward convolution_overrideable dot linear "
        "matmul mm mv _int_mm _scaled_mm vdot".split()
    ),
}
"""Category -> names of `aten` (and `fxopt`, for random) operators. Everything else is "library"."""

_OF_CUBLAS = frozenset(
    "mm addmm _addmm_activation bmm baddbmm addbmm mv addmv dot vdot linear _int_mm _scaled_mm scaled_mm group_scaled_mm "
    "weight_only_mm linear_cross_entropy linear_cross_entropy_backward".split()
)


def calls_cublas(op: str) -> bool:
    """Whether the operator with that overload name ("aten::mm.default") may call cuBLAS, which keeps a workspace for each
    stream that it is called on."""
    return op.partition("::")[2].partition(".")[0] in _OF_CUBLAS


UNINITIALISED = frozenset("empty empty_like empty_strided new_empty new_empty_strided".split())
"""Factories whose contents are not defined: two calls are two tensors."""

COMMUTATIVE = frozenset(
    "add mul maximum minimum eq ne logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor fmax fmin hypot "
    "logaddexp".split()
)
"""Names whose first two tensor operands may be swapped without changing a bit of the result (add: with alpha = 1)."""

_CATEGORY_OF = {name: category for category, names in CATEGORIES.items() for name in names}
_OVERLOAD: type = type(torch.ops.aten.add.Tensor)
GETITEM = operator.getitem
_SYMBOLIC_MODULES = frozenset({"operator", "_operator", "math", "builtins"})


def is_overload(target: Any) -> bool:
    """Whether `target` is an OpOverload."""
    return isinstance(target, _OVERLOAD)


@functools.cache
def is_higher_order(target: Any) -> bool:
    """Whether `target` is a higher-order operator (cond, scan, checkpoint, flex_attention, a user's Triton kernel, ...)."""
    return any(base.__name__ == "HigherOrderOperator" for base in type(target).__mro__)


@functools.cache
def is_symbolic(target: Any) -> bool:
    """Whether `target` is arithmetic on sizes (operator.add, math.floor, torch.sym_max, ...)."""
    if is_overload(target):
        return str(target.name()).startswith("aten::sym_") and "constrain" not in target.name()
    if target is GETITEM or not callable(target):
        return False
    return getattr(target, "__module__", None) in _SYMBOLIC_MODULES or getattr(target, "__name__", "").startswith("sym_")


@functools.cache
def schema(target: Any) -> Any:
    """The FunctionSchema of an OpOverload. (The one place that reads it: torch has no public name for it.)"""
    return target._schema


@functools.cache
def name_of(target: Any) -> str:
    """ "add" for aten.add.Tensor, "fxopt::rand" for ops of other namespaces; "getitem", "cond", ... for the rest."""
    if not is_overload(target):
        return str(getattr(target, "__name__", target))
    qualified = str(target.name()).partition(".")[0]
    return qualified.removeprefix("aten::")


@functools.cache
def category(target: Any) -> str:
    """A key of CATEGORIES, or symbolic, getitem, higher_order or library."""
    if target is GETITEM:
        return "getitem"
    if is_symbolic(target):
        return "symbolic"
    if is_higher_order(target):
        return "higher_order"
    if not is_overload(target):
        return "library"
    name = name_of(target)
    if "::" in name:
        namespace, _, short = name.partition("::")
        return "random" if namespace == "fxopt" and short in CATEGORIES["random"] else "library"
    return _CATEGORY_OF.get(name, "library")


@functools.cache
def is_view(target: Any) -> bool:
    """Whether the result may share memory with an argument. `_unsafe_view` does, though its schema denies it."""
    if target is GETITEM:
        return True
    if not is_overload(target):
        return is_higher_order(target)
    return name_of(target) == "_unsafe_view" or any(r.alias_info is not None for r in schema(target).returns)


@functools.cache
def is_mutating(target: Any) -> bool:
    return is_overload(target) and bool(schema(target).is_mutable)


@functools.cache
def is_random(target: Any) -> bool:
    """Whether the op draws from a generator, so that calling it once or twice is not the same."""
    if not is_overload(target):
        return False
    return torch.Tag.nondeterministic_seeded in target.tags or name_of(target) == "fxopt::seed"


@functools.cache
def is_pure(target: Any) -> bool:
    """Whether a call may be removed when unused: no mutation, no randomness, no assertion (an op without results)."""
    if target is GETITEM or is_symbolic(target):
        return True
    if not is_overload(target) or is_mutating(target) or is_random(target):
        return False
    return len(schema(target).returns) > 0 and "assert" not in name_of(target)


@functools.cache
def may_merge(target: Any) -> bool:
    """Whether two calls with equal arguments may become one."""
    return is_pure(target) and name_of(target) not in UNINITIALISED
