"""The interface of a rival."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from ...config import MeftConfig
from ...errors import MeftError
from ...patching.patch import patch
from ...patching.state import count_parameters


class UnavailableRivalError(MeftError):
    """This rival cannot run here; the message says why."""


@dataclass(frozen=True)
class Budget:
    """How much is to be trained. A rival sets its own width so that it comes nearest to it.

    Attributes:
        config: settings of MEFT, its rank among them.
        trainable: parameters that MEFT trains with them, those of a task head included.
    """

    config: MeftConfig
    trainable: int

    @classmethod
    def of(cls, model: nn.Module, config: MeftConfig) -> Budget:
        """What MEFT would train of this model, which is left alone: a twin without memory is patched."""
        settings: Any = copy.deepcopy(model.config)
        with FakeTensorMode(), no_init_weights():
            return cls(config, count_parameters(patch(type(model)(settings), config))[0])


@dataclass(frozen=True)
class Rival:
    """One way to fine-tune.

    Attributes:
        name: for the command line and JSON.
        title: for tables.
        prepare: makes a pretrained model, on its device, ready to train, in place; returns what to call instead of it.
        lr: peak learning rate that suits it.
        packages: modules that it needs besides the demo's.
        gpu: runs on CUDA alone.
        reversible: its streams are undone, so that ``verify`` applies.
        dashed: learns what the rival before it learns, and only differs in cost.
        whole: trains the pretrained weights themselves, which therefore cannot be quantised.
    """

    name: str
    title: str
    prepare: Callable[[nn.Module, Budget], nn.Module]
    lr: float = 1e-3
    packages: tuple[str, ...] = ()
    gpu: bool = False
    reversible: bool = False
    dashed: bool = False
    whole: bool = False

    def why_unavailable(self, device: torch.device) -> str | None:
        """What is missing on this machine, or None."""
        if missing := [name for name in self.packages if importlib.util.find_spec(name) is None]:
            return f"{', '.join(missing)} is not installed"
        if self.gpu and device.type != "cuda":
            return "it runs on CUDA alone"
        return None


def is_causal(model: Any) -> bool:
    """Whether the model's task is the next token, so that it has no head of its own to train."""
    return model.get_output_embeddings() is not None
