"""Estimates of quantised weights, of host memory, and of texts longer than the model's positions."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS, UnavailableRivalError
from meft_kernels.estimate import twin
from meft_kernels.estimate.estimator import Estimator
from meft_kernels.estimate.published import published
from meft_kernels.estimate.quantised import QuantisedLinear, quantise
from meft_kernels.estimate.shapes import find_config, longest_input, with_positions
from meft_kernels.estimate.step import tensor_bytes
from meft_kernels.estimate.twin import build
from meft_kernels.loss import chunks
from meft_kernels.memory import LiveTensorMeter

from .architectures.zoo import tiny
from .test_estimate import bert, llama, run

pytest.importorskip("typer.testing")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

RANK = MeftConfig(rank=8)


def test_four_bits_weigh_what_bitsandbytes_weigh() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(320, 192, bias=False, dtype=torch.bfloat16)
    ours = QuantisedLinear(plain, "4bit")
    theirs = bitsandbytes.nn.Linear4bit(
        320, 192, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.bfloat16
    )
    theirs.load_state_dict(plain.state_dict())
    weight = theirs.to("cpu").weight
    state = weight.quant_state
    parts = [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert tensor_bytes([ours.weight, ours.scales]) == tensor_bytes(parts)


@pytest.mark.parametrize("weights", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_linear_modules_of_the_layers_are_exchanged(family: str, weights: Any) -> None:
    model = tiny(family).to(torch.bfloat16)
    quantise(model, weights)
    left = [
        name for name, module in model.named_modules() if type(module) is nn.Linear or "Conv1D" in str(type(module))
    ]
    assert not [name for name in left if ".layer" in name or ".h." in name]
    assert type(model.get_output_embeddings()) in (nn.Linear, type(None))


def test_the_matrix_is_there_while_it_is_multiplied() -> None:
    """In forward, in backward, and not between; nothing else is kept for it."""
    plain = nn.Linear(512, 256, dtype=torch.bfloat16)
    linear = QuantisedLinear(plain.requires_grad_(False), "4bit")
    hidden = torch.zeros(32, 512, dtype=torch.bfloat16, requires_grad=True)
    matrix, out = 512 * 256 * 2, 32 * 256 * 2
    with LiveTensorMeter() as meter:
        result = linear(hidden)
        assert meter.peak_bytes == matrix + out and meter.live_bytes == out
        meter.reset_peak()
        result.backward(torch.ones_like(result))
        assert meter.peak_bytes >= matrix + 32 * 512 * 2 and meter.live_bytes < matrix


def test_quantised_weights_are_less_by_what_they_are() -> None:
    config = llama(4)
    plain, packed, half = (
        Estimator(config, torch.bfloat16, 1, RANK, weights=weights).step(RIVALS["meft"], 64)  # type: ignore[arg-type]
        for weights in (None, "4bit", "8bit")
    )
    layers = build(config, torch.bfloat16).base_model.layers
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    modules = sum(isinstance(m, nn.Linear) for m in layers.modules())
    assert plain.weights - packed.weights == pytest.approx(linear * (2 - 4.127 / 8) - modules * 4 * 273, rel=1e-3)
    rows = sum(m.out_features for m in layers.modules() if isinstance(m, nn.Linear))
    assert plain.weights - half.weights == linear - 4 * rows
    assert plain.kept == packed.kept == half.kept
    assert packed.total < half.total < plain.total


@pytest.mark.parametrize("rival", ["lora", "lora_checkpointing", "lora_chunked_tiled_host", "bottleneck", "meft_lora"])
def test_rivals_train_beside_quantised_weights(rival: str) -> None:
    """As many parameters as beside plain ones."""
    plain, packed = (
        Estimator(llama(2), torch.bfloat16, 1, RANK, weights=weights).step(RIVALS[rival], 256)  # type: ignore[arg-type]
        for weights in (None, "4bit")
    )
    assert plain.optimizer == packed.optimizer and plain.gradients == packed.gradients
    assert packed.total < plain.total


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(UnavailableRivalError, match="cannot be trained"):
        Estimator(llama(2), torch.bfloat16, 1, RANK, weights="4bit").step(RIVALS["full"], 64)
    with pytest.raises(ValueError, match="weights are 4bit or 8bit"):
        Estimator(llama(2), torch.bfloat16, 1, RANK, weights="3bit")  # type: ignore[arg-type]


@pytest.mark.parametrize("rival", ["lora_chunked", "lora_chunked_tiled_host"])
def test_leaving_equal_tiles_out_changes_no_byte(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """About 10 tiles of an MLP, 10 chunks of the loss, 10 parts of its gradient, of other sizes at the end."""
    config = llama(2, max_position_embeddings=4096)
    config.vocab_size = 32768
    monkeypatch.setattr(chunks, "_SCALED_AT_ONCE", 64 * 64)
    short = Estimator(config, torch.bfloat16, 2, RANK, gpu=False).step(RIVALS[rival], 310)
    monkeypatch.setattr(twin, "shortening", contextlib.nullcontext)
    assert Estimator(config, torch.bfloat16, 2, RANK, gpu=False).step(RIVALS[rival], 310) == short


def test_adapters_in_the_models_dtype() -> None:
    """LoRA's as well as ours."""
    for rival in ("lora", "meft"):
        wide, narrow = (
            Estimator(llama(2), torch.bfloat16, 1, MeftConfig(rank=8, adapter_dtype=dtype)).step(RIVALS[rival], 64)  # type: ignore[arg-type]
            for dtype in ("float32", "model")
        )
        assert wide.gradients == 2 * narrow.gradients


def test_texts_longer_than_the_positions() -> None:
    config = llama(2, max_position_embeddings=128)
    with pytest.raises(ValueError, match="any_length"):
        Estimator(config, torch.bfloat16, 1, RANK).step(RIVALS["meft"], 129)
    longer = Estimator(config, torch.bfloat16, 1, RANK, any_length=True)
    room = longer.step(RIVALS["meft"], 1000).total
    assert 1000 <= longer.longest(RIVALS["meft"], room, 990) <= 1010
    for name in ("bert-base", "roberta-large"):
        config = find_config(name)
        assert longest_input(with_positions(config, 2048)) == 2048 and longest_input(config) == 512
    learned = Estimator(bert(2), torch.bfloat16, 1, RANK, any_length=True)
    grown = learned.step(RIVALS["meft"], 256).weights - learned.step(RIVALS["meft"], 128).weights
    assert grown == 128 * (64 * 2 + 2 * 8)  # a row of the table, and of two buffers of indices


def test_published_figures_are_for_their_model_and_card() -> None:
    config = find_config("llama-3.1-8b")
    assert [each.tokens for each in published(config, 80 * 10**9)] == [342_733, 142_400, 500_000]
    assert [each.tokens for each in published(config, 24 * 10**9)] == [78_475]
    assert published(config, 40 * 10**9) == published(find_config("llama-3.2-1b"), 80 * 10**9) == []
    assert all("://" in str(each) for each in published(config, 80 * 10**9))


def test_command_line(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "estimate.json"
    llama(3, max_position_embeddings=64).save_pretrained(folder)
    done = run(
        "--model", str(folder), "--seq", "96", "--gpu", "16MB", "--rivals", "lora_chunked_host,full",
        "--weights", "4bit", "--adapter-dtype", "model", "--any-length", "--json", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    printed = done.output.replace("\n", "").replace(" ", "")  # lines break anywhere
    assert "4bitweights" in printed and "host,GiB" in printed and "cannotbetrained" in printed
    record = json.loads(out.read_text())
    row = record["figures"][0]
    assert record["settings"]["weights"] == "4bit" and record["settings"]["adapter_dtype"] == "model"
    assert row["longest"] > 96 and row["longest_host"] > row["host"] == 3 * 96 * 64 * 2
    plain = run("--model", str(folder), "--seq", "64", "--rivals", "meft")
    assert "host," not in plain.output.split("From shapes")[0]
    assert run("--model", str(folder), "--weights", "2bit").exit_code == 2
    assert run("--model", str(folder), "--adapter-dtype", "float8").exit_code == 2
