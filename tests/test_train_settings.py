"""Settings and data of ``meft-kernels train``: what is said where they are wrong, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from meft_kernels import MeftConfig
from meft_kernels.programs.cli import app
from meft_kernels.programs.training.data import encode, load_rows
from meft_kernels.programs.training.settings import HARMLESS, DataSettings, check_given, differences, merge, resolve
from meft_kernels.programs.training.tokens import IGNORED, Encoder
from meft_kernels.programs.training.yaml_file import read_yaml, write_yaml

from .training_files import CHAT, tokenizer, write_rows

for package in ("accelerate", "datasets", "yaml"):
    pytest.importorskip(package)


def yaml(folder: Path, text: str) -> Path:
    (folder / "settings.yaml").write_text(text, encoding="utf-8")
    return folder / "settings.yaml"


def test_numbers_and_words_are_what_people_mean(tmp_path: Path) -> None:
    text = "training: {learning_rate: 1e-3, warmup_steps: .1, max_steps: 20, eval_strategy: no, bf16: false, x: 1_e}\n"
    found = read_yaml(yaml(tmp_path, text))["training"]
    assert found == {
        "learning_rate": 1e-3, "warmup_steps": 0.1, "max_steps": 20, "eval_strategy": "no", "bf16": False, "x": "1_e"
    }  # fmt: skip
    assert type(found["max_steps"]) is int
    assert read_yaml(yaml(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("traning: {}", "no setting 'traning': did you mean training?"),
        ("training: {learning_rte: 1e-3}", "no setting 'learning_rte': did you mean learning_rate?"),
        ("meft: {ranks: 4}", "section meft: there is no setting 'ranks': did you mean rank?"),
        ("data: {txt: body}", "did you mean text?"),
        ("data: {zzz: body}", "Known are completion, conversations,"),
        ("training: {output_dir: x}", "training.output_dir cannot be set: it is --out"),
        ("training: {save_only_model: true}", "cannot be resumed"),
        ("training: {learning_rate: fast}", "training.learning_rate is float, not 'fast'"),
        ("training: {bf16: yes}", "training.bf16 is bool, not 'yes'"),
        ("training: {max_steps: 1.5}", "training.max_steps is int, not 1.5"),
        ("training: {eval_strategy: often}", "training: often is not a valid IntervalStrategy"),
        ("training: {report_to: wandb}", "training: WandbCallback requires wandb"),
        ("training: 7", "training is a section of settings, not 7"),
        ("meft: {rank: 0}", "rank must be an integer >= 1"),
        ("meft: {adapters: none}", "leaves nothing to train"),
        ("task: translation", "task is one of classification, causal-lm"),
        ("dtype: int8", "dtype is one of float32, bfloat16, float16"),
        ("data: {held_out: 1.5}", "a share between 0 and 1"),
        ("data: {held_out: 0}", "a share between 0 and 1"),
        ("data: {max_length: long}", "data.max_length is int"),
        ("data: {max_length: 1000}", "this model has 512 positions"),
        ("data: {packing: true}", "data.packing is for causal-lm"),
        ("model: [a, b]", "model is a name"),
        ("meft: {rank: 4}\nmeft: {rank: 8}", "'meft' is given twice"),
        ("a: [", "is no valid YAML"),
        ("- a\n- b", "holds no settings"),
        ("meft: {rank: !!python/object/apply:os.getcwd []}", "is no valid YAML"),
    ],
)
def test_settings_that_are_wrong(text: str, message: str, tmp_path: Path, bert: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"good w{i}", "label": i % 2} for i in range(20)])
    given = ["--model", bert, "--data", data, "--config", yaml(tmp_path, text), "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, ["train", *map(str, given)])
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.glob("out/*"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .training_files import save_models

    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder / "bert"


def test_what_is_missing_is_named(tmp_path: Path, bert: Path) -> None:
    def said(*given: Any) -> str:
        result = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "out"), *map(str, given)])
        assert result.exit_code == 2, result.exception
        return " ".join(result.output.split())

    assert "--model is missing" in said("--data", "imdb")
    assert "--data is missing" in said("--model", bert)
    assert "no model '/no/such'" in said("--model", "/no/such", "--data", "imdb")
    assert "cannot be read: No such file" in said("--config", tmp_path / "none.yaml")
    rows = write_rows(tmp_path / "texts.jsonl", [{"text": f"good w{i}"} for i in range(20)])
    assert "is no causal language model (BertForSequenceClassification)" in said("--model", bert, "--data", rows)
    assert "a share below 1, not 1.5" in said("--model", bert, "--data", rows, "--held-out", "1.5")


def test_one_process_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["train", "--model", "a", "--data", "b", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "trains in one process" in result.output


def test_missing_packages_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from meft_kernels import packages

    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["train", "--model", "a", "--data", "b", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "'accelerate'" in result.output
    assert 'pip install "meft_kernels[train]"' in " ".join(result.output.split())


def test_later_layers_win_and_what_is_left_open_has_defaults(tmp_path: Path) -> None:
    file = check_given({"model": "a", "data": "imdb", "meft": {"rank": 4, "variant": "meft1"}}, "file")
    flags = {"data": {"max_length": 64}, "meft": {"rank": 8}, "training": {"seed": 3}}
    made = resolve(check_given(merge(file, flags), "flags"), "classification", encoder=True)
    assert made.meft == MeftConfig(rank=8, variant="meft1", down_init_std=0.05)
    assert (made.data.source, made.data.max_length) == ("imdb", 64)
    assert made.training["seed"] == 3 and made.training["learning_rate"] == 1e-3
    assert resolve(file, "causal-lm", encoder=False).meft.down_init_std == MeftConfig().down_init_std
    write_yaml(tmp_path / "s.yaml", made.plain(), "all")
    again = resolve(check_given(read_yaml(tmp_path / "s.yaml"), "s"), "classification", encoder=True)
    assert again == made and differences(again, made) == []


def test_harmless_settings_exist() -> None:
    known = resolve({"model": "a", "data": {}, "meft": {}, "training": {}}, "causal-lm", encoder=False).plain()
    from transformers import TrainingArguments

    for name in HARMLESS:
        section, _, key = name.rpartition(".")
        there = known[section] if section else known
        assert key in there or (section == "training" and key in TrainingArguments.__dataclass_fields__), name


def rows_of(path: Path, task: Any = None, **settings: Any) -> Any:
    return load_rows(DataSettings(source=str(path), **settings), task)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.jsonl", "\n\n", "cannot be read|has no rows"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text":', "cannot be read"),
        ("a.csv", "review,label\na,0\nb,1\n", "has the columns review, label; wanted is messages or"),
        ("a.csv", "text,label\na,0\nb,0\nc,0\n", "only one class: 0"),
        ("a.csv", "text,label\n1,0\n2,1\n3,0\n", "the column text holds int64, not text"),
        ("a.csv", "text,label\na,0.5\nb,1.5\nc,0.5\n", "numbers, not classes"),
        ("a.csv", "text,label\n" + "".join(f"t{i},l{i}\n" for i in range(30)), "30 classes in 30 rows"),
        ("a.csv", "text,label\na,0\n", "has 1 different rows, too few to hold out 1"),
        ("a.csv", "text,label\n,0\n,1\n", "holds (null|float64), not text"),
        ("a.jsonl", '{"text": ["a"], "label": 0}\n' * 3, "the column text holds List, not text"),
        ("a.jsonl", '{"text": "a", "label": [0]}\n' * 3, "has only|too few|a class is a number or a name"),
        ("a.jsonl", '{"messages": "hello"}\n' * 3, "the column messages holds string, not lists of messages"),
    ],
)
def test_data_that_cannot_serve(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / name)


def test_a_mistyped_column_makes_no_other_task_of_the_data(tmp_path: Path) -> None:
    """Without the label, texts would be left, to train a language model on."""
    rows = tmp_path / "a.csv"
    rows.write_text("review,stars\na,0\nb,1\nc,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.label: .* has no column 'star'; it has review, stars"):
        rows_of(rows, text="review", label="star")
    assert rows_of(rows, text="review", label="stars").task == "classification"
    assert rows_of(rows, "causal-lm", text="review", label="star").task == "causal-lm"  # asked for: no label is needed


@pytest.mark.parametrize("name", ["amazon", "missing.csv", "rows.parquet", "a/b/c"])
def test_names_that_are_no_data(name: str) -> None:
    with pytest.raises(ValueError, match=r"imdb|there is no file"):
        rows_of(Path(name))


def test_the_columns_decide_the_task(tmp_path: Path) -> None:
    line = {"text": "a", "label": "x", "prompt": "p", "completion": "c"}
    for columns, task in (
        (("text", "label"), "classification"),
        (("text",), "causal-lm"),
        (("prompt", "completion"), "causal-lm"),
    ):
        made = [{name: f"{line[name]}{row % 2 if name == 'label' else row}" for name in columns} for row in range(20)]
        rows = rows_of(write_rows(tmp_path / f"{len(columns)}{task}.jsonl", made))
        assert (rows.task, rows.layout.needed) == (task, columns)
    labelled = tmp_path / "2classification.jsonl"
    assert rows_of(labelled, "causal-lm").layout.needed == ("text",)
    with pytest.raises(ValueError, match="wanted for classification is text and label"):
        rows_of(tmp_path / "1causal-lm.jsonl", "classification")
    made = [{"body": f"a{row}", "stars": row % 3} for row in range(20)]
    assert rows_of(write_rows(tmp_path / "o.jsonl", made), text="body", label="stars").classes == ("0", "1", "2")


def test_the_split_is_kept_and_shares_nothing(tmp_path: Path) -> None:
    made = [{"text": f"w{row}", "label": ("no", "yes")[row % 2]} for row in range(40)]
    path = write_rows(tmp_path / "a.jsonl", [*made, {"text": "w1", "label": "no"}, {"text": None, "label": "no"}])
    rows = rows_of(path)
    assert rows.classes == ("no", "yes") and (rows.incomplete, rows.repeated) == (1, 1)
    assert (len(rows.train), len(rows.held_out)) == (36, 4)
    assert not {text for text, _ in rows.train} & {text for text, _ in rows.held_out}
    assert all(int(text[1:]) % 2 == label for text, label in rows.train + rows.held_out)
    assert rows == rows_of(path) and rows.fingerprint() == rows_of(path).fingerprint()
    assert rows.fingerprint() != rows_of(path, split_seed=1).fingerprint()
    assert len(rows_of(path, held_out=0.5).held_out) == 20
    few = rows_of(path, train_texts=5, held_out=7)
    assert (len(few.train), len(few.held_out)) == (5, 7)
    with pytest.raises(ValueError, match="fewer than the 39 asked for"):
        rows_of(path, train_texts=39)


def test_folders_of_datasets_with_and_without_parts(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})

    def made(start: int, rows: int = 12) -> Any:
        values = {"text": [f"w{start + i}" for i in range(rows)], "label": [i % 2 for i in range(rows)]}
        return datasets.Dataset.from_dict(values, features=features)

    made(0).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made(0), test=made(50), extra=made(70)).save_to_disk(tmp_path / "parts")
    one, parts = rows_of(tmp_path / "one"), rows_of(tmp_path / "parts")
    assert one.classes == parts.classes == ("no", "yes")
    assert (len(one.train), len(one.held_out)) == (11, 1)
    assert (len(parts.train), len(parts.held_out)) == (12, 12)
    assert {text for text, _ in parts.held_out} == {f"w{50 + i}" for i in range(12)}
    few = rows_of(tmp_path / "parts", held_out_split="extra", held_out=3).held_out
    assert len(few) == 3 and [text for text, _ in few] != ["w70", "w71", "w72"]  # drawn
    with pytest.raises(ValueError, match="a number of its texts, not a share"):
        rows_of(tmp_path / "parts", held_out=0.5)
    with pytest.raises(ValueError, match="has no part 'dev'; it has train, test, extra"):
        rows_of(tmp_path / "parts", split="dev")
    with pytest.raises(ValueError, match="has no parts"):
        rows_of(tmp_path / "one", split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        rows_of(tmp_path / "empty")


def learnt(encoded: dict[str, Any] | None) -> tuple[str, str]:
    """All tokens, and those with a label, as words."""
    assert encoded is not None
    words = tokenizer("llama")
    wanted = [token for token in encoded["labels"] if token != IGNORED]
    assert all(label in (IGNORED, token) for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True))
    return words.decode(encoded["input_ids"]), words.decode(wanted)


def test_which_tokens_are_learnt() -> None:
    encoder = Encoder(tokenizer("llama"), max_length=10)
    assert learnt(encoder.text(("good film",))) == ("good film </s>", "good film </s>")
    assert learnt(encoder.completion(("good film", "so fine"))) == ("good film so fine </s>", "so fine </s>")
    assert learnt(encoder.completion(("good " * 8, "so fine"))) == ("good " * 8 + "so fine", "so fine")
    assert encoder.completion(("good " * 10, "so fine")) is None
    assert encoder.text(("",)) is None
    labelled = Encoder(tokenizer("bert"), max_length=4).labelled(("good film so fine", 1))
    assert labelled is not None and labelled["input_ids"][0] == 2 and labelled["input_ids"][-1] == 3
    assert len(labelled["input_ids"]) == 4 and labelled["labels"] == 1


def test_the_assistants_turns_are_learnt() -> None:
    words = tokenizer("llama")
    turns = [("user", "hello"), ("assistant", "good film"), ("user", "so"), ("assistant", "fine")]
    messages = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(ValueError, match="has no chat template"):
        Encoder(words, max_length=20).conversation((messages,))
    words.chat_template = CHAT
    whole = "user hello </s> assistant good film </s> user so </s> assistant fine </s>"
    assert learnt(Encoder(words, max_length=20).conversation((messages,))) == (whole, "good film </s> fine </s>")
    words.chat_template = "{{ 'good' if messages | length > 2 else 'bad' }} " + CHAT
    with pytest.raises(ValueError, match="beginning otherwise when more follows"):
        Encoder(words, max_length=20).conversation((messages,))
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="does not take a conversation: roles must alternate"):
        Encoder(words, max_length=20).conversation((messages,))


def test_conversations_from_a_file(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]
    made = [{"messages": [*turns, {"role": "user", "content": f"w{row}"}]} for row in range(12)]
    words = tokenizer("llama")
    words.chat_template = CHAT
    rows = rows_of(write_rows(tmp_path / "a.jsonl", made))
    train, held_out, lost = encode(rows, Encoder(words, max_length=20))
    assert (len(train), len(held_out), lost) == (11, 1, 0)
    assert all(learnt(row)[1] == "fine </s>" for row in train)
    with pytest.raises(ValueError, match="no train text has tokens to learn"):
        encode(rows, Encoder(words, max_length=3))
