"""Op lowerings, one file per kind of op; TABLES lists them all."""

from fxopt.lower.ops import (
    activations,
    adaptive_pooling,
    comparisons,
    creation,
    indexing,
    joins,
    pointwise,
    pooling,
    random,
    reductions,
    scans,
    scatters,
    softmax,
    special,
    upsampling,
    views,
)

TABLES = (
    pointwise.TABLE,
    comparisons.TABLE,
    activations.TABLE,
    special.TABLE,
    creation.TABLE,
    random.TABLE,
    reductions.TABLE,
    softmax.TABLE,
    scans.TABLE,
    views.TABLE,
    joins.TABLE,
    indexing.TABLE,
    scatters.TABLE,
    pooling.TABLE,
    adaptive_pooling.TABLE,
    upsampling.TABLE,
)
