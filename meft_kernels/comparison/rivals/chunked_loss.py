"""The loss of a causal language model without whole logits: chunk by chunk, as TRL, Liger and cut-cross-entropy do."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from ...memory import tiles
from ...state import unwrap
from .base import UnavailableRivalError, is_causal

ROWS = 256
"""Tokens of a chunk, TRL's for its ``chunked_nll``."""

_BETWEEN = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of configs by which something stands between head and loss."""


class _HeadLoss(torch.autograd.Function):
    """Sum of all tokens' losses; the hidden states' gradient is made in forward, so that no chunk is computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in tiles(range(0, len(hidden), ROWS)):
            rows = slice(start, start + ROWS)
            with torch.enable_grad():
                leaf = hidden[rows].detach().requires_grad_(wanted)
                loss = F.cross_entropy(head(leaf).float(), labels[rows], reduction="sum")
            total += loss.detach()
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(loss, leaf)[0]
            del leaf, loss
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(d_loss), None, None


def chunked_loss(model: Any) -> None:
    """In training, ``model(**batch, labels=...)`` gives its loss alone. A classifier, which has no such head, is left.

    Raises:
        UnavailableRivalError: more than a head stands between the body and the loss, or the head is trained.
    """
    base = unwrap(model)
    if not is_causal(base):
        return
    head, text = base.get_output_embeddings(), base.config.get_text_config()
    odd = [name for name in _BETWEEN if getattr(text, name, None)]
    if base.config.is_encoder_decoder or odd or all(child is not head for child in base.children()):
        raise UnavailableRivalError(f"chunked loss takes heads that read what {type(base.base_model).__name__} gives")
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise UnavailableRivalError("chunked loss takes a frozen head")
    plain = base.forward

    @functools.wraps(plain)
    def forward(*args: Any, labels: torch.Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if labels is None or not base.training or args:
            return plain(*args, labels=labels, **kwargs)
        hidden = base.base_model(**kwargs)[0]
        following = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        total = _HeadLoss.apply(hidden.reshape(-1, hidden.shape[-1]), following, head)
        count = (following != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)

    base.forward = forward
