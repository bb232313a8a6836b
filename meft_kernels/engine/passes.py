"""Forward passes under way through one stack's layers, each in its own thread."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..config import MeftConfig
from ..errors import ReversibleUsageError
from ..notices import warn_once
from .arguments import cached_tensors, caches_in, gives_gradient, without_cache
from .arithmetic import Arithmetic
from .between import Seam, check_graph, hand_on, hooks_between, may_look, take_up
from .inference import Streams, check_finite, enter, move, read_out
from .layer import PatchedLayer
from .refusals import refuse_checkpointing, refuse_filled_cache, refuse_transforms
from .remainders import HostMemory
from .replay import draw_seed
from .reversible import Enter, Exit, Reversible
from .step import Step
from .surroundings import Surroundings, version_of
from .tape import Counts, Observer, Tape
from .variants import Plan

logger = logging.getLogger(__name__)


class Stack(Protocol):
    """What a pass needs of the stack whose layers it runs through."""

    label: str
    first: int
    order: list[PatchedLayer]
    layerdrop: bool
    config: MeftConfig
    plan: Plan
    arithmetic: Arithmetic | None
    observer: Observer | None
    counts: Counts
    host: HostMemory | None

    @property
    def reversible_end(self) -> int:
        """Place of the first call that keeps its activations."""

    def check(self, tape: Tape) -> None:
        """Raise if a stream of the pass left its range."""


@dataclass
class Pass:
    """A forward pass between two of its layers."""

    tape: Tape
    place: int
    """Of the call that is due; places count on from the stack's first."""
    other: torch.Tensor
    main: torch.Tensor
    handed_on: torch.Tensor
    """What the layer before returned: ``main``, or the read-out where somebody may look."""
    version: int | None
    graph: bool = False
    """Whether plain autograd has taken over, as it does above the reversible layers."""
    seam: Seam | None = None
    """What brought the read-out about, if that was handed on."""
    watched: bool = False
    """Whether others than the layers and transformers may have got hold of it."""

    def read_out(self) -> torch.Tensor:
        """The hidden states that both streams stand for."""
        return self.tape.read_out()


@dataclass
class InferencePass:
    """The same where nobody will go back; see :mod:`.inference`."""

    place: int
    streams: Streams
    weights: tuple[float, float]
    main: torch.Tensor
    """The second stream in the model's dtype."""
    handed_on: torch.Tensor
    version: int | None
    watched: bool = False

    def read_out(self) -> torch.Tensor:
        """As :meth:`Pass.read_out`."""
        return read_out(self.streams, self.weights, self.main.dtype)


@dataclass(frozen=True)
class Way:
    """How a call of the model runs its pass, whatever other threads do to the stack meanwhile."""

    arithmetic: Arithmetic | None
    """None for one that nobody will go back through."""
    observer: Observer | None = None
    wants_hidden_states: bool = False
    drops: bool = False
    """Whether the model leaves out layers at random."""


class Passes:
    """The passes under way through one stack, at most one in each thread."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy and pickle: a pass under way is nothing to copy, and threading.local cannot be.
        return {"_stack": self._stack}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_stack"])  # type: ignore[misc]

    def begin(self, way: Way) -> None:
        """A call of the model begins: nothing is left of an earlier one that did not reach its end."""
        self.abandon()
        self._local.way = way

    def end(self) -> None:
        """A call of the model has ended."""
        self.abandon()
        self._local.way = None

    @property
    def current(self) -> Pass | InferencePass | None:
        """The pass under way in this thread."""
        return getattr(self._local, "current", None)

    @property
    def way(self) -> Way | None:
        """How the call under way in this thread runs."""
        return getattr(self._local, "way", None)

    def abandon(self) -> None:
        """Forget the pass under way, if any."""
        self._local.current = None

    def run(
        self, layer: PatchedLayer, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """One layer's part of a forward pass: the hidden states to hand on, and what else the layer returns.

        The latter is None for layers that return hidden states bare.
        """
        way = self.way
        if way is not None and way.arithmetic is None:
            return self._infer(layer, hidden_states, kwargs, way)
        refuse_checkpointing(layer.name, layer.module)
        drops = self._stack.layerdrop and layer.module.training
        current = self._pass_at(layer, hidden_states, drops)
        place = current.place
        hidden_states = current.main  # what the recompute will see: as quantised, and no read-out
        found = Surroundings(layer.module, layer.name, kwargs, layer.inventories) if torch.is_grad_enabled() else None
        if found is None or not (found.trained or current.main.requires_grad or gives_gradient(cached_tensors(kwargs))):
            step = Step(layer, current.tape, place, kwargs)
            current.main = step.forward(hidden_states, recording=False)
            extras = step.extras.take()
        elif current.graph or self._keeps_activations(layer, place, kwargs):
            if not current.graph:
                current.tape, current.graph = current.tape.fork(), True
            step = Step(layer, current.tape, place, kwargs)
            current.other, current.main, extras = step.forward_with_graph(current.other, hidden_states)
        else:
            if current.tape.first_recorded is None:
                current.tape.first_recorded = current.tape.position
            refuse_filled_cache(kwargs, place)
            step = Step(layer, current.tape, place, without_cache(found.kwargs), found)
            current.other, current.main, *made = Reversible.apply(step, current.other, hidden_states, *found.trained)
            extras = step.extras.take(made)
            if current.tape.observer is not None:
                current.tape.observer.saved(place, step.saved_bytes)
        current.place = place + 1
        if self._due(current.place) is None:
            self.abandon()
            self._stack.check(current.tape)
            return Exit.apply(current.other, current.main, current.tape), extras
        self._hand_on(current, layer, drops)
        return current.handed_on, extras

    def _infer(
        self, layer: PatchedLayer, hidden_states: torch.Tensor, kwargs: dict[str, Any], way: Way
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """:meth:`run` where nobody will go back."""
        stack, current = self._stack, self.current
        if torch.is_grad_enabled():
            raise ReversibleUsageError(
                f"gradients are recorded in {layer.name} and were not where its model was called: record them around "
                "the whole model, or patch(model, inference='exact')"
            )
        place = self._place_of(layer, drops=False)
        if current is None:
            self._refuse_start(hidden_states)
            wide = enter(hidden_states)
            current = InferencePass(place, (wide, wide), stack.plan.readout, hidden_states, hidden_states, None)
            self._local.current = current
        else:
            self._check_untouched(current, layer, hidden_states)
        assert isinstance(current, InferencePass)
        current.streams, current.main, extras = move(layer, current.streams, current.main, kwargs)
        current.place = place + 1
        if self._due(current.place) is None:
            self.abandon()
            out = current.read_out()
            check_finite(out, stack.label)
            return out, extras
        _, current.watched = self._between(current, layer)
        seen = current.watched or way.wants_hidden_states
        current.handed_on = current.read_out() if seen else current.main
        current.version = version_of(current.handed_on)
        return current.handed_on, extras

    def _between(self, current: Pass | InferencePass, layer: PatchedLayer) -> tuple[list[Any], bool]:
        """The hooks between this layer and the next, and whether anybody may look at what is handed on there."""
        following = self._due(current.place)
        assert following is not None
        hooks = hooks_between(layer, following)
        return hooks, may_look(layer, following, hooks)

    def _hand_on(self, current: Pass, layer: PatchedLayer, drops: bool) -> None:
        """Choose what the layer returns: its main stream, or the read-out."""
        hooks, current.watched = self._between(current, layer)
        way = self.way
        # With LayerDrop any layer may turn out to have been the last. FSDP's hooks must run before any of a layer's
        # backward, and that of a graph begins with either stream.
        asked = way is not None and way.wants_hidden_states
        seam = current.watched or drops or asked or (current.graph and bool(hooks))
        current.seam = Seam(current.tape, layer.name) if seam else None
        current.handed_on = (
            current.main if current.seam is None else hand_on(current.seam, current.other, current.main, current.tape)
        )
        current.version = version_of(current.handed_on)

    def _pass_at(self, layer: PatchedLayer, hidden_states: torch.Tensor, drops: bool) -> Pass:
        """The pass that this call goes on with, or begins."""
        current = self.current
        place = self._place_of(layer, drops=drops)
        if current is None:
            current = self._start(hidden_states)
        else:
            assert isinstance(current, Pass)
            self._check_untouched(current, layer, hidden_states)
            self._take_up(current, layer, hidden_states)
        current.place = place
        return current

    def _place_of(self, layer: PatchedLayer, *, drops: bool) -> int:
        """Where in the order of calls this one is; ``drops`` allows for layers that were left out.

        Raises:
            ReversibleUsageError: it is another layer's turn.
        """
        current = self.current
        place = self._stack.first if current is None else current.place
        if self._due(place) is not layer:
            if not (drops and layer.index > place):
                due = None if current is None else self._due(place)
                raise ReversibleUsageError(
                    f"{layer.name} was called where {'the first layer' if due is None else due.name} was due: "
                    "reversible layers run in the order in which they did when the model was patched (early exits and "
                    "calls of single layers are not supported; LayerDrop is, where the model's config has it when "
                    "patch is called)"
                )
            place = layer.index
        return place

    def _due(self, place: int) -> PatchedLayer | None:
        """The layer whose call is at this place; None after the last."""
        at = place - self._stack.first
        return self._stack.order[at] if at < len(self._stack.order) else None

    @staticmethod
    def _take_up(current: Pass, layer: PatchedLayer, given: torch.Tensor) -> None:
        """The carriers for the layer, by way of the tensor that it was given: what stands in the graph has its turn."""
        if not torch.is_grad_enabled():
            return
        if given is not current.handed_on:
            check_graph(layer.name, given, current.handed_on)
        if current.seam is None:
            current.main = given
        elif given.requires_grad:
            current.other, current.main = take_up(current.seam, given, current.main, current.tape)

    @staticmethod
    def _refuse_start(hidden_states: torch.Tensor) -> None:
        refuse_transforms()
        if hidden_states.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ReversibleUsageError(
                f"hidden states must be float16, bfloat16, float32 or float64, got {hidden_states.dtype}"
            )

    def _start(self, hidden_states: torch.Tensor) -> Pass:
        way = self.way
        if way is None and self._stack.arithmetic is not None:
            way = Way(self._stack.arithmetic, self._stack.observer)
        if way is None or way.arithmetic is None:
            raise ReversibleUsageError(
                f"{self._stack.label} was called without its model, so fraction_bits could not be calibrated: call "
                "model(**batch) or meft_kernels.calibrate(model, batch) once, or pass fraction_bits to patch"
            )
        self._refuse_start(hidden_states)
        tape = Tape.start(
            hidden_states,
            arithmetic=way.arithmetic,
            readout=self._stack.plan.readout,
            seed=draw_seed() if torch.is_grad_enabled() or self._trains_anywhere() else None,
            observer=way.observer,
            counts=self._stack.counts,
            host=self._stack.host,
            inplace_gradients=self._stack.config.inplace_gradients,
            check_layers=self._stack.config.check == "layer",
        )
        if torch.is_grad_enabled():
            self._stack.counts.last_tokens = hidden_states.shape[:-1].numel()
            self._stack.counts.tokens += self._stack.counts.last_tokens
        other, main = Enter.apply(hidden_states, tape)
        self._local.current = current = Pass(tape, self._stack.first, other, main, main, None)
        return current

    def _trains_anywhere(self) -> bool:
        """Whether any module is in train mode: dropout may be live in an eval-mode model, or below its first layer."""
        return any(module.training for layer in self._stack.order for module in layer.module.modules())

    @staticmethod
    def _check_untouched(current: Pass | InferencePass, layer: PatchedLayer, hidden_states: torch.Tensor) -> None:
        handed_on = current.handed_on
        # Not `is`: FSDP and others pass tensors through an identity Function of their own.
        same = (
            hidden_states.data_ptr() == handed_on.data_ptr()
            and hidden_states.shape == handed_on.shape
            and hidden_states.stride() == handed_on.stride()
            and hidden_states.dtype == handed_on.dtype
            and current.version == version_of(hidden_states)
        )
        if same and current.version is None and current.watched:  # torch.inference_mode counts no writes
            same = torch.equal(hidden_states, current.read_out())
        if not same:
            raise ReversibleUsageError(
                f"the hidden states that {layer.name} got are not those that the layer before returned: a hook or the "
                "model's own code changed them between two reversible layers, which the inverse cannot know. Hooks "
                "there may read; one that writes (steering) belongs on a module inside of a layer, before the first "
                "patched layer (frozen_layers moves it up) or behind the last. If it is the model's code, for batches "
                "of this kind alone (images, say): patch(model, probe=batch) with one of them finds where"
            )

    def _keeps_activations(self, layer: PatchedLayer, place: int, kwargs: dict[str, Any]) -> bool:
        if place >= self._stack.reversible_end:
            return True
        if not layer.module.training and caches_in(kwargs):
            warn_once(
                logger,
                "gradients are recorded in eval mode with a KV cache, which a recompute would fill twice: activations "
                "are kept. Pass use_cache=False, or call model.train() or torch.no_grad(), whichever you mean.",
            )
            return True
        return False
