"""Op lowerings, one file per kind of op; TABLES lists them all."""

from fxopt.lower.ops import creation, indexing, joins, pointwise, random, reductions, scatters, views

TABLES = (
    pointwise.TABLE,
    creation.TABLE,
    random.TABLE,
    reductions.TABLE,
    views.TABLE,
    joins.TABLE,
    indexing.TABLE,
    scatters.TABLE,
)
