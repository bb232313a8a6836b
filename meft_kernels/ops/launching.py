"""Launching kernels, and what both families of ops look up once for tensors of the same kind.

Triton binds and classifies every argument of every launch, looks for the kernel that it has compiled for such, and
compares all constants of the module: 25 to 39 us, in which a layer's eleven launches take longer than the kernels run.
The answer is the same for tensors of the same shapes, dtypes and device, which is what a :class:`Launch` is made for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

facts = attrgetter("shape", "dtype", "device")
"""What is known of a tensor without looking at its strides or its memory."""

_ADDRESS = methodcaller("data_ptr")
_DENSE = methodcaller("is_contiguous")
_OFF = (15).__and__
"""Of an address, how far it is from a multiple of 16, of which Triton's compiled kernels make use."""

remembered = functools.lru_cache(1024)
"""For what depends on its arguments alone; batches of many lengths have their turns. Errors are raised anew."""


def without_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """The function under ``torch.no_grad()``, which is on already wherever a layer calls it."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return plain


def all_dense(*tensors: torch.Tensor | None) -> bool:
    """Whether all that are there are contiguous."""
    return all(map(_DENSE, [tensor for tensor in tensors if tensor is not None]))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """bfloat16 tensors as int16, everything else as it is."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


class Launch:
    """One kernel with a grid and constants, for tensors of the same dtypes on one device.

    Attributes:
        kernel: of Triton's; what the interpreter makes of it is launched as it is.
        grid: as many programs in each dimension.
        constants: the kernel's last arguments, in their order, and options of the launch.
        device: where the tensors are.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], device: torch.device) -> None:
        self.kernel, self.grid, self.constants = kernel, grid, constants
        self.device = device if device.type == "cuda" else None
        self._compiled: tuple[Any, tuple[Any, ...]] | None = None

    def __call__(self, tensors: tuple[torch.Tensor | None, ...], scalars: tuple[Any, ...]) -> None:
        """Launch it, under the device of its tensors.

        Args:
            tensors: the kernel's first arguments; bfloat16 ones are passed on as bits.
            scalars: those that come between them and the constants. What Triton specialises for a value must be the
                same in every call.
        """
        if self.device is not None and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                self._launch(tensors, scalars)
        else:
            self._launch(tensors, scalars)

    def _launch(self, tensors: tuple[torch.Tensor | None, ...], scalars: tuple[Any, ...]) -> None:
        addresses = list(map(_ADDRESS, [tensor for tensor in tensors if tensor is not None]))
        # Multiples of 16, and no simulated ones, which lie nowhere.
        well_placed = not any(map(_OFF, addresses)) and 0 not in addresses
        if well_placed and self._compiled is not None:
            run, constants = self._compiled
            run(*tensors, *scalars, *constants)  # which takes addresses, and does not ask what of
            return
        bits = [None if tensor is None else as_bits(tensor) for tensor in tensors]
        compiled = self.kernel[self.grid](*bits, *scalars, **self.constants)
        if well_placed and hasattr(compiled, "asm"):
            names = self.kernel.arg_names[len(tensors) + len(scalars) :]
            self._compiled = compiled[(*self.grid, 1, 1)[:3]], tuple([self.constants[name] for name in names])
