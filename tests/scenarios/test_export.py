"""A trained model made into something for inference: recorded as a graph, or its linear layers quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meft_kernels

from ..architectures.zoo import batch_for, tiny
from ..models import TRAINABLE_START, VARIANTS, tiny_bert, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
IDS = torch.arange(1, 21).view(2, 10)
ROUNDING = 2e-4
"""Streams in fixed point of 20 bits against floating point, relative, of tiny models whose states are small."""


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids).logits


def traced(model: nn.Module, inputs: torch.Tensor) -> Any:
    return torch.jit.trace(Logits(model), inputs, check_trace=False)


def exported(model: nn.Module, inputs: torch.Tensor) -> Any:
    return torch.export.export(Logits(model), (inputs,)).module()


WAYS = {"jit.trace": traced, "torch.export": exported}


def patched(model: nn.Module, **settings: Any) -> Any:
    torch.manual_seed(5)
    return meft_kernels.patch(model, **{**TRAINABLE_START, "fraction_bits": 20, **settings}).eval()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_a_graph_computes_what_the_model_does(build: Any, variant: str, way: str) -> None:
    model = patched(build(), variant=variant)
    with torch.no_grad():
        expected = model(IDS).logits
        graph = WAYS[way](model, IDS)
        assert distance(graph(IDS), expected) < ROUNDING
        others = IDS.flip(0, 1)
        assert distance(graph(others), model(others).logits) < ROUNDING
        assert torch.equal(model(IDS).logits, expected)  # it is what it was


@pytest.mark.parametrize("settings", [{"coupling": "paper", "arithmetic": "float"}, {"frozen_layers": 1}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_other_settings(settings: dict[str, Any], way: str) -> None:
    model = patched(tiny_bert(), **{"fraction_bits": None if "arithmetic" in settings else 20, **settings})
    with torch.no_grad():
        assert distance(WAYS[way](model, IDS)(IDS), model(IDS).logits) < ROUNDING


def test_before_the_first_batch_and_in_bfloat16() -> None:
    """Nothing is calibrated for a graph, which has no fixed point."""
    model = patched(tiny_bert().bfloat16(), fraction_bits=None)
    with torch.no_grad():
        graph = exported(model, IDS)
        assert distance(graph(IDS).float(), model(IDS).logits.float()) < 0.02


def test_an_image_model() -> None:
    model = patched(tiny("vit"))
    pixels = batch_for(model)["pixel_values"]
    with torch.no_grad():
        assert distance(exported(model, pixels)(pixels), model(pixels).logits) < ROUNDING


def test_the_pretrained_model_alone() -> None:
    plain = tiny_bert()
    model = patched(tiny_bert())
    with torch.no_grad(), meft_kernels.disable_adapter(model):
        assert torch.equal(exported(model, IDS)(IDS), exported(plain, IDS)(IDS))


def test_any_length() -> None:
    model = patched(tiny_bert())
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(Logits(model), (IDS,), dynamic_shapes=({1: length},)).module()
        for tokens in (5, 17):
            ids = torch.arange(1, 2 * tokens + 1).view(2, tokens)
            assert distance(program(ids), model(ids).logits) < ROUNDING


def test_the_strict_way_says_which_to_take() -> None:
    with torch.no_grad(), pytest.raises(Exception, match="strict=False"):
        torch.export.export(Logits(patched(tiny_bert())), (IDS,), strict=True)


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    torch.onnx.export(Logits(patched(tiny_bert())), (IDS,), tmp_path / "model.onnx", dynamo=False)
    assert (tmp_path / "model.onnx").stat().st_size


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_quantised_dynamically(build: Any) -> None:
    """As far from the patched model as a quantised plain model is from a plain one; the adapters stay as they are."""

    def quantised(model: nn.Module) -> Any:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

    plain, model = build(), patched(build())
    with torch.no_grad():
        usual = distance(quantised(plain)(IDS).logits, plain(IDS).logits)
        smaller = quantised(model)
        assert distance(smaller(IDS).logits, model(IDS).logits) < 2 * usual
    ours = {name for name, _ in model.named_parameters() if ".meft." in name}
    assert ours == {name for name, _ in smaller.named_parameters() if ".meft." in name}


def test_hooks_on_an_adapters_projections_run() -> None:
    """In forward and in the recompute; what they change is in force, and gradients pass them."""
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(tiny_bert(), engine=engine).train()
        seen: list[torch.Size] = []

        def see(module: nn.Module, args: Any, output: torch.Tensor, seen: list[torch.Size] = seen) -> None:
            seen.append(output.shape)

        for layer in model.bert.encoder.layer:
            down, up = layer.meft["ffn"].down, layer.meft["stream"].up
            down.register_forward_hook(see)
            up.register_forward_hook(lambda module, args, output: output * 0.5)
        torch.manual_seed(2)
        loss = model(IDS, labels=torch.tensor([0, 1])).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert seen == [(2, 10, 8)] * (6 if engine == "reversible" else 3)
        results.append((loss.detach(), gradients))
    (loss, found), (expected_loss, expected) = results
    assert torch.equal(loss, expected_loss)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7) for name in expected)
