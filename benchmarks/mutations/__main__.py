"""Break the engine on purpose, one place at a time: does a test notice?

``python -m benchmarks.mutations`` takes some ten minutes on one core, writes ``benchmarks/results/mutations.md``, and
exits with 1 if anything that is broken goes unnoticed. ``--only TEXT`` runs those whose description has it, and writes
nothing.

The package and its tests are copied, the copy is changed, and the few tests named for the case run on it in a process
of their own. A test that is said to notice must pass on the package as it is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .cases import MUTATIONS, Mutation
from .child import DIED, ENDED_WELL, FAILED, ROOT, run_tests

RESULTS = ROOT / "benchmarks" / "results" / "mutations.md"
TIMEOUT = 240
"""Seconds; a case that hangs is noticed, too."""
PRELOADED = ["torch", "pytest", "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert"]
"""Imported once, before a process is forked for each case."""


def _tests_on(folder: Path, tests: tuple[str, ...], interpreted: bool) -> tuple[int, str | None]:
    """Exit status of pytest and the test that failed; ``(1, "no end")`` where there is no end.

    Raises:
        SystemExit: pytest ran no tests, could not import them, or died.
    """
    # Triton must not have been imported before it is told to interpret
    context: Any = multiprocessing.get_context("spawn" if interpreted else "forkserver")
    receiving, sending = context.Pipe(duplex=False)
    log = folder / "log.txt"
    process = context.Process(target=run_tests, args=(folder, tests, interpreted, log, sending))
    process.start()
    sending.close()
    found: tuple[int, str | None]
    try:
        found = receiving.recv() if receiving.poll(TIMEOUT) else (FAILED, "no end")
    except EOFError:  # it died without an answer
        found = (DIED, None)
    process.kill()
    process.join()
    if found[0] not in (ENDED_WELL, FAILED):
        said = log.read_text()[-4000:] if log.exists() else ""
        raise SystemExit(f"pytest ended with {found[0]} on {' '.join(tests)}:\n{said}")
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
    if status == ENDED_WELL or test is None:
        return None
    if test.startswith("tests/") and _tests_on(whole, (test,), mutation.interpreted)[0] != ENDED_WELL:
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
