"""What kind of operator an OpInfo entry is, from what the operator means and not from how fxopt treats it."""

from __future__ import annotations

from typing import Any

JUDGED = ("pointwise", "reduction", "indexing", "view")
"""The classes of which at least nine samples in ten must run through generated code."""

_BY_TYPE = {
    "UnaryUfuncInfo": "pointwise",
    "BinaryUfuncInfo": "pointwise",
    "ReductionOpInfo": "reduction",
    "SpectralFuncInfo": "spectral",
    "ShapeFuncInfo": "indexing",
}

_NAMES: dict[str, str] = {
    "pointwise": """
        _unsafe_masked_index addcdiv addcmul clamp clone contiguous constant_pad_nd lerp logaddexp2 masked_logaddexp
        masked_fill native_dropout_backward nn_functional_gelu nn_functional_glu nn_functional_hardswish
        nn_functional_leaky_relu resolve_conj resolve_neg to where isin cross linalg_cross
        nn_functional_binary_cross_entropy nn_functional_binary_cross_entropy_with_logits allclose""",
    "reduction": """
        _batch_norm_with_update _native_batch_norm_legit _softmax_backward_data aminmax corrcoef cov cummax cummin cumprod
        cumsum cumulative_trapezoid dist linalg_matrix_norm linalg_norm linalg_norm_subgradients_at_zero
        linalg_vecdot log_softmax log_softmax_with_dtype logcumsumexp logsumexp masked_cumprod masked_cumsum
        masked_log_softmax masked_normalize masked_softmax masked_softmin max_reduction_no_dim max_reduction_with_dim
        min_reduction_no_dim min_reduction_with_dim native_batch_norm native_group_norm native_layer_norm
        nn_functional_adaptive_avg_pool1d nn_functional_adaptive_avg_pool2d nn_functional_adaptive_avg_pool3d
        nn_functional_avg_pool1d nn_functional_avg_pool2d nn_functional_avg_pool3d nn_functional_batch_norm
        nn_functional_batch_norm_without_cudnn nn_functional_cosine_embedding_loss nn_functional_cosine_similarity
        nn_functional_cross_entropy nn_functional_gaussian_nll_loss nn_functional_group_norm
        nn_functional_hinge_embedding_loss nn_functional_huber_loss nn_functional_instance_norm nn_functional_kl_div
        nn_functional_l1_loss nn_functional_layer_norm nn_functional_local_response_norm nn_functional_margin_ranking_loss
        nn_functional_max_pool1d nn_functional_max_pool2d nn_functional_max_pool3d nn_functional_mse_loss
        nn_functional_multi_margin_loss nn_functional_multilabel_margin_loss nn_functional_multilabel_soft_margin_loss
        nn_functional_nll_loss nn_functional_normalize nn_functional_pairwise_distance nn_functional_poisson_nll_loss
        nn_functional_rms_norm nn_functional_smooth_l1_loss nn_functional_soft_margin_loss nn_functional_softmin
        nn_functional_softmin_with_dtype nn_functional_triplet_margin_loss
        nn_functional_triplet_margin_with_distance_loss norm norm_fro norm_inf renorm softmax softmax_with_dtype std_mean
        std_mean_unbiased sum_to_size torch_ops_aten__safe_softmax_default trace trapezoid trapz var_mean var_mean_unbiased
        nn_functional_adaptive_max_pool1d nn_functional_adaptive_max_pool2d nn_functional_adaptive_max_pool3d
        _segment_reduce_lengths _segment_reduce_offsets equal""",
    "indexing": """
        __getitem__ _chunk_cat _unsafe_masked_index_put_accumulate alias_copy as_strided_copy as_strided_scatter block_diag
        bucketize cartesian_prod cat column_stack combinations diag diag_embed diagflat diagonal_copy diagonal_scatter diff
        dstack expand_copy flip fliplr flipud gather gradient hstack index_add index_copy index_fill index_put
        index_reduce_amax index_reduce_amin index_reduce_mean index_reduce_prod index_select max_pool2d_with_indices_backward
        narrow_copy nn_functional_channel_shuffle nn_functional_embedding nn_functional_embedding_bag
        nn_functional_interpolate_area nn_functional_interpolate_bicubic _upsample_bilinear2d_aa grid_sampler_2d
        grid_sampler_3d nn_functional_grid_sample nn_functional_interpolate_bilinear nn_functional_interpolate_linear
        nn_functional_interpolate_nearest nn_functional_interpolate_nearest-exact nn_functional_interpolate_trilinear
        nn_functional_max_unpool1d nn_functional_max_unpool1d_grad nn_functional_max_unpool2d nn_functional_max_unpool2d_grad
        nn_functional_max_unpool3d nn_functional_max_unpool3d_grad nn_functional_one_hot nn_functional_pad_circular
        nn_functional_pad_constant nn_functional_pad_reflect nn_functional_pad_replicate
        nn_functional_pad_replicate_negative nn_functional_pixel_shuffle nn_functional_pixel_unshuffle nn_functional_unfold
        nn_functional_upsample_bilinear nn_functional_upsample_nearest permute_copy put repeat_interleave roll rot90 scatter
        scatter_add scatter_reduce_amax scatter_reduce_amin scatter_reduce_mean scatter_reduce_prod scatter_reduce_sum
        select_scatter slice_scatter split_with_sizes_copy squeeze_copy stack t_copy take take_along_dim transpose_copy tril
        triu unbind_copy unfold_copy unravel_index unsafe_chunk unsafe_split unsqueeze_copy view_copy vstack fft_fftshift
        fft_ifftshift meshgrid_list_of_tensors meshgrid_variadic_tensors""",
    "view": """
        H T mH mT as_strided as_strided_partial_views atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to chunk
        diagonal dsplit expand expand_as flatten hsplit linalg_diagonal movedim narrow permute ravel reshape reshape_as
        select slice split split_list_args split_with_sizes squeeze squeeze_multiple t tensor_split transpose unbind
        unflatten unfold unsqueeze view view_as view_as_complex view_as_real vsplit""",
    "factory": """
        arange empty empty_like empty_permuted empty_strided eye full full_like linspace linspace_tensor_overload logspace
        logspace_tensor_overload new_empty new_empty_strided new_full new_ones new_zeros ones ones_like scalar_tensor
        tril_indices triu_indices zero_ zeros zeros_like resize_ resize_as_ linalg_vander broadcast_shapes
        signal_windows_bartlett signal_windows_blackman signal_windows_cosine signal_windows_exponential
        signal_windows_gaussian signal_windows_general_cosine signal_windows_general_hamming signal_windows_hamming
        signal_windows_hann signal_windows_kaiser signal_windows_nuttall""",
    "random": """
        bernoulli cauchy exponential geometric log_normal multinomial nn_functional_alpha_dropout nn_functional_dropout
        nn_functional_dropout2d nn_functional_dropout3d nn_functional_feature_alpha_dropout_with_train
        nn_functional_feature_alpha_dropout_without_train nn_functional_fractional_max_pool2d
        nn_functional_fractional_max_pool3d normal normal_in_place normal_number_mean rand_like randint randint_like randn
        randn_like uniform""",
    "contraction": """
        __rmatmul__ addbmm addmm addmm_decomposed addmv addr baddbmm bmm bmm_triton_optimized dot einsum inner kron
        linalg_multi_dot matmul mm mv nn_functional_bilinear nn_functional_conv1d nn_functional_conv2d nn_functional_conv3d
        nn_functional_conv_transpose1d nn_functional_conv_transpose2d nn_functional_conv_transpose3d nn_functional_linear
        nn_functional_linear_cross_entropy nn_functional_linear_cross_entropy_chunked
        nn_functional_linear_cross_entropy_chunked_none nn_functional_multi_head_attention_forward
        nn_functional_scaled_dot_product_attention outer tensordot torch__scaled_mm torch__scaled_mm_v2
        torch_ops_aten__efficient_attention_forward torch_ops_aten__flash_attention_forward vdot cdist
        nn_functional_pdist""",
    "data-dependent": """
        argwhere bincount item masked_scatter masked_select nonzero nonzero_static to_sparse unique unique_consecutive""",
}

_CLASS_OF = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def op_class(op: Any) -> str:
    """The class of an OpInfo; "library" for sorting, linear algebra and the like."""
    return _CLASS_OF.get(op.formatted_name) or _BY_TYPE.get(type(op).__name__, "library")
