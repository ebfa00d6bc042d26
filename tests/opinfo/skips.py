"""What the sweep does not compare with eager's values, each with the reason. Everything else must be right."""

from __future__ import annotations

_JITERATOR: dict[str, str] = dict.fromkeys(
    """
    jiterator_2inputs_2outputs jiterator_4inputs_with_extra_args jiterator_binary jiterator_binary_return_by_ref
    jiterator_unary
    """.split(),
    "compiles CUDA source",
)

NOT_RUN: dict[str, dict[str, str]] = {
    "cpu": {
        **_JITERATOR,
        "torch_ops_aten__efficient_attention_forward": "exists on CUDA only",
        "torch_ops_aten__flash_attention_forward": "exists on CUDA only",
    },
    "cuda": _JITERATOR,
}
"""By device: ops that it does not have, or that are no graph of operators."""

RANDOM: dict[str, str] = dict.fromkeys(
    """
    bernoulli cauchy exponential geometric log_normal multinomial nn_functional_alpha_dropout nn_functional_dropout
    nn_functional_dropout2d nn_functional_dropout3d nn_functional_feature_alpha_dropout_with_train
    nn_functional_fractional_max_pool2d nn_functional_fractional_max_pool3d
    nn_functional_multi_head_attention_forward nn_functional_rrelu nn_functional_scaled_dot_product_attention normal
    normal_in_place normal_number_mean pca_lowrank rand_like randint randint_like randn randn_like svd_lowrank uniform
    """.split(),
    "draws random numbers: layout compared, and the distribution instead of the values where eager's own calls differ",
)
"""Values differ from call to call; where eager repeats itself (dropout that is off), they are compared all the same."""

UNINITIALISED: dict[str, str] = dict.fromkeys(
    "empty empty_like empty_permuted empty_strided new_empty new_empty_strided resize_ resize_as_".split(),
    "memory that nobody has written: only shape, dtype and strides are compared",
)

NEEDS_DYNAMO: dict[str, str] = {
    "to_sparse": "makes sparse tensors, which AOTAutograd alone does not differentiate: Dynamo leaves them to eager",
}
"""Ops whose every sample goes through torch.compile."""
