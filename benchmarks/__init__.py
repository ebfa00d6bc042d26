"""The benchmark harness: kernels and whole models under every contender, interleaved; `fxopt bench` runs it."""
