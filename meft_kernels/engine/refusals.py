"""What a patched model is not called with: each is told before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ReversibleUsageError
from .arguments import cached_tensors, caches_in


def refuse_replica(module: nn.Module) -> None:
    """A copy that ``nn.DataParallel`` made of the model shares the patched layers with it."""
    if getattr(module, "_is_replica", False):
        raise ReversibleUsageError(
            "nn.DataParallel is not supported, its replicas would compute with the first device's layers: "
            "launch with torchrun (DistributedDataParallel), or show one device (CUDA_VISIBLE_DEVICES=0)"
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
    prefix_trains = any(tensor.requires_grad for tensor in cached_tensors(kwargs))
    if reversible and torch.is_grad_enabled() and (trains(module) or prefix_trains):
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
