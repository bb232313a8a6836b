"""What pytest is given beside a peer's tests: the hub on disk, which tests to run, and models that come patched.

Loaded by ``-p benchmarks.peers.plugin``, before the peer's own modules are: those import the functions replaced here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import PEERS, why_not
from .hub import DATA, load_zen, zen


class Patcher:
    """Patches every model of a supported family as soon as it is loaded, or wrapped by PEFT.

    ``adapters="none"``: what the test trains, a LoRA or all of the model, is trained reversibly.
    """

    def __init__(self) -> None:
        self.states: list[Any] = []

    def patched(self, model: Any) -> Any:
        """``model``, patched if one of our families serves it and its weights are there."""
        import meft_kernels
        from meft_kernels.errors import UnsupportedModelError
        from meft_kernels.patching.state import require_state

        with contextlib.suppress(UnsupportedModelError):
            meft_kernels.patch(model, adapters="none")
            self.states.append(require_state(model))
        return model

    def install(self) -> None:
        """Replace the functions that load and wrap."""
        import peft
        import transformers

        import meft_kernels

        def loaded(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found = load(*args, **kwargs)
            if isinstance(found, tuple):  # output_loading_info
                return (self.patched(found[0]), *found[1:])
            return self.patched(found)

        def wrapped(wrap: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
            """First wrapped, then patched, as the README says."""
            if is_patched(model):
                meft_kernels.unpatch(model)
            return self.patched(wrap(model, *args, **kwargs))

        _replace_classmethod(transformers.PreTrainedModel, "from_pretrained", loaded)
        _replace_classmethod(peft.PeftModel, "from_pretrained", wrapped)
        peft.get_peft_model = functools.partial(wrapped, peft.get_peft_model)

    def counts(self) -> dict[str, int]:
        """Models patched since last asked, and backward passes through them in which every stream was compared."""
        states = {id(state): state for state in self.states}.values()
        self.states.clear()
        return {
            "models": len(states),
            "passes": sum(stack.counts.checked for state in states for stack in state.stacks),
        }


def is_patched(model: Any) -> bool:
    from meft_kernels.patching.state import find_state

    return find_state(model) is not None


def _replace_classmethod(owner: type, name: str, by: Callable[..., Any]) -> None:
    original = vars(owner)[name].__func__

    @functools.wraps(original)
    def replaced(cls: type, *args: Any, **kwargs: Any) -> Any:
        return by(functools.partial(original, cls), *args, **kwargs)

    setattr(owner, name, classmethod(replaced))


class Plugin:
    """One run of one peer's tests."""

    def __init__(self, peer: str, patch: bool, out: Path, checkout: Path) -> None:
        self.peer = PEERS[peer]
        self.patcher = Patcher() if patch else None
        self.out = out
        self.found: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, int] = {}
        if self.patcher is not None:
            self.patcher.install()
        if peer == "peft":
            _diffusers_in_name()
        if peer == "trl":
            _serve_zen(checkout)
        if peer == "accelerate":
            _run_examples_here()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.peer.name == "peft":
            _stay_offline()
        chosen = []
        for item in items:
            if (reason := why_not(item, self.peer)) is None:
                chosen.append(item)
            else:
                self.left_out[reason] = self.left_out.get(reason, 0) + 1
        items[:] = chosen

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.found.setdefault(report.nodeid, {"outcome": "passed", "why": "", "models": 0, "passes": 0})
        if report.outcome != "passed":
            test["outcome"] = "failed" if report.failed else "skipped"
            test["why"] = _last_line(report)
        if report.when == "call" and self.patcher is not None:
            test.update(self.patcher.counts())

    def pytest_sessionfinish(self) -> None:
        self.out.write_text(json.dumps({"tests": self.found, "left_out": self.left_out}, indent=1))


def _last_line(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[:500]


def _diffusers_in_name() -> None:
    """PEFT's common tests import a class of diffusers, which none of the chosen ones uses."""
    if importlib.util.find_spec("diffusers") is None:
        diffusers = types.ModuleType("diffusers")
        diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = diffusers


def _stay_offline() -> None:
    """PEFT's tests go online for whatever they have not met yet."""

    class Met(dict[str, int]):
        def __contains__(self, _: object) -> bool:
            return True

        def __missing__(self, _: str) -> int:
            return 0

    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = Met()  # type: ignore[attr-defined]
    if sys.modules["diffusers"].__spec__ is None:  # made here, and no longer needed: whoever looks for it finds none
        del sys.modules["diffusers"]


def _serve_zen(checkout: Path) -> None:
    import datasets

    found = zen(checkout)
    original = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        return load_zen(found, *args, **kwargs) if path == DATA else original(path, *args, **kwargs)

    datasets.load_dataset = load_dataset


def _run_examples_here() -> None:
    """accelerate's examples, which its tests launch each in two processes of its own, run in this one.

    The metric that they load from the hub is a plain accuracy.
    """
    import accelerate.test_utils.testing as testing
    from accelerate.state import AcceleratorState

    class Accuracy:
        def __init__(self) -> None:
            self.right: list[bool] = []

        def add_batch(self, predictions: Any, references: Any) -> None:
            self.right += (predictions == references).tolist()

        def compute(self) -> dict[str, float]:
            return {"accuracy": sum(self.right) / len(self.right)}

    evaluate = types.ModuleType("evaluate")
    evaluate.load = lambda *_: Accuracy()  # type: ignore[attr-defined]
    sys.modules["evaluate"] = evaluate

    def run_command(command: list[Any], return_stdout: bool = False, env: object = None) -> str | None:
        words = [str(word) for word in command]
        script = next(index for index, word in enumerate(words) if word.endswith(".py"))
        printed = io.StringIO()
        arguments, sys.argv = sys.argv, words[script:]
        try:
            with contextlib.redirect_stdout(printed):
                runpy.run_path(words[script], run_name="__main__")
        finally:
            sys.argv = arguments
            AcceleratorState._reset_state(True)
        return printed.getvalue() if return_stdout else None

    testing.run_command = run_command


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peer", choices=list(PEERS))
    parser.addoption("--patch", action="store_true")
    parser.addoption("--outcomes", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    config.pluginmanager.register(Plugin(options.peer, options.patch, options.outcomes, Path(os.getcwd())))
