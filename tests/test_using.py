"""``meft-kernels predict`` and ``generate`` on what ``train`` left, of both methods, and what they refuse."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import meft_kernels
from meft_kernels.programs.cli import app

from .test_train import TASKS, home, options, run  # noqa: F401 (home is a fixture)
from .training_files import write_rows

METHODS = ("meft", "lora")
TEXTS = ["good film", "bad plot so dull", "fine " * 40, "not so good w7"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[tuple[str, str], Path]:  # noqa: F811
    """A run of each task and method; classes have names here."""
    rows = [json.loads(line) for line in (home / "labelled.jsonl").read_text().splitlines()]
    named = write_rows(home / "named.jsonl", [{**row, "label": ("dire", "superb")[row["label"]]} for row in rows])
    made = {}
    for task in TASKS:
        for method in METHODS:
            if method == "lora":
                pytest.importorskip("peft")
            out = made[task, method] = home / f"run-{task}-{method}"
            data = ["--data", named] if task == "classification" else []
            more = ["--merge"] if method == "lora" else []
            said = run(
                *options(home, task), *data, "--method", method, *more, "--steps", 6, "--lr", "0.02", "--out", out
            )
            command = "predict" if task == "classification" else "generate"
            assert f"try it: meft-kernels {command} {out} " in said
            if (task, method) == ("classification", "meft"):  # the base model's own head has three classes
                (hint,) = re.findall(r"use it: (.*)", said)
                assert type(eval(hint, {"meft_kernels": meft_kernels})).__name__ == "BertForSequenceClassification"
            assert f'its tokenizer: transformers.AutoTokenizer.from_pretrained("{out / "adapter"}")' in said
    return made


def loaded(home: Path, task: str, method: str, folder: Path) -> Any:  # noqa: F811
    """The trained model, by hand."""
    if task == "classification":
        base = AutoModelForSequenceClassification.from_pretrained(
            home / "bert", num_labels=2, ignore_mismatched_sizes=True
        )
    else:
        base = AutoModelForCausalLM.from_pretrained(home / "llama")
    if method == "meft":
        return meft_kernels.load_adapter(base, folder / "adapter").eval()
    import peft

    return peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


@pytest.mark.parametrize("method", METHODS)
def test_predicted_is_what_the_model_says(
    method: str,
    home: Path,  # noqa: F811
    runs: dict[tuple[str, str], Path],
    tmp_path: Path,
) -> None:
    folder = runs["classification", method]
    model, words = loaded(home, "classification", method, folder), AutoTokenizer.from_pretrained(home / "bert")
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            logits = model(**words(text, truncation=True, max_length=12, return_tensors="pt")).logits
        expected.append(logits.softmax(-1)[0].tolist())
    rows = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    data = write_rows(tmp_path / "texts.jsonl", rows)
    assert "4 rows" in call("predict", folder, "--data", data, "--out", tmp_path / "a.jsonl", "--batch-size", 3)
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for row, made, shares in zip(rows, found, expected, strict=True):
        assert row.items() <= made.items()
        assert list(made["probabilities"]) == ["dire", "superb"]
        # Six digits are written, of float32 in batches here and one by one there.
        assert list(made["probabilities"].values()) == pytest.approx(shares, abs=1e-4)
        assert made["predicted"] == ("dire", "superb")[shares[1] > shares[0]]
        assert made["probability"] == max(made["probabilities"].values())
    semicolons = tmp_path / "texts.csv"
    semicolons.write_text("id;text\n" + "".join(f"{row['id']};{row['text']}\n" for row in rows))
    call("predict", folder, "--data", semicolons, "--out", tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["predicted"] for row in table] == [row["predicted"] for row in found]
    assert table[3]["id"] == "3" and json.loads(table[3]["probabilities"]).keys() == {"dire", "superb"}
    lines = call("predict", folder / "adapter", *TEXTS).splitlines()
    assert [line.split()[0] for line in lines] == [row["predicted"] for row in found]


@pytest.mark.parametrize("method", METHODS)
def test_generated_is_what_the_model_says(
    method: str,
    home: Path,  # noqa: F811
    runs: dict[tuple[str, str], Path],
    tmp_path: Path,
) -> None:
    folder = runs["causal-lm", method]
    model, words = loaded(home, "causal-lm", method, folder), AutoTokenizer.from_pretrained(home / "llama")
    prompts = ["good film", "bad plot so dull w9"]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([words(prompt).input_ids])
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
                              pad_token_id=words.eos_token_id)  # fmt: skip
        expected.append(words.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    out = tmp_path / "a.jsonl"
    call("generate", folder, "--data", tmp_path / "prompts.txt", "--max-new-tokens", 5, "--out", out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": prompt, "generated": text} for prompt, text in zip(prompts, expected, strict=True)
    ]
    assert call("generate", folder, prompts[0], "--max-new-tokens", 5).strip() == expected[0].strip()
    hot = ["generate", folder, prompts[0], "--max-new-tokens", 20, "--temperature", 5]
    assert call(*hot) == call(*hot) != call(*hot, "--seed", 1)


def test_a_merged_model_and_one_that_moved(
    home: Path,  # noqa: F811
    runs: dict[tuple[str, str], Path],
    tmp_path: Path,
) -> None:
    for method in METHODS:
        folder = shutil.copytree(runs["classification", method] / "adapter", tmp_path / method)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "base_model_name_or_path": "/gone/away"}))
        assert "is no longer at /gone/away: say where it is, --base-model" in " ".join(
            call("predict", folder, "good", code=2).split()
        )
        assert call("predict", folder, *TEXTS, "--max-length", 12, "--base-model", home / "bert") == call(
            "predict", runs["classification", method], *TEXTS
        )
    merged = runs["classification", "lora"] / "merged"
    assert [line.split()[0] for line in call("predict", merged, *TEXTS).splitlines()] == [
        line.split()[0] for line in call("predict", runs["classification", "lora"], *TEXTS).splitlines()
    ]
    (tmp_path / "lora" / "classes.json").unlink()
    assert "write classes.json into it" in call(
        "predict", tmp_path / "lora", "good", "--base-model", home / "bert", code=2
    )


def test_what_cannot_be_used_is_told_before_torch_is_imported(
    home: Path,  # noqa: F811
    runs: dict[tuple[str, str], Path],
    tmp_path: Path,
) -> None:
    classifier, speaker = runs["classification", "meft"], runs["causal-lm", "lora"]
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(classifier / "settings.yaml", unfinished)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "head.csv").write_text("text\n")
    (tmp_path / "blank.csv").write_text('text,id\ngood,1\n" ",2\n')
    (tmp_path / "wide.csv").write_text("text,id\ngood,1,2\n")
    (tmp_path / "odd.jsonl").write_text('{"text": "good"}\n[1]\n')
    write_rows(tmp_path / "taken.jsonl", [{"text": "good", "predicted": "no"}])
    cases = [
        (["predict", str(tmp_path / "none"), "a"], "there is no folder"),
        (["predict", str(tmp_path), "a"], "holds no adapter"),
        (["predict", str(unfinished), "a"], "train --resume --out"),
        (["predict", str(speaker), "a"], "was trained for causal-lm, not for classification: meft-kernels generate"),
        (["generate", str(classifier), "a"], "was trained for classification, not for causal-lm"),
        (["predict", str(classifier)], "say what to predict"),
        (["predict", str(classifier), "a", "--data", "head.csv"], "and not both"),
        (["generate", str(speaker)], "say what to go on from"),
        (["predict", str(classifier), " "], "row 1 has no text"),
        (["predict", str(classifier), "--data", "none.csv"], "there is no file"),
        (["predict", str(classifier), "--data", "a.parquet"], "--data is a file that ends in .csv"),
        (["predict", str(classifier), "--data", "empty.csv"], "is empty"),
        (["predict", str(classifier), "--data", "head.csv"], "is empty"),
        (["predict", str(classifier), "--data", "blank.csv"], "row 2 has no text in text: ' '"),
        (["predict", str(classifier), "--data", "wide.csv"], "row 1 has more fields"),
        (["predict", str(classifier), "--data", "odd.jsonl"], "line 2 is no JSON object"),
        (["predict", str(classifier), "--data", "blank.csv", "--text", "body"], "no column 'body'; it has text, id"),
        (["predict", str(classifier), "--data", "taken.jsonl", "--out", "b.csv"], "a column 'predicted' already"),
        (["predict", str(classifier), "a", "--out", "b.txt"], "--out is a file that ends in .csv or .jsonl"),
        (["predict", str(classifier), "a", "--out", "no/b.csv"], "there is no folder no"),
    ]
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from meft_kernels.programs.cli import app\n"
        f"for command, message in {cases}:\n"
        "    done = CliRunner().invoke(app, command)\n"
        "    assert done.exit_code == 2, (command, done.output, done.exception)\n"
        "    assert message in ' '.join(done.output.split()), (message, done.output)\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_what_the_model_has_no_room_for(home: Path, runs: dict[tuple[str, str], Path]) -> None:  # noqa: F811
    folder = runs["causal-lm", "meft"]
    said = call("generate", folder, "good", "--max-new-tokens", 100_000, code=2)
    assert "prompt 1 has 1 tokens, and with --max-new-tokens 100000 more than" in " ".join(said.split())
    said = call("predict", runs["classification", "meft"], "good", "--max-length", 100_000, code=2)
    assert "--max-length is 100000, and this model has" in " ".join(said.split())
    assert "no chat template" not in call("generate", folder, "good", "--chat", "--max-new-tokens", 2)


def test_prompts_are_written_as_in_training() -> None:
    from meft_kernels.programs.using.generate import Prompts

    from .training_files import CHAT, tokenizer

    words = tokenizer("llama")

    def written(layout: str | None, *prompt: str, chat: bool | None = None) -> str:
        return words.decode(Prompts(words, layout, chat).ids(*prompt))

    assert written("prompt", "good film") == written(None, "good film") == "good film"
    with pytest.raises(ValueError, match="no chat template"):
        written("messages", "good")
    assert "[UNK]" in written("instruction", "good")  # words of Alpaca's prompt, which this tokenizer does not know
    words.chat_template = CHAT
    asked = "user good </s> assistant"
    assert written("messages", "good") == written("conversations", "good") == asked
    assert written("instruction", "good") == asked and written("prompt", "good") == "good"
    assert written("instruction", "good", "film") == "user good film </s> assistant"
    assert written("prompt", "good", chat=True) == asked and written("messages", "good", chat=False) == "good"
