"""What is found of a model is what somebody wrote for its family, bit for bit: each serves what the other made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels import supported_model_types
from meft_kernels.architectures.found import find
from meft_kernels.patching import targets
from meft_kernels.patching.state import require_state

from ..models import StreamWitness
from .exactness import patched, step
from .written import FOUND, spec_of
from .zoo import batch_for, skip_reason, tiny

WHOLE = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
"""No layer is left out at random: each forward would leave out others."""

SETTINGS: list[dict[str, Any]] = [
    {"variant": "meft1"},
    {"variant": "meft2"},
    {"variant": "meft3"},
    {"variant": "meft2", "adapters": "none"},
    {"variant": "meft3", "adapters": "none", "tile": 3},
    {"variant": "meft3", "dtype": torch.bfloat16},
]


def by(spec: Any, name: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, **settings: Any) -> tuple[Any, Any]:
    """A model patched by this spec, dropout live, and what one step of it was: loss, gradients, streams."""
    monkeypatch.setattr(targets, "find_architecture", lambda model_type: spec)
    bits = 16 if dtype == torch.float32 else 10
    model = patched(tiny(name, dropout=0.1, **WHOLE).to(dtype), fraction_bits=bits, **settings).train()
    witnesses = StreamWitness.on_every_stack(model)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch_for(model).items()}
    loss, gradients = step(model, batch)
    return model, (loss, gradients, [witness.before for witness in witnesses])


@pytest.mark.parametrize("name", sorted((*supported_model_types(), *FOUND)))
def test_they_agree(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Streams, gradients, names, what is told of the model, files: with and without adapters, in 32 and 16 bits."""
    written = spec_of(name)
    found = find(tiny(name, dropout=0.1, **WHOLE))
    for settings in SETTINGS:
        settings = {"dtype": torch.float32, **settings}
        if skip_reason(name, settings["variant"]) is not None:
            continue
        model, (loss, gradients, streams) = by(written, name, monkeypatch, **settings)
        other, (found_loss, found_gradients, found_streams) = by(found, name, monkeypatch, **settings)
        assert found_loss == loss, settings
        assert found_gradients.keys() == gradients.keys()
        assert not [key for key in gradients if not torch.equal(found_gradients[key], gradients[key])], settings
        for one, another in zip(streams, found_streams, strict=True):
            assert one.keys() == another.keys()
            assert all(torch.equal(a, b) for i in one for a, b in zip(one[i], another[i], strict=True)), settings
        assert list(other.state_dict()) == list(model.state_dict())
        assert str(meft_kernels.describe(other)) == str(meft_kernels.describe(model))
        if settings["variant"] == "meft2" and "adapters" not in settings:
            _files_are_the_same(model, other, found, tmp_path, monkeypatch, name)


def _files_are_the_same(
    model: Any, other: Any, found: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stacks = [
        [(stack.name, stack.in_turn, stack.plan, stack.hidden_size) for stack in require_state(each).stacks]
        for each in (model, other)
    ]
    assert stacks[0] == stacks[1]
    StreamWitness.off(model)
    for each, place in ((model, "written"), (other, "found")):
        meft_kernels.save_adapter(each, folder / place)
    for file in sorted(path.name for path in (folder / "written").iterdir()):
        assert _content(folder / "written" / file) == _content(folder / "found" / file), file
    with torch.no_grad():
        expected = model.eval()(**batch_for(model))[0]
        for spec, place in ((found, "written"), (spec_of(name), "found")):
            monkeypatch.setattr(targets, "find_architecture", lambda model_type, spec=spec: spec)
            loaded = meft_kernels.load_adapter(tiny(name, dropout=0.1, **WHOLE), folder / place)
            assert torch.equal(loaded(**batch_for(loaded))[0], expected)


def _content(file: Path) -> Any:
    """All of it but what a found spec's file says of how it was found, which is for models that cannot be looked at."""
    if file.name != "adapter_config.json":
        return file.read_bytes()
    settings = json.loads(file.read_text(encoding="utf-8"))
    for each in settings["structure"]:
        each.pop("found", None)
    return settings
