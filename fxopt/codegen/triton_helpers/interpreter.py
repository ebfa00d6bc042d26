"""Whether Triton's interpreter runs what is compiled otherwise, and knows no PTX."""

import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
