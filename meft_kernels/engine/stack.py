"""One list of layers made reversible: what each layer's ``forward`` becomes, and the forward passes through it.

Nothing of a model's own forward is copied. Its loop calls the layers one by one as before; each layer's ``forward``,
bound on the instance, is a :class:`PatchedLayer`. The first one starts a :class:`~meft_kernels.engine.tape.Tape`, the
last one reads it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..architectures import find_architecture
from ..architectures.found import FoundLayers
from ..architectures.layer_lists import LayerList, Run
from ..config import MeftConfig
from ..errors import NonFiniteError, ReversibleUsageError, StreamOverflowError, UnsupportedModelError
from ..notices import and_others
from .arithmetic import Arithmetic
from .layer import PatchedLayer
from .norms import lean_norms
from .owner import BoundOwner, OwnerCall
from .passes import Pass, Passes, Way
from .refusals import asked_for, refuse_frozen_adapters, refuse_outputs, refuse_partitioned, refuse_replica
from .remainders import HostMemory
from .tape import Counts, Observer, Tape
from .threads import Gate, Switch
from .variants import make_plan


class ReversibleStack:
    """The patched layers of a run through one ``nn.ModuleList`` and the state of the forward passes through them.

    It is made without any; :meth:`hold` gives it its layers.
    """

    def __init__(self, target: LayerList, run: Run, config: MeftConfig, gate: Gate | None = None) -> None:
        self.owner = target.owner
        """The model whose forward loops over the layers."""
        self.name = target.name
        """Of the list."""
        self.label = run.label
        """Of the run, for people."""
        self.spec = target.spec
        self._family, self._kind = target.family, target.kind
        self.hidden_size = target.hidden_size
        self.in_turn = target.in_turn
        """Whether a layer is its attention block and then its MLP block."""
        self.layerdrop = target.layerdrop
        """Whether the owner leaves out layers at random in training."""
        self.under_peft = target.under_peft
        self.config = config
        self.plan = make_plan(config, post_norm=target.post_norm)
        self.engine = config.engine
        self.first = run.calls[0]
        """Place of the first call: places count on from there, and are indices of layers where each is called once."""
        self.calls = run.calls
        """Indices in the list of the layers that a pass calls, in turn."""
        self.below = run.below
        """Calls of patched layers of the same list in runs before this one."""
        self.frozen = run.frozen
        """Layers of the list below the run that stay as they are; those below its first run."""
        self.layers: list[PatchedLayer] = []
        self.order: list[PatchedLayer] = []
        """The layer of each call."""
        self.arithmetic: Arithmetic | None
        """None until the first batch has chosen ``fraction_bits``."""
        self.passed_by: set[frozenset[str]] = set()
        """Names of arguments with which calls of the owner do not go through the stack."""
        self.gate = gate or Gate()
        """For all stacks of a model: passes go through, whoever changes what they read waits for them."""
        self._switch = Switch()
        self._calibrates = False
        """Whether the next forward is to, whatever it is for."""
        self.observer: Observer | None = None
        self.counts = Counts()
        self.host = HostMemory() if config.remainders == "host" else None
        """Where remainders wait between forward and backward, None for the device itself."""
        self.max_bits: int | None = None
        """Calibration goes no finer, where streams have overflowed what it had chosen."""
        self.passes = Passes(self)
        self.arithmetic = self.given_arithmetic(config)
        rows = config.tile if isinstance(config.tile, int) else None
        # A graph is compiled for all layers at once; an object in the place of a norm's forward would tie it to one.
        compiled = target.layers if config.compile_layers else ()
        self._norms = lean_norms(self.owner, rows, outside=compiled) if config.lean_norms else []
        for norm in self._norms:
            norm.bind()
        self._bound = BoundOwner.of(self, self.owner)
        # A hook, for a copy has the model's own forward, and which module is called is all there is to tell it by.
        self._replicas = self.owner.register_forward_pre_hook(refuse_replica)

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy and pickle: a spec's callables need not be importable, and the reader of a pickle has
        # registered the family, too. What was found of one model is registered nowhere.
        found = isinstance(self.spec, FoundLayers)
        return {name: value for name, value in self.__dict__.items() if found or name != "spec"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "spec" in state:
            self.__dict__.update(state)
            return
        architecture = find_architecture(state["_family"])
        if architecture is None or state["_kind"] >= len(architecture.layers):
            raise UnsupportedModelError(
                f"this model was patched with an architecture {state['_family']!r} that is not registered here: call "
                "register_architecture before loading it"
            )
        self.__dict__.update(state, spec=architecture.layers[state["_kind"]])

    def hold(self, layers: list[PatchedLayer]) -> None:
        """Have these, each once, be the layers that the run calls."""
        by_index = {layer.index: layer for layer in layers}
        self.layers, self.order = layers, [by_index[index] for index in self.calls]

    @property
    def end(self) -> int:
        """Place after the last call."""
        return self.first + len(self.calls)

    @property
    def reversible_end(self) -> int:
        """Place of the first call that keeps its activations."""
        if self.engine == "autograd":
            return self.first
        count = self.config.reversible_layers
        return self.end if count is None else min(self.end, self.first + max(0, count - self.below))

    def name_of(self, place: int) -> str:
        """The name of the layer whose call is at this place."""
        return self.order[place - self.first].name

    def remove(self) -> None:
        """Give every layer its own forward back and take all hooks off."""
        for layer in self.layers:
            layer.unbind()
            if layer.tap is not None:
                layer.tap.remove()
        for norm in self._norms:
            norm.unbind()
        self._bound.release(self)
        self._replicas.remove()
        # Break the cycles, so that `del model` frees its memory at once.
        del self.passes
        self.layers.clear()
        self.order.clear()
        self._norms.clear()

    def parts(self) -> list[object]:
        """The objects of ours that removing it changes."""
        taps = [layer.tap for layer in self.layers if layer.tap is not None]
        return [self, self._bound, *self.layers, *taps]

    @staticmethod
    def given_arithmetic(config: MeftConfig) -> Arithmetic | None:
        """How streams are held, where the settings say it all; None where a batch must be seen first."""
        if config.arithmetic == "float" or config.fraction_bits is not None:
            return Arithmetic(config.fraction_bits, config.impl)
        return None

    def take_up(self, config: MeftConfig, arithmetic: Arithmetic | None) -> None:
        """Go on with another adapter's settings and calibration."""
        self.abandon()
        self.config, self.arithmetic, self.max_bits = config, arithmetic, None
        self._calibrates = False

    def abandon(self) -> None:
        """Forget the pass under way, if any."""
        self.passes.abandon()

    @property
    def bypassed(self) -> bool:
        """Whether this thread's calls go to the pretrained layers as they were, adapters left out."""
        return self._switch.bypassed

    @contextmanager
    def bypass(self, bypassed: bool = True) -> Iterator[None]:
        """For a block, have this thread use the pretrained model as it was before patching, or as patched again."""
        before, self._switch.bypassed = self._switch.bypassed, bypassed
        try:
            yield
        finally:
            self._switch.bypassed = before

    def run(
        self, layer: PatchedLayer, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """One layer's part of a forward pass; see :meth:`~meft_kernels.engine.passes.Passes.run`."""
        return self.passes.run(layer, hidden_states, kwargs)

    def check(self, tape: Tape) -> None:
        """Raise if a stream of the pass left its range; the next forward then calibrates anew, to fewer bits."""
        try:
            tape.check_forward()
        except NonFiniteError as error:
            if (damaged := _damaged(self.owner)) is None:
                raise
            raise NonFiniteError(
                f"{error} It began earlier: {damaged} NaN or infinity already, which an earlier step wrote; go back to "
                "weights from before it."
            ) from None
        except StreamOverflowError as error:
            if self.config.fraction_bits is not None:
                raise StreamOverflowError(
                    f"{error} Patch with a smaller fraction_bits than {self.config.fraction_bits}."
                ) from None
            fewer = max(0, (tape.arithmetic.fraction_bits or 0) - 2)
            self.max_bits = fewer if self.max_bits is None else min(fewer, self.max_bits)
            self.arithmetic = None
            raise StreamOverflowError(
                f"{error} fraction_bits will be calibrated anew on the next forward, to {self.max_bits} at most: "
                "repeat this batch or go on with the next. To resume from a checkpoint in another process, patch with "
                f"fraction_bits={self.max_bits}."
            ) from None

    def admit(self, call: OwnerCall) -> None:
        """A call of the owner is about to begin: refuse what cannot be."""
        self.gate.enter()
        try:
            refuse_partitioned(self.layers[0].module, self.name)
            refuse_frozen_adapters(self.owner, self.layers, under_peft=self.under_peft)
            between = self.spec.read_between  # by the model around it, from which they have their gradients
            looked_at = {**call.named, "output_hidden_states": False} if between else call.named
            refuse_outputs(self.owner, looked_at, reversible=self.reversible_end > self.first, first=self.first)
        except BaseException:
            self.leave()
            raise

    def only_infers(self) -> bool:
        """Whether nobody will go back through the pass that begins now, nor wants its streams as training has them."""
        wanted = torch.is_grad_enabled() or self.owner.training or self._calibrates or self.observer is not None
        return self.config.inference == "float" and not wanted

    def begin(self, call: OwnerCall) -> None:
        """It begins, calibrated if it goes through this stack and training's streams are wanted."""
        infers = self.only_infers()
        if self.arithmetic is None and not infers:
            return
        self._calibrates = False
        between = self.spec.read_between or asked_for("output_hidden_states", self.owner, call.named)
        drops = self.layerdrop and self.owner.training
        arithmetic = None if infers else self.arithmetic
        self.passes.begin(Way(arithmetic, self.observer, wants_hidden_states=between, drops=drops))

    def finish(self, returned: Any) -> None:
        """A call of the owner has returned this.

        Raises:
            ReversibleUsageError: some of the layers were not called.
            NonFiniteError, StreamOverflowError: as :meth:`check`, where the last layer was left out at random.
        """
        current, way = self.passes.current, self.passes.way
        if current is None or way is None or returned is None:
            return
        if not (way.drops and isinstance(current, Pass)):
            raise ReversibleUsageError(
                f"the model returned before {self.order[-1].name}, so the streams were never read out (a smaller "
                "config.num_hidden_layers, or an early exit)"
            )
        self.check(current.tape)

    def leave(self) -> None:
        """A call of the owner has ended, whichever way."""
        self.passes.end()
        self.gate.leave()

    def reset_calibration(self) -> None:
        """Have the next forward choose ``fraction_bits`` anew.

        Raises:
            ReversibleUsageError: it was given by the user.
        """
        if self.config.fraction_bits is not None:
            raise ReversibleUsageError(
                f"fraction_bits={self.config.fraction_bits} was given to patch, there is nothing to calibrate"
            )
        if self.config.arithmetic == "exact":
            self.arithmetic, self._calibrates = None, True
        self.passed_by.clear()

    def set_fraction_bits(self, fraction_bits: int) -> int:
        """Use these, calibrated elsewhere; fewer, if streams overflowed here or the settings say so. Returns them."""
        limits = (self.config.fraction_bits, self.max_bits)
        fraction_bits = min([fraction_bits, *(limit for limit in limits if limit is not None)])
        self.arithmetic, self._calibrates = Arithmetic(fraction_bits, self.config.impl), False
        return fraction_bits


def _damaged(module: nn.Module) -> str | None:
    """What trains in it and is not finite any more: ``up.weight and 3 others hold``; None where all is.

    Of what other processes have a part of, this one's is looked at: they may not be here to be asked.
    """
    found = [
        name
        for name, each in module.named_parameters()
        if each.requires_grad and not torch.isfinite(each.to_local() if isinstance(each, DTensor) else each).all()
    ]
    if not found:
        return None
    return f"{and_others(found)} {'holds' if len(found) == 1 else 'hold'}"
