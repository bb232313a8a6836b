"""``patch`` and ``unpatch``: find the layers, freeze the model, insert the adapters, bind the forwards."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.activations import ACT2FN

from .adapters import Adapter, FfnTap
from .architectures import ArchitectureSpec
from .config import MeftConfig
from .errors import PatchError
from .layer import PatchedLayer
from .stack import ReversibleStack
from .targets import LayerList, check_trainable, find_layers, find_spec, fitting, is_peft, modules_to_train

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_STATE = "_meft_state"
_ADAPTERS = "meft"
"""Name of the submodule that holds a layer's adapters."""


@dataclass
class PatchState:
    """What :func:`patch` did to a model."""

    config: MeftConfig
    stacks: list[ReversibleStack]
    trained_modules: tuple[str, ...]
    """Modules trained and saved whole beside the adapters."""
    required_grad: dict[str, bool]
    """``requires_grad`` of every parameter before."""


def patch(model: Model, config: MeftConfig | None = None, **overrides: Any) -> Model:
    """Make a pretrained transformer reversible, in place: frozen, with adapters, and no activations kept per layer.

    Training code does not change. The model's outputs are at first those of the pretrained model, up to the coupling's
    small leak (see :func:`~meft_kernels.verify`).

    Args:
        model: a transformers model of a supported family, with any task head. Wrapped by PEFT, what PEFT trains goes
            on being trained, beside the adapters or (``adapters="none"``) instead of them.
        config: settings; ``None`` is ``MeftConfig()``.
        **overrides: settings to change in ``config``, e.g. ``rank=16``.

    Returns:
        The same object. A model already patched with the same settings comes back as it is.

    Raises:
        UnsupportedModelError: no family serves this model, or it is in a state that cannot be trained.
        PatchError: already patched with other settings.
        ValueError: a setting is out of range. Nothing has been changed when an error is raised.
    """
    config = dataclasses.replace(config or MeftConfig(), **overrides)
    if (state := find_state(model)) is not None:
        if state.config == config:
            return model
        differing = [
            f"{f.name}={getattr(state.config, f.name)!r} (asked for {getattr(config, f.name)!r})"
            for f in dataclasses.fields(config)
            if getattr(state.config, f.name) != getattr(config, f.name)
        ]
        raise PatchError(
            f"already patched with {', '.join(differing)}: call unpatch(model) first (it drops the adapters)"
        )
    base = unwrap(model)
    spec = find_spec(base, config)
    lists = find_layers(base, spec)
    check_trainable(base, lists, config)
    for target in lists:
        if any(isinstance(vars(layer).get("forward"), PatchedLayer) for layer in target.layers):
            raise PatchError(f"layers of {target.name} are already patched as part of another model")
    adapters = [
        [_make_adapters(layer, target, base, spec, config) for layer in target.layers[config.frozen_layers :]]
        for target in lists
    ]
    trained = modules_to_train(base, spec, config)

    # Nothing was changed so far, and nothing can fail from here on.
    required_grad = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    if config.adapters == "all":
        for parameter in base.parameters():
            parameter.requires_grad_(parameter.requires_grad and is_peft(base))
    for name in trained:
        base.get_submodule(name).requires_grad_(True)
    stacks = [_bind(target, made, config) for target, made in zip(lists, adapters, strict=True)]
    object.__setattr__(base, _STATE, PatchState(config, stacks, trained, required_grad))
    trainable, total = count_parameters(base)
    logger.info(
        "patched %s: %s, %s arithmetic, %s coupling, %d reversible layers, %s trainable of %s parameters",
        type(base).__name__,
        config.variant,
        config.arithmetic,
        config.coupling,
        sum(stack.reversible_end - stack.first for stack in stacks),
        f"{trainable:,}",
        f"{total:,}",
    )
    for stack in stacks:
        _warn_of_drift(stack, base.dtype)
    if config.adapters == "all" and is_peft(base):
        logger.warning(
            "meft_kernels: what PEFT saves of this model, the checkpoints of a Trainer among it, holds PEFT's weights "
            "and not the adapters inserted now: save those with save_adapter, into a folder of their own"
        )
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`: adapters dropped, forwards, hooks and ``requires_grad`` as they were. Save adapters first.

    Modules trained beside the adapters (a task head, BERT's pooler with it) keep their trained weights.

    Raises:
        PatchError: the model is not patched.
    """
    state = require_state(model)
    base = unwrap(model)
    for stack in state.stacks:
        for layer in stack.layers:
            if not layer.is_bound:
                raise PatchError(
                    f"the forward of {layer.name} was wrapped again after patch (accelerate's hooks do so): take that "
                    "wrapper off first"
                )
    for stack in state.stacks:
        for layer in stack.layers:
            layer.module._modules.pop(_ADAPTERS, None)
        stack.remove()
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(state.required_grad.get(name, parameter.requires_grad))
        if not parameter.requires_grad:
            parameter.grad = None
    delattr(base, _STATE)
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside a ``with`` block the model computes what it did, frozen, before :func:`patch`: DPO's reference, say.

    Bit for bit: adapters and coupling are out of the way. Modules trained beside them (a task head) stay as they are. A
    backward through a forward made outside of the block must run outside of it, too.

    Raises:
        PatchError: the model is not patched.
    """
    with ExitStack() as bypasses:
        for stack in require_state(model).stacks:
            bypasses.enter_context(stack.bypass())
        yield


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT, DDP or ``torch.compile`` wrapper."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def find_state(model: nn.Module) -> PatchState | None:
    """What :func:`patch` did to the model, None if it did nothing."""
    return getattr(unwrap(model), _STATE, None)


def require_state(model: nn.Module) -> PatchState:
    """The same, where there must be something.

    Raises:
        PatchError: the model is not patched.
    """
    state = find_state(model)
    if state is None:
        raise PatchError("this model is not patched: call meft_kernels.patch(model) first")
    return state


def adapter_module_names(state: PatchState) -> list[str]:
    """Qualified names of the modules that hold adapters."""
    if state.config.adapters == "none":
        return []
    return [f"{layer.name}.{_ADAPTERS}" for stack in state.stacks for layer in stack.layers]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def _warn_of_drift(stack: ReversibleStack, dtype: torch.dtype) -> None:
    """Float streams, and with them their rounding, are divided by the coefficients in every layer on the way back."""
    layers = stack.reversible_end - stack.first
    if stack.config.arithmetic != "float" or not layers:
        return
    growth = -sum(math.log10(abs(lane.coefficient)) for lane in (stack.plan.first, stack.plan.second))
    error = layers * growth + math.log10(torch.finfo(dtype).eps)
    if error > -2:
        logger.warning(
            "meft_kernels: float streams of %s: undoing %d layers amplifies the rounding of %s to about 10^%.0f of the "
            "hidden states, so the gradients of the lower layers will be wrong. Use arithmetic='exact', or at most "
            "reversible_layers=%d.",
            stack.name,
            layers,
            str(dtype).removeprefix("torch."),
            error,
            max(0, int((-2 - math.log10(torch.finfo(dtype).eps)) / growth)),
        )


def _make_adapters(
    layer: nn.Module, target: LayerList, model: Any, spec: ArchitectureSpec, config: MeftConfig
) -> dict[str, Adapter]:
    """One layer's adapters: ``ffn`` parallel to its FFN, ``stream`` for the other branch."""
    if config.adapters == "none":
        return {}
    weight = next(parameter for parameter in layer.parameters())
    dtype = weight.dtype if weight.is_floating_point() else getattr(model, "dtype", torch.float32)
    with fitting(model):
        activation = config.activation or spec.activation(model.config)
        dropout = spec.dropout(model.config) if config.dropout is None else config.dropout
    if activation not in ACT2FN:
        raise ValueError(f"activation {activation!r} is none of {', '.join(sorted(ACT2FN))}")
    return {
        name: Adapter(
            target.hidden_size,
            config.rank,
            activation,
            dropout,
            down_init_std=config.down_init_std,
            up_init_std=config.up_init_std,
            impl=config.impl,
            device=weight.device,
            dtype=torch.float32 if config.adapter_dtype == "float32" and dtype != torch.float64 else dtype,
        ).train(layer.training)
        for name in ("ffn", "stream")
    }


def _bind(target: LayerList, adapters: list[dict[str, Adapter]], config: MeftConfig) -> ReversibleStack:
    stack = ReversibleStack(target, config)
    for index, made in enumerate(adapters, config.frozen_layers):
        layer = target.layers[index]
        tap = FfnTap(made["ffn"], stack) if made else None
        patched = PatchedLayer(stack, layer, index, made.get("stream"), tap)
        if made:
            layer.add_module(_ADAPTERS, nn.ModuleDict(made).train(layer.training))
        patched.bind()
        stack.layers.append(patched)
    return stack
