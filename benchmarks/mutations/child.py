"""One case in a process of its own: pytest on a changed copy of the package."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENDED_WELL, FAILED, DIED = 0, 1, -1
"""pytest's exit statuses, and one that it has not; all others mean that it could not run the tests."""


class _FirstFailure:
    """A plugin of pytest's that keeps the name of the test that failed."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid


def run_tests(folder: Path, tests: tuple[str, ...], interpreted: bool, log: Path, answer: Any) -> None:
    """In a process of its own: run ``tests`` on the copy; sends pytest's exit status and the test that failed."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    import pytest
    import torch

    torch.set_num_threads(1)
    seen = _FirstFailure()
    arguments = [f"tests/{test}" if test.endswith(".py") else test for test in tests]
    quiet = ["-x", "-q", "-p", "no:cacheprovider", "-c", str(folder / "pyproject.toml"), f"--rootdir={folder}"]
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = int(pytest.main([*arguments, *quiet, "-W", "ignore::RuntimeWarning"], plugins=[seen]))
    import meft_kernels

    assert Path(meft_kernels.__file__).is_relative_to(folder), "another copy of the package was imported"
    answer.send((status, seen.name))
