"""Ours: the three couplings in exact arithmetic, and a LoRA inside the reversible layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import nn

from ...patching.patch import patch
from .base import Budget, Rival
from .lora import lora


def meft(model: nn.Module, budget: Budget, **settings: Any) -> nn.Module:
    """The default settings but for ``settings``."""
    return patch(model, dataclasses.replace(budget.config, **settings))


def meft_lora(model: nn.Module, budget: Budget, **settings: Any) -> nn.Module:
    """PEFT LoRA inside layers made reversible, in the place of our adapters: the whole budget is LoRA's."""
    return patch(lora(model, budget), dataclasses.replace(budget.config, adapters="none", **settings))


def _lean(name: str, what: str, **settings: Any) -> Rival:
    prepare = functools.partial(meft, **settings)
    return Rival(name, f"MEFT, {what}", prepare, reversible=True, dashed=True)


RIVALS = (
    Rival("meft", "MEFT", meft, reversible=True),
    *(
        Rival(variant, f"MEFT ({variant})", functools.partial(meft, variant=variant), reversible=True)
        for variant in ("meft1", "meft2", "meft3")
    ),
    _lean("meft_pieces", "attention in pieces", attention="pieces"),
    _lean("meft_host", "host remainders", remainders="host"),
    _lean("meft_pieces_host", "pieces + host", attention="pieces", remainders="host"),
    Rival("meft_lora", "reversible LoRA", meft_lora, packages=("peft",), reversible=True),
    Rival(
        "meft_compiled",
        "MEFT, layers compiled",
        functools.partial(meft, compile_layers=True),
        reversible=True,
        dashed=True,
    ),
)
