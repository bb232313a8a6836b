"""What a patched model is not called with: each is told before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from ..errors import ReversibleUsageError, UnsupportedModelError
from ..notices import warn_once
from .arguments import cached_tensors, caches_in, gives_gradient

logger = logging.getLogger(__name__)


class _Layer(Protocol):
    """What is needed of a patched layer."""

    @property
    def adapters(self) -> Mapping[str, nn.Module]: ...


def refuse_replica(module: nn.Module, _: Any = None) -> None:
    """A copy that ``nn.DataParallel`` made of the model shares the patched layers with it. A forward pre-hook."""
    if getattr(module, "_is_replica", False):
        raise ReversibleUsageError(
            "nn.DataParallel is not supported, its replicas would compute with the first device's layers: "
            "launch with torchrun (DistributedDataParallel), or show one device (CUDA_VISIBLE_DEVICES=0)"
        )


def refuse_transforms() -> None:
    """``torch.func`` and forward-mode derivatives, which streams cannot carry."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise ReversibleUsageError(
            "torch.func's transforms (grad, vmap, jvp, ...) and forward-mode derivatives do not go through a patched "
            "model: use torch.autograd.grad, with engine='autograd' where create_graph=True is needed, or unpatch"
        )


def refuse_frozen_adapters(module: nn.Module, layers: Sequence[_Layer], *, under_peft: bool) -> None:
    """In training, adapters that were all frozen after ``patch``: PEFT does so with whatever it finds, unasked.

    Args:
        module: the model whose forward loops over the layers.
        layers: the patched ones.
        under_peft: whether PEFT was there before; then the user has frozen them.

    Raises:
        ReversibleUsageError: PEFT was put on the model since.
    """
    if not (module.training and torch.is_grad_enabled()) or not layers[0].adapters:
        return
    if any(trains(adapter) for layer in layers for adapter in layer.adapters.values()):  # as a rule the first one does
        return
    if not under_peft and any(type(part).__module__.startswith("peft.") for part in module.modules()):
        raise ReversibleUsageError(
            "PEFT was put on this model after patch, and has frozen the adapters that patch inserted. Wrap first and "
            "patch then: unpatch(model) and unload PEFT, get_peft_model(model, ...), and patch(model), where both "
            "train, or reversible(model), where PEFT's alone does. A trainer's peft_config= comes too late"
        )
    warn_once(
        logger,
        "meft_kernels: the adapters that patch inserted have been frozen since, and do not train. If you did not mean "
        "that: PEFT's wrappers and prepare_model_for_kbit_training freeze all that they find, so call them before "
        "patch. A quantised model needs no preparation for patch.",
    )


def refuse_checkpointing(name: str, module: nn.Module) -> None:
    """Gradient checkpointing of a layer that is reversible already."""
    if module.training and getattr(module, "gradient_checkpointing", False):
        raise ReversibleUsageError(
            f"gradient checkpointing is on for {name}, which already keeps no activations: call "
            "model.gradient_checkpointing_disable(), or pass gradient_checkpointing=False to the trainer"
        )


def refuse_outputs(module: nn.Module, kwargs: dict[str, Any], *, reversible: bool, first: int) -> None:
    """What a call of the model may not ask for while gradients are recorded.

    Args:
        module: the model whose forward loops over the layers.
        kwargs: its call's.
        reversible: whether any of its layers drops its activations.
        first: index of the first patched layer.
    """
    if not (reversible and torch.is_grad_enabled()):
        return
    prefix_trains = gives_gradient(cached_tensors(kwargs))
    if prefix_trains or trains(module) or gives_gradient(tree_leaves(kwargs)):
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if asked_for(name, module, kwargs):
                raise ReversibleUsageError(
                    f"{name} is not available while gradients are recorded: reversible layers keep none of what "
                    f"is asked for, and it would come without its gradient. Pass {name}=False, run under "
                    f"torch.no_grad(), or patch with engine='autograd'."
                )
        if module.training or prefix_trains:
            refuse_filled_cache(kwargs, first)


def refuse_filled_cache(kwargs: dict[str, Any], index: int) -> None:
    """An empty KV cache may be left out of training; a filled one is an input that a recompute would not see again."""
    for name, cache in caches_in(kwargs).items():
        if _holds_tokens(cache, index):
            raise ReversibleUsageError(
                f"{name} holds earlier tokens while gradients are recorded, and a recompute cannot use it: pass the "
                "whole sequence. Prefix tuning works this way; it needs engine='autograd'."
            )


def _holds_tokens(cache: Any, index: int) -> bool:
    """Whether a layer's part of a KV cache is filled; of linear attention and convolutions it is a state."""
    parts = getattr(cache, "layers", ())
    part = parts[index] if index < len(parts) else None
    states = getattr(part, "has_previous_state", False)
    if any(states.values() if isinstance(states, dict) else states if isinstance(states, list) else [states]):
        return True
    if part is not None and not hasattr(part, "get_seq_length"):
        return False
    length = getattr(cache, "get_seq_length", None)
    return length is None or int(length(index)) > 0


def asked_for(name: str, module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call of the model wants an output, by its argument or by the model's config."""
    asked = kwargs.get(name)
    return bool(asked if asked is not None else getattr(getattr(module, "config", None), name, False))


def trains(module: nn.Module) -> bool:
    """Whether any parameter of the module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


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
