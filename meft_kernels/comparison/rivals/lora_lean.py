"""LoRA with checkpointing and what people add for long texts: chunked loss, checkpoints on the host, tiled MLPs."""

from __future__ import annotations

import functools

from torch import nn

from .base import Budget, Rival
from .chunked_loss import chunked_loss
from .host_checkpoints import keep_checkpoints_on_host
from .lora_checkpointing import lora_checkpointing
from .tiled_mlp import tile_mlps


def lora_lean(model: nn.Module, budget: Budget, *, host: bool = False, tiled: bool = False) -> nn.Module:
    """Every layer checkpointed, the loss without whole logits.

    Raises:
        UnavailableRivalError: the model's head or its feed-forward parts are none that this takes.
    """
    made = lora_checkpointing(model, budget)
    chunked_loss(made)
    if tiled:
        tile_mlps(made)
    if host:
        keep_checkpoints_on_host(made)
    return made


def _rival(name: str, what: str, *, host: bool = False, tiled: bool = False) -> Rival:
    prepare = functools.partial(lora_lean, host=host, tiled=tiled)
    return Rival(name, f"LoRA + {what}", prepare, packages=("peft",), dashed=True)


RIVALS = (
    _rival("lora_chunked", "checkpointing + chunked loss"),
    _rival("lora_chunked_tiled", "checkpointing + chunked loss + tiled MLP", tiled=True),
    _rival("lora_chunked_host", "host checkpoints + chunked loss", host=True),
    _rival("lora_chunked_tiled_host", "host checkpoints + chunked loss + tiled MLP", host=True, tiled=True),
)
