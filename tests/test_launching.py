"""What is looked up once for a launch: never for tensors of another kind than those that come next."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from meft_kernels import ops
from meft_kernels.ops import AdapterWeights
from meft_kernels.ops.launching import Launch, all_dense

CPU = torch.device("cpu")


class Compiled:
    """What a launch by Triton returns."""

    asm = "kernel"

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self._calls.append(("compiled", grid, args))


class Kernel:
    """A kernel of Triton's, or of its interpreter, which returns nothing."""

    arg_names = ("x", "rows", "BLOCK", "EVEN")

    def __init__(self, *, interpreted: bool = False) -> None:
        self.calls: list[Any] = []
        self._returned = None if interpreted else Compiled(self.calls)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.calls.append(("triton", grid, args))
            return self._returned

        return launch


def launch(kernel: Kernel) -> Launch:
    return Launch(kernel, (7,), {"EVEN": True, "BLOCK": 64, "num_warps": 4}, CPU)


def test_the_second_launch_goes_to_the_compiled_kernel() -> None:
    kernel = Kernel()
    made, x, y = launch(kernel), torch.zeros(8), torch.ones(8)
    made((x,), (3,))
    made((y,), (4,))
    assert [call[0] for call in kernel.calls] == ["triton", "compiled"]
    _, grid, (tensor, *rest) = kernel.calls[1]
    assert grid == (7, 1, 1) and tensor is y
    assert rest == [4, 64, True]  # in the order of the kernel's own arguments, without options


def test_tensors_that_lie_elsewhere_go_to_triton() -> None:
    """A compiled kernel makes use of addresses that are multiples of 16."""
    kernel, base = Kernel(), torch.zeros(9)
    made = launch(kernel)
    made((base[1:],), (3,))
    made((base[1:],), (3,))
    made((base[:8],), (3,))
    made((base[1:],), (3,))
    made((base[:8],), (3,))
    assert [call[0] for call in kernel.calls] == ["triton"] * 4 + ["compiled"]


def test_the_interpreter_is_asked_each_time() -> None:
    kernel = Kernel(interpreted=True)
    made = launch(kernel)
    for _ in range(2):
        made((torch.zeros(8, dtype=torch.bfloat16),), (3,))
    assert [call[0] for call in kernel.calls] == ["triton"] * 2
    assert all(call[2][0].dtype == torch.int16 for call in kernel.calls)


def _layouts(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
    return [torch.zeros(shape, dtype=dtype), wide[..., : shape[-1]]]


def _calls(shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> None:
    """Every op on tensors of one shape, in many settings."""
    width = shape[-1]
    weights = AdapterWeights(
        *(torch.zeros(size, dtype=dtype) for size in ((rank, width), (rank,), (width, rank), (width,)))
    )
    for x, stream_dtype, centered, value, dropout in itertools.product(
        _layouts(shape, dtype),
        {torch.int32, torch.float32, dtype},
        (False, True),
        {None, torch.float32, dtype},
        (0.0, 0.1),
    ):
        exact = stream_dtype == torch.int32
        bits = 16 if exact else None
        settings: dict[str, Any] = {"fraction_bits": bits, "value_dtype": value, "impl": "triton"}
        for stream in _layouts(shape, stream_dtype):
            center = torch.zeros(shape, dtype=stream_dtype) if centered else None
            for coefficient in (1.0, 0.1):
                made = ops.couple(stream, x, coefficient, center=center, **settings)
                ops.uncouple(stream, x, coefficient, made.remainder, center=center, first_row=3, **settings)
            more = {"dropout": dropout, "seed": 5, "center": center, "residual": centered, **settings}
            ops.adapter_couple(stream, x, weights, "gelu", 1.0, **more)
            ops.adapter_uncouple(stream, x, weights, "gelu", 1.0, **more)
            into = torch.zeros(shape, dtype=dtype) if centered else None
            ops.adapter_uncouple_backward(stream, x, x.clone(), weights, "relu", 1.0, dx_into=into, **more)
        ops.parallel_adapter(x, x, weights, "silu", dropout=dropout, seed=1, impl="triton")
        ops.adapter_forward(x, weights, "silu", dropout=dropout, seed=1, impl="triton")
        ops.adapter_backward(x.clone(), x, weights, "silu", dropout=dropout, seed=1, impl="triton")


def test_a_launch_is_for_one_kind_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that Triton compiles a kernel for is the same in every call of a launch: dtypes, and integers by value."""
    pytest.importorskip("triton")
    from meft_kernels.ops.coupling import triton as kernels

    if kernels.INTERPRETED:
        pytest.skip("Triton's interpreter compiles nothing")
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    kinds: dict[int, tuple[Launch, Any]] = {}
    times = 0

    def note(self: Launch, tensors: tuple[Any, ...], scalars: tuple[Any, ...]) -> None:
        nonlocal times
        times += 1
        parameters = self.kernel.params
        values = [
            type(value) if parameter.do_not_specialize or isinstance(value, float) else value
            for parameter, value in zip(parameters[len(tensors) :], scalars, strict=False)
        ]
        kind = [None if tensor is None else tensor.dtype for tensor in tensors], values
        assert kinds.setdefault(id(self), (self, kind))[1] == kind
        constants = [parameter.name for parameter in parameters if parameter.is_constexpr]
        assert len(tensors) + len(scalars) + len(constants) == len(parameters)
        assert set(constants) <= set(self.constants)

    monkeypatch.setattr(Launch, "_launch", note)
    for shape, dtype, rank in (
        ((2, 3, 64), torch.float32, 8),
        ((6, 64), torch.float32, 8),
        ((6, 64), torch.bfloat16, 8),
        ((6, 64), torch.float32, 16),
        ((1, 20), torch.float16, 8),
    ):
        _calls(shape, dtype, rank)
    assert 100 < len(kinds) < times / 2  # and the same one does serve


def test_dense() -> None:
    x = torch.zeros(4, 6)
    assert all_dense(x, None) and not all_dense(x, x.mT)
