"""``patch`` and ``unpatch``: find the layers, freeze the model, insert the adapters, bind the forwards."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .adapters import Adapter, FfnTap
from .architectures import ArchitectureSpec, LayerSpec, find_architecture, supported_model_types
from .config import MeftConfig
from .errors import PatchError, UnsupportedModelError
from .layer import PatchedLayer
from .stack import ReversibleStack

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
    spec = _find_spec(base)
    lists = _find_layers(base, spec)
    if (objection := spec.objection(base.config, config)) is not None:
        raise UnsupportedModelError(f"{type(base).__name__} cannot be patched with these settings: {objection}")
    _check_trainable(base, lists, config)
    adapters = [[_make_adapters(layer, base, spec, config) for layer in found.layers] for found in lists]
    trained = _modules_to_train(base, spec, config)

    # Nothing was changed so far, and nothing can fail from here on.
    required_grad = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    if config.adapters == "all":
        for parameter in base.parameters():
            parameter.requires_grad_(parameter.requires_grad and _is_peft(base))
    for name in trained:
        base.get_submodule(name).requires_grad_(True)
    stacks = [_bind(found, made, spec, base.config, config) for found, made in zip(lists, adapters, strict=True)]
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
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`: adapters dropped, forwards, hooks and ``requires_grad`` as they were. Save adapters first.

    Modules trained beside the adapters (a task head) keep their trained weights.

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


def _find_spec(model: nn.Module) -> ArchitectureSpec:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    spec = find_architecture(model_type) if model_type else None
    if spec is None:
        what = (
            f"model type {model_type!r}" if model_type else f"{type(model).__name__}, which has no config.model_type,"
        )
        raise UnsupportedModelError(
            f"{what} is not supported; supported are: {', '.join(supported_model_types())}. A family of your own is "
            "made known with meft_kernels.register_architecture"
        )
    return spec


class _LayerList(NamedTuple):
    """One list of a family's layers in a model."""

    owner: nn.Module
    """The model whose forward loops over it."""
    name: str
    """Qualified name."""
    layers: list[nn.Module]
    spec: LayerSpec


def _find_layers(model: nn.Module, spec: ArchitectureSpec) -> list[_LayerList]:
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        kind = next((kind for kind in spec.layers if all(kind.matches(layer) for layer in module)), None)
        if kind is not None:
            parents = [
                name.rsplit(".", depth)[0] if depth <= name.count(".") else ""
                for depth in range(1, name.count(".") + 2)
            ]
            owners = [model.get_submodule(parent) for parent in parents]
            # The nearest transformers model (BertModel, not BertEncoder): its call has the user's own arguments.
            owner = next(
                (owner for owner in owners if hasattr(owner, "config") and hasattr(owner, "base_model_prefix")), model
            )
            found.append(_LayerList(owner, name, list(module), kind))
    if not found:
        names = [name for kind in spec.layers for name in kind.class_names]
        raise UnsupportedModelError(f"{type(model).__name__} holds no list of layers named {' or '.join(names)}")
    return found


def _check_trainable(model: nn.Module, lists: list[_LayerList], config: MeftConfig) -> None:
    """Refuse, before anything is changed, what could not train."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "is_trainable", True):
        raise UnsupportedModelError(
            f"the model is quantised by {type(quantizer).__name__}, which gives no gradients: load it with a method "
            "that trains (bitsandbytes 4-bit, torchao), or dequantised"
        )
    for _, name, layers, _ in lists:
        tensors = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
        if any(tensor.is_meta for tensor in tensors):
            raise UnsupportedModelError(
                f"{name} has weights on the meta device (offloaded, or never loaded): load them first"
            )
        if len(devices := {tensor.device for tensor in tensors}) > 1:
            raise UnsupportedModelError(
                f"{name} is spread over {', '.join(sorted(map(str, devices)))}; the streams live on one device: load "
                "the model without device_map, or use data parallelism"
            )
        if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise UnsupportedModelError(
                "gradient checkpointing is on: call model.gradient_checkpointing_disable() (reversible layers already "
                "keep no activations)"
            )
        if any("forward" in vars(layer) and isinstance(vars(layer)["forward"], PatchedLayer) for layer in layers):
            raise PatchError(f"layers of {name} are already patched as part of another model")
        if len(set(map(id, layers))) < len(layers):
            raise UnsupportedModelError(f"{name} holds the same layer more than once: shared layers are not supported")
        patched = len(layers) - config.frozen_layers
        if patched < 1:
            raise ValueError(f"frozen_layers={config.frozen_layers} leaves none of the {len(layers)} layers of {name}")
        if config.reversible_layers is not None and config.reversible_layers > patched:
            raise ValueError(
                f"reversible_layers={config.reversible_layers}, but {name} has {patched} layers above the "
                f"{config.frozen_layers} frozen ones"
            )


def _is_peft(model: Any) -> bool:
    """Whether PEFT has decided what trains: it has frozen all but its own weights, and the heads it was told to train.

    Somebody who wrapped the model in it wants that kept.
    """
    return hasattr(model, "peft_config")


def _modules_to_train(model: Any, spec: ArchitectureSpec, config: MeftConfig) -> tuple[str, ...]:
    """Names of the modules that train whole; by default a task head that is no language-model head."""
    if config.modules_to_save is not None:
        names = config.modules_to_save
        known = {name for name, _ in model.named_modules()}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"modules_to_save: the model has no module {', '.join(unknown)}")
        return names
    if config.adapters == "none" or _is_peft(model):
        return ()
    base = getattr(model, "base_model", model)
    if base is model or model.get_output_embeddings() is not None:
        return ()
    modules = dict(model.named_modules())
    heads = [name for name, child in model.named_children() if child is not base]
    inner = [f"{model.base_model_prefix}.{name}" for name in spec.head_modules]
    # Some heads come without the pooler (token classification), some have nothing to train.
    present = [name for name in (*heads, *inner) if name in modules]
    return tuple(name for name in present if next(modules[name].parameters(), None) is not None)


def _make_adapters(
    layer: nn.Module, model: nn.Module, spec: ArchitectureSpec, config: MeftConfig
) -> dict[str, Adapter]:
    """One layer's adapters: ``ffn`` parallel to its FFN, ``stream`` for the other branch."""
    if config.adapters == "none":
        return {}
    weight = next(parameter for parameter in layer.parameters())
    dtype = weight.dtype if weight.is_floating_point() else getattr(model, "dtype", torch.float32)
    settings: Any = model.config
    return {
        name: Adapter(
            spec.hidden_size(settings),
            config.rank,
            config.activation or spec.activation(settings),
            spec.dropout(settings) if config.dropout is None else config.dropout,
            down_init_std=config.down_init_std,
            up_init_std=config.up_init_std,
            impl=config.impl,
            device=weight.device,
            dtype=torch.float32 if config.adapter_dtype == "float32" and dtype != torch.float64 else dtype,
        ).train(layer.training)
        for name in ("ffn", "stream")
    }


def _bind(
    found: _LayerList,
    adapters: list[dict[str, Adapter]],
    architecture: ArchitectureSpec,
    model_config: Any,
    config: MeftConfig,
) -> ReversibleStack:
    owner, name, layers, spec = found
    stack = ReversibleStack(owner, name, architecture, spec, model_config, config)
    for index in range(config.frozen_layers, len(layers)):
        layer, made = layers[index], adapters[index]
        tap = FfnTap(made["ffn"], spec.ffn_reads(layer), spec.ffn_writes(layer), stack) if made else None
        patched = PatchedLayer(stack, layer, index, made.get("stream"), tap)
        if made:
            layer.add_module(_ADAPTERS, nn.ModuleDict(made).train(layer.training))
        patched.bind()
        stack.layers.append(patched)
    return stack
