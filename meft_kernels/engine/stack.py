"""One list of layers made reversible: what each layer's ``forward`` becomes, and the forward passes through it.

Nothing of a model's own forward is copied. Its loop calls the layers one by one as before; each layer's ``forward``,
bound on the instance, is a :class:`PatchedLayer`. The first one starts a :class:`~meft_kernels.engine.tape.Tape`, the
last one reads it out.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..architectures import find_architecture
from ..config import MeftConfig
from ..errors import ReversibleUsageError, StreamOverflowError, UnsupportedModelError
from ..notices import warn_once
from ..targets import LayerList, refuse_partitioned
from .arithmetic import Arithmetic
from .calibration import MAX_CALIBRATED_BITS, Probe
from .layer import PatchedLayer, cached_tensors, caches_in, differentiable, without_cache
from .replay import draw_seed, seeded
from .reversible import Enter, Exit, Reversible
from .step import Step
from .tape import Counts, Observer, Tape
from .variants import make_plan

logger = logging.getLogger(__name__)


@dataclass
class _Pass:
    """A forward pass between two of its layers."""

    tape: Tape
    next_index: int
    other: torch.Tensor
    main: torch.Tensor
    handed_on: torch.Tensor
    """What the layer before returned: ``main``, or the read-out where hidden states were asked for."""
    version: int | None
    graph: bool = False
    """Whether plain autograd has taken over, as it does above the reversible layers."""


class ReversibleStack:
    """The patched layers of one ``nn.ModuleList`` and the state of the forward passes through them."""

    def __init__(self, target: LayerList, config: MeftConfig) -> None:
        self.owner = target.owner
        """The model whose forward loops over the layers."""
        self.name = target.name
        self.spec = target.spec
        self._family, self._kind = target.family, target.kind
        self.hidden_size = target.hidden_size
        self.layerdrop = target.layerdrop
        """Whether the owner leaves out layers at random in training."""
        self.config = config
        self.plan = make_plan(config, post_norm=target.post_norm)
        self.engine = config.engine
        self.first = config.frozen_layers
        self.layers: list[PatchedLayer] = []
        self.arithmetic: Arithmetic | None
        """None until the first batch has chosen ``fraction_bits``."""
        self.bypassed = False
        """Whether calls go to the pretrained layers as they were, adapters left out."""
        self.observer: Observer | None = None
        self.counts = Counts()
        self.max_bits = MAX_CALIBRATED_BITS
        """Calibration goes no finer; lowered when streams overflowed what it had chosen."""
        self._local = threading.local()
        self.arithmetic = self.given_arithmetic(config)
        self._handles = [
            self.owner.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.owner.register_forward_hook(self._after_forward, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy and pickle: a pass under way is nothing to copy, and threading.local cannot be. The spec's
        # callables need not be importable; the reader of a pickle has registered the family, too.
        return {name: value for name, value in self.__dict__.items() if name not in ("_local", "spec")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        architecture = find_architecture(state["_family"])
        if architecture is None or state["_kind"] >= len(architecture.layers):
            raise UnsupportedModelError(
                f"this model was patched with an architecture {state['_family']!r} that is not registered here: call "
                "register_architecture before loading it"
            )
        self.__dict__.update(state, spec=architecture.layers[state["_kind"]])
        self._local = threading.local()

    @property
    def reversible_end(self) -> int:
        """Index of the first layer that keeps its activations."""
        if self.engine == "autograd":
            return self.first
        count = self.config.reversible_layers
        return self.first + (len(self.layers) if count is None else count)

    def remove(self) -> None:
        """Give every layer its own forward back and take all hooks off."""
        for layer in self.layers:
            layer.unbind()
            if layer.tap is not None:
                layer.tap.remove()
        for handle in self._handles:
            handle.remove()
        # Break the cycles, so that `del model` frees its memory at once.
        self.layers.clear()
        self._handles.clear()

    @staticmethod
    def given_arithmetic(config: MeftConfig) -> Arithmetic | None:
        """How streams are held, where the settings say it all; None where a batch must be seen first."""
        if config.arithmetic == "float" or config.fraction_bits is not None:
            return Arithmetic(config.fraction_bits, config.impl)
        return None

    def take_up(self, config: MeftConfig, arithmetic: Arithmetic | None) -> None:
        """Go on with another adapter's settings and calibration."""
        self.abandon()
        self.config, self.arithmetic, self.max_bits = config, arithmetic, MAX_CALIBRATED_BITS

    def abandon(self) -> None:
        """Forget the pass under way, if any."""
        self._local.current = None

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """Run a block on the pretrained model as it was before patching."""
        before, self.bypassed = self.bypassed, True
        try:
            yield
        finally:
            self.bypassed = before

    def run(
        self, layer: PatchedLayer, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """One layer's part of a forward pass: the hidden states to hand on, and what else the layer returns.

        The latter is None for layers that return hidden states bare.
        """
        if layer.module.training and getattr(layer.module, "gradient_checkpointing", False):
            raise ReversibleUsageError(
                f"gradient checkpointing is on for {layer.name}, which already keeps no activations: call "
                "model.gradient_checkpointing_disable(), or pass gradient_checkpointing=False to the trainer"
            )
        drops = self.layerdrop and layer.module.training
        current = self._pass_at(layer, hidden_states, drops)
        hidden_states = current.main  # what the recompute will see: as quantised, and no read-out
        tensors, leaves, detached = differentiable(layer.module, kwargs)
        if not torch.is_grad_enabled() or not (tensors or current.main.requires_grad):
            step = Step(layer, current.tape, kwargs, [])
            current.main = step.forward(hidden_states, recording=False)
            extras = step.extras.take()
        elif self._keeps_activations(layer, kwargs):
            if not current.graph:
                current.tape, current.graph = current.tape.fork(), True
            step = Step(layer, current.tape, kwargs, [])
            current.other, current.main, extras = step.forward_with_graph(current.other, hidden_states)
        else:
            if current.tape.first_recorded is None:
                current.tape.first_recorded = current.tape.position
            _refuse_filled_cache(kwargs, layer.index)
            step = Step(layer, current.tape, without_cache(detached), leaves)
            current.other, current.main, *made = Reversible.apply(step, current.other, hidden_states, *tensors)
            extras = step.extras.take(made)
            if self.observer is not None:
                self.observer.saved(layer.index, step.saved_bytes)
        if layer is self.layers[-1]:
            self.abandon()
            self._check(current.tape)
            return Exit.apply(current.other, current.main, current.tape), extras
        current.next_index = layer.index + 1
        current.handed_on = current.main
        if drops or getattr(self._local, "wants_hidden_states", False):
            # A stream alone is not what the model's layer would have returned: meft2's main one lags by a layer. With
            # LayerDrop any layer may turn out to have been the last.
            current.handed_on = Exit.apply(current.other, current.main, current.tape)
        current.version = _version(current.handed_on)
        return current.handed_on, extras

    def _pass_at(self, layer: PatchedLayer, hidden_states: torch.Tensor, drops: bool) -> _Pass:
        """The pass that this call goes on with, or begins."""
        current: _Pass | None = getattr(self._local, "current", None)
        if current is None and (layer.index == self.first or drops):
            return self._start(hidden_states)
        if current is None or not (layer.index == current.next_index or (drops and layer.index > current.next_index)):
            expected = "the first layer" if current is None else self.layers[current.next_index - self.first].name
            raise ReversibleUsageError(
                f"{layer.name} was called where {expected} was due: reversible layers run in order, each once "
                "(early exits and calls of single layers are not supported; LayerDrop is, where the model's config has "
                "it when patch is called)"
            )
        self._check_untouched(current, layer, hidden_states)
        return current

    def _start(self, hidden_states: torch.Tensor) -> _Pass:
        if self.arithmetic is None:
            raise ReversibleUsageError(
                f"{self.name} was called without its model, so fraction_bits could not be calibrated: call "
                "model(**batch) or meft_kernels.calibrate(model, batch) once, or pass fraction_bits to patch"
            )
        if hidden_states.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ReversibleUsageError(
                f"hidden states must be float16, bfloat16, float32 or float64, got {hidden_states.dtype}"
            )
        tape = Tape.start(
            hidden_states,
            arithmetic=self.arithmetic,
            readout=self.plan.readout,
            seed=draw_seed() if torch.is_grad_enabled() or self._trains_anywhere() else None,
            observer=self.observer,
            counts=self.counts,
        )
        if torch.is_grad_enabled():
            self.counts.last_tokens = hidden_states.shape[:-1].numel()
            self.counts.tokens += self.counts.last_tokens
        other, main = Enter.apply(hidden_states, tape)
        self._local.current = current = _Pass(tape, self.first, other, main, main, None)
        return current

    def _trains_anywhere(self) -> bool:
        """Whether any module is in train mode: dropout may be live in an eval-mode model, or below its first layer."""
        return any(module.training for layer in self.layers for module in layer.module.modules())

    @staticmethod
    def _check_untouched(current: _Pass, layer: PatchedLayer, hidden_states: torch.Tensor) -> None:
        main = current.handed_on
        # Not `is`: FSDP and others pass tensors through an identity Function of their own.
        same = (
            hidden_states.data_ptr() == main.data_ptr()
            and hidden_states.shape == main.shape
            and hidden_states.dtype == main.dtype
            and current.version == _version(hidden_states)
        )
        if not same:
            raise ReversibleUsageError(
                f"the hidden states that {layer.name} got are not those that the layer before returned: a hook or the "
                "model's own code changed them between two reversible layers, which the inverse cannot know"
            )

    def _keeps_activations(self, layer: PatchedLayer, kwargs: dict[str, Any]) -> bool:
        if layer.index >= self.reversible_end:
            return True
        if not layer.module.training and caches_in(kwargs):
            warn_once(
                logger,
                "gradients are recorded in eval mode with a KV cache, which a recompute would fill twice: activations "
                "are kept. Pass use_cache=False, or call model.train() or torch.no_grad(), whichever you mean.",
            )
            return True
        return False

    def _check(self, tape: Tape) -> None:
        try:
            tape.check_forward()
        except StreamOverflowError as error:
            if self.config.fraction_bits is not None:
                raise StreamOverflowError(
                    f"{error} Patch with a smaller fraction_bits than {self.config.fraction_bits}."
                ) from None
            self.max_bits = max(0, (tape.arithmetic.fraction_bits or 0) - 2)
            self.arithmetic = None
            raise StreamOverflowError(
                f"{error} fraction_bits will be calibrated anew on the next forward, to {self.max_bits} at most: "
                "repeat this batch or go on with the next."
            ) from None

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.bypassed:
            return
        self.abandon()
        if getattr(module, "_is_replica", False):
            raise ReversibleUsageError(
                "nn.DataParallel is not supported, its replicas would compute with the first device's layers: "
                "launch with torchrun (DistributedDataParallel), or show one device (CUDA_VISIBLE_DEVICES=0)"
            )
        refuse_partitioned(self.layers[0].module, self.name)
        self._local.wants_hidden_states = _asked_for("output_hidden_states", module, kwargs)
        prefix_trains = any(tensor.requires_grad for tensor in cached_tensors(kwargs))
        if self.reversible_end > self.first and torch.is_grad_enabled() and (_trains(module) or prefix_trains):
            for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
                if _asked_for(name, module, kwargs):
                    raise ReversibleUsageError(
                        f"{name} is not available while gradients are recorded: reversible layers keep none of what "
                        f"is asked for, and it would come without its gradient. Pass {name}=False, run under "
                        f"torch.no_grad(), or patch with engine='autograd'."
                    )
            if module.training or prefix_trains:
                _refuse_filled_cache(kwargs, self.first)
        if self.arithmetic is None:
            self.calibrate(args, kwargs)

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current: _Pass | None = getattr(self._local, "current", None)
        self.abandon()
        if current is None or output is None:
            return
        if self.layerdrop and module.training:
            self._check(current.tape)
        else:
            raise ReversibleUsageError(
                f"the model returned before {self.layers[-1].name}, so the streams were never read out (a smaller "
                "config.num_hidden_layers, or an early exit)"
            )

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
            self.arithmetic = None

    def set_fraction_bits(self, fraction_bits: int) -> None:
        """Use these, calibrated elsewhere."""
        self.arithmetic = Arithmetic(fraction_bits, self.config.impl)

    def calibrate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose ``fraction_bits`` from one forward of the owner in float32 streams, which leaves no trace.

        Raises:
            NonFiniteError: the model gives NaN or infinities on these inputs; names the layer.
        """
        kwargs = {**kwargs, **copy.deepcopy(caches_in(kwargs))}
        probe = Probe(impl=self.config.impl)
        before = self.arithmetic, self.observer
        self.arithmetic, self.observer = probe, None
        training = self.owner.training
        try:
            if self.layerdrop:
                self.owner.training = False  # the owner's own switch: no layer may be left out, dropout stays as it is
            with torch.no_grad(), seeded(0, next(self.owner.parameters()).device):
                self.owner.forward(*args, **kwargs)
        finally:
            self.owner.training = training
            self.arithmetic, self.observer = before
            self.abandon()
        self.arithmetic = Arithmetic(probe.fraction_bits_for(self.max_bits, self.name), self.config.impl)


def _refuse_filled_cache(kwargs: dict[str, Any], index: int) -> None:
    """An empty KV cache may be left out of training; a filled one is an input that a recompute would not see again."""
    for name, cache in caches_in(kwargs).items():
        length = getattr(cache, "get_seq_length", None)
        if length is None or int(length(index)) > 0:
            raise ReversibleUsageError(
                f"{name} holds earlier tokens while gradients are recorded, and a recompute cannot use it: pass the "
                "whole sequence. Prefix tuning works this way; it needs engine='autograd'."
            )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _asked_for(name: str, module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get(name)
    return bool(asked if asked is not None else getattr(getattr(module, "config", None), name, False))


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
