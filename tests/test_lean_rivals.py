"""LoRA as people run it for long texts: loss in chunks, checkpoints on the host, MLPs in tiles. The same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS, Budget, UnavailableRivalError
from meft_kernels.comparison.rivals.chunked_loss import chunked_loss
from meft_kernels.comparison.rivals.host_checkpoints import keep_checkpoints_on_host
from meft_kernels.comparison.rivals.lora_checkpointing import lora_checkpointing
from meft_kernels.comparison.rivals.tiled_mlp import tile_mlps
from meft_kernels.memory import LiveTensorMeter

from .architectures.zoo import batch_for, tiny

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONFIG = MeftConfig(rank=8, dropout=0.0)


def prepared(family: str) -> Any:
    """LoRA whose B is no longer zero, so that all gradients are alive."""
    torch.manual_seed(0)
    model = lora_checkpointing(tiny(family), Budget.of(tiny(family), CONFIG)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model: Any, batch: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(model: Any, other: Any, batch: Any, **kwargs: Any) -> None:
    (loss, gradients), (other_loss, others) = step(model, batch, **kwargs), step(other, batch, **kwargs)
    assert gradients.keys() == others.keys() and len(gradients) > 2
    # Sums of at most a few hundred float32 terms in another order.
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_loss_in_chunks_is_the_whole_one(family: str) -> None:
    model = prepared(family)
    other = copy.deepcopy(model)
    chunked_loss(other)
    agree(model, other, batch_for(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
def test_mlps_in_tiles_are_the_whole_ones(family: str) -> None:
    """With tiles that do not divide the rows."""
    model = prepared(family)
    other = copy.deepcopy(model)
    tile_mlps(other, rows=5)
    batch = batch_for(model)
    agree(model, other, batch)


def test_dropout_in_tiles_is_repeated_in_backward() -> None:
    """The loss is linear in what is dropped: a gradient of other draws would miss the difference quotient."""
    from meft_kernels.comparison.rivals.tiled_mlp import _in_tiles

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8)).double()
    tiled = _in_tiles(module.forward, module, 3)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    rng = torch.get_rng_state()

    def loss(x: torch.Tensor) -> torch.Tensor:
        torch.set_rng_state(rng)
        return tiled(x)

    assert torch.autograd.gradcheck(loss, hidden)


def test_families_without_a_feed_forward_module_are_refused() -> None:
    with pytest.raises(UnavailableRivalError, match="OPTDecoderLayer has no module"):
        tile_mlps(tiny("opt"))


def test_autocast_in_tiles() -> None:
    model = prepared("llama")
    other = copy.deepcopy(model)
    tile_mlps(other, rows=5)
    batch = batch_for(model)
    found = []
    for each in (model, other):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = each(**batch).loss
        loss.backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():  # bfloat16 inside: 2^-8 a term
        torch.testing.assert_close(gradient, found[1][name], rtol=0.05, atol=0.05 * gradient.abs().max().item())


def test_checkpoints_on_the_host_are_the_hosts_bytes() -> None:
    """One input a layer, in host memory and nowhere else; numbers as without, bit for bit."""
    model = prepared("llama")
    other = copy.deepcopy(model)
    keep_checkpoints_on_host(other)
    batch = batch_for(model)
    kept, host = [], []
    results = []
    for each in (model, other):
        with LiveTensorMeter() as meter:
            torch.manual_seed(1)
            loss = each(**batch).loss
            kept.append(meter.live_bytes)
            host.append(meter.host_bytes)
            loss.backward()
            assert meter.host_bytes == 0
        results.append((loss.detach(), [p.grad for p in each.parameters() if p.grad is not None]))
    config = model.config
    one = batch["input_ids"].numel() * config.hidden_size * 4
    assert host == [0, config.num_hidden_layers * one]
    assert kept[0] - kept[1] >= (config.num_hidden_layers - 1) * one
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_each_takes_less_than_the_one_before() -> None:
    peaks = []
    for name in ("lora_checkpointing", "lora_chunked", "lora_chunked_tiled", "lora_chunked_tiled_host"):
        torch.manual_seed(0)
        base = tiny("llama", hidden_size=16, intermediate_size=2048, vocab_size=8192, num_hidden_layers=3)
        model = RIVALS[name].prepare(base, Budget.of(base, CONFIG)).train()
        batch = {key: value.repeat(16, 4) for key, value in batch_for(model).items()}
        with LiveTensorMeter() as meter:
            model(**batch).loss.backward()
        peaks.append(meter.peak_bytes)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4, peaks
