"""``meft-kernels train --method lora``: a folder of PEFT's, a merged model, and going on after a signal."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from meft_kernels.programs.training.settings import check_given, merge, resolve

from .test_train import TASKS, history, home, kill_at, options, run  # noqa: F401 (home is a fixture)

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("task", TASKS)
def test_a_run_stopped_and_resumed(
    task: str,
    home: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it leaves knows nothing of us, computes what the figures say, and is that of a run without a stop."""
    asked = [*options(home, task), "--method", "lora", "--config", home / "often.yaml", "--steps", 6, "--alpha", 8]
    whole, out = tmp_path / "whole", tmp_path / "out"
    said = run(*asked, "--merge", "--out", whole)
    written, merges = said.split("use it: ")[1:]
    with monkeypatch.context() as patched:
        kill_at(patched, signal.SIGINT, lambda what, state: (what, state.global_step) == ("log", 3))
        assert "--resume --out" in run(*asked, "--out", out, code=130)
    run("--resume", "--merge", "--out", out)
    assert history(out) == history(whole)
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        ours, expected = load_file(out / name), load_file(whole / name)
        assert ours.keys() == expected.keys()
        assert not [key for key in ours if ".meft." in key]
        assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.items())

    assert not [path for path in whole.glob("[am]*/*") if "meft" in path.name or "reversible" in path.name]
    adapter, merged = (eval(line, {"peft": peft, "transformers": transformers}) for line in (written, merges))
    assert type(merged).__module__.startswith("transformers.models.")
    assert adapter.peft_config["default"].r == 4 and adapter.peft_config["default"].lora_alpha == 8
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        scores = adapter.eval()(input_ids=ids).logits
        assert torch.allclose(merged.eval()(input_ids=ids).logits, scores, atol=1e-5)
    figures, logged = json.loads((whole / "metrics.json").read_text()), history(whole)
    patched_loss, saved_loss = [entry["eval_loss"] for entry in logged if "eval_loss" in entry][-2:]
    assert figures["eval_loss"] == saved_loss
    assert saved_loss == pytest.approx(patched_loss, abs=1e-2)  # the coupling's leak


def settings(text: dict[str, Any], **flags: Any) -> Any:
    made = merge(check_given({"model": "llama", **text}, "file"), check_given(flags, "flags"))
    return resolve(made, "causal-lm", encoder=False)


def test_settings() -> None:
    made = settings({"method": "lora", "lora": {"r": 8, "use_dora": True}, "meft": {"beta": -1 / 8}})
    assert made.lora == {"r": 8, "use_dora": True, "lora_alpha": 32, "target_modules": "all-linear"}
    assert made.meft.adapters == "none"
    assert made.training["learning_rate"] == 5e-4
    assert settings(made.plain()) == made
    assert settings({"lora": {"r": 8}}, method="lora", rank=4).lora["r"] == 4
    assert settings({"meft": {"rank": 8}}, rank=4).meft.rank == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"merge": True}, "merge is for method lora"),
        ({"lora": {"r": 4}}, "lora.r is for method lora"),
        ({"method": "lora", "meft": {"dropout": 0.1}}, "method lora inserts no adapters, so dropout has no meaning"),
        ({"method": "lora", "lora": {"lora_alfa": 4}}, "there is no setting 'lora_alfa': did you mean lora_alpha"),
        ({"method": "lora", "lora": {"task_type": "CAUSAL_LM"}}, "lora.task_type cannot be set: the task decides"),
        ({"method": "dora"}, "method is one of meft, lora"),
        ({"merge": "yes"}, "merge is true or false"),
    ],
)
def test_wrong_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(given)


def test_what_peft_refuses_is_told(home: Path, tmp_path: Path) -> None:  # noqa: F811
    said = run(
        *options(home, "causal-lm"), "--method", "lora", "--target-modules", "q,v", "--out", tmp_path / "out", code=2
    )
    assert "lora: Target modules" in said
    assert not (tmp_path / "out").exists()
