"""The command line, run in this process on MiniLM."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import meft_kernels

typer_testing = pytest.importorskip("typer.testing")

from meft_kernels.programs.cli import app  # noqa: E402

# PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SMALL = ["--steps", "3", "--batch-size", "4", "--held-out", "24", "--train-texts", "48", "--max-length", "24"]


def run(*arguments):
    return typer_testing.CliRunner().invoke(app, list(arguments))


def test_the_library_alone_imports_none_of_the_demo():
    code = (
        "import sys, meft_kernels.memory\n"
        "for name in {*meft_kernels.__all__} - {'MeftCallback', 'Plan', 'plan'}: getattr(meft_kernels, name)\n"
        "print([name for name in ('typer', 'rich', 'datasets', 'peft', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_only_reads_its_options_answers_without_torch(tmp_path):
    (tmp_path / "a.csv").write_text("review,label\na,0\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "stars": 1}\n')
    commands = [["--help"], ["--version"], ["models"], ["train", "--help"]]
    if torch.version.cuda is None and torch.version.hip is None:
        commands.append(["env"])
    wrong = [["--data", "a.csv"], ["--data", "a.jsonl", "--task", "classification"]]
    commands += [["train", "--model", "minilm", "--out", "out", *each] for each in wrong]
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from meft_kernels.programs.cli import app\n"
        f"for command in {commands}:\n"
        "    done = CliRunner().invoke(app, command)\n"
        "    assert done.exit_code == (2 if '--model' in command else 0), done.output\n"
        "    assert '--model' not in command or 'the columns' in done.output, done.output\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_every_public_name_is_where_it_is_said_to_be():
    places = {name for names in meft_kernels._PLACES.values() for name in names}
    assert {*places, "ops"} == set(meft_kernels.__all__)
    assert all(getattr(meft_kernels, name) is not None for name in meft_kernels.__all__)
    assert set(meft_kernels.__all__) <= set(dir(meft_kernels))
    with pytest.raises(AttributeError, match="no attribute 'pacth'"):
        meft_kernels.pacth  # noqa: B018


def test_version():
    import importlib.metadata

    assert run("--version").output.strip() == importlib.metadata.version("meft_kernels") == meft_kernels.__version__


def test_one_version_everywhere():
    root = Path(__file__).parents[1]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{version}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_env_lists_versions():
    result = run("env")
    assert result.exit_code == 0, result.output
    for word in ("python", "torch", "transformers", "triton", "coupling kernels"):
        assert word in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--data", "amazon"), "rotten_tomatoes, imdb"),
        (("demo", "--model", "no/such-model"), "no model 'no/such-model'"),
        (("demo", "--model", "missing.gguf"), "no file missing.gguf"),
        (("demo", "--variant", "meft9"), "variant must be one of"),
        (("demo", "--rank", "0"), "rank"),
        (("demo", "--compare", "--methods", "meft,qlora"), "qlora is none of"),
        (("demo", "--methods", "lora"), "--methods goes with --compare"),
        (("demo", "--dtype", "int4"), "float32, bfloat16, float16"),
        (("demo", "--held-out", "100000"), "fewer than the 100001"),
        (("verify", "--lam", "0.3"), "the nearest is"),
        (("verify", "--paper", "--variant", "meft9"), "variant must be one of"),
    ],
)
def test_what_the_user_can_put_right_is_said_without_a_traceback(arguments, message, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_demo_trains_saves_and_loads_back(tmp_path):
    pytest.importorskip("datasets")
    out = tmp_path / "out"
    result = run("demo", "--out", str(out), *SMALL)
    assert result.exit_code == 0, result.output
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert not (out / "comparison.png").exists()
    (outcome,) = json.loads((out / "results.json").read_text())["outcomes"]
    assert outcome["bit_exact"] is True and outcome["same_after_reload"] is True
    assert outcome["gradient_error"] <= 1e-5
    assert len(outcome["losses"]) == 3 and outcome["kept_bytes"] < outcome["peak_bytes"]
    assert "yes, every bit" in result.output
    assert "too short to mean anything: 3 steps of 4 (200 of 16 are usual)" in " ".join(result.output.split())
    assert re.search(r"^MEFT.*: step 1/\d+, loss \d", result.output, re.MULTILINE)  # no terminal: lines


def test_the_comparison_trains_all_methods_over_the_seeds(tmp_path):
    for package in ("datasets", "peft", "matplotlib"):
        pytest.importorskip(package)
    result = run("demo", "--compare", "--seeds", "2", "--out", str(tmp_path), *SMALL)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    outcomes = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    assert [(o["method"], o["seed"]) for o in outcomes] == [
        (method, seed) for seed in (0, 1) for method in ("meft", "lora", "lora_checkpointing")
    ]
    meft, lora, checkpointing = outcomes[:3]
    assert meft["kept_bytes"] < checkpointing["kept_bytes"] < lora["kept_bytes"]
    assert abs(meft["trainable"] / lora["trainable"] - 1) < 0.05
    assert lora["losses"] == pytest.approx(checkpointing["losses"], rel=1e-4)  # the same training, recomputed
    assert "±" in result.output


def test_verify_says_exact_and_exits_accordingly():
    pytest.importorskip("datasets")
    exact = run("verify", "--batch-size", "2", "--max-length", "32")
    assert exact.exit_code == 0, exact.output
    assert "gradient" in exact.output
    paper = run("verify", "--paper", "--batch-size", "2", "--max-length", "32")
    assert paper.exit_code == 1, paper.output  # the paper's float streams do not come back bit for bit
