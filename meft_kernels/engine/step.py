"""One layer's part of one forward pass: its two lanes, moved forward, and undone again in backward."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ReversibleUsageError
from .call import Call, Gradients, Layer
from .lane import LanePass, Undoing
from .surroundings import Surroundings
from .tape import Tape
from .variants import Lane


class StraightThrough(torch.autograd.Function):
    """One lane under plain autograd: hands out ``value`` and sends gradients as if nothing had been rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        lane: Lane,
        a: torch.Tensor,
        center: torch.Tensor,
        branch: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.lane = lane
        ctx.branch_dtype = None if branch is None else branch.dtype
        return value

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        da = dy * ctx.lane.coefficient
        d_branch = None if ctx.branch_dtype is None else dy.to(ctx.branch_dtype)
        return None, None, da, -da if ctx.lane.centered else None, d_branch


class Step:
    """One layer's part of one forward pass; its branches can be computed again at any time, with the same bits.

    ``found`` is what the recompute has to find again; None where there is to be none.
    """

    def __init__(
        self, layer: Layer, tape: Tape, place: int, kwargs: dict[str, Any], found: Surroundings | None = None
    ) -> None:
        self.call = Call(layer, tape, place, kwargs, found)
        self.tape = tape
        self.position = tape.position
        """How many layers the streams had passed before this one."""
        self.first, self.second = LanePass(self.call, layer.plan.first), LanePass(self.call, layer.plan.second)

    @property
    def extras(self) -> Any:
        """What the layer returned beside its hidden states."""
        return self.call.extras

    def _finish_forward(self, y1: torch.Tensor, y2: torch.Tensor) -> None:
        self.tape.x1, self.tape.x2 = (y2, y1) if self.call.layer.plan.switched else (y1, y2)
        self.tape.position = self.position + 1

    def forward(self, main: torch.Tensor, *, recording: bool) -> torch.Tensor:
        """Move the tape's streams past this layer, in place.

        Returns:
            The new main stream as hidden states.
        """
        tape, plan = self.tape, self.call.layer.plan
        if tape.observer is not None:
            tape.observer.forward(self.call.place, tape.x1, tape.x2)
        a, center, center_value = tape.x1, tape.x2, main
        a_sum, center_sum = tape.checksums
        for lane in (self.first, self.second):
            wants_value = lane is self.first or not plan.switched
            lane.checksum = a_sum
            if lane.branch.is_identity:
                y_sum, value = a_sum, tape.arithmetic.value(a, tape.dtype) if wants_value else None
            else:
                y_sum, value = lane.move(a, center, center_value, recording=recording, wants_value=wants_value)
            a, center = center, a
            a_sum, center_sum = center_sum, y_sum
            if value is not None:
                center_value = value
        self._finish_forward(a, center)
        if self.call.found is not None:
            self.call.found.settle()
        tape.checksums = (center_sum, a_sum) if plan.switched else (a_sum, center_sum)
        return center_value

    def forward_with_graph(
        self, other: torch.Tensor, main: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...] | None]:
        """The same numbers under plain autograd, which keeps every activation.

        Returns:
            The carriers (other, main) that those given became, and what the layer returned beside the hidden states.
        """
        tape, plan = self.tape, self.call.layer.plan
        extras: tuple[Any, ...] | None = None
        a, center, a_carrier, center_carrier = tape.x1, tape.x2, other, main
        for lane in (self.first, self.second):
            branch = None
            if lane.branch.is_identity:
                y, value = a, tape.arithmetic.value(a, tape.dtype)
            else:
                coupled, branch, made = lane.move_with_graph(a, center, center_carrier)
                extras = made if extras is None else extras
                assert coupled.value is not None
                y, value = coupled.y, coupled.value
            carrier = StraightThrough.apply(value, lane.lane, a_carrier, center_carrier, branch)
            a, center, a_carrier, center_carrier = center, y, center_carrier, carrier
        self._finish_forward(a, center)
        if plan.switched:
            a_carrier, center_carrier = center_carrier, a_carrier
        return a_carrier, center_carrier, extras

    def backward(
        self,
        d_other: torch.Tensor,
        d_main: torch.Tensor,
        d_extras: tuple[torch.Tensor, ...],
        *,
        owned: tuple[bool, bool],
        wants_input: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Gradients]:
        """Rebuild this layer's input in place, and turn the gradients of its outputs into those of its inputs.

        Args:
            owned: whether ``d_other`` and ``d_main`` may be written to.

        Returns:
            Gradients of (other, main), None unless ``wants_input``, and of ``inputs``.
        """
        self._check_position()
        assert self.call.found is not None
        with self.call.found.restored():
            made = self._undo(d_other, d_main, d_extras, owned=owned, wants_input=wants_input)
        # The graph, and with it this object, lives as long as somebody holds the loss: keep nothing large in it.
        self.call.forget()
        return made

    def _check_position(self) -> None:
        name, position = self.call.layer.name, self.tape.position
        if position > self.position + 1:
            raise ReversibleUsageError(
                f"backward begins at {name}, above which it has not undone the streams: the loss does not depend on "
                "the layers above. Add 0 * output.sum() of the model's output to it, or patch(model, "
                "engine='autograd')."
            )
        if position != self.position + 1:
            raise ReversibleUsageError(
                f"backward reached {name}, but its streams are gone: an earlier backward through the same forward has "
                "already undone them. Add the losses up and call backward once, or run forward again; patch(model, "
                "engine='autograd') keeps everything and allows it."
            )

    def _undo(
        self,
        d_other: torch.Tensor,
        d_main: torch.Tensor,
        d_extras: tuple[torch.Tensor, ...],
        *,
        owned: tuple[bool, bool],
        wants_input: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Gradients]:
        tape, plan = self.tape, self.call.layer.plan
        tape.check_after_backward()
        tape.position = -1  # nobody may use the streams if this is left by an exception
        gradients: Gradients = [None] * len(self.call.inputs)
        if plan.switched:
            y, center, dy, d_center = tape.x1, tape.x2, d_other, d_main
            owns_dy, owns_center = owned
        else:
            y, center, dy, d_center = tape.x2, tape.x1, d_main, d_other
            owns_center, owns_dy = owned
        del d_other, d_main
        center_value: torch.Tensor | None = None
        for lane in (self.second, self.first):
            last = lane is self.first
            wants_value = not (last or self.first.branch.reads_by_tile)
            value: torch.Tensor | None = None
            if not lane.branch.is_identity:
                if not owns_center:
                    d_center, owns_center = d_center.clone(memory_format=torch.contiguous_format), True
                wants_center = wants_input or not last
                given = Undoing(y, center, dy, d_center, d_extras, wants_center)
                handed, center_value = center_value, None
                value = lane.undo(given, handed, gradients, wants_value=wants_value)
                del handed, given
                coefficient = lane.lane.coefficient
                if coefficient != 1:
                    dy, owns_dy = (dy.mul_(coefficient) if owns_dy else dy * coefficient), True
            y, center, dy, d_center = center, y, d_center, dy
            owns_dy, owns_center = owns_center, owns_dy
            center_value = value
        self.call.check_reached(gradients)
        tape.check_undone(self.call.inputs, gradients)
        # two undone lanes leave (y, center) = (x2, x1)
        tape.x1, tape.x2, tape.position = center, y, self.position
        if tape.observer is not None:
            tape.observer.rebuilt(self.call.place, tape.x1, tape.x2)
        self.first.forget()
        self.second.forget()
        if self.position == tape.first_recorded:
            tape.finish()
        if not wants_input:
            return None, None, gradients
        tape.handed_down.give(*[d for d, owns in ((d_center, owns_center), (dy, owns_dy)) if owns])
        return d_center, dy, gradients

    @property
    def saved_bytes(self) -> int:
        """Bytes that this layer keeps between forward and backward."""
        checksums = 2 * torch.int64.itemsize
        return checksums + self.first.remainders.nbytes + self.second.remainders.nbytes
