"""What ``meft-kernels train`` makes of data as people have them, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from meft_kernels.programs.training import columns
from meft_kernels.programs.training.classes import class_table, told_of_data
from meft_kernels.programs.training.columns import check_file
from meft_kernels.programs.training.data import encode, load_rows
from meft_kernels.programs.training.metrics import Accuracy
from meft_kernels.programs.training.settings import DataSettings
from meft_kernels.programs.training.tokens import IGNORED, Encoder

from .test_train import home, options, run  # noqa: F401 (home is a fixture)
from .training_files import CHAT, tokenizer, write_rows

pytest.importorskip("datasets")


def rows_of(path: Path, task: Any = None, **settings: Any) -> Any:
    return load_rows(DataSettings(source=str(path), **settings), task)


def csv(folder: Path, text: str) -> Path:
    (folder / "a.csv").write_text(text, encoding="utf-8")
    return folder / "a.csv"


def chat_encoder(max_length: int = 40) -> Encoder:
    words = tokenizer("llama")
    words.chat_template = CHAT
    return Encoder(words, max_length=max_length)


def words_of(row: dict[str, Any]) -> tuple[str, str]:
    """All of a row, and what of it is learnt."""
    words = tokenizer("llama")
    return words.decode(row["input_ids"]), words.decode([token for token in row["labels"] if token != IGNORED])


@pytest.mark.parametrize(("who", "what"), [("from", "value"), ("role", "content")])
def test_conversations_of_sharegpt(who: str, what: str, tmp_path: Path) -> None:
    user, assistant = ("human", "gpt") if who == "from" else ("user", "assistant")
    made = [
        {"conversations": [{who: user, what: "hello"}, {who: assistant, what: "fine"}, {who: user, what: f"w{row}"}]}
        for row in range(12)
    ]
    rows = rows_of(write_rows(tmp_path / "a.jsonl", made))
    assert (rows.task, len(rows.train)) == ("causal-lm", 11)
    train, _, lost = encode(rows, chat_encoder())
    assert lost == 0 and all(words_of(row)[1] == "fine </s>" for row in train)
    renamed = write_rows(tmp_path / "b.jsonl", [{"talk": row["conversations"]} for row in made])
    assert rows_of(renamed, conversations="talk").train == rows.train


def test_instructions_of_alpaca(tmp_path: Path) -> None:
    """With a chat template a conversation, without one Alpaca's own prompt; an input may be empty."""
    made = [
        {"instruction": f"so w{row}", "input": "good film" if row % 2 else "", "output": "fine", "text": "all of it"}
        for row in range(12)
    ]
    rows = rows_of(write_rows(tmp_path / "a.jsonl", made), held_out=2)
    assert (rows.task, rows.incomplete, len(rows.train)) == ("causal-lm", 0, 10)
    train, _, _ = encode(rows, chat_encoder())
    for (instruction, given, _), row in zip(rows.train, train, strict=True):
        asked = f"{instruction} {given}".strip()
        assert words_of(row) == (f"user {asked} </s> assistant fine </s>", "fine </s>")
    plain = Encoder(tokenizer("llama"), max_length=80)
    train, _, _ = encode(rows, plain)
    assert all(words_of(row)[1] == "fine </s>" for row in train)
    without = [{key: row[key] for key in ("instruction", "output")} for row in made]
    rows = rows_of(write_rows(tmp_path / "b.jsonl", without), held_out=2)
    assert all(given == "" for _, given, _ in rows.train)


def test_alpacas_prompt_is_the_published_one() -> None:
    from meft_kernels.programs.training.conversations import instruction_prompt

    assert instruction_prompt("Add.", "1, 2", chat=False) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:"
    )
    assert instruction_prompt("Add.", "", chat=False).startswith("Below is an instruction that describes a task. Write")
    assert instruction_prompt("Add.", "1, 2", chat=True) == "Add.\n\n1, 2"


GOOD = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([{"role": "user", "content": None}], r"row 7: message 1 has no content"),
        ([*GOOD, {"role": None, "content": "so"}], r"row 7: message 3 says neither role nor from"),
        (
            [{"from": "human", "value": "so"}, {"from": "narrator", "value": "so"}],
            r"row 7: message 2 is from 'narrator'",
        ),
    ],
)
def test_a_bad_conversation_is_named_by_its_row(bad: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    turns = GOOD if "role" in bad[0] else [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "fine"}]
    made = [
        {"messages": [*turns, dict.fromkeys(turns[0], f"w{row}") | dict([*turns[0].items()][:1])]} for row in range(12)
    ]
    made[6] = {"messages": bad}
    with pytest.raises(ValueError, match=message):
        rows_of(write_rows(tmp_path / "a.jsonl", made))


def test_a_conversation_that_the_template_refuses_is_named_by_its_row(tmp_path: Path) -> None:
    made = [{"messages": [{"role": "user", "content": f"w{row}"}, *GOOD[1:]]} for row in range(30)]
    made[17]["messages"].reverse()
    encoder = chat_encoder()
    encoder.tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    )
    with pytest.raises(ValueError, match="row 18: the chat template of this model does not take a conversation: no"):
        encode(rows_of(write_rows(tmp_path / "a.jsonl", made)), encoder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 3 is no JSON"),
        ('"text"', "line 3 is no JSON object"),
        ('{"text": ["a"], "label": 1}', "text is list in line 3 and str in line 1"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        rows_of(path)


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_what_stands_between_columns_is_found(mark: str, tmp_path: Path) -> None:
    lines = [f"text{mark}label", *(f'"good; so, w{row}"{mark}{row % 2}' for row in range(12))]
    path = csv(tmp_path, "\n".join(lines) + "\n")
    check_file({"source": str(path)}, None)
    rows = rows_of(path)
    assert rows.classes == ("0", "1") and rows.train[0][0].startswith("good; so, w")


def test_classes_named_none_and_na_are_classes(tmp_path: Path) -> None:
    lines = [f"w{row},{('None', 'NA', 'null')[row % 3]}" for row in range(30)]
    rows = rows_of(csv(tmp_path, "\n".join(["text,label", *lines, "w30,", ",NA"]) + "\n"))
    assert rows.classes == ("NA", "None", "null") and rows.incomplete == 2
    lines = [f"w{row},{row % 3}" for row in range(30)]  # an empty field makes no text of numbers
    rows = rows_of(csv(tmp_path, "\n".join(["text,label", *lines, "w30,"]) + "\n"))
    assert rows.classes == ("0", "1", "2") and rows.incomplete == 1


def test_what_is_told_of_the_data(tmp_path: Path) -> None:
    classes = ("billing", "Billing", " billing ", "refund")
    made = [{"text": "good " * (row % 9) + f"w{row}", "label": classes[row % 4]} for row in range(40)]
    made += [{"text": "  ", "label": "refund"}, {"text": "w0", "label": "refund"}, {"text": "w0", "label": "billing"}]
    rows = rows_of(write_rows(tmp_path / "a.jsonl", made), held_out=8)
    encoder = Encoder(tokenizer("bert"), max_length=8)
    _, _, lost = encode(rows, encoder)
    told = told_of_data(rows, encoder, lost)
    assert told[0][0].startswith("4 classes, texts to train on + held out: ")
    counts = {name: sum(rows.classes[label] == name for _, label in rows.train) for name in classes}
    assert all(f"{name}: {counts[name]} + {10 - counts[name]}" in told[0][0] for name in classes)
    assert told[1] == (
        "' billing ', 'Billing', 'billing' are 3 classes, which differ in case or blanks alone: if they are one, make "
        "them one in the data",
        "yellow",
    )
    assert told[2][0] == "left out: rows with something empty: 1, whose text came before: 2"
    long = sum(len(text.split()) + 2 > 8 for text, _ in rows.train + rows.held_out)
    assert long > 0 and told[3][0] == f"cut off after max_length=8 tokens: {long} of 40 texts"
    few = rows_of(tmp_path / "a.jsonl", held_out=30, train_texts=1)
    assert any("no text to train on has the class" in line for line, _ in told_of_data(few, encoder, 0))


def test_nothing_is_told_where_there_is_nothing_to_tell(tmp_path: Path) -> None:
    rows = rows_of(write_rows(tmp_path / "a.jsonl", [{"text": f"w{row}"} for row in range(20)]))
    encoder = Encoder(tokenizer("llama"), max_length=8)
    assert told_of_data(rows, encoder, encode(rows, encoder)[2]) == []


def test_figures_of_each_class() -> None:
    measure = Accuracy(["no", "yes", "never"])
    found = measure(SimpleNamespace(predictions=np.array([0, 0, 1, 1, 1]), label_ids=np.array([0, 1, 1, 1, 0])))
    assert found == {"accuracy": 0.6}
    assert measure.by_class == [
        {"class": "no", "texts": 2, "precision": 0.5, "recall": 0.5},
        {"class": "yes", "texts": 3, "precision": 2 / 3, "recall": 2 / 3},
        {"class": "never", "texts": 0, "precision": None, "recall": None},
    ]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(class_table(measure.by_class))
    assert "66.7" in captured.get() and "never" in captured.get()


def test_a_run_says_and_writes_it(home: Path, tmp_path: Path) -> None:  # noqa: F811
    said = run(*options(home, "classification"), "--steps", 2, "--out", tmp_path / "out")
    assert "2 classes, texts to train on + held out: " in said and "precision" in said
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [each["class"] for each in figures["classes"]] == ["0", "1"]
    right = sum(each["recall"] * each["texts"] for each in figures["classes"])
    assert right / 8 == pytest.approx(figures["eval_accuracy"])


def test_columns_are_looked_at_until_they_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a late row has one of them; where none has, to the end."""
    read: list[str] = []
    monkeypatch.setattr(columns.json, "loads", lambda line, parse=json.loads: read.append(line) or parse(line))
    rows = [{"text": "a"}, {"text": "b", "label": 0}, *({"text": f"{number}"} for number in range(50))]
    path = write_rows(tmp_path / "a.jsonl", rows)
    columns.check_file({"source": str(path)}, None)
    assert len(read) == 1
    columns.check_file({"source": str(path)}, "classification")
    assert len(read) == 1 + 2
    with pytest.raises(ValueError, match="no column 'stars'; it has text, label"):
        columns.check_file({"source": str(path), "label": "stars"}, None)
    assert len(read) == 1 + 2 + 52
