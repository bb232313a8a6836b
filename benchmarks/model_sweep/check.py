"""One model type through ``patch``: every rebuilt input, every gradient, and what is left after ``unpatch``."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

import meft_kernels
from meft_kernels import MeftConfig, ReversibleUsageError, UnsupportedModelError
from meft_kernels.architectures import find_architecture
from meft_kernels.architectures.found import FoundArchitecture, FoundLayers
from meft_kernels.engine.tape import Observer
from meft_kernels.patching.state import PatchState, require_state
from meft_kernels.patching.targets import find_spec

from .models import CannotBeMade, floats, make
from .stand_ins import stood_in

START = 0.03
"""How far patching alone may move the outputs. What moves them further must shrink with the coupling's coefficients, as
where an expert was chosen by a hair; a wrong function, about which both engines agree, does not."""
BOUND = 1e-5
"""Worst gradient in float32, relative to its own size or to a hundredth of all."""


class _Witness(Observer):
    """Compares the streams that backward rebuilds with forward's."""

    def __init__(self) -> None:
        self.before: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.equal: list[bool] = []

    def forward(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        self.before.append((index, x1.clone(), x2.clone()))

    def rebuilt(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        then = [(a, b) for i, a, b in self.before if i == index]
        self.equal.append(any(torch.equal(x1, a) and torch.equal(x2, b) for a, b in then))

    def saved(self, index: int, nbytes: int) -> None:
        pass


def look(model_type: str) -> dict[str, Any]:
    """What becomes of a model type: plain values."""
    try:
        model, batch = make(model_type)
    except CannotBeMade as reason:
        return {"outcome": "cannot be made", "reason": str(reason)}
    found: dict[str, Any] = {"class": type(model).__name__, "written": find_architecture(model_type) is not None}
    if stood_in(model):
        found["note"] = "its tower for images, of timm, is one convolution here"
    with _looked_at_once():
        return found | _checked(model, batch)


def _checked(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    probe, refusal = _way_in(model, batch)
    if refusal is not None:
        return {"outcome": "refused", "reason": refusal}
    spec = find_spec(model, MeftConfig(), probe=probe)
    if isinstance(spec, FoundArchitecture):
        layers = [each for each in spec.layers if isinstance(each, FoundLayers)]
        found |= {"found": spec.line.partition("no family file: ")[2], "probe": "made up" if probe is None else "given"}
        found["in two blocks"] = all(each.apart for each in layers)
    found["checks"] = {}
    for variant in ("meft2", "meft1", "meft3"):
        try:
            found["checks"][variant] = check(model, batch, variant, probe)
        except ReversibleUsageError as error:
            return {"outcome": "refused", "reason": f"in the first step: {error}"}
        except UnsupportedModelError as error:
            if variant != "meft3":
                raise
            found["meft3"] = str(error).partition("settings: ")[2]
    passes = all(passed(each) for each in found["checks"].values())
    return {**found, "outcome": "passes" if passes else "fails"}


@contextmanager
def _looked_at_once() -> Iterator[None]:
    """What was found of a model with a batch is found again without looking: it was unpatched in between."""
    targets: Any = meft_kernels.patching.targets
    look_at = targets.find
    known: dict[tuple[int, int], FoundArchitecture] = {}

    def find(model: Any, **settings: Any) -> FoundArchitecture:
        key = id(model), id(settings["batch"])
        if key not in known:
            known[key] = look_at(model, **settings)
        return known[key]

    targets.find = find
    try:
        yield
    finally:
        targets.find = look_at


def _way_in(model: Any, batch: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The batch to look at the model with, None for a made-up one; and why it is refused, if it is, with either."""
    reasons: list[str] = []
    for probe in (None, batch):
        try:
            meft_kernels.unpatch(meft_kernels.patch(model, probe=probe))
        except UnsupportedModelError as error:
            said = str(error).partition("does not serve: ")[2].partition(" A family of your own")[0]
            reasons.append(said or str(error))
        else:
            return probe, None
    return None, reasons[-1]


def passed(check: dict[str, Any]) -> bool:
    """Whether nothing of a check is amiss."""
    good = check["bit equal"] and check["same loss"] and check["unpatch identical"] and not check["missing"]
    all_of_them = check["layers"] > 0 and check["layers"] % check["of"] == 0  # a stack may run more than once
    near = check["start"] <= START or check["start at a 16th"] <= START / 16
    return bool(good and all_of_them and near and check["worst gradient"] <= BOUND)


def check(model: Any, batch: dict[str, Any], variant: Any, probe: dict[str, Any] | None) -> dict[str, Any]:
    """Patch, a step in each engine, unpatch."""
    expected, keys = _outputs(model, batch), list(model.state_dict())
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    start = _start(model, batch, variant, probe, expected)
    torch.manual_seed(5)
    meft_kernels.patch(model, variant=variant, rank=8, up_init_std=0.05, probe=probe)
    state = require_state(model)
    try:
        model.train()
        for module in model.modules():  # batch statistics are another matter
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        witnesses = [_Witness() for _ in state.stacks]
        for stack, witness in zip(state.stacks, witnesses, strict=True):
            stack.observer = witness
        loss, found = _step(model, batch)
        with _autograd(state):
            reference_loss, reference = _step(model, batch)
        of = sum(len(stack.order) for stack in state.stacks)
    finally:
        meft_kernels.unpatch(model.eval())
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, before in required:
            parameter.requires_grad_(before)
    equal = [each for witness in witnesses for each in witness.equal]
    after = _outputs(model, batch)
    same = len(after) == len(expected) and all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    return {
        "layers": len(equal),
        "of": of,
        "bit equal": all(equal) and bool(equal),
        # Not always to the last bit: kernels are chosen by what needs a gradient, which the first layer's input does in
        # one engine alone.
        "same loss": abs(loss - reference_loss) <= 1e-6 * max(1.0, abs(loss)),
        "worst gradient": _worst(found, reference),
        "missing": sorted(n for n in found.keys() ^ reference.keys() if (found | reference)[n].any())[:3],
        "unpatch identical": same and list(model.state_dict()) == keys,
        "start": start,
        **({} if start <= START else {"start at a 16th": _start(model, batch, variant, probe, expected, 16)}),
    }


def _start(
    model: Any, batch: dict[str, Any], variant: Any, probe: Any, expected: list[torch.Tensor], nearer: int = 1
) -> float:
    """How far the patched model's outputs are from the pretrained one's before training, relative to them."""
    lam, beta = (each if each == 1 else each / nearer for each in MeftConfig(variant=variant).coefficients)
    meft_kernels.patch(model, variant=variant, rank=8, probe=probe, lam=lam, beta=beta)
    try:
        now = _outputs(model, batch)
    finally:
        meft_kernels.unpatch(model)
    pairs = [(a.double(), b.double()) for a, b in zip(now, expected, strict=True) if a.shape == b.shape]
    off = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
    return off / size if size else math.nan


@contextmanager
def _autograd(state: PatchState) -> Iterator[None]:
    for stack in state.stacks:
        stack.engine, stack.observer = "autograd", None
    yield


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _outputs(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    _seed(3)
    with torch.no_grad():
        return [value.clone() for value in floats(model(**batch))]


def _step(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    _seed(2)
    generator = torch.Generator().manual_seed(0)
    values = list(floats(model(**batch)))
    loss = torch.stack([(v.float() * torch.randn(v.shape, generator=generator)).mean() for v in values]).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def _worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    norms = {name: float(value.double().norm()) for name, value in expected.items()}
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    if not total:
        return math.inf
    off = [
        float((found[name].double() - expected[name].double()).norm()) / max(norms[name], 1e-2 * total)
        for name in expected.keys() & found.keys()
    ]
    return max(off, default=math.inf)
