"""What is planned for: a config, or a model as it is: its class, dtype, quantisation, and what PEFT put into it."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..comparison.rivals import Budget, Rival
from ..config import MeftConfig
from ..errors import UnsupportedModelError
from ..estimate.estimator import Estimator
from ..estimate.quantised import Weights
from ..estimate.step import tensor_bytes
from ..estimate.twin import bare_twin, simulation
from ..packages import require
from ..patching.patch import patch
from ..patching.state import find_state, unwrap


@dataclass(frozen=True)
class Subject:
    """A model to be simulated.

    Attributes:
        model_class: None: that of the config's usual task.
        gpu: whether it will train on one.
        rival: prepares a twin as the model is, and patches it.
        loss: whether it computes one.
        beside: bytes of its weights that a twin does not have, or has too many (negative).
    """

    config: Any
    dtype: torch.dtype
    weights: Weights | None
    model_class: Any
    gpu: bool
    rival: Rival
    loss: bool = True
    beside: int = 0

    def estimator(self, rows: int, meft: MeftConfig, *, any_length: bool) -> Estimator:
        return Estimator(
            self.config, self.dtype, rows, meft, loss=self.loss, gpu=self.gpu, weights=self.weights,
            any_length=any_length, model_class=self.model_class,
        )  # fmt: skip


def _patched(model: nn.Module, budget: Budget) -> nn.Module:
    return patch(model, budget.config)


def of_config(config: Any, dtype: torch.dtype | None, weights: Weights | None, *, gpu: bool | None) -> Subject:
    """A config alone; on a GPU, where nothing else is said."""
    _refuse(config)
    rival = Rival("planned", "MEFT", _patched, reversible=True)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    return Subject(config, dtype, weights, None, gpu is not False, rival)


def of_model(model: Any, *, gpu: bool | None) -> Subject:
    """A model. One on a CPU will train on the GPU, if the machine has one: trainers move it there."""
    base = unwrap(model)
    config = getattr(base, "config", None)
    if config is None or not hasattr(type(base), "_from_config"):
        raise UnsupportedModelError(f"memory= is for transformers' models, not for {type(base).__name__}")
    _refuse(config)
    if gpu is None:
        gpu = base.device.type != "cpu" or torch.cuda.is_available()
    weights = _weights(base)
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    if str(plain._attn_implementation).startswith("flash"):
        plain._attn_implementation = "sdpa"  # which allocates the same, and runs on tensors without data
    prepare = _Prepare.of(model)
    takes = inspect.signature(type(base).forward).parameters
    subject = Subject(
        plain, base.dtype, weights, type(base), gpu,
        Rival("planned", "MEFT", prepare.patched, reversible=True),
        loss="labels" in takes or "start_positions" in takes,
    )  # fmt: skip
    if find_state(model) is not None:
        return subject
    with simulation(gpu=gpu):
        twin = prepare.as_model(bare_twin(plain, base.dtype, weights, type(base)))
        expected = tensor_bytes([*twin.parameters(), *twin.buffers()])
    beside = tensor_bytes([*model.parameters(), *model.buffers(), *_scales(model)]) - expected
    return Subject(**{**vars(subject), "beside": beside})


def _scales(model: nn.Module) -> list[torch.Tensor]:
    """What bitsandbytes hangs on its parameters, as attributes."""
    found: list[torch.Tensor] = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        states = [vars(each) for each in (state, getattr(state, "state2", None)) if each is not None]
        hung = [value for each in states for value in each.values()]
        found += [value for value in (*hung, getattr(parameter, "SCB", None)) if isinstance(value, torch.Tensor)]
    return found


def _refuse(config: Any) -> None:
    what = None
    if getattr(config, "is_encoder_decoder", False):
        what = "encoder-decoder models, whose two stacks grow in different ways"
    elif hasattr(config, "image_size") or hasattr(config, "vision_config"):
        what = "models of images"
    if what:
        raise UnsupportedModelError(
            f"memory= is not available for {what} ({config.model_type}): choose attention, remainders, tile and "
            "reversible_layers by name"
        )


def _weights(base: Any) -> Weights | None:
    """How the layers' linear modules are stored."""
    if getattr(base, "is_loaded_in_4bit", False):
        return "4bit"
    if getattr(base, "is_loaded_in_8bit", False) or getattr(base, "hf_quantizer", None) is not None:
        return "8bit"
    return None


@dataclass(frozen=True)
class _Prepare:
    """Makes of a bare twin what the model is: PEFT's modules, what trains, in which dtype."""

    peft_configs: dict[str, Any]
    trains: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def of(cls, model: nn.Module) -> _Prepare:
        inner = getattr(model, "_orig_mod", None) or model
        configs: Any = getattr(inner, "peft_config", {})
        trains = {name: (p.requires_grad, p.dtype) for name, p in inner.named_parameters()}
        return cls(dict(configs), trains)

    def as_model(self, twin: Any) -> Any:
        made = twin
        for place, (name, config) in enumerate(self.peft_configs.items()):
            config = copy.deepcopy(config)
            if place == 0:
                made = require("peft").get_peft_model(twin, config, adapter_name=name, autocast_adapter_dtype=False)
            else:
                made.add_adapter(name, config, autocast_adapter_dtype=False)
        for name, parameter in made.named_parameters():
            trains, dtype = self.trains.get(name, (parameter.requires_grad, parameter.dtype))
            if not (parameter.is_floating_point() and dtype.is_floating_point):
                continue
            if parameter.dtype != dtype:
                parameter.data = parameter.detach().to(dtype)
            parameter.requires_grad_(trains)
        return made

    def patched(self, twin: nn.Module, budget: Budget) -> nn.Module:
        return patch(self.as_model(twin), budget.config)
