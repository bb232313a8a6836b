"""Adapter files from anybody: whatever is in them, a clear error or a whole adapter, and no code of theirs runs."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import meft_kernels
from meft_kernels import MeftError
from meft_kernels.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME
from meft_kernels.patching.state import find_state

from .models import TRAINABLE_START, tiny_bert

FUZZ = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NASTY = [
    None, True, False, 0, -1, 1, 10**9, 10**400, -(10**30), 0.5, float("nan"), float("inf"), 1e-320, "", "x",
    "../../etc/passwd", "/abs/x", "__import__('os').abort()", "\x00", "\ud800", "a" * 10_000, [], [[]], ["x"], [None],
    {}, {"": ""}, {"a": {"b": []}}, ["classifier"], ["", "bert"], ["bert.encoder.layer.0"],
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    meft_kernels.save_adapter(meft_kernels.patch(tiny_bert(), **TRAINABLE_START), folder)
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_bert()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def fresh(saved: Path, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    return json.loads((folder / CONFIG_NAME).read_text())


def load(model: Any, folder: Path) -> bool:
    """Whether it loaded; if not, the model must be what it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    try:
        meft_kernels.load_adapter(model, folder)
    except MeftError:
        loaded = False
    else:
        loaded = True
        assert all(torch.isfinite(p).all() for p in model.parameters())
        heads = {name: before[name] for name in before if name.startswith(("classifier", "bert.pooler"))}
        meft_kernels.unpatch(model)
        model.load_state_dict(heads, strict=False)
    assert find_state(model) is None
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [p.requires_grad for p in model.parameters()] == required
    return loaded


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(2, len(value))):
            yield from places(value[index], (*path, index))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


def test_unharmed(saved: Path, model: Any, folder: Path) -> None:
    fresh(saved, folder)
    assert load(model, folder)


def test_nasty_values_everywhere(saved: Path, model: Any, folder: Path) -> None:
    """Every value of the config replaced by every nasty one."""
    description = fresh(saved, folder)
    few = dict(list(description["base_fingerprint"].items())[:2])
    description["base_fingerprint"] = few
    loaded = 0
    for path in places(description):
        for value in NASTY:
            text = json.dumps(put(description, path, value))
            (folder / CONFIG_NAME).write_text(text)
            loaded += load(model, folder)
    assert loaded  # some replace what may be anything, such as the library's version


@FUZZ
@given(data=st.data())
def test_harmed_bytes(saved: Path, model: Any, folder: Path, data: st.DataObject) -> None:
    fresh(saved, folder)
    path = folder / data.draw(st.sampled_from([CONFIG_NAME, WEIGHTS_NAME]))
    content = bytearray(path.read_bytes())
    if path.name == WEIGHTS_NAME and data.draw(st.booleans()):
        end = 8 + int.from_bytes(content[:8], "little")  # in the head, where it matters
    else:
        end = len(content)
    start = data.draw(st.integers(0, end - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "remove"]))
    if kind == "cut":
        del content[start:]
    elif kind == "flip":
        content[start] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "insert":
        content[start:start] = data.draw(st.binary(min_size=1, max_size=20))
    else:
        del content[start : start + data.draw(st.integers(1, 20))]
    path.write_bytes(bytes(content))
    load(model, folder)


@pytest.mark.parametrize(
    "name", ["../../x", "/abs/x", "..\\x", "bert.encoder.layer.9.meft.ffn.up.weight", "", "classifier"]
)
def test_other_names_of_tensors(name: str, saved: Path, model: Any, folder: Path) -> None:
    fresh(saved, folder)
    tensors = load_file(folder / WEIGHTS_NAME)
    for key in list(tensors)[:3]:
        save_file({name if k == key else k: tensor for k, tensor in tensors.items()}, folder / WEIGHTS_NAME)
        assert not load(model, folder)
    save_file({**tensors, name: torch.zeros(1)}, folder / WEIGHTS_NAME)
    assert not load(model, folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes(dtype: torch.dtype, saved: Path, model: Any, folder: Path) -> None:
    fresh(saved, folder)
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, folder / WEIGHTS_NAME)
    assert not load(model, folder)


class Runs:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["in the place of safetensors", "beside", "torch", "config"])
def test_pickles_never_run(kind: str, saved: Path, model: Any, folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Runs(ran)))
    assert ran.exists()  # it would
    ran.unlink()
    fresh(saved, folder)
    if kind == "torch":
        torch.save({"x": Runs(ran)}, folder / WEIGHTS_NAME)
    elif kind == "config":
        (folder / CONFIG_NAME).write_bytes(pickle.dumps(Runs(ran)))
    elif kind == "beside":
        (folder / WEIGHTS_NAME).unlink()
        for name in ("adapter_model.bin", "pytorch_model.bin", "model.pt"):
            torch.save({"x": Runs(ran)}, folder / name)
    else:
        (folder / WEIGHTS_NAME).write_bytes(pickle.dumps(Runs(ran)))
    assert not load(model, folder)
    assert not ran.exists()


def test_folders_that_are_none(model: Any, tmp_path: Path, saved: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folders" / CONFIG_NAME).mkdir(parents=True)
    for name in ("file", "empty", "folders", "nowhere", "\x00"):
        assert not load(model, tmp_path / name)
    shutil.copytree(saved, tmp_path / "weights")
    (tmp_path / "weights" / WEIGHTS_NAME).unlink()
    (tmp_path / "weights" / WEIGHTS_NAME).mkdir()
    assert not load(model, tmp_path / "weights")
