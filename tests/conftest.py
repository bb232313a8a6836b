"""No network; one thread a worker: small tensors gain nothing from more, and workers would fight for the cores."""

import gc
import os

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
