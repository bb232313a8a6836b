"""An error in the place of any call that the library makes, and what must be as before afterwards."""

from __future__ import annotations

import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import meft_kernels
from meft_kernels.modules import modules_of
from meft_kernels.patching.state import AdapterSlot, find_state

PACKAGE = str(Path(meft_kernels.__file__).parent)
MECHANISM = {str(Path(PACKAGE) / "rollback.py"), str(Path(PACKAGE) / "engine" / "threads.py")}
"""What puts things back, and opens the gate for other threads, is trusted to run, as is leaving a ``with`` block."""

CALLBACKS = {str(weakref.__file__), str(Path(torch.__file__).parent / "_dynamo" / "utils.py")}
"""What runs as an object dies. torch.compile, once used, keeps a weak reference to every module that is made."""


class Injected(Exception):
    """No error that anything could expect."""


class _Calls:
    """Raises at one of the calls that are made from the library's own code, Python's and C's alike."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.place = at, error, ""
        self.made = 0
        self.sites: dict[tuple[CodeType, int], tuple[int, int]] = {}
        """Every call that stands in the code, with the numbers of the first and the last time that it was made."""
        self._ours: dict[CodeType, bool] = {}

    def _is_ours(self, code: CodeType) -> bool:
        if code not in self._ours:
            name = code.co_filename
            self._ours[code] = name.startswith(PACKAGE) and name not in MECHANISM
        return self._ours[code]

    @staticmethod
    def _is_trusted(code: CodeType) -> bool:
        """Generators too: when one is closed that was not used up, Python swallows what is raised."""
        generates = bool(code.co_flags & inspect.CO_GENERATOR)
        return code.co_filename in MECHANISM | CALLBACKS or code.co_name == "__exit__" or generates

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        caller = frame if event == "c_call" else frame.f_back if event == "call" else None
        if caller is None or not self._is_ours(caller.f_code):
            return
        if event == "call" and self._is_trusted(frame.f_code):
            return
        self.made += 1
        site = (caller.f_code, caller.f_lasti)
        self.sites[site] = (self.sites.get(site, (self.made,))[0], self.made)
        if self.made == self.at:
            sys.setprofile(None)
            self.place = f"call {self.at}, in {caller.f_code.co_name}:{caller.f_lineno}"
            raise self.error(self.place)


def call_sites(operation: Callable[[], object]) -> list[tuple[int, int]]:
    """Run an operation; for each call that stands in its code the numbers of the first and the last one made there."""
    gc.collect()  # what earlier tests left: its finalisers are no calls of the operation
    calls = _Calls(0, Injected)
    gc.disable()
    sys.setprofile(calls)
    try:
        operation()
    finally:
        sys.setprofile(None)
        gc.enable()
    return list(calls.sites.values())


def interrupted(operation: Callable[[], object], at: int, error: type[BaseException]) -> str | None:
    """Run an operation with an error in the place of its call number ``at``.

    Returns:
        Where the error was raised; None where the operation made fewer calls this time, or this one was a finaliser's.
    """
    calls = _Calls(at, error)
    dropped: list[object] = []  # Python drops what finalisers and callbacks of weak references raise
    before, sys.unraisablehook = sys.unraisablehook, dropped.append
    gc.disable()
    sys.setprofile(calls)
    try:
        operation()
    except BaseException:  # some errors are told by others
        if not calls.place:
            raise
        return calls.place
    finally:
        sys.setprofile(None)
        gc.enable()
        sys.unraisablehook = before
    if dropped:
        return None
    assert not calls.place, f"went on after an error in {calls.place}"
    return None


def spread(numbers: Sequence[int], at_most: int) -> list[int]:
    """All of them, or as many as are allowed, evenly spread, the first and the last among them."""
    if len(numbers) <= at_most:
        return list(numbers)
    return [numbers[round(index * (len(numbers) - 1) / (at_most - 1))] for index in range(at_most)]


def everything(model: nn.Module) -> dict[str, Any]:
    """All that an interrupted operation must leave as it was; equal only where it is, bit for bit."""
    state = find_state(model)
    objects = [*modules_of(model), *(() if state is None else state.parts())]
    shape: list[Any] = []
    if state is not None:
        for name, slot in state.inactive.items():  # the slot itself may be a new one
            shape.append((name, slot.config, list(map(id, slot.parts()[1:])), slot.arithmetics, slot.beside))
    for thing in objects:
        if isinstance(thing, torch.Tensor | AdapterSlot):
            continue
        attributes = {}
        for name, value in vars(thing).items():
            if name == "inactive":
                continue
            if isinstance(value, dict):
                attributes[name] = [(key, id(held)) for key, held in value.items()]
            elif isinstance(value, list | set | tuple):
                attributes[name] = [id(held) for held in value]
            else:
                attributes[name] = value if isinstance(value, bool | int | str) else id(value)
        shape.append((id(thing), type(thing), attributes))
    waiting = [part for part in objects if isinstance(part, nn.Module)]
    tensors = [t for part in waiting for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
    tensors += [part for part in objects if isinstance(part, torch.Tensor)]
    return {
        "shape": shape,
        "values": [tensor.detach().clone() for tensor in tensors],
        "trains": [tensor.requires_grad for tensor in tensors],
        "gradients": [None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone()) for tensor in tensors],
        "keys": list(model.state_dict()),
    }


def same(now: Any, before: Any) -> bool:
    """Equality that goes into containers and compares tensors bit for bit, dtype and device included."""
    if isinstance(before, torch.Tensor):
        alike = isinstance(now, torch.Tensor) and (now.dtype, now.device, now.shape) == (
            before.dtype,
            before.device,
            before.shape,
        )
        return alike and torch.equal(now, before)
    if isinstance(before, dict):
        return now.keys() == before.keys() and all(same(now[key], before[key]) for key in before)
    if isinstance(before, list | tuple):
        return len(now) == len(before) and all(same(a, b) for a, b in zip(now, before, strict=True))
    return bool(now == before)


def difference(now: dict[str, Any], before: dict[str, Any]) -> str:
    """Where two states differ, for a message."""
    for name, expected in before.items():
        if not same(now[name], expected):
            pairs = enumerate(zip(now[name], expected, strict=False))
            first = next((index, a, b) for index, (a, b) in pairs if not same(a, b)) if now[name] else None
            return f"{name}: {first!s:.2000}"
    return ""
