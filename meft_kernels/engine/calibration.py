"""How many fraction bits the streams of a model can afford."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..config import MeftConfig
from ..errors import ReversibleUsageError
from ..ops import INT_LIMIT, Coupled
from .arguments import copies_of_caches
from .arithmetic import Arithmetic
from .passes import Passes, Way
from .replay import other_generators_kept, seeded
from .surroundings import buffers_kept

if TYPE_CHECKING:
    from .owner import OwnerCall

logger = logging.getLogger(__name__)

MAX_CALIBRATED_BITS = 22
"""Finer than this gains nothing: streams of magnitude 1 then resolve float32's own rounding."""

HEADROOM_BITS = 2
"""log2 of how much the streams may grow, in training or on other batches, before they overflow."""

_COARSE = 2.0**-9
"""Rounding noise relative to a layer input's RMS beyond which it would show beside bfloat16's own (2^-9)."""


@dataclass(frozen=True)
class Probe(Arithmetic):
    """Float32 streams that note how large they become. One pass of it decides ``fraction_bits``."""

    fraction_bits: int | None = None
    largest: list[torch.Tensor] = field(default_factory=list)
    rms: list[torch.Tensor] = field(default_factory=list)
    """Of every stream, the smallest of any token: one large token would hide all others in the RMS of them together."""
    fuses: ClassVar[bool] = False
    entered: list[torch.Size] = field(default_factory=list)
    """Shapes of the hidden states with which passes have begun."""

    def enter(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stream, status = super().enter(hidden_states.float())
        self.entered.append(hidden_states.shape)
        self._note(stream)
        return stream, status

    def couple(
        self,
        a: torch.Tensor,
        branch: torch.Tensor,
        coefficient: float,
        center: torch.Tensor | None,
        value_dtype: torch.dtype | None,
        inplace: bool,
        first_row: int = 0,
    ) -> Coupled:
        coupled = super().couple(a, branch, coefficient, center, value_dtype, inplace, first_row)
        self._note(coupled.y)
        return coupled

    def _note(self, stream: torch.Tensor) -> None:
        if stream.numel():
            self.largest.append(stream.abs().amax())
            rms = stream.square().mean(-1).sqrt()
            self.rms.append(torch.where(rms > 0, rms, math.inf).amin())  # embeddings of padding are often zero

    def fraction_bits_for(self, at_most: int, name: str) -> int:
        """The most fraction bits that leave the streams room to grow by ``2^HEADROOM_BITS`` beyond what was met."""
        if not self.largest:
            raise ReversibleUsageError(f"calibration of {name} got an empty batch: call the model on real inputs first")
        largest = float(torch.stack(self.largest).max())
        integer_bits = math.ceil(math.log2(max(largest, 2.0**-20)))
        bits = int(math.log2(INT_LIMIT)) - HEADROOM_BITS - integer_bits
        bits = max(0, min(at_most, bits))
        rms = float(torch.stack(self.rms).min())
        noise = 2.0**-bits / math.sqrt(12)
        if noise > _COARSE * rms:
            logger.warning(
                "meft_kernels: streams of %s range from a token with an RMS of %.3g to a largest value of %.3g; "
                "fraction_bits=%d resolves that token to %.1e of its RMS only. Fine-tuning still works, the start loss "
                "may move; verify(model, batch) shows by how much.",
                name,
                rms,
                largest,
                bits,
                noise / rms,
            )
        else:
            logger.debug(
                "meft_kernels: %s: fraction_bits=%d, largest %.4g, smallest rms %.3g", name, bits, largest, rms
            )
        return bits


class Uncalibrated(Protocol):
    """What is needed of a stack of layers that may have no ``fraction_bits`` yet."""

    label: str
    config: MeftConfig
    owner: nn.Module
    layerdrop: bool
    arithmetic: Arithmetic | None
    max_bits: int | None
    passes: Passes
    passed_by: set[frozenset[str]]
    """Names of arguments with which calls of the model do not go through it."""


def calibrate(stacks: Sequence[Uncalibrated], call: OwnerCall, turn: AbstractContextManager[Any]) -> None:
    """Choose ``fraction_bits`` of a model's stacks that have none, from one forward in float32 streams without a trace.

    A stack through which this call does not go has none afterwards, and is not tried again in calls with the same
    arguments: texts alone, where it is for images.

    Args:
        stacks: all those that the model's own forward goes through.
        call: of the model.
        turn: held meanwhile: where several threads come to it at once, the first one's choice is everybody's.

    Raises:
        NonFiniteError: the model gives NaN or infinities on these inputs; names the layer.
        ReversibleUsageError: the batch is empty.
    """
    given = frozenset(name for name, value in call.named.items() if value is not None)

    def is_due(stack: Uncalibrated) -> bool:
        return stack.arithmetic is None and given not in stack.passed_by

    if not any(map(is_due, stacks)):
        return
    with turn:
        probes = [(stack, Probe(impl=stack.config.impl)) for stack in stacks if is_due(stack)]
        if not probes:
            return
        owner = stacks[0].owner
        training = owner.training
        ways = [(stack, Way(stack.arithmetic)) for stack in stacks if stack.arithmetic is not None]
        ways += [(stack, Way(probe)) for stack, probe in probes]
        for stack, way in ways:
            stack.passes.begin(way)
        try:
            if any(stack.layerdrop for stack in stacks):
                owner.training = False  # the owner's own switch: no layer may be left out, dropout stays as it is
            device = next(owner.parameters()).device
            with torch.no_grad(), buffers_kept(owner), other_generators_kept(), seeded(0, device):
                call.repeat(_copies(call.named))
        finally:
            owner.training = training
            for stack, _ in ways:
                stack.passes.end()
        for stack, probe in probes:
            if not probe.entered:
                stack.passed_by.add(given)
            else:
                at_most = MAX_CALIBRATED_BITS if stack.max_bits is None else min(stack.max_bits, MAX_CALIBRATED_BITS)
                stack.arithmetic = Arithmetic(probe.fraction_bits_for(at_most, stack.label), stack.config.impl)


def _copies(named: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments, to be called with once more: Moonshine's decoder adds positions to its encoder's states."""
    caches = copies_of_caches(named)
    return {n: caches[n] if n in caches else tree_map_only(torch.Tensor, torch.clone, v) for n, v in named.items()}
