"""``patch`` and ``unpatch``: find the layers, freeze the model, insert the adapters, bind the forwards."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch
from torch import nn

from ..architectures.found import FoundArchitecture, FoundLayers
from ..architectures.layer_lists import LayerList, Run, find_layers, is_peft
from ..checkpoint.binding import LoadingBinding, SavingBinding
from ..checkpoint.plain import PlainSavingBinding
from ..config import MeftConfig
from ..engine.adapters import Adapter, FfnTap
from ..engine.layer import ADAPTERS, PatchedLayer
from ..engine.stack import ReversibleStack
from ..engine.stack_state import StackState
from ..engine.threads import Gate
from ..errors import PatchError
from ..loss.binding import LossBinding, head_for
from ..rollback import all_or_nothing
from .insertion import make_adapters
from .peft_exit import PeftExitBinding
from .state import (
    STATE,
    PatchState,
    between_passes,
    count_parameters,
    dtype_beside,
    find_state,
    is_sentence_encoder,
    peft_wrapper,
    require_state,
    unwrap,
)
from .surprises import optimizers_of, warn_of_early, warn_of_float16
from .targets import Trust, check_trainable, find_spec, modules_to_train, parts_named
from .trainer_bindings import CheckpointingBinding, QuantisedBinding

if TYPE_CHECKING:
    from ..planning import Plan

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    config: MeftConfig | None = None,
    *,
    memory: int | str | None = None,
    batch: tuple[int, int] | None = None,
    allow_coefficient: bool = False,
    trust: Trust = "found",
    probe: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Model:
    """Make a pretrained transformer reversible, in place: frozen, with adapters, and no activations kept per layer.

    Training code does not change. The model's outputs are at first those of the pretrained model, up to the coupling's
    small leak (see :func:`~meft_kernels.verify`).

    Args:
        model: a transformers model with any task head, of a family that has a file, or one whose structure is found and
            proven on the model itself (a forward and backward of a few tokens). Wrapped by PEFT, what PEFT trains goes
            on being trained, beside the adapters or (``adapters="none"``) instead of them.
        config: settings; ``None`` is ``MeftConfig()``.
        memory: a budget for all that the process has on the device, as ``"22GiB"`` or in bytes: what is not set is
            chosen, by simulation, so that a step of ``batch`` is as fast as fits (:func:`meft_kernels.plan`).
        batch: rows and tokens of a batch, with ``memory``.
        allow_coefficient: whether a budget may choose another coefficient, which changes what is computed.
        trust: ``"written"`` refuses what is no family with a file, though its structure could be found.
        probe: a batch, keyword arguments of the model's forward, to find the structure with; made up by default.
        **overrides: settings to change in ``config``, e.g. ``rank=16``.

    Returns:
        The same object. A model already patched with the same settings comes back as it is.

    Raises:
        UnsupportedModelError: no family serves this model and nothing could be found and proven of it, or it is in
            a state that cannot be trained.
        PatchError: already patched with other settings.
        BudgetError: no settings fit into ``memory``.
        ValueError: a setting is out of range. Nothing has been changed when an error is raised.
        TypeError: a setting does not exist, or this is no model.
    """
    return patch_as_saved(
        model,
        config,
        (),
        early=optimizers_of(model) if isinstance(model, nn.Module) else (),
        memory=memory,
        batch=batch,
        allow_coefficient=allow_coefficient,
        trust=trust,
        probe=probe,
        **overrides,
    )


def patch_as_saved(
    model: Model,
    config: MeftConfig | None,
    saved: Sequence[FoundLayers],
    *,
    early: Sequence[torch.optim.Optimizer] = (),
    memory: int | str | None = None,
    batch: tuple[int, int] | None = None,
    allow_coefficient: bool = False,
    trust: Trust = "found",
    probe: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Model:
    """:func:`patch`, which explains the arguments; without a family file, held to what was ``saved`` of the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a model, as from_pretrained gives it, not a {type(model).__name__}")
    if not isinstance(config, MeftConfig | None):
        raise TypeError(f"settings are given by name, as in patch(model, rank=8), or as a MeftConfig: not {config!r}")
    if trust not in get_args(Trust):
        raise ValueError(f"trust must be one of {', '.join(get_args(Trust))}; got {trust!r}")
    budget = None
    if memory is not None or batch is not None:
        budget = _planned(model, config, memory, batch, allow_coefficient, overrides)
        config, overrides = budget.config, {}
    config = (config or MeftConfig()).changed(**overrides)
    if (state := find_state(model)) is not None:
        check_same_settings(state.config, config)
        return model
    base = unwrap(model)
    spec = find_spec(base, config, trust, probe, saved)
    lists = find_layers(base, spec, config.stacks)
    check_trainable(base, lists, config)
    for target in lists:
        if any(isinstance(vars(layer).get("forward"), PatchedLayer) for layer in target.layers):
            raise PatchError(f"layers of {target.name} are already patched as part of another model")
    adapters = [
        {
            index: make_adapters(layer, target.spec, target.hidden_size, base, spec, config)
            for index, layer in enumerate(target.layers)
            if index >= config.frozen_layers
        }
        for target in lists
    ]
    trained = modules_to_train(base, lists, spec, config)
    head = head_for(base, config)

    with all_or_nothing(model):
        state = _change(model, base, lists, adapters, trained, head, config)
        state.plan = budget
        state.found = spec if isinstance(spec, FoundArchitecture) else None
        _report(base, state)
        warn_of_early(early if config.adapters == "all" else (), base)
    return model


def _change(
    model: nn.Module,
    base: nn.Module,
    lists: list[LayerList],
    adapters: list[dict[int, dict[str, Adapter]]],
    trained: tuple[str, ...],
    head: nn.Module | None,
    config: MeftConfig,
) -> PatchState:
    """All that ``patch`` changes of a model."""
    required_grad = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    if config.adapters == "all":
        for parameter in base.parameters():
            parameter.requires_grad_(parameter.requires_grad and is_peft(base))
    for part in parts_named(base, trained):
        part.requires_grad_(True)
    gate = Gate()
    stacks = [
        _bind(target, run, made, config, gate)
        for target, made in zip(lists, adapters, strict=True)
        for run in target.runs(config.frozen_layers)
    ]
    state = PatchState(config, stacks, trained, required_grad)
    state.bindings += [CheckpointingBinding(base, stacks), LoadingBinding(base)]
    if config.adapters == "all":
        state.bindings += [SavingBinding(base), QuantisedBinding(base)]
    else:
        wrapper = peft_wrapper(model)
        state.bindings.append(PlainSavingBinding(base, wrapper, stacks))
        if wrapper is not None:
            state.around = (wrapper, wrapper.base_model)
            state.bindings.append(PeftExitBinding(wrapper))
    if head is not None:
        state.bindings.append(LossBinding(base, head, config.loss_rows))
    if config.adapters == "all" and is_sentence_encoder(model):
        from .sentence_encoders import EncoderBinding

        state.bindings.append(EncoderBinding(model, base))
    object.__setattr__(base, STATE, state)
    return state


def _report(base: nn.Module, state: PatchState) -> None:
    """Say what was done, and warn of what comes of it."""
    config = state.config
    trainable, total = count_parameters(base)
    logger.info(
        "patched %s: %s, %s arithmetic, %s coupling, %d reversible layers, %s trainable of %s parameters",
        type(base).__name__,
        config.variant,
        config.arithmetic,
        config.coupling,
        sum(stack.reversible_end - stack.first for stack in state.stacks),
        f"{trainable:,}",
        f"{total:,}",
    )
    if state.plan is not None:
        logger.info("planned %s", state.plan.line())
    for stack in state.stacks:
        _warn_of_drift(stack)
    without = [stack.name for stack in state.stacks if stack.layers[0].spec.attention_pieces is None]
    if config.attention == "pieces" and without:
        logger.warning(
            "meft_kernels: attention='pieces' changes nothing for %s: which products its attention is made of is "
            "written in no family file, and it runs whole",
            ", ".join(dict.fromkeys(without)),
        )
    warn_of_float16(base)
    if config.adapters == "all" and is_peft(base):
        logger.warning(
            "meft_kernels: what PEFT saves of this model, the checkpoints of a Trainer among it, holds PEFT's weights "
            "and not the adapters inserted now: save those with save_adapter, into a folder of their own"
        )


def _planned(
    model: nn.Module,
    config: MeftConfig | None,
    memory: Any,
    batch: Any,
    allow_coefficient: bool,
    overrides: dict[str, Any],
) -> Plan:
    """Settings for a budget; nothing of the model is touched."""
    from ..planning.planner import check_budget, plan  # with it comes the estimator, which patches models itself

    check_budget(memory, batch)
    base = unwrap(model)
    settings = (config or MeftConfig()).changed(**overrides)
    check_trainable(base, find_layers(base, find_spec(base, settings), settings.stacks), settings)
    return plan(model, config, memory=memory, batch=batch, allow_coefficient=allow_coefficient, **overrides)


def check_same_settings(here: MeftConfig, asked: MeftConfig) -> None:
    """Refuse to do with one model what needs another.

    Raises:
        PatchError: the settings differ; names those that do.
    """
    differing = [
        f"{f.name}={getattr(here, f.name)!r} (asked for {getattr(asked, f.name)!r})"
        for f in dataclasses.fields(MeftConfig)
        if getattr(here, f.name) != getattr(asked, f.name)
    ]
    if differing:
        raise PatchError(
            f"already patched with {', '.join(differing)}: call unpatch(model) first (it drops the adapters)"
        )


@between_passes
def unpatch(model: Model) -> Model:
    """Undo :func:`patch`: adapters dropped, all of them, forwards, hooks, ``requires_grad`` as before. Save them first.

    Modules trained beside the adapters (a task head, BERT's pooler with it) keep their trained weights. So does
    whatever trained in a model without adapters of ours (:func:`~meft_kernels.reversible`); what trains there was never
    ours to say, and is left as it is.

    Raises:
        PatchError: the model is not patched, or a layer's forward was wrapped meanwhile. Nothing has been changed when
            this or any other error is raised.
    """
    check_may_unpatch(model)
    state, base = require_state(model), unwrap(model)
    with all_or_nothing(model, state.parts()):
        for stack in reversed(state.stacks):  # a model that owns two of them has their objects one inside the other
            for layer in stack.layers:
                layer.module._modules.pop(ADAPTERS, None)
            stack.remove()
        for binding in state.bindings:
            binding.remove(base)
        for name, parameter in base.named_parameters():
            if state.decides_on(name):
                parameter.requires_grad_(state.required_grad.get(name, parameter.requires_grad))
            if not parameter.requires_grad:
                parameter.grad = None
        delattr(base, STATE)
    return model


def check_may_unpatch(model: nn.Module) -> None:
    """Raise what :func:`unpatch` would, if it would.

    Raises:
        PatchError: the model is not patched, or a layer's forward was wrapped meanwhile.
    """
    for stack in require_state(model).stacks:
        for layer in stack.layers:
            if not layer.is_bound:
                raise PatchError(
                    f"the forward of {layer.name} was wrapped again after patch (accelerate's hooks do so): take that "
                    "wrapper off first"
                )


def _warn_of_drift(stack: ReversibleStack) -> None:
    """Float streams, and with them their rounding, are divided by the coefficients in every layer on the way back."""
    layers = stack.reversible_end - stack.first
    if stack.config.arithmetic != "float" or not layers:
        return
    dtype = dtype_beside(stack) or torch.get_default_dtype()
    growth = -sum(math.log10(abs(lane.coefficient)) for lane in (stack.plan.first, stack.plan.second))
    error = layers * growth + math.log10(torch.finfo(dtype).eps)
    if error > -2:
        logger.warning(
            "meft_kernels: float streams of %s: undoing %d layers amplifies the rounding of %s to about 10^%.0f of the "
            "hidden states, so the gradients of the lower layers will be wrong. Use arithmetic='exact', or at most "
            "reversible_layers=%d.",
            stack.label,
            layers,
            str(dtype).removeprefix("torch."),
            error,
            max(0, int((-2 - math.log10(torch.finfo(dtype).eps)) / growth)),
        )


def _bind(
    target: LayerList, run: Run, adapters: dict[int, dict[str, Adapter]], config: MeftConfig, gate: Gate
) -> ReversibleStack:
    """One run through a list, its layers' adapters inserted."""
    stack = ReversibleStack(target, run, config, gate)
    layers: list[PatchedLayer] = []
    for index in dict.fromkeys(run.calls):
        layer, made = target.layers[index], adapters[index]
        inside: dict[str, nn.Module] = {**made}
        if not layers:
            inside["state"] = StackState(stack)
        if inside:
            layer.add_module(ADAPTERS, nn.ModuleDict(inside).train(layer.training))
        patched = PatchedLayer(stack, layer, index, made.get("stream"), FfnTap(made["ffn"], stack) if made else None)
        patched.bind()
        layers.append(patched)
    stack.hold(layers)
    return stack
