"""Break the engine on purpose, one place at a time: does a test notice?

``python -m benchmarks.mutations`` takes some ten minutes on one core, writes ``benchmarks/results/mutations.md``, and
exits with 1 if anything that is broken goes unnoticed. ``--only TEXT`` runs those whose description has it, and writes
nothing.

The package and its tests are copied, the copy is changed, and the few tests named for the case run on it in a process
of their own. A test that is said to notice must pass on the package as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .cases import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "mutations.md"
TIMEOUT = 240
"""Seconds; a case that hangs is noticed, too."""
PRELOADED = ["torch", "pytest", "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert"]
"""Imported once, before a process is forked for each case."""

_ENDED_WELL, _FAILED = 0, 1


class _FirstFailure:
    """A plugin of pytest's that keeps the name of the test that failed."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid


def _run_tests(folder: Path, tests: tuple[str, ...], interpreted: bool, log: Path, answer: Any) -> None:
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


def _tests_on(folder: Path, tests: tuple[str, ...], interpreted: bool) -> tuple[int, str | None]:
    """Exit status of pytest and the test that failed; ``(1, "no end")`` where it hangs, or the process dies.

    Raises:
        SystemExit: pytest ran no tests, or could not import them.
    """
    context = multiprocessing.get_context("forkserver")
    receiving, sending = context.Pipe(duplex=False)
    log = folder / "log.txt"
    process = context.Process(target=_run_tests, args=(folder, tests, interpreted, log, sending))
    process.start()
    sending.close()
    found: tuple[int, str | None] = (_FAILED, "no end")
    with contextlib.suppress(EOFError):
        if receiving.poll(TIMEOUT):
            found = receiving.recv()
    process.kill()
    process.join()
    if found[0] not in (_ENDED_WELL, _FAILED):
        raise SystemExit(f"pytest ended with {found[0]} on {' '.join(tests)}:\n{log.read_text()[-4000:]}")
    return found


def _copy(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for part in ("meft_kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


def changed(mutation: Mutation, root: Path = ROOT) -> str:
    """The file's text with the mutation.

    Raises:
        SystemExit: it does not occur exactly once.
    """
    text = (root / "meft_kernels" / mutation.path).read_text(encoding="utf-8")
    if (times := text.count(mutation.old)) != 1:
        raise SystemExit(f"{mutation.broken}: {mutation.old!r} occurs {times} times in {mutation.path}, not once")
    return text.replace(mutation.old, mutation.new)


def noticed_by(mutation: Mutation, whole: Path) -> str | None:
    """The test that notices, None if none does.

    Raises:
        SystemExit: the test fails on the package as it is, too.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        _copy(folder)
        (folder / "meft_kernels" / mutation.path).write_text(changed(mutation), encoding="utf-8")
        status, test = _tests_on(folder, mutation.tests, mutation.interpreted)
    if status == _ENDED_WELL or test is None:
        return None
    if test.startswith("tests/") and _tests_on(whole, (test,), mutation.interpreted)[0] != _ENDED_WELL:
        raise SystemExit(f"{test} fails on the package as it is")
    return test


def _table(rows: list[tuple[Mutation, str | None]]) -> str:
    lines = [
        "# What notices when the engine is broken",
        "",
        "`python -m benchmarks.mutations`; each line is one change of the source, made alone, and the first test of",
        "those named for it that failed.",
        "",
        "| broken | where | noticed by |",
        "| --- | --- | --- |",
    ]
    for mutation, test in rows:
        name = "**nobody**" if test is None else f"`{test.removeprefix('tests/')}`"
        lines.append(f"| {mutation.broken} | `{mutation.path}` | {name.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit status is 1 if any goes unnoticed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutations", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="those whose description has it; no table is written")
    options = parser.parse_args(arguments)
    chosen = [mutation for mutation in MUTATIONS if options.only is None or options.only in mutation.broken]
    for mutation in chosen:
        changed(mutation)  # all of them fit, or none runs
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name).resolve()
        _copy(whole)
        for mutation in chosen:
            start = time.perf_counter()
            rows.append((mutation, noticed_by(mutation, whole)))
            seconds = time.perf_counter() - start
            print(f"{seconds:5.0f} s  {mutation.broken}: {rows[-1][1] or 'UNNOTICED'}", flush=True)
    if options.only is None:
        RESULTS.write_text(_table(rows), encoding="utf-8")
    unnoticed = sum(test is None for _, test in rows)
    print(f"{len(rows)} ways to break it, {unnoticed} unnoticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
