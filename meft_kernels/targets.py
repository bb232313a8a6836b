"""What of a model is to be patched, and what cannot be: its family, its lists of layers, its new heads.

Everything here looks and refuses; nothing is changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.tensor import DTensor

from .architectures import ArchitectureSpec, LayerSpec, find_architecture, supported_model_types
from .architectures.found import find
from .config import MeftConfig
from .errors import UnsupportedModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerList:
    """One list of a family's layers in a model, with what the family's spec says of them."""

    owner: nn.Module
    """The model whose forward loops over it."""
    name: str
    """Qualified name."""
    layers: list[nn.Module]
    family: str
    """The name under which the spec is registered."""
    kind: int
    """Which of the spec's kinds of layers they are."""
    spec: LayerSpec
    hidden_size: int
    layerdrop: bool
    post_norm: bool
    in_turn: bool


Trust = Literal["found", "written"]


def find_spec(
    model: nn.Module, config: MeftConfig, trust: Trust = "found", probe: Mapping[str, Any] | None = None
) -> ArchitectureSpec:
    """The spec of the model's family; where nobody wrote one, what is found of the model and proven on it.

    Args:
        model: the model.
        config: settings.
        trust: ``"written"`` for families with a file alone.
        probe: a batch to look at the model with, where there is none.

    Raises:
        UnsupportedModelError: there is none, or it objects to this model with these settings.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    spec = find_architecture(model_type) if model_type else None
    if spec is None and trust == "found" and model_type:
        found = find(model, frozen_layers=config.frozen_layers, batch=probe)
        logger.info("%s", found.line)
        spec = found
    if spec is None:
        what = (
            f"model type {model_type!r}" if model_type else f"{type(model).__name__}, which has no config.model_type,"
        )
        raise UnsupportedModelError(
            f"{what} is not supported; supported are: {', '.join(supported_model_types())}. {_way_out(model)}"
        )
    with fitting(model):
        objection = spec.objection(model.config, config)
    if objection is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be patched with these settings: {objection}")
    return spec


def _way_out(model: nn.Module) -> str:
    """A part of a composite model may be supported where the whole is not."""
    for name, part in model.named_modules():
        model_type = getattr(getattr(part, "config", None), "model_type", None)
        if name and hasattr(part, "base_model_prefix") and find_architecture(model_type or "") is not None:
            return f"Its part {name} ({model_type}) is: patch(model.{name})"
    return (
        "A family of your own is made known with meft_kernels.register_architecture; README.md beside "
        "meft_kernels/architectures says how"
    )


@contextmanager
def fitting(model: Any) -> Iterator[None]:
    """A spec's callables are users' code, too: what they raise tells that the spec is not this model's."""
    try:
        yield
    except Exception as error:
        raise UnsupportedModelError(
            f"the ArchitectureSpec of {model.config.model_type!r} does not fit {type(model).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def find_layers(model: nn.Module, spec: ArchitectureSpec) -> list[LayerList]:
    """Every list of the family's layers in the model.

    Raises:
        UnsupportedModelError: there is none, or the spec does not fit its layers.
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        kind = next((i for i, kind in enumerate(spec.layers) if kind.serves(name, module)), None)
        if kind is not None:
            found.append(_describe(model, name, list(module), spec, kind))
    if not found:
        names = [name for kind in spec.layers for name in kind.class_names]
        raise UnsupportedModelError(f"{type(model).__name__} holds no list of layers named {' or '.join(names)}")
    return found


def _describe(model: Any, name: str, layers: list[nn.Module], spec: ArchitectureSpec, kind: int) -> LayerList:
    parents = [
        name.rsplit(".", depth)[0] if depth <= name.count(".") else "" for depth in range(1, name.count(".") + 2)
    ]
    owners = [model.get_submodule(parent) for parent in parents]
    # The nearest transformers model (BertModel, not BertEncoder): its call has the user's own arguments.
    owner = next((owner for owner in owners if hasattr(owner, "config") and hasattr(owner, "base_model_prefix")), model)
    layer_spec = spec.layers[kind]
    with fitting(model):
        for layer in layers:
            for tap in (layer_spec.ffn_reads(layer), layer_spec.ffn_writes(layer)):
                if not isinstance(tap, nn.Module):
                    raise TypeError(f"ffn_reads and ffn_writes must give modules, not {type(tap).__name__}")
        return LayerList(
            owner=owner,
            name=name,
            layers=layers,
            family=model.config.model_type,
            kind=kind,
            spec=layer_spec,
            hidden_size=(layer_spec.hidden_size or spec.hidden_size)(model.config),
            layerdrop=layer_spec.layerdrop(model.config) > 0,
            post_norm=layer_spec.post_norm(model.config),
            in_turn=layer_spec.in_turn(model.config),
        )


def check_trainable(model: nn.Module, lists: list[LayerList], config: MeftConfig) -> None:
    """Refuse, before anything is changed, what could not train."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "is_trainable", True):
        raise UnsupportedModelError(
            f"the model is quantised by {type(quantizer).__name__}, which gives no gradients: load it with a method "
            "that trains (bitsandbytes, torchao), or dequantised (a GGUF file: "
            "quantization_config=GgufConfig(dequantize=True))"
        )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedModelError(
            "the model was loaded with tensor parallelism (tp_plan, or DistributedConfig), which splits single layers "
            "between processes: load it whole, and use data parallelism (DistributedDataParallel, FSDP2)"
        )
    for target in lists:
        name, layers = target.name, target.layers
        for layer in layers:
            refuse_partitioned(layer, name)
        tensors = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            raise UnsupportedModelError(
                f"the weights of {name} are distributed already (DTensor): call patch first, and fully_shard after it. "
                "Tensor parallelism, which splits single layers, is not supported"
            )
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


def refuse_partitioned(layer: nn.Module, name: str) -> None:
    """DeepSpeed's ZeRO-3 empties the weights and fills them by hooks of its own, for each of a layer's modules.

    A layer's adapters and its recompute use weights outside of them. It is asked again in every forward, by one look at
    one weight, because trainers partition a model after it was patched.

    Raises:
        UnsupportedModelError: that was done to this layer.
    """
    if hasattr(next(layer.parameters(), None), "ds_id"):
        raise UnsupportedModelError(
            f"the weights of {name} are partitioned by DeepSpeed ZeRO-3, which is not supported: shard the model with "
            "FSDP2 (patch, then fully_shard), or take a ZeRO stage below 3, which leaves weights whole"
        )


def is_peft(model: Any) -> bool:
    """Whether PEFT has decided what trains: it has frozen all but its own weights, and the heads it was told to train.

    Somebody who wrapped the model in it wants that kept.
    """
    return hasattr(model, "peft_config")


def modules_to_train(model: Any, spec: ArchitectureSpec, config: MeftConfig) -> tuple[str, ...]:
    """Names of the modules that train whole; by default a task head that is no language-model head."""
    if config.modules_to_save is not None:
        names = config.modules_to_save
        known = {name for name, _ in model.named_modules()}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"modules_to_save: the model has no module {', '.join(unknown)}")
        return names
    if config.adapters == "none" or is_peft(model):
        return ()
    modules = dict(model.named_modules())
    base = getattr(model, "base_model", model)
    if base is model or model.get_output_embeddings() is not None:
        return tuple(name for name in spec.extra_heads if name in modules)
    heads = [name for name, child in model.named_children() if child is not base]
    inner = [f"{model.base_model_prefix}.{name}" for name in spec.head_modules]
    # Some heads come without the pooler (token classification), some have nothing to train.
    present = [name for name in (*heads, *inner) if name in modules]
    return tuple(name for name in present if next(modules[name].parameters(), None) is not None)
