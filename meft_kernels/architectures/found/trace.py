"""One forward of a model, looked at: which modules of its lists were called, with what, and what became of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections import UserDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...modules import modules_of


@dataclass
class Call:
    """One call of one module."""

    module: nn.Module
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: int
    given: torch.Tensor | None = None
    """The first argument, if it is a tensor."""
    given_version: int = -1
    entered: torch.Tensor | None = None
    """The same as the module saw it, which records gradients."""
    entered_version: int = -1
    overwritten: bool = False
    """Whether the call wrote into it."""
    output: Any = None
    models: tuple[int, ...] = ()
    """``id``s of the models that were being called."""
    returned: torch.Tensor | None = None
    """What it returns, or the first of that."""
    returned_version: int = -1
    value: torch.Tensor | None = None
    """A copy of its values, of a layer."""
    end: int = -1
    boxes: dict[str, Any] = field(default_factory=dict)
    """Arguments that are mappings or lists, KV caches aside."""
    held: dict[str, Any] = field(default_factory=dict)
    """What each of them held before."""
    filled: list[str] = field(default_factory=list)
    """Those of them that the call wrote into."""
    written: list[torch.Tensor] = field(default_factory=list)
    """Tensors that it wrote into mappings."""
    readers: list[tuple[str, Call | None]] = field(default_factory=list)
    """Functions that read what it returned, and the layer's call that they were part of."""

    def contains(self, other: Call) -> bool:
        return self.start <= other.start and other.end <= self.end

    @property
    def others(self) -> list[torch.Tensor]:
        """Tensors among its arguments beside the first."""
        first = next(iter(parameter_names(self.module)), "")
        rest = {name: value for name, value in self.kwargs.items() if name != first or self.args}
        return [leaf for leaf in tree_leaves([self.args[1:], rest]) if isinstance(leaf, torch.Tensor)]


@dataclass
class Trace:
    """What was seen in one forward."""

    layers: list[Call]
    """Calls of the lists' children, in time."""
    parts: dict[int, list[Call]]
    """``id`` of such a child: calls of the modules below it, named by their path in it, in time."""
    output: Any
    asked: set[int]
    """``id``s of the models inside the model that it asked for their hidden states."""


def first_tensor(output: Any) -> torch.Tensor | None:
    """What a layer hands on: what it returns, bare or first in a tuple."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a module's forward takes by position."""
    return _names_of(type(module).forward)


@functools.cache
def _names_of(forward: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)[1:]


def trace(model: nn.Module, batch: dict[str, Any], lists: dict[str, nn.ModuleList]) -> Trace:
    """Call the model once; gradients are recorded from the first layers of ``lists`` on, where the model lets them."""
    recorder = _Recorder(model, lists)
    with recorder.listening(model), recorder:
        output = model(**batch)
    return Trace(sorted(recorder.layers, key=lambda call: call.start), recorder.parts, output, recorder.asked)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, lists: dict[str, nn.ModuleList]) -> None:
        super().__init__()
        self.layers: list[Call] = []
        self.parts: dict[int, list[Call]] = defaultdict(list)
        self.asked: set[int] = set()
        self._names = {id(layer): f"{name}.{i}" for name, layers in lists.items() for i, layer in enumerate(layers)}
        self._children = [layer for layers in lists.values() for layer in layers]
        self._open: list[Call] = []
        self._models = [id(model)]
        self._owners: dict[int, list[Call]] = defaultdict(list)
        self._clock = 0
        self._paths = {id(layer): {id(m): n for n, m in layer.named_modules()} for layer in self._children}

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        handles = []
        try:
            for part in model.modules():
                if part is not model and hasattr(part, "base_model_prefix"):
                    handles.append(part.register_forward_pre_hook(self._model_begins, with_kwargs=True))
                    handles.append(part.register_forward_hook(self._model_ends))
            inside: dict[int, nn.Module] = {}
            for layer in self._children:
                inside.update({id(module): module for module in modules_of(layer)})
            for module in inside.values():
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, with_kwargs=True, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _model_begins(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._models.append(id(module))
        if kwargs.get("output_hidden_states"):
            self.asked.add(id(module))

    def _model_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._models.remove(id(module))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():
            first = next(iter(parameter_names(module)), None)
            given = args[0] if args else kwargs.get(first or "")
            call = Call(module, self._names.get(id(module), ""), args, dict(kwargs), self._tick())
            self._open.append(call)
            call.models = tuple(self._models)
            if not isinstance(given, torch.Tensor):
                return None
            call.given, call.given_version, call.entered = given, given._version, given
            if id(module) not in self._names:
                return None
            call.boxes = _boxes(call)
            call.held = {name: copy.copy(box) for name, box in call.boxes.items()}
            if given.is_floating_point():
                # Another tensor of the same memory: its gradient is what comes through this call alone.
                call.entered = given.view_as(given) if given.requires_grad else given.detach().requires_grad_().clone()
            call.entered_version = call.entered._version
            if args:
                return (call.entered, *args[1:]), kwargs
            return args, kwargs | {str(first): call.entered}

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with torch._C.DisableTorchFunction():
            call = next(call for call in reversed(self._open) if call.module is module)
            self._open.remove(call)
            call.end = self._tick()
            if id(module) in self._names:
                # Other tensors of the same memory: their gradients are what comes from outside of the layer alone.
                output = tree_map_only(torch.Tensor, _handed_on, output)
            call.output, call.returned = output, first_tensor(output)
            self._note_part(call)
            if id(module) not in self._names:
                return None
            call.overwritten = call.entered is not None and call.entered._version != call.entered_version
            _note_written(call)
            if call.returned is not None:
                call.returned_version = call.returned._version
                call.value = call.returned.detach().clone()
                self._owners[_address(call.returned)].append(call)
            self.layers.append(call)
            return output

    def _note_part(self, call: Call) -> None:
        for layer in self._open:
            if (paths := self._paths.get(id(layer.module))) is not None:
                part = dataclasses.replace(call, name=paths.get(id(call.module), ""))
                self.parts[id(layer.module)].append(part)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._owners and getattr(func, "__name__", "") not in _LOOKS:
            with torch._C.DisableTorchFunction():
                for tensor in _tensors((*args, *kwargs.values())):
                    for call in self._owners.get(_address(tensor), ()):
                        self._note_reader(getattr(func, "__name__", str(func)), tensor, call)
        return func(*args, **kwargs)

    def _note_reader(self, name: str, tensor: torch.Tensor, call: Call) -> None:
        if call.returned is not None and call.returned.shape == tensor.shape:
            layers = (other for other in self._open if id(other.module) in self._names and other.start > call.end)
            call.readers.append((name, next(layers, None)))


_LOOKS = {
    "__get__", "dim", "size", "stride", "data_ptr", "untyped_storage", "storage_offset", "is_floating_point", "numel",
    "__len__", "requires_grad_", "register_hook", "is_contiguous", "retain_grad", "__hash__", "__set__", "__repr__",
    "is_complex", "get_device", "detach",
}  # fmt: skip
"""Functions that read no values."""


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same numbers in memory."""
    return one.shape == other.shape and _address(one) == _address(other) != -1


def _handed_on(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # of no storage: fake, sparse
        return -1


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, torch.Tensor):
                yield each


def _boxes(call: Call) -> dict[str, Any]:
    from ...engine.arguments import caches_in

    named = {**dict(zip(parameter_names(call.module), call.args, strict=False)), **call.kwargs}
    caches = caches_in(named)
    return {n: value for n, value in named.items() if n not in caches and isinstance(value, dict | UserDict | list)}


def _note_written(call: Call) -> None:
    """What the call put into its boxes; others get other tensors of the same memory, as of what it returns."""
    for name, box in call.boxes.items():
        before = call.held[name]
        if isinstance(box, list):
            if list(map(id, box)) != list(map(id, before)):
                call.filled.append(name)
            continue
        new = {key: value for key, value in box.items() if key not in before or before[key] is not value}
        if not new:
            continue
        call.filled.append(name)
        for key, value in new.items():
            box[key] = handed = tree_map_only(torch.Tensor, _handed_on, value)
            call.written += [leaf for leaf in tree_leaves(handed) if isinstance(leaf, torch.Tensor)]
