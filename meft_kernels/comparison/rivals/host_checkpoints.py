"""Checkpoints in host memory: what every layer's recompute begins with waits there until backward comes to it."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ...memory import host_allocation
from ...patching.state import unwrap


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    pinned = tensor.device.type == "cuda"
    with host_allocation():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    copy.copy_(tensor, non_blocking=pinned)
    return tensor.device, copy


def _to_device(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, copy = packed
    return copy.to(device, non_blocking=True, copy=True)


def _checkpoint(function: Any, *args: Any) -> Any:
    """What the layer itself saves goes to checkpoint's own hooks, which are inside: only its input comes to these."""
    with saved_tensors_hooks(_to_host, _to_device):
        return torch_checkpoint(function, *args, use_reentrant=False)


def keep_checkpoints_on_host(model: Any) -> None:
    """For a model whose layers are checkpointed: by what transformers' ``offload=True`` does (since 5.23).

    The difference is that it works everywhere and is known to the meter, on a CPU and on tensors without data too.
    """
    for module in unwrap(model).modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = _checkpoint
