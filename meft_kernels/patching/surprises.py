"""What of a patched model would train to NaN, or not at all, without a word: looked for as it is patched."""

from __future__ import annotations

import gc
import logging
import statistics
import sys
from collections.abc import Iterable

import torch
from torch import nn

from ..notices import and_others

logger = logging.getLogger(__name__)


def warn_of_float16(base: nn.Module) -> None:
    """Log what trains in float16, if anything does."""
    half = [name for name, each in base.named_parameters() if each.requires_grad and each.dtype == torch.float16]
    if half:
        logger.warning(
            "meft_kernels: %s train in float16, in which AdamW's epsilon is 0 and its first step can give NaN: load "
            "the model in bfloat16, or in float32 and train it under autocast",
            and_others(half),
        )


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Those that hold parameters of the model. Not to be asked within a rollback, which holds them as well."""
    # Whoever goes through all objects takes a tenth of a second: not where nobody else holds the parameters.
    counts = [sys.getrefcount(each) for each in model.parameters()]
    alone = min(sys.getrefcount(each) for each in nn.LayerNorm(1).parameters())  # which draws no random numbers
    if not counts or statistics.median(counts) <= alone:
        return []
    known = set(map(id, model.parameters()))
    # isinstance would ask proxies what they stand for, and some import it then.
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)]
    return [each for each in found if known & _held_by(each)]


def warn_of_early(optimizers: Iterable[torch.optim.Optimizer], base: nn.Module) -> None:
    """Log that one of these was built before ``patch``, and holds nothing that trains since."""
    trained = {id(each) for each in base.parameters() if each.requires_grad}
    if any(not trained & _held_by(each) for each in optimizers):
        logger.warning(
            "meft_kernels: an optimizer that was built before patch holds parameters of this model and none of those "
            "that train now: it would change nothing. Build it after patch"
        )


def _held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(each) for group in getattr(optimizer, "param_groups", []) for each in group["params"]}
