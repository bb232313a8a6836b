"""Modules and parameters below a module: the same as torch's own, each once."""

from __future__ import annotations

import torch
from torch import nn

import meft_kernels
from meft_kernels.modules import modules_of, parameters_of
from tests.models import tiny_llama


def _same(model: nn.Module) -> None:
    assert {id(part) for part in modules_of(model)} == {id(part) for part in model.modules()}
    assert len(modules_of(model)) == len(list(model.modules()))
    assert {id(parameter) for parameter in parameters_of(model)} == {id(parameter) for parameter in model.parameters()}
    assert len(parameters_of(model)) == len(list(model.parameters()))


def test_a_patched_model() -> None:
    _same(meft_kernels.patch(tiny_llama(), rank=4))


def test_what_is_shared_counts_once_and_what_is_missing_not() -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False), "second": nn.Linear(3, 3)})
    model["second"].weight = model["first"].weight
    model["again"] = model["first"]
    model.register_module("none", None)
    model["list"] = nn.ParameterList([torch.zeros(2)])
    _same(model)


def test_a_loop_ends() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("itself", model)
    _same(model)
