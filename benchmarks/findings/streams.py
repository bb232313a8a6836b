"""How far float arithmetic's rebuilt streams are from the forward's, layer by layer; and what patching alone does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import meft_kernels
from benchmarks.real import real_batch, real_model
from benchmarks.start_loss import causal_loss, hidden_states
from meft_kernels import MeftConfig, NonFiniteError, StreamOverflowError
from meft_kernels.engine.replay import seeded
from meft_kernels.patching.state import require_state, unwrap

from .shared import CPU, Job, Sizes, finite

INVERSION, START = "finding-inversion", "finding-start"


def inversion_job(sizes: Sizes, label: str, dtype: str, configs: dict[str, dict[str, Any]]) -> Job:
    """Adapters that do something already, or the lanes that are theirs would have nothing to invert."""
    whole = {name: {"rank": 8, "up_init_std": 0.02, **config} for name, config in configs.items()}
    settings = {"model": sizes.language_model, "dtype": dtype, "rows": 1, "tokens": sizes.tokens, "configs": whole}
    return Job(INVERSION, f"{label}-{dtype}", settings, invert)


def start_job(sizes: Sizes, label: str, model: str, configs: dict[str, dict[str, Any]]) -> Job:
    size = {"rows": sizes.rows, "tokens": sizes.tokens, "draws": sizes.draws}
    return Job(START, f"{label}-{model}", {"model": model, **size, "configs": configs}, start)


@functools.cache
def _model(name: str, dtype: str) -> nn.Module:
    """Patched and given back by one config after the other: reading a GGUF file takes half a minute."""
    return real_model(name, getattr(torch, dtype)).eval()


_batch = functools.cache(real_batch)
"""Reading all reviews for every config would take longer than the config."""


class _Drift:
    """An observer: the relative error of every rebuilt stream, the worse of the two."""

    def __init__(self) -> None:
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.error: dict[int, float | None] = {}
        self.equal: dict[int, bool] = {}

    def forward(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        self.before[index] = (x1.clone(), x2.clone())

    def rebuilt(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        pairs = list(zip((x1, x2), self.before.pop(index), strict=True))
        self.equal[index] = all(torch.equal(now, then) for now, then in pairs)
        errors = [finite((now.double() - then.double()).norm() / then.double().norm()) for now, then in pairs]
        known = [error for error in errors if error is not None]
        self.error[index] = max(known) if len(known) == len(errors) else None

    def saved(self, index: int, nbytes: int) -> None:
        pass


def _one(model: nn.Module, batch: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    drift = _Drift()
    with seeded(0, CPU):
        meft_kernels.patch(model, MeftConfig.from_dict(config))
    stopped = None
    try:
        (stack,) = require_state(model).stacks
        stack.observer = drift
        options = {"use_cache": False} if unwrap(model).get_output_embeddings() is not None else {}
        model(**batch, **options).loss.backward()
    except (NonFiniteError, StreamOverflowError) as error:
        stopped = str(error)
    finally:
        meft_kernels.unpatch(model)
    upwards = sorted(drift.error, reverse=True)  # the order in which backward undoes them
    return {
        "error": [drift.error[index] for index in upwards],
        "equal": bool(upwards) and all(drift.equal.values()),
        "stopped": stopped,
    }


def invert(settings: dict[str, Any]) -> dict[str, Any]:
    """Of each config: the error after undoing 1, 2, ... layers from the top; null is infinity or NaN."""
    model = _model(settings["model"], settings["dtype"])
    batch = _batch(settings["model"], settings["rows"], settings["tokens"])
    return {name: _one(model, batch, config) for name, config in settings["configs"].items()}


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """Of each config: change of a causal model's loss in nats, or relative one of an encoder's last hidden states."""
    name = settings["model"]
    model = _model(name, "float32")
    batches = [_batch(name, settings["rows"], settings["tokens"], seed) for seed in range(settings["draws"])]
    causal = unwrap(model).get_output_embeddings() is not None
    look = causal_loss if causal else hidden_states
    with torch.no_grad():
        before = [look(model, batch) for batch in batches]
        figures = {
            label: _changes(model, MeftConfig.from_dict(config), batches, look, before)
            for label, config in settings["configs"].items()
        }
    return {"unit": "nats" if causal else "relative", "configs": figures}


def _changes(
    model: nn.Module,
    config: MeftConfig,
    batches: list[dict[str, torch.Tensor]],
    look: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor],
    before: list[torch.Tensor],
) -> dict[str, Any]:
    """No changes, and why, where the streams cannot hold what the coupling makes of them."""
    meft_kernels.patch(model, config)
    bits = meft_kernels.describe(model).stacks[0].bits_per_element
    figures: dict[str, Any] = {"changes": [], "bits": bits, "stopped": None}
    try:
        for batch, old in zip(batches, before, strict=True):
            new = look(model, batch)
            change = new - old if new.dim() == 0 else (new - old).norm() / old.norm()
            figures["changes"].append(float(change))
    except (NonFiniteError, StreamOverflowError) as error:
        figures |= {"changes": [], "stopped": str(error)}
    finally:
        meft_kernels.unpatch(model)
    return figures
