"""Is my model exact, and what does it save: checked on the user's own model and batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import Engine
from ..engine.replay import seeded
from ..engine.surroundings import buffers_kept
from ..errors import ReversibleUsageError
from ..memory import LiveTensorMeter
from ..notices import and_others
from ..patching.state import PatchState, between_passes, fraction_bits_of, require_state, unwrap
from ..patching.switching import disable_adapter

Batch = Mapping[str, Any]
_MIB = 2**20


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found; ``str()`` gives a table."""

    bit_exact: bool
    """Every reversible layer's rebuilt input equals the forward's, bit for bit."""
    first_mismatch: str | None
    """The first layer, in the order of backward, whose input came back different."""
    gradient_error: float
    """||g - g_ref|| / ||g_ref|| over all trainable parameters, g_ref from ``engine="autograd"``; inf where one of them
    has a gradient in one engine only, or none has any."""
    worst_gradient: tuple[str, float]
    """The parameter whose gradient is furthest off, and its error relative to its own norm."""
    saved_bytes_per_layer: float
    """Bytes that a reversible layer keeps between forward and backward for this batch, on average."""
    saved_bytes_per_element: float
    """The same per element of the hidden states."""
    start_loss: float | None
    """Loss of the patched model in eval mode, adapters as they are now; None if the batch has no labels."""
    base_loss: float | None
    """Loss of the same model with adapters and coupling out of the way."""
    layers: int
    """Reversible layers that were checked."""
    other_layers: int
    """Patched layers that were not: left out (LayerDrop), or their activations were kept."""
    fraction_bits: tuple[int | None, ...]
    """k of every stack; None for float streams."""
    repeats: bool
    """The forward gave the same loss in both engines, to the last bit."""
    blocks_match: bool
    """The family's ``attention_block`` and ``mlp_block``, one after the other, are the layer itself, bit for bit and
    with all it returns. Only meft3 uses them."""
    without_gradient: tuple[str, ...]
    """Trainable parameters that got no gradient in either engine, of which their equality says nothing: this batch does
    not use them (an expert, a pooler), or the loss does not depend on what they compute."""
    kept_bytes: int | None
    """Bytes of all tensors that wait for backward after the forward of this batch, weights not; None under
    ``compile_layers``, of which not all are seen."""
    autograd_bytes: int | None
    """The same of the same model with ``engine="autograd"``, which keeps every activation."""

    @property
    def verdict(self) -> str:
        """In a sentence: is it exact, and if not, where is it not?"""
        if not self.layers:
            return "NOT checked: no layer was rebuilt"
        if not self.bit_exact:
            return f"NOT exact: the input of {self.first_mismatch} was not rebuilt bit for bit"
        if not math.isfinite(self.gradient_error):
            return f"NOT exact: the gradient of {self.worst_gradient[0]} is not that of plain autograd"
        if not self.repeats:
            return "NOT exact: the loss is another under plain autograd"
        return (
            f"exact: {self.layers} of {self.layers} reversible layers rebuilt bit for bit, gradients "
            f"{self.gradient_error:.0e} from those of plain autograd"
        )

    def __str__(self) -> str:
        rows = [
            ("verdict", self.verdict),
            ("bit exact", f"{self.bit_exact}" + (f", first at {self.first_mismatch}" if self.first_mismatch else "")),
            ("layers checked", f"{self.layers}" + (f", {self.other_layers} others" if self.other_layers else "")),
            ("same loss in both engines", str(self.repeats)),
            ("blocks are the layer", str(self.blocks_match)),
            ("gradient error", f"{self.gradient_error:.2e}"),
            ("worst gradient", f"{self.worst_gradient[1]:.2e} {self.worst_gradient[0]}"),
            (
                "kept by a layer",
                f"{self.saved_bytes_per_layer:,.0f} bytes until backward ({self.saved_bytes_per_element:.3f} per "
                "element of the hidden states)",
            ),
            ("fraction bits", ", ".join("float" if bits is None else str(bits) for bits in self.fraction_bits)),
        ]
        if self.kept_bytes is not None and self.autograd_bytes:
            saved = 1 - self.kept_bytes / self.autograd_bytes
            said = f"{self.kept_bytes / _MIB:,.1f} MiB, {self.autograd_bytes / _MIB:,.1f} under engine='autograd'"
            rows.insert(-1, ("kept by the model", f"{said}: {100 * saved:.0f} % saved on this batch"))
        if self.without_gradient:
            rows.append(("without a gradient", and_others(self.without_gradient)))
        if self.start_loss is not None and self.base_loss is not None:
            rows.append(("loss patched / pretrained", f"{self.start_loss:.4f} / {self.base_loss:.4f}"))
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


@dataclass
class _Recorder:
    """Keeps both streams at every layer's input, on the CPU, and compares what backward rebuilds."""

    inputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    equal: dict[int, bool] = field(default_factory=dict)
    nbytes: list[int] = field(default_factory=list)
    elements: int = 0

    def forward(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        self.inputs[index] = (x1.to("cpu", copy=True), x2.to("cpu", copy=True))
        self.elements = x1.numel()

    def rebuilt(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        before = self.inputs.pop(index)
        self.equal[index] = all(torch.equal(now.cpu(), then) for now, then in zip((x1, x2), before, strict=True))

    def saved(self, index: int, nbytes: int) -> None:
        self.nbytes.append(nbytes)


def calibrate(model: nn.Module, batch: Batch) -> tuple[int | None, ...]:
    """Choose ``fraction_bits`` from this batch, as the first training batch would; weights stay untouched.

    Args:
        model: a patched model.
        batch: keyword arguments of its forward, on its device.

    Returns:
        The bits chosen for every stack of layers; None for float streams.

    Raises:
        PatchError: the model is not patched.
        ReversibleUsageError: ``fraction_bits`` was given to ``patch``.
    """
    state = require_state(model)
    for stack in state.stacks:
        stack.reset_calibration()
    with torch.no_grad():
        unwrap(model)(**batch)
    return fraction_bits_of(state)


@between_passes
def verify(model: nn.Module, batch: Batch) -> VerifyReport:
    """Run one batch both ways and hold every layer's rebuilt input and every gradient against the reference.

    Uses the model in its present mode (call ``model.train()`` to have dropout live), restores gradients, random state
    and mode, and needs memory for the activations of one plain autograd pass: take a small batch.

    Args:
        model: a patched model.
        batch: keyword arguments of its forward, on its device. With labels the loss is the model's own, without it is
            the mean square of the first output.

    Returns:
        A report; nothing is raised for a model that is not exact.

    Raises:
        PatchError: the model is not patched.
        NonFiniteError, StreamOverflowError: the streams cannot hold this batch.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch is a mapping of the model's keyword arguments, not {type(batch).__name__}")
    state = require_state(model)
    base = unwrap(model)
    if not any(parameter.requires_grad for parameter in base.parameters()):
        raise ReversibleUsageError("nothing in this model is trainable, so there are no gradients to verify")
    if all(stack.reversible_end == stack.first for stack in state.stacks):
        raise ReversibleUsageError(
            "no layer is reversible (engine='autograd', reversible_layers=0, or a budget in which all fits): "
            "nothing to verify"
        )
    if "use_cache" in inspect.signature(base.forward).parameters:
        batch = {"use_cache": False, **batch}
    with _left_as_it_was(base):
        start_loss, base_loss = _losses(base, batch)
        blocks_match = _blocks_match(base, batch, state)
        with _observed(state) as recorders:
            loss, gradients = _gradients(base, batch)
        with _engine(state, "autograd"):
            reference_loss, reference = _gradients(base, batch)
        kept = autograd_kept = None
        if not state.config.compile_layers:
            kept = _kept(base, batch)
            with _engine(state, "autograd"):
                autograd_kept = _kept(base, batch)
    mismatches = [
        stack.name_of(place)
        for stack, recorder in zip(state.stacks, recorders, strict=True)
        for place, equal in recorder.equal.items()
        if not equal
    ]
    checked = sum(len(recorder.equal) for recorder in recorders)
    sizes = [nbytes for recorder in recorders for nbytes in recorder.nbytes]
    elements = sum(len(recorder.nbytes) * recorder.elements for recorder in recorders)
    trainable = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    missing = tuple(name for name in trainable if name not in gradients and name not in reference)
    error, worst = _gradient_errors(gradients, reference)
    if len(missing) == len(trainable):
        error, worst = math.inf, (missing[0], math.inf)
    return VerifyReport(
        bit_exact=checked > 0 and not mismatches,
        first_mismatch=mismatches[0] if mismatches else None,
        gradient_error=error,
        worst_gradient=worst,
        saved_bytes_per_layer=sum(sizes) / max(1, len(sizes)),
        saved_bytes_per_element=sum(sizes) / max(1, elements),
        start_loss=start_loss,
        base_loss=base_loss,
        layers=checked,
        other_layers=sum(len(stack.order) for stack in state.stacks) - checked,
        fraction_bits=fraction_bits_of(state),
        repeats=loss == reference_loss,
        blocks_match=blocks_match,
        without_gradient=missing,
        kept_bytes=kept,
        autograd_bytes=autograd_kept,
    )


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put gradients, buffers, random state and train or eval mode back afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with buffers_kept(model), seeded(0, next(model.parameters()).device):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextmanager
def _observed(state: PatchState) -> Iterator[list[_Recorder]]:
    recorders = [_Recorder() for _ in state.stacks]
    for stack, recorder in zip(state.stacks, recorders, strict=True):
        stack.observer = recorder
    try:
        yield recorders
    finally:
        for stack in state.stacks:
            stack.observer = None


@contextmanager
def _engine(state: PatchState, engine: Engine) -> Iterator[None]:
    before = [stack.engine for stack in state.stacks]
    for stack in state.stacks:
        stack.engine = engine
    try:
        yield
    finally:
        for stack, was in zip(state.stacks, before, strict=True):
            stack.engine = was


def _losses(model: nn.Module, batch: Batch) -> tuple[float | None, float | None]:
    """Loss in eval mode as patched, and as pretrained; restores train mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        patched = getattr(model(**batch), "loss", None)
        with disable_adapter(model):
            pretrained = getattr(model(**batch), "loss", None)
    for module, training in modes:
        module.training = training
    return _number(patched), _number(pretrained)


def _blocks_match(model: nn.Module, batch: Batch, state: PatchState) -> bool:
    """Hold every layer's blocks against the layer, in eval mode and without adapters."""
    layers = {layer.module: layer for stack in state.stacks for layer in stack.layers}
    same: list[bool] = []

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        same.append(layers[module].blocks_give(output, *args, **kwargs))

    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in layers]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), disable_adapter(model):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return all(same)


def _number(loss: torch.Tensor | None) -> float | None:
    return None if loss is None else float(loss)


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    output = model(**batch)
    loss: torch.Tensor | None = getattr(output, "loss", None)
    return output[0].float().square().mean() if loss is None else loss


def _kept(model: nn.Module, batch: Batch) -> int:
    """Bytes alive because of the loss. In a forward of its own: a meter looks at every op, and may change which run."""
    with torch.enable_grad(), seeded(0, next(model.parameters()).device), LiveTensorMeter() as meter:
        loss = _loss(model, batch)
        kept = meter.live_bytes
    del loss
    return kept


def _gradients(model: nn.Module, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and the gradient of every trainable parameter, under the same random numbers each time."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in trainable.values():
        parameter.grad = None
    with torch.enable_grad(), seeded(0, next(model.parameters()).device):
        loss = _loss(model, batch)
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable.items() if parameter.grad is not None}
    for parameter in trainable.values():
        parameter.grad = None
    return float(loss.detach()), gradients


def _gradient_errors(
    gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> tuple[float, tuple[str, float]]:
    """Relative error over everything, and of the parameter that is furthest off; inf if one has no gradient at all.

    A parameter's error is relative to its own gradient, or to a hundredth of all gradients together if that is more:
    some are zero but for rounding (a key's bias, which softmax ignores), and have no relative error of their own.
    """
    if gradients.keys() != reference.keys():
        odd = min(gradients.keys() ^ reference.keys())
        return math.inf, (odd, math.inf)
    squares = norms = 0.0
    worst = ("", 0.0)
    least = 1e-4 * sum(float(expected.double().square().sum()) for expected in reference.values())
    for name, expected in reference.items():
        off = float((gradients[name].double() - expected.double()).square().sum())
        norm = float(expected.double().square().sum())
        squares, norms = squares + off, norms + norm
        relative = math.sqrt(off / max(norm, least)) if norm or least else (math.inf if off else 0.0)
        if not relative <= worst[1]:  # NaN counts as worst
            worst = (name, relative)
    return (math.sqrt(squares / norms) if norms else (math.inf if squares else 0.0)), worst
