"""Compiles Triton kernels without a GPU.

Launchers run on tensors without storage and with a driver that replaces the GPU's. The compiled
kernels have the constants that the launchers would choose on that GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

Architecture = Literal["sm_80", "sm_90", "sm_100"]
ARCHITECTURES: tuple[Architecture, ...] = ("sm_80", "sm_90", "sm_100")


class Code(NamedTuple):
    """A compiled kernel."""

    kernel: str
    constants: Mapping[str, Any]
    """Fields of the bundles of compile-time constants that the launch has."""
    num_warps: int
    shared_bytes: int
    tensor_columns: int
    """Columns of tensor memory (sm_100)."""
    ptx: str
    cubin: bytes


def require_compiler() -> None:
    """Check that kernels can be compiled in this process and in those that it starts.

    Raises:
        ValueError: they cannot.
    """
    try:
        from triton import knobs
    except ImportError as error:
        raise ValueError("Triton is not installed: there is nothing to compile with") from error
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: interpreted kernels have no code; unset it")


class _OfflineDriver:
    """The part of a GPU's driver that Triton needs to compile."""

    def __init__(self, architecture: Architecture) -> None:
        self._capability = int(architecture.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self._capability  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


def _constants(arguments: Sequence[Any]) -> dict[str, Any]:
    return {
        name: value.value
        for bundle in arguments
        if hasattr(bundle, "_fields")
        for name, value in bundle._asdict().items()
        if hasattr(value, "value")
    }


def compile_launches(launch: Callable[[], None], architecture: Architecture) -> list[Code]:
    """Code of the kernels that a function launches, in order.

    Replaces Triton's driver for good, so the process must not use it for anything else.
    """
    from triton import knobs
    from triton.runtime import JITFunction, driver

    from msdetr.kernels.ms_deform_attn import configs

    codes = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        if "enable_fp_fusion" not in constants:
            raise ValueError(f"{kernel.__name__}: enable_fp_fusion is left to Triton's default")
        code = run(kernel, *args, grid=grid, warmup=True, **constants)
        codes.append(
            Code(
                kernel=kernel.__name__,
                constants=_constants(args),
                num_warps=code.metadata.num_warps,
                shared_bytes=code.metadata.shared,
                tensor_columns=getattr(code.metadata, "tmem_size", 0),
                ptx=code.asm["ptx"],
                cubin=code.asm["cubin"],
            )
        )

    driver.set_active(_OfflineDriver(architecture))
    knobs.compilation.disable_line_info = False  # names the functions of loads
    # Drop configurations chosen for another architecture.
    configs.forget()
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(configs, "architecture", return_value=architecture),
    ):
        launch()
    return codes
