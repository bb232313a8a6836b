"""The memory estimator: against measurement, in depth, in length, and on the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from benchmarks.estimator import measured
from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS
from meft_kernels.estimate.depth import extrapolate, sample_depths, with_depth
from meft_kernels.estimate.estimator import Estimator, longest_that_fits
from meft_kernels.estimate.shapes import BUILT_IN, find_config, longest_input
from meft_kernels.estimate.sizes import memory_size
from meft_kernels.estimate.step import StepBytes
from meft_kernels.estimate.twin import build

from .architectures.zoo import tiny_config
from .test_coupling_triton import ROOT, run_checks

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

RANK = MeftConfig(rank=8)


def llama(layers: int, **settings: Any) -> Any:
    return LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, architectures=["LlamaForCausalLM"], **settings,
    )  # fmt: skip


def bert(layers: int) -> Any:
    config = tiny_config("bert", num_hidden_layers=layers, hidden_size=64, max_position_embeddings=128, dropout=0.1)
    config.architectures = ["BertForMaskedLM"]
    return config


@pytest.mark.parametrize(
    ("config", "dtype", "rival"),
    [
        (llama(8, tie_word_embeddings=True), torch.float32, "meft"),
        (llama(8), torch.bfloat16, "lora_checkpointing"),
        (llama(7), torch.bfloat16, "meft3"),
        (bert(7), torch.float32, "lora"),
        (bert(7), torch.bfloat16, "full"),
        (llama(8), torch.bfloat16, "lora_chunked"),
        (llama(7), torch.bfloat16, "lora_chunked_tiled_host"),
        (bert(7), torch.float32, "lora_chunked_tiled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_estimates_are_what_a_whole_model_takes(config: Any, dtype: torch.dtype, rival: str) -> None:
    """From two and four layers, without data, against all layers with real tensors: to 1 %, and 10 is the promise."""
    assert len(sample_depths(config)) == 2
    estimator = Estimator(config, dtype, 2, RANK, gpu=False)
    step = estimator.step(RIVALS[rival], 96)
    real = measured(config, dtype, 2, 96, rival, estimator.meft)
    assert step.host == real["host"] and (step.host > 0) == rival.endswith("host")
    assert step.kept == pytest.approx(real["kept"], rel=0.01)
    assert step.total == pytest.approx(real["total"], rel=0.01)


def test_dense_masks_are_counted_only_where_there_are_any() -> None:
    """Full batches need none; fake tensors would make transformers build one."""
    long = Estimator(llama(2), torch.float32, 1, RANK, loss=False)
    one, two, three = (long.step(RIVALS["meft"], tokens).peak for tokens in (512, 1024, 1536))
    assert three - two == pytest.approx(two - one, rel=0.02)  # a mask of tokens x tokens would bend it


def test_loss_is_logits_and_more() -> None:
    config = llama(2)
    config.vocab_size = 4096
    with_loss, without = (
        Estimator(config, torch.float32, 1, RANK, loss=loss).step(RIVALS["meft"], 64) for loss in (1, 0)
    )
    logits = 64 * 4096 * 4
    assert with_loss.peak - without.peak > logits
    full = Estimator(config, torch.float32, 1, RANK, loss=False).step(RIVALS["full"], 64)
    assert full.gradients == pytest.approx(
        full.weights, rel=0.01
    )  # the head's too, which the body's backward does not reach


def test_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels' host code allocates, and nothing is launched; AdamW over all parameters at once copies them."""
    launched = []

    def no_launch(kernel: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: launched.append(kernel.__name__)

    monkeypatch.setattr("meft_kernels.estimate.twin._no_launch", no_launch)
    config = llama(2)
    steps = []
    for gpu in (False, True):
        assert not launched
        steps.append(Estimator(config, torch.float32, 2, RANK, loss=False, gpu=gpu).step(RIVALS["meft"], 64))
    assert launched.count("adapter_couple_kernel") == launched.count("couple_exact_kernel") == len(launched) // 9 == 2
    cpu, gpu = steps
    assert gpu.kept == pytest.approx(cpu.kept, rel=0.01)
    # One copy of all parameters instead of one of the largest.
    assert 0.5 * gpu.gradients < gpu.update - cpu.update < gpu.gradients


def test_dropout_as_on_a_gpu() -> None:
    """Attention drops out inside its kernel, so that nothing grows with the square of the tokens; masks are bytes."""
    kept = {
        (gpu, tokens): Estimator(bert(2), torch.bfloat16, 2, RANK, gpu=gpu).step(RIVALS["full"], tokens).kept
        for gpu in (True, False)
        for tokens in (32, 64, 128)
    }
    assert kept[True, 128] - kept[True, 64] == pytest.approx(2 * (kept[True, 64] - kept[True, 32]), rel=0.01)
    assert kept[False, 128] - kept[False, 64] > 2.2 * (kept[False, 64] - kept[False, 32])
    assert kept[True, 32] < kept[False, 32]


@pytest.mark.slow
def test_kernels_allocate_what_is_estimated(tmp_path: Path) -> None:
    run_checks(ROOT / "tests" / "isolated" / "check_estimate.py", tmp_path / "report.xml", interpret=True, least=3)


def test_layers_that_differ_are_taken_by_whole_periods() -> None:
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=9, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=16, architectures=["Gemma3ForCausalLM"],
        layer_types=["sliding_attention", "full_attention"] * 4 + ["sliding_attention"],
    )  # fmt: skip
    low, high = sample_depths(config)
    assert (low, high) == (3, 5)
    fewer = with_depth(config, low)
    assert fewer.layer_types == config.layer_types[:low] and len(config.layer_types) == 9
    estimator = Estimator(config, torch.float32, 1, RANK)
    whole = estimator.simulate(config, RIVALS["meft"], 64)
    assert estimator.step(RIVALS["meft"], 64).total == pytest.approx(whole.total, rel=0.01)


def test_a_peak_that_will_move_is_not_extrapolated() -> None:
    """A step whose peak is at the loss for few layers, and in the last gradients for many."""
    asked = []

    def simulate(config: Any, parts: Any) -> StepBytes:
        layers = config.num_hidden_layers
        asked.append(layers)
        return StepBytes(0, 10 * layers, 0, layers, 50 + layers, max(100 + layers, 10 * layers), 0)

    assert extrapolate(llama(40), simulate).peak == 400
    assert asked == [2, 4, 40]


@pytest.mark.parametrize("start", [1, 100, 5000])
@pytest.mark.parametrize(
    ("total", "best"),
    [(lambda t: 10 + t, 990), (lambda t: t * t, 31), (lambda t: 900 + max(0, t - 500), 600), (lambda t: 2000, 0)],
)
def test_the_longest_that_fits(total: Any, best: int, start: int) -> None:
    found = longest_that_fits(total, 1000, start, 8192)
    assert total(max(found, 1)) <= 1000 or found == best == 0
    assert best * 0.98 - 1 <= found <= best
    assert longest_that_fits(lambda t: 5, 1000, start, 8192) == 8192


def test_shapes() -> None:
    """Parameters as published, in millions."""
    known = {
        "bert-base": 109.5,
        "roberta-large": 355.4,
        "opt-1.3b": 1315.8,
        "llama-3.2-1b": 1235.8,
        "llama-3.1-8b": 8030.3,
        "llama-3.1-70b": 70553.7,
    }
    assert set(known) == set(BUILT_IN)
    for name, millions in known.items():
        config = find_config(name)
        with torch.device("meta"):
            counted = sum(p.numel() for p in build(config, torch.bfloat16).parameters()) / 1e6
        assert counted == pytest.approx(millions, rel=2e-3), name
    assert find_config("meta-llama/Llama-3.1-8B").hidden_size == 4096
    assert longest_input(find_config("roberta-large")) == 512
    with pytest.raises(ValueError, match=r"no config for .*nothing-of-the-kind"):
        find_config("./nothing-of-the-kind")


def test_sizes() -> None:
    assert memory_size("80GB") == 80 * 10**9
    assert memory_size("24 GiB") == 24 * 2**30
    for wrong in ("80", "0GB", "a lot"):
        with pytest.raises(ValueError, match="--gpu is a size"):
            memory_size(wrong)


def run(*arguments: str) -> Any:
    from meft_kernels.programs.cli import app

    return typer_testing.CliRunner().invoke(app, ["estimate", *arguments])


def test_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama(4, max_position_embeddings=256).save_pretrained(folder)
    out = tmp_path / "estimate.json"
    done = run(
        "--model", str(folder), "--batch", "2", "--seq", "64", "--gpu", "80GB", "--rivals", "meft,full",
        "--json", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert logging.getLogger("meft_kernels").level == logging.NOTSET  # what is quiet in a simulation is said after it
    assert "MEFT" in done.output and "yes" in done.output
    rows = json.loads(out.read_text())["figures"]
    assert [(row["rival"], row["longest"]) for row in rows] == [("meft", 256), ("full", 256)]
    assert rows[0]["total"] < rows[1]["total"]
    assert run("--model", str(folder), "--seq", "512", "--rivals", "meft").exit_code == 2
    assert run("--model", str(folder), "--rivals", "unsloth").exit_code == 2
    assert run("--model", str(folder), "--rivals", "lroa").exit_code == 2


def test_progress_and_a_way_out(tmp_path: Path) -> None:
    llama(4, max_position_embeddings=4096).save_pretrained(tmp_path)
    given = ["--model", str(tmp_path), "--batch", "2", "--seq", "4096", "--rivals", "meft,lora"]
    done = run(*given, "--gpu", "8MB")
    assert "estimating 1 of 2: MEFT" in done.stderr and "estimating 2 of 2: LoRA" in done.stderr
    said = " ".join(done.stdout.split())
    longest = json_of(given, "8MB", tmp_path)["meft"]
    assert f"the longest text that does has {longest:,} tokens, with MEFT" in said and longest > 0
    assert "What may help: --weights 4bit, --batch below 2, the settings that meft-kernels plan tries" in said
    said = " ".join(run(*given, "--gpu", "0.1MB").stdout.split())
    assert "not even texts of one token: the weights take" in said and "plan tries" not in said
    assert "What may help" not in run(*given, "--gpu", "80GB").stdout


def json_of(given: list[str], gpu: str, folder: Path) -> dict[str, int]:
    assert run(*given, "--gpu", gpu, "--json", str(folder / "out.json")).exit_code == 0
    return {row["rival"]: row["longest"] for row in json.loads((folder / "out.json").read_text())["figures"]}
