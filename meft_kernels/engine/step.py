"""One layer's part of one forward pass: its two lanes, moved forward, and undone again in backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..adapters import FusedBranch
from ..errors import ReversibleUsageError
from ..modules import parameters_of
from ..ops import Coupled
from .extras import Extras
from .replay import draw_seed, no_leaf, seeded
from .tape import Tape
from .variants import Branch, Lane, Plan


class Layer(Protocol):
    """What the engine needs of a patched layer."""

    index: int
    name: str
    module: nn.Module

    @property
    def plan(self) -> Plan:
        """The layer's two lanes."""

    def run(
        self, branch: Branch, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """One branch of the layer, and what else the layer returns if this branch makes it."""

    def has(self, branch: Branch) -> bool:
        """Whether the branch computes anything (a bare adapter may have been left out)."""

    def fused(self, branch: Branch, hidden_states: torch.Tensor) -> FusedBranch | None:
        """The branch for a kernel that couples as well; None where ``run`` must compute it."""


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


class _Given(NamedTuple):
    """What a lane's inverse starts from."""

    y: torch.Tensor
    center: torch.Tensor
    center_value: torch.Tensor
    dy: torch.Tensor
    d_center: torch.Tensor
    """Gradient of the center so far."""
    d_extras: tuple[torch.Tensor, ...]
    """Gradients of the extras that need one."""
    owned: bool
    """Whether ``d_center`` may be written to."""
    value_dtype: torch.dtype | None
    wants_center: bool
    """Whether the gradient of the center is wanted at all."""


class Step:
    """One layer's part of one forward pass; its branches can be computed again at any time, with the same bits.

    ``inputs`` are the tensors besides the streams that need a gradient: parameters, and leaves that stand in ``kwargs``
    for the arguments that need one.
    """

    def __init__(self, layer: Layer, tape: Tape, kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> None:
        self.layer = layer
        self.tape = tape
        self.kwargs = kwargs
        self.inputs = inputs
        self.position = tape.position
        """How many layers the streams had passed before this one."""
        self.extras = Extras()
        self.remainders: dict[str, torch.Tensor | None] = {}
        self.checksums: dict[str, torch.Tensor] = {}
        """By lane: checksum of the stream that the lane's inverse must give back."""

    def _is_identity(self, lane: Lane) -> bool:
        """Whether the lane only hands its stream on: no adapter in it, and coefficient 1."""
        return not self.layer.has(lane.branch) and lane.coefficient == 1

    def _branch(self, lane: Lane, hidden_states: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """The lane's branch under random numbers of its own, and what else the layer returns if this lane makes it."""
        version = None if hidden_states.is_inference() else hidden_states._version
        with seeded(self._seed(lane), hidden_states.device):
            made = self.layer.run(lane.branch, hidden_states, self.kwargs)
        if version is not None and hidden_states._version != version:
            raise ReversibleUsageError(
                f"{self._where(lane)} wrote into its own input, which others read: let it work on a copy"
            )
        return made

    def _fused(self, lane: Lane, hidden_states: torch.Tensor) -> FusedBranch | None:
        """The lane's branch for a kernel that couples as well, with the random numbers that ``_branch`` would draw."""
        branch = self.layer.fused(lane.branch, hidden_states) if self.tape.arithmetic.fuses else None
        if branch is not None and branch.dropout:
            with seeded(self._seed(lane), hidden_states.device):
                branch = branch._replace(seed=draw_seed())
        return branch

    def _seed(self, lane: Lane) -> int | None:
        return None if self.tape.seed is None else self.tape.seed + 2 * self.layer.index + (lane.name == "G")

    def _couple(
        self,
        lane: Lane,
        a: torch.Tensor,
        branch: torch.Tensor,
        center: torch.Tensor,
        *,
        wants_value: bool,
        inplace: bool,
    ) -> Coupled:
        """Move one lane forward and note its status."""
        tape = self.tape
        coupled = tape.arithmetic.couple(
            a,
            branch.detach(),
            lane.coefficient,
            center if lane.centered else None,
            tape.dtype if wants_value else None,
            inplace,
        )
        self._note(lane, coupled)
        return coupled

    def _note(self, lane: Lane, coupled: Coupled) -> None:
        self.remainders[lane.name] = coupled.remainder
        self.tape.statuses.append((self._where(lane), coupled.status))

    def _where(self, lane: Lane) -> str:
        return f"{lane.name} ({lane.branch.replace('_', ' ')}) of {self.layer.name}"

    def _finish_forward(self, y1: torch.Tensor, y2: torch.Tensor) -> None:
        self.tape.x1, self.tape.x2 = (y2, y1) if self.layer.plan.switched else (y1, y2)
        self.tape.position = self.position + 1

    def forward(self, main: torch.Tensor, *, recording: bool) -> torch.Tensor:
        """Move the tape's streams past this layer, in place.

        With ``recording``, branches run with grad enabled although their graph is dropped at once: kernels may be
        chosen by it, and the recompute in backward needs it.

        Returns:
            The new main stream as hidden states.
        """
        tape, plan = self.tape, self.layer.plan
        if tape.observer is not None:
            tape.observer.forward(self.layer.index, tape.x1, tape.x2)
        a, center, center_value = tape.x1, tape.x2, main
        a_sum, center_sum = tape.checksums
        for lane in (plan.first, plan.second):
            wants_value = lane is plan.first or not plan.switched
            self.checksums[lane.name] = a_sum
            if self._is_identity(lane):
                y, y_sum, value = a, a_sum, tape.arithmetic.value(a, tape.dtype) if wants_value else None
            else:
                fused = self._fused(lane, center_value)
                if fused is not None:
                    coupled = tape.arithmetic.couple_adapter(
                        a,
                        fused,
                        lane.coefficient,
                        center if lane.centered else None,
                        tape.dtype if wants_value else None,
                    )
                    self._note(lane, coupled)
                else:
                    with torch.set_grad_enabled(recording):
                        branch, extras = self._branch(lane, no_leaf(center_value.detach().requires_grad_(recording)))
                    if extras is not None:
                        self.extras = Extras.of(extras)
                    branch = branch.detach()
                    del extras
                    coupled = self._couple(lane, a, branch, center, wants_value=wants_value, inplace=True)
                    del branch
                y, y_sum, value = coupled.y, coupled.checksum, coupled.value
            a, center = center, y
            a_sum, center_sum = center_sum, y_sum
            if value is not None:
                center_value = value
        self._finish_forward(a, center)
        tape.checksums = (center_sum, a_sum) if plan.switched else (a_sum, center_sum)
        return center_value

    def forward_with_graph(
        self, other: torch.Tensor, main: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...] | None]:
        """The same numbers under plain autograd, which keeps every activation.

        Returns:
            The carriers (other, main) that those given became, and what the layer returned beside the hidden states.
        """
        tape, plan = self.tape, self.layer.plan
        extras: tuple[Any, ...] | None = None
        a, center, a_carrier, center_carrier = tape.x1, tape.x2, other, main
        for lane in (plan.first, plan.second):
            branch = None
            if self._is_identity(lane):
                y, value = a, tape.arithmetic.value(a, tape.dtype)
            else:
                branch, made = self._branch(lane, center_carrier)
                extras = made if extras is None else extras
                with torch.no_grad():
                    coupled = self._couple(lane, a, branch, center, wants_value=True, inplace=False)
                assert coupled.value is not None
                y, value = coupled.y, coupled.value
            carrier = StraightThrough.apply(value, lane, a_carrier, center_carrier, branch)
            a, center, a_carrier, center_carrier = center, y, center_carrier, carrier
        self._finish_forward(a, center)
        if plan.switched:
            a_carrier, center_carrier = center_carrier, a_carrier
        return a_carrier, center_carrier, extras

    def backward(
        self, d_other: torch.Tensor, d_main: torch.Tensor, d_extras: tuple[torch.Tensor, ...], *, wants_input: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
        """Rebuild this layer's input in place, and turn the gradients of its outputs into those of its inputs.

        Returns:
            Gradients of (other, main), None unless ``wants_input``, and of ``inputs``.
        """
        tape, plan = self.tape, self.layer.plan
        if tape.position != self.position + 1:
            raise ReversibleUsageError(
                f"backward reached {self.layer.name}, but its streams are gone: an earlier backward through the same "
                "forward has already undone them. Add the losses up and call backward once, or run forward again; "
                "patch(model, engine='autograd') keeps everything and allows it."
            )
        self._check_parameters()
        tape.check_after_backward()
        tape.position = -1  # nobody may use the streams if this is left by an exception
        gradients: list[torch.Tensor | None] = [None] * len(self.inputs)
        if plan.switched:
            y, center, dy, d_center = tape.x1, tape.x2, d_other, d_main
        else:
            y, center, dy, d_center = tape.x2, tape.x1, d_main, d_other
        center_value = tape.arithmetic.value(center, tape.dtype)
        owned = False  # d_center is autograd's
        for lane in (plan.second, plan.first):
            last = lane is plan.first
            value_dtype = None if last else tape.dtype
            if self._is_identity(lane):
                a, a_value, da = y, None if last else tape.arithmetic.value(y, tape.dtype), dy
            else:
                wants_center = wants_input or not last
                # Before the branch's backward, which may write into dy: Liger's norms put their gradient there.
                da = dy * lane.coefficient
                given = _Given(y, center, center_value, dy, d_center, d_extras, owned, value_dtype, wants_center)
                a, a_value, checksum, d_center = self._undo(lane, given, gradients)
                del given
                tape.comparisons.append((self._where(lane), checksum, self.checksums[lane.name]))
                if lane.centered:
                    d_center = d_center - da
                owned = True
            y, center, dy, d_center = center, a, d_center, da
            if a_value is not None:
                center_value = a_value
        # two undone lanes leave (y, center) = (x2, x1)
        tape.x1, tape.x2, tape.position = center, y, self.position
        if tape.observer is not None:
            tape.observer.rebuilt(self.layer.index, tape.x1, tape.x2)
        # The graph, and with it this object, lives as long as somebody holds the loss: keep nothing large in it.
        self.remainders.clear()
        self.kwargs, self.inputs = {}, []
        if self.position == tape.first_recorded:
            tape.finish()
        return (d_center, dy, gradients) if wants_input else (None, None, gradients)

    def _undo(
        self, lane: Lane, given: _Given, gradients: list[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Rebuild one lane's stream in place. Adds to ``gradients``.

        Returns:
            The stream, its value and its checksum, and ``d_center`` with what came through the branch.
        """
        tape = self.tape
        center = given.center if lane.centered else None
        with tape.autocast.restored():
            fused = self._fused(lane, given.center_value)
        if fused is not None:
            undone = tape.arithmetic.uncouple_adapter(
                given.y,
                given.dy,
                fused,
                lane.coefficient,
                self.remainders[lane.name],
                center,
                given.value_dtype,
                given.d_center if given.owned else given.d_center.clone(),
            )
            self._collect(zip(fused.weights, undone.gradients, strict=True), gradients)
            return undone.a, undone.value, undone.checksum, undone.dx
        # Undone before the branch's backward runs, which may write into what the branch gave; and the value only after
        # it, so that no more is held meanwhile.
        leaf, branch, edges = self._recompute(lane, given.center_value)
        incoming = [given.dy.to(branch.dtype), *(given.d_extras if len(edges) > 1 else ())]
        plain = tape.arithmetic.uncouple(given.y, branch, lane.coefficient, self.remainders[lane.name], center, None)
        del branch
        from_branch = self._differentiate(leaf, edges, incoming, gradients, wants_center=given.wants_center)
        del leaf, edges, incoming
        value = None if given.value_dtype is None else tape.arithmetic.value(plain.a, given.value_dtype)
        d_center = given.d_center if from_branch is None else given.d_center + from_branch
        return plain.a, value, plain.checksum, d_center

    def _collect(
        self, found: Iterable[tuple[torch.Tensor, torch.Tensor | None]], gradients: list[torch.Tensor | None]
    ) -> None:
        """Add gradients, each with its tensor, to those of ``inputs``."""
        places = {id(tensor): place for place, tensor in enumerate(self.inputs)}
        for tensor, gradient in found:
            place = places.get(id(tensor))
            if place is None or gradient is None:
                continue
            held = gradients[place]
            gradients[place] = gradient if held is None else held + gradient

    def _check_parameters(self) -> None:
        """The recompute must reach the parameters that forward recorded, or they would silently get no gradient."""
        present = {id(parameter) for parameter in parameters_of(self.layer.module)}
        for parameter in self.inputs:
            if isinstance(parameter, nn.Parameter) and not (id(parameter) in present and parameter.requires_grad):
                raise ReversibleUsageError(
                    f"trainable parameters of {self.layer.name} were replaced or frozen between forward and backward "
                    "(unpatch, another adapter switched on or off, a module swapped, functional_call): "
                    "run backward first"
                )

    def _recompute(
        self, lane: Lane, center_value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[GradientEdge | None]]:
        """Compute the branch again.

        Returns:
            Its input, to differentiate by; what it gave, cut from its graph; and where the gradients of that and of the
            extras enter the graph, None where none flows.
        """
        # Autocast as in forward, but not for the branch's backward, whose products it would round.
        with self.tape.autocast.restored(), torch.enable_grad():
            leaf = center_value.detach().requires_grad_()
            branch, extras = self._branch(lane, no_leaf(leaf))
        outputs = [branch] if extras is None else [branch, *self.extras.again(extras)]
        # An edge holds the graph and not the tensor: nothing but the branch's own backward needs what it gave.
        edges = [get_gradient_edge(output) if output.requires_grad else None for output in outputs]
        return leaf, branch.detach(), edges

    def _differentiate(
        self,
        leaf: torch.Tensor,
        edges: list[GradientEdge | None],
        incoming: list[torch.Tensor],
        gradients: list[torch.Tensor | None],
        *,
        wants_center: bool,
    ) -> torch.Tensor | None:
        """The gradient of the branch's input. Adds to ``gradients``."""
        outputs = [(edge, gradient) for edge, gradient in zip(edges, incoming, strict=True) if edge is not None]
        targets = [leaf, *self.inputs] if wants_center else self.inputs
        if not targets or not outputs:
            return None
        roots, arriving = zip(*outputs, strict=True)
        found = list(torch.autograd.grad(roots, targets, arriving, allow_unused=True))
        from_branch = found.pop(0) if wants_center else None
        self._collect(zip(self.inputs, found, strict=True), gradients)
        return from_branch

    @property
    def saved_bytes(self) -> int:
        """Bytes that this layer keeps between forward and backward."""
        checksums = 2 * torch.int64.itemsize
        return checksums + sum(r.nbytes for r in self.remainders.values() if r is not None)
