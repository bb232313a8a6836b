"""``pytest benchmarks/``: throughput and memory by pytest-benchmark; ``--quick`` in under three minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from meft_kernels.comparison.records import device_name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes and few rounds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases are marked ``quick`` or ``full``: each run takes one kind."""
    other = "full" if config.getoption("--quick") else "quick"
    left_out = [item for item in items if item.get_closest_marker(other)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: for --quick alone")
    config.addinivalue_line("markers", "full: too long for --quick")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Callable[..., float]:
    """Times a call, the device's work included; returns its median in seconds. Further figures go along."""

    def run(call: Callable[[], object], *, group: str, **figures: Any) -> float:
        def waited() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.group = group
        benchmark.extra_info.update(device=device_name(device), torch=torch.__version__, **figures)
        rounds = 3 if request.config.getoption("--quick") else 10
        benchmark.pedantic(waited, rounds=rounds, warmup_rounds=1)
        # None with --benchmark-disable
        return float(benchmark.stats.stats.median) if benchmark.stats is not None else float("nan")

    run.extra_info = benchmark.extra_info  # type: ignore[attr-defined]
    return run
