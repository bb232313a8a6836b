"""Hidden states that lie in memory in another order: channels first, as convolutions and audio front ends give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels.engine.arithmetic import Arithmetic

from ..models import FAMILIES, TRAINABLE_START, VARIANTS


@pytest.mark.parametrize("settings", [{}, {"tile": 4}, {"arithmetic": "float"}], ids=["whole", "tiles", "float"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_give_what_dense_ones_do(family: str, variant: str, settings: dict[str, Any]) -> None:
    coefficient = 0.5 if settings.get("arithmetic") == "float" else -1 / 3
    model = FAMILIES[family]()
    torch.manual_seed(5)
    meft_kernels.patch(model, variant=variant, lam=coefficient, beta=coefficient, **TRAINABLE_START, **settings)
    values = torch.randn(2, 64, 6, generator=torch.Generator().manual_seed(3))
    lying = values.transpose(1, 2)
    found = []
    for embeds in (lying, lying.contiguous()):
        embeds = embeds.detach().requires_grad_()
        loss = model(inputs_embeds=embeds).logits.square().mean()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), "embeds": embeds.grad, **gradients})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[1].items():
        assert torch.allclose(found[0][name], tensor, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("fraction_bits", [16, None])
def test_streams_are_dense(fraction_bits: int | None) -> None:
    """Or every kernel would copy them, layer by layer."""
    lying = torch.randn(2, 64, 6).transpose(1, 2)
    stream, _ = Arithmetic(fraction_bits).enter(lying)
    assert stream.is_contiguous()
    assert stream.data_ptr() != lying.data_ptr()
