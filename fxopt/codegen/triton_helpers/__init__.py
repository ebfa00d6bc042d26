"""Device functions that printed Triton kernels call: operators whose exact eager semantics take several instructions.

Real `@triton.jit` functions; printed kernels import this package as `h`. Arguments are tensors of one dtype unless said.
"""

from fxopt.codegen.triton_helpers.arithmetic import (
    divide,
    divide_many,
    each_larger_int8,
    float_floordiv,
    float_remainder,
    int_floordiv,
    int_pow,
    int_remainder,
    inverse,
    larger_int8,
    largest,
    maximum,
    minimum,
    share,
    share_before_rounding,
    shift_left,
    shift_right,
    sign,
    smallest,
    square_root,
)
from fxopt.codegen.triton_helpers.exponentials import (
    by_polynomial,
    coarse_erf_plus_one,
    coarse_gelu,
    erf_plus_one,
    fast_sigmoid,
    flushing_exp,
    log_add_exp,
    sigmoid,
    tanh_plus_one,
)
from fxopt.codegen.triton_helpers.memory import (
    as_natural,
    bring,
    elements_of_line,
    floor_index,
    wrap_index,
)
from fxopt.codegen.triton_helpers.philox import (
    philox_words,
    rand,
    rand_word,
    randint,
    randn,
)
from fxopt.codegen.triton_helpers.reductions import (
    addition,
    arg_max,
    arg_min,
    both,
    each_larger_place,
    either,
    group_sum,
    larger_place,
    product,
    run_ends,
    run_sums,
    three_sums,
    welford,
    welford_step,
)
from fxopt.codegen.triton_helpers.rounding import (
    each_rounded_to_half,
    int8_to_float32,
    nan_beyond_float8e4,
    rounded_to_half,
    rounded_to_int8,
    saturated_to_float8e4,
    scaled_to_int8,
    to_float8e5,
)
from fxopt.codegen.triton_helpers.softmax import (
    finite_base,
    softmax_stats,
    softmax_step,
    softmax_total,
    weighted_softmax,
    weighted_softmax_step,
)
