"""What a kernel is compiled for, as a value. Ask it for features; architecture numbers are compared nowhere else."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # compile workers need no more than the numbers
    import torch

_SHARED_PER_BLOCK = {
    75: 65536,
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
}
_SM_COUNT = {75: 40, 80: 108, 86: 84, 87: 16, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170}
_HALF_TERAFLOPS = {75: 50, 80: 260, 86: 110, 87: 50, 89: 280, 90: 770, 100: 1600, 103: 1600, 120: 380}
_MEMORY_GIGABYTES = {75: 280, 80: 1700, 86: 700, 87: 180, 89: 850, 90: 3000, 100: 6800, 103: 6800, 120: 1500}
_L2_MEGABYTES = {75: 4, 80: 40, 86: 6, 87: 4, 89: 72, 90: 50, 100: 126, 103: 126, 120: 96}
_OLDEST_KNOWN = 75


@dataclass(frozen=True)
class Target:
    """A device that kernels are compiled for.

    `kind` is "cuda" or "cpu". CUDA: `arch` is major*10 + minor, `shared_per_block` the opt-in limit in bytes,
    `registers_per_sm` 32-bit registers, `l2_bytes` those of the cache that all multiprocessors share. CPU:
    `cpu_capability` is torch's name for the instruction set ("AVX512", "AVX2", "DEFAULT").
    """

    kind: str
    arch: int = 0
    sm_count: int = 1
    shared_per_block: int = 0
    registers_per_sm: int = 65536
    warp_size: int = 32
    cpu_capability: str = ""
    name: str = ""
    l2_bytes: int = 0

    @staticmethod
    def current(device: torch.device | str) -> Target:
        """The target of `device` on this machine. Raises RuntimeError (from torch) when that CUDA device does not exist."""
        import torch

        device = torch.device(device)
        if device.type == "cuda":
            return _from_cuda_device(torch.cuda.current_device() if device.index is None else device.index)
        return Target.cpu()

    @staticmethod
    def cuda(arch: int) -> Target:
        """The typical GPU of `arch` (80, 90, 100, ...), for compiling without one; unknown numbers take the next older."""
        known = max((a for a in _SM_COUNT if a <= arch), default=_OLDEST_KNOWN)
        return Target(
            "cuda",
            arch=arch,
            sm_count=_SM_COUNT[known],
            shared_per_block=_SHARED_PER_BLOCK[known],
            name=f"sm_{arch}",
            l2_bytes=_L2_MEGABYTES[known] << 20,
        )

    @staticmethod
    def cpu() -> Target:
        """This machine's CPU."""
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        return Target("cpu", sm_count=torch.get_num_threads(), cpu_capability=capability, name="cpu")

    @property
    def key(self) -> str:
        """What compiled code depends on: equal for devices that can share binaries."""
        return f"cuda-sm{self.arch}" if self.kind == "cuda" else f"cpu-{self.cpu_capability}"

    @property
    def compiles_triton(self) -> bool:
        """Triton 3.6 generates code for this GPU."""
        return self.kind == "cuda" and self.arch >= _OLDEST_KNOWN

    @property
    def has_tensor_maps(self) -> bool:
        """The GPU loads blocks of tensors by descriptor (its tensor memory accelerator)."""
        return self.kind == "cuda" and self.arch >= 90

    @property
    def has_warpgroup_products(self) -> bool:
        """Tensor cores that four warps feed together from shared memory, at least 64 rows a time."""
        return self.kind == "cuda" and 90 <= self.arch < 120

    @property
    def has_float8(self) -> bool:
        """Triton has float8_e4m3fn there, and tensor cores multiply it."""
        return self.kind == "cuda" and self.arch >= 89

    @property
    def half_flops(self) -> float:
        """Floating-point operations a second that large matrix products in float16 and bfloat16 reach (H100: measured)."""
        return 1e12 * _HALF_TERAFLOPS[self._known] * self.sm_count / _SM_COUNT[self._known]

    @property
    def memory_rate(self) -> float:
        """Bytes a second, read and written, that a copy in device memory reaches (H100: measured)."""
        return 1e9 * _MEMORY_GIGABYTES[self._known]

    @property
    def _known(self) -> int:
        return _nearest_known(self.arch)

    @property
    def is_hopper(self) -> bool:
        return self.kind == "cuda" and 90 <= self.arch < 100

    @property
    def is_blackwell(self) -> bool:
        """Blackwell or later, for which Triton brings a ptxas of its own."""
        return self.kind == "cuda" and self.arch >= 100


@functools.cache  # cost models ask for each configuration
def _nearest_known(arch: int) -> int:
    """The latest architecture whose figures are known that is no later than `arch`."""
    return max((a for a in _SM_COUNT if a <= arch), default=_OLDEST_KNOWN)


@functools.cache
def _from_cuda_device(index: int) -> Target:
    import torch

    properties = torch.cuda.get_device_properties(index)
    typical = Target.cuda(properties.major * 10 + properties.minor)
    return replace(
        typical,
        sm_count=properties.multi_processor_count,
        shared_per_block=getattr(properties, "shared_memory_per_block_optin", typical.shared_per_block),
        registers_per_sm=getattr(properties, "regs_per_multiprocessor", typical.registers_per_sm),
        name=properties.name,
        l2_bytes=getattr(properties, "L2_cache_size", typical.l2_bytes),
    )
