"""The tape: the two streams of one forward pass, outside of autograd, and the checks on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from .. import ops
from ..errors import NonFiniteError, NotRepeatableError, StreamOverflowError
from ..memory import shortened
from .arithmetic import Arithmetic
from .gradients import HandedDown
from .remainders import HostMemory, Remainders
from .replay import AutocastState
from .tiles import auto_rows, cut


class Observer(Protocol):
    """Sees both streams at every layer's input, in forward and again when backward has rebuilt them.

    ``index`` is the place of the layer's call: the layer's index in its list, where each is called once.
    """

    def forward(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None: ...

    def rebuilt(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None: ...

    def saved(self, index: int, nbytes: int) -> None: ...


@dataclass
class Counts:
    """What a stack's passes amounted to since the model was patched; for reports."""

    tokens: int = 0
    """Tokens that entered with gradients recorded, padding among them."""
    last_tokens: int = 0
    """Of the last such pass."""
    checked: int = 0
    """Backward passes in which every rebuilt stream was compared with the forward's and found equal."""


@dataclass
class Tape:
    """The two streams of one forward pass, and what its backward must hold them against."""

    arithmetic: Arithmetic
    readout: tuple[float, float]
    """Weights of x1 and x2 in the hidden states that leave the stack."""
    dtype: torch.dtype
    """Dtype of the hidden states."""
    seed: int | None
    autocast: AutocastState
    x1: torch.Tensor
    x2: torch.Tensor
    checksums: tuple[torch.Tensor, torch.Tensor]
    """Of x1 and x2 as they are now, in whatever tiles they were moved; see :func:`~meft_kernels.ops.checksum`."""
    position: int = 0
    """How many layers the streams have passed; -1 once the tape cannot be used any more."""
    observer: Observer | None = None
    counts: Counts = field(default_factory=Counts)
    """Of the stack that this pass runs through."""
    statuses: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """For every lane moved so far: where, and the status that the coupling reported."""
    comparisons: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """For every lane undone so far: where, the rebuilt stream's checksum, and the forward's."""
    host: HostMemory | None = None
    """Where remainders wait, None for the device itself."""
    latest: Remainders | None = None
    """Of the lane moved last, which backward undoes first."""
    handed_down: HandedDown = field(default_factory=HandedDown)
    """Gradients on their way from one layer's backward to the next one's."""
    first_recorded: int | None = None
    """Position of the lowest layer that backward will reach."""
    check_layers: bool = False
    """Whether a layer's rebuilt streams are compared before its gradients are handed on."""
    suspect: torch.Tensor | None = None
    """Whether any stream has come back different so far; kept on the device, where other processes train along."""
    _check_queued: bool = False
    _compared: bool = False

    @classmethod
    def start(
        cls,
        hidden_states: torch.Tensor,
        *,
        arithmetic: Arithmetic,
        readout: tuple[float, float],
        seed: int | None,
        observer: Observer | None,
        counts: Counts,
        host: HostMemory | None = None,
        inplace_gradients: bool = True,
        check_layers: bool = False,
    ) -> Tape:
        """Both streams set to the hidden states that enter the stack."""
        handed_down = HandedDown(enabled=inplace_gradients)
        with torch.no_grad():
            x1, status = arithmetic.enter(hidden_states)
            checksum = arithmetic.checksum(x1)
            tape = cls(
                arithmetic,
                readout,
                hidden_states.dtype,
                seed,
                AutocastState.capture(hidden_states.device),
                x1,
                x1.clone(),
                (checksum, checksum),
                observer=observer,
                counts=counts,
                host=host,
                handed_down=handed_down,
                check_layers=check_layers,
            )
        tape.statuses.append(("the hidden states that enter the reversible layers", status))
        return tape

    def fork(self) -> Tape:
        """The same streams for layers above the reversible ones, which must leave this tape's as they are."""
        return copy.copy(self)

    def read_out(self) -> torch.Tensor:
        """The hidden states that leave the stack."""
        weights = [(w, x) for w, x in zip(self.readout, (self.x1, self.x2), strict=True) if w]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            if len(weights) == 1:
                return self.arithmetic.value(weights[0][1], self.dtype)
            (w1, x1), (w2, x2) = weights
            out = torch.empty_like(x1, dtype=self.dtype)
            for tile in shortened(cut(x1.shape, auto_rows(x1.device))):  # two wide copies of a few rows, not of all
                mixed = self.arithmetic.value(tile.of(x1), wide).mul_(w1)
                tile.of(out).copy_(mixed.add_(self.arithmetic.value(tile.of(x2), wide), alpha=w2))
            return out

    def check_forward(self) -> None:
        """Raise if any stream overflowed or met a NaN: one transfer from the device for the whole stack.

        Raises:
            NonFiniteError, StreamOverflowError: naming the first layer concerned.
        """
        flags = torch.stack([status for _, status in self.statuses]).tolist()
        for (where, _), status in zip(self.statuses, flags, strict=True):
            if status & ops.NON_FINITE:
                raise NonFiniteError(
                    f"NaN or infinity in {where}. Common causes: a learning rate too high, float16 activations past "
                    "65504, damaged weights. The forward was abandoned before any gradient was computed."
                )
            if status & ops.OVERFLOW:
                raise StreamOverflowError(
                    f"a stream left its fixed-point range (|value| < 2^{30 - (self.arithmetic.fraction_bits or 0)} at "
                    f"fraction_bits={self.arithmetic.fraction_bits}) in {where}. The forward was abandoned before any "
                    "gradient was computed; weights are untouched."
                )

    def finish(self) -> None:
        """Drop the streams: the loss may live on, and with it the graph that holds this tape."""
        self.x1 = self.x2 = self.x1.new_empty(0)
        self.latest = None

    def check_after_backward(self) -> None:
        """Have :meth:`check_rebuilt` called at the end of the backward now running, however far down it goes."""
        if not self._check_queued:
            self._check_queued = True
            queue = torch.autograd.Variable._execution_engine.queue_callback
            # DDP has queued the end of its own reduction by then, without which it would refuse the next forward.
            queue((lambda: queue(self.check_rebuilt)) if trains_with_others() else self.check_rebuilt)

    def check_rebuilt(self) -> None:
        """Raise if any stream came back different: one transfer from the device for the whole backward.

        Raises:
            NotRepeatableError: naming the first layer, in the order of backward, that did not repeat.
        """
        self._check_queued = False
        self._compare()
        if self._compared:
            self.counts.checked += 1
            self._compared = False

    def check_undone(self, inputs: Sequence[torch.Tensor], gradients: list[torch.Tensor | None]) -> None:
        """One more layer is undone, and its ``gradients``, those of ``inputs``, have not been handed on yet.

        Raises:
            NotRepeatableError: with ``check_layers``, the layer did not repeat.
        """
        if self.check_layers:
            self._compare()
        elif self._comparable and trains_with_others():
            self._mark(inputs, gradients)

    @property
    def _comparable(self) -> bool:
        # float streams only come close; an observer compares by itself, and reports
        return self.arithmetic.fraction_bits is not None and self.observer is None

    def _mark(self, inputs: Sequence[torch.Tensor], gradients: list[torch.Tensor | None]) -> None:
        """Make one gradient NaN if a stream has come back different: the others will average it before we raise.

        It travels with the gradients themselves. A message of its own would have to be sent in every backward by every
        process, and one that leaves out a backward, or this stack, would have all others wait for it.
        """
        if not self.comparisons:
            return
        # the layer's own, two at most; one of the layer before says nothing new
        wrong = torch.stack([rebuilt != expected for _, rebuilt, expected in self.comparisons[-2:]]).any()
        self.suspect = wrong if self.suspect is None else self.suspect | wrong
        found = [
            (gradient.numel(), place, gradient)
            for place, (tensor, gradient) in enumerate(zip(inputs, gradients, strict=True))
            if gradient is not None and isinstance(tensor, torch.nn.Parameter)
        ]
        if found:
            _, place, least = min(found)
            gradients[place] = torch.where(self.suspect, math.nan, least)

    def _compare(self) -> None:
        if not self.comparisons or not self._comparable:
            return
        comparisons, self.comparisons, self._compared = self.comparisons, [], True
        places, rebuilt, expected = zip(*comparisons, strict=True)
        same = (torch.stack(rebuilt) == torch.stack(expected)).tolist()
        for where, equal in zip(places, same, strict=True):
            if not equal:
                raise NotRepeatableError(
                    f"{where} did not compute the same bits in backward as in forward, so the rebuilt inputs below "
                    "it are wrong. The gradients of this step are invalid: drop them (optimizer.zero_grad()). "
                    "Likely causes: a nondeterministic kernel (try torch.use_deterministic_algorithms(True)); a "
                    "context that was on in forward only (sdpa_kernel, TF32 flags, torch.set_num_threads); random "
                    "numbers from a generator of its own; weights, masks or buffers changed in place between "
                    "forward and backward; a module that keeps state between calls. meft_kernels.verify(model, "
                    "batch) tells whether it persists."
                )


def trains_with_others() -> bool:
    """Whether gradients may be averaged with those of other processes before backward ends."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
