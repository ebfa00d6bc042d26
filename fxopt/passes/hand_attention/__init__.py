"""Attention that is written out, recognised before autograd: `rewrite.py` is the pass."""
