"""What of a model is to be patched, and what cannot be: its family, its layers, its new heads.

Everything here looks and refuses; nothing is changed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..architectures import ArchitectureSpec, find_architecture, supported_model_types
from ..architectures.found import FoundLayers, find, find_on_a_copy, has_no_data
from ..architectures.layer_lists import LayerList, fitting, is_peft
from ..config import MeftConfig
from ..engine.refusals import refuse_partitioned
from ..errors import UnsupportedModelError

logger = logging.getLogger(__name__)


Trust = Literal["found", "written"]


def find_spec(
    model: nn.Module,
    config: MeftConfig,
    trust: Trust = "found",
    probe: Mapping[str, Any] | None = None,
    saved: Sequence[FoundLayers] = (),
) -> ArchitectureSpec:
    """The spec of the model's family; where nobody wrote one, what is found of the model and proven on it.

    Args:
        model: the model.
        config: settings.
        trust: ``"written"`` for families with a file alone.
        probe: a batch to look at the model with, where there is none.
        saved: what was found when an adapter was saved, to which the model is then held.

    Raises:
        UnsupportedModelError: there is none, or it objects to this model with these settings.
        ValueError: the model has no list of layers of a name in ``stacks``.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    spec = find_architecture(model_type) if model_type else None
    if spec is None and trust == "found" and model_type and isinstance(model, PreTrainedModel):
        if has_no_data(model):
            found = find_on_a_copy(model, frozen_layers=config.frozen_layers, wanted=config.stacks, saved=saved)
        else:
            found = find(model, frozen_layers=config.frozen_layers, batch=probe, wanted=config.stacks, saved=saved)
        logger.info("%s", found.line)
        spec = found
    if spec is not None and not isinstance(model, PreTrainedModel):
        part = _supported_part(model)
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model, though it has the config of one"
            + (
                f": patch the one inside it, patch(model{_path(part)}). What is around that stays as it is"
                if part
                else ""
            )
        )
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
    part = _supported_part(model)
    if part is not None:
        inside: Any = model.get_submodule(part)
        return f"Its part {part} ({inside.config.model_type}) is: patch(model{_path(part)})"
    return (
        "A family of your own is made known with meft_kernels.register_architecture; README.md beside "
        "meft_kernels/architectures says how"
    )


def _supported_part(model: nn.Module) -> str | None:
    """The name of the outermost transformers model inside of this one that has a family."""
    for name, part in model.named_modules():
        model_type = getattr(getattr(part, "config", None), "model_type", None)
        if name and isinstance(part, PreTrainedModel) and find_architecture(model_type or "") is not None:
            return name
    return None


def _path(name: str) -> str:
    """A submodule's name as Python says it."""
    return "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in name.split("."))


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
        if len(layers) <= config.frozen_layers:
            raise ValueError(f"frozen_layers={config.frozen_layers} leaves none of the {len(layers)} layers of {name}")
        frozen = [index < config.frozen_layers for index in target.calls]
        if frozen != sorted(frozen, reverse=True):
            raise ValueError(
                f"frozen_layers={config.frozen_layers}: the layers of {name} are called several times in a pass, those "
                "at the bottom also above others, so that none can be left out"
            )
        patched = frozen.count(False)
        if config.reversible_layers is not None and config.reversible_layers > patched:
            raise ValueError(
                f"reversible_layers={config.reversible_layers}, but {name} has {patched} layers above the "
                f"{config.frozen_layers} frozen ones"
            )


def modules_to_train(
    model: PreTrainedModel, lists: list[LayerList], spec: ArchitectureSpec, config: MeftConfig
) -> tuple[str, ...]:
    """Names of what trains whole: modules, and parameters that are in none of them.

    By default what pretraining did not make: a task head that is no language-model head, and what a class of the user's
    own adds to transformers' models.

    Raises:
        ValueError: ``modules_to_save`` names what is not there.
        UnsupportedModelError: it cannot be told what of the model is new.
    """
    if config.modules_to_save is not None:
        names = config.modules_to_save
        known = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"modules_to_save: the model has no module or parameter {', '.join(unknown)}")
        return names
    if config.adapters == "none" or is_peft(model):
        return ()
    heads = _task_heads(model, spec)
    parent = _class_in_transformers(model)
    if parent is None or parent is type(model):
        return heads
    theirs = _parts_of(parent, model)
    modules = dict(model.named_modules())
    added = _added(model, theirs)
    if added:
        owners = {name for name, part in model.named_modules() if any(part is target.owner for target in lists)}
        inner = [f"{owner}.{name}" for owner in sorted(owners - {""}) for name in spec.head_modules]
        added += [name for name in inner if name in modules and _has_parameters(modules[name])]
    return tuple(dict.fromkeys((*(name for name in heads if name.partition(".")[0] in theirs), *added)))


def _task_heads(model: Any, spec: ArchitectureSpec) -> tuple[str, ...]:
    """Heads of transformers' own classes that are new: names of modules, and of parameters beside them."""
    modules = dict(model.named_modules())
    base = getattr(model, "base_model", model)
    if base is model or model.get_output_embeddings() is not None:
        return tuple(name for name in spec.extra_heads if name in modules)
    heads = [name for name, child in model.named_children() if child is not base]
    inner = [f"{model.base_model_prefix}.{name}" for name in spec.head_modules]
    # Some heads come without the pooler (token classification), some have nothing to train.
    present = [name for name in (*heads, *inner) if name in modules and _has_parameters(modules[name])]
    return (*present, *(name for name, parameter in model._parameters.items() if parameter is not None))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _class_in_transformers(model: nn.Module) -> type[PreTrainedModel] | None:
    """The model's class, or the nearest one that it inherits from, among transformers' models."""
    return next((cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")), None)


def _parts_of(cls: type[PreTrainedModel], model: PreTrainedModel) -> set[str]:
    """What a model of this class has, by its own names for it: its children and its own parameters."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            plain = cls(copy.deepcopy(model.config))
    except Exception as error:
        raise UnsupportedModelError(
            f"what {type(model).__name__} adds to {cls.__name__} is to be trained, and cannot be told, since "
            f"{cls.__name__}(config) fails ({error}): name it in modules_to_save=(...)"
        ) from error
    return {*plain._modules, *plain._parameters}


def _added(model: PreTrainedModel, theirs: set[str]) -> list[str]:
    """What the model has beside these parts and beside pretrained models: names of the largest parts that train whole.

    Parts that do not train, among others that do, stay as they are.
    """
    any_trains = any(parameter.requires_grad for parameter in model.parameters())

    def trains(parameter: nn.Parameter) -> bool:
        return parameter.requires_grad or not any_trains

    def inside(module: nn.Module, prefix: str, leave_out: set[str]) -> list[str]:
        own = module._parameters.items()
        found = [f"{prefix}{name}" for name, p in own if p is not None and name not in leave_out and trains(p)]
        for name, child in module.named_children():
            if name in leave_out or isinstance(child, PreTrainedModel) or not _has_parameters(child):
                continue
            pretrained = any(isinstance(part, PreTrainedModel) for part in child.modules())
            if not pretrained and all(map(trains, child.parameters())):
                found.append(f"{prefix}{name}")
            else:
                found += inside(child, f"{prefix}{name}.", set())
        return found

    return inside(model, "", theirs)


def parts_named(model: nn.Module, names: Iterable[str]) -> list[nn.Module | nn.Parameter]:
    """The modules and parameters of these names."""
    modules = dict(model.named_modules())
    return [modules[name] if name in modules else model.get_parameter(name) for name in names]
