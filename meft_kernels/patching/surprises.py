"""What of a patched model would train to NaN, or not at all, without a word: looked for once, after patching."""

from __future__ import annotations

import gc
import logging
import statistics
import sys

import torch
from torch import nn

logger = logging.getLogger(__name__)


def warn_of_surroundings(base: nn.Module, *, adapters: bool) -> None:
    """Log what the owner of the model should know.

    Args:
        base: the patched model.
        adapters: whether some were inserted: what trains without, trained before.
    """
    half = [name for name, each in base.named_parameters() if each.requires_grad and each.dtype == torch.float16]
    if half:
        others = f" and {len(half) - 1} others" if len(half) > 1 else ""
        logger.warning(
            "meft_kernels: %s%s train in float16, in which AdamW's epsilon is 0 and its first step can give NaN: load "
            "the model in bfloat16, or in float32 and train it under autocast",
            half[0],
            others,
        )
    if adapters and _has_early_optimizer(base):
        logger.warning(
            "meft_kernels: an optimizer that was built before patch holds parameters of this model and none of those "
            "that train now: it would change nothing. Build it after patch"
        )


def _has_early_optimizer(base: nn.Module) -> bool:
    """Whether some optimizer knows parameters of the model, but none that trains."""
    # Whoever goes through all objects takes a tenth of a second: not where nobody else holds the parameters.
    counts = [sys.getrefcount(each) for each in base.parameters()]
    if statistics.median(counts) <= min(sys.getrefcount(each) for each in nn.Linear(1, 1).parameters()):
        return False
    frozen = {id(each) for each in base.parameters() if not each.requires_grad}
    trained = {id(each) for each in base.parameters() if each.requires_grad}
    for each in gc.get_objects():
        # isinstance would ask proxies what they stand for, and some import it then.
        if issubclass(type(each), torch.optim.Optimizer):
            held = {id(parameter) for group in getattr(each, "param_groups", []) for parameter in group["params"]}
            if held & frozen and not held & trained:
                return True
    return False
