"""Every model type of the installed transformers, tiny and random, through ``patch``.

    OMP_NUM_THREADS=1 nice python -m benchmarks.model_sweep            # goes on where it was stopped; --workers 2
    python -m benchmarks.model_sweep --stale                           # those looked at with other code, or not yet
    python -m benchmarks.model_sweep --only gemma4 qwen3_vl --again
    python -m benchmarks.model_sweep --table                           # docs/MODELS.md, and counts elsewhere

Each type has a process of its own, with a limit of time and memory. A type passes where every rebuilt input is equal
bit for bit, every gradient is within 1e-5 of plain autograd's, the outputs are at first the pretrained model's, and
``unpatch`` leaves the model that was there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import resource
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parents[1] / "results" / "model_sweep"
RESULTS = HERE / "results.json"
PAGE = REPOSITORY / "docs" / "MODELS.md"
COUNTED = (REPOSITORY / "README.md", REPOSITORY / "docs" / "supported-models.md")
SECONDS = 90
MEMORY = 12 << 30


class Late(BaseException):
    """A type has had its time. No ``Exception``: those are what a model's own code may say."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these model types")
    parser.add_argument("--again", action="store_true", help="those too that have been looked at")
    parser.add_argument("--stale", action="store_true", help="those too that were looked at with other code")
    parser.add_argument("--outcome", nargs="*", help="of those that have been looked at, these outcomes, again")
    parser.add_argument("--workers", type=int, default=1, help="types at a time")
    parser.add_argument("--table", action="store_true", help="write docs/MODELS.md and stop")
    chosen = parser.parse_args()
    results = _recorded()
    if not chosen.table:
        _sweep(results, chosen)
    from meft_kernels.architectures.table import write_table

    from .table import COUNT, count, page

    write_table()

    PAGE.write_text(page(results), encoding="utf-8")
    for place in COUNTED:
        place.write_text(COUNT.sub(count(results), place.read_text(encoding="utf-8")), encoding="utf-8")
    stale = sum(found.get("code") != code() for found in results.values())
    print(f"{len(results)} model types, {stale} of them looked at with other code (--stale)")


def _recorded() -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return recorded


def code() -> str:
    """What a result depends on, in short: the engine, how structure is found, and transformers."""
    import transformers

    digest = hashlib.sha256(transformers.__version__.encode())
    for folder in ("meft_kernels/engine", "meft_kernels/architectures/found"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sweep(results: dict[str, Any], chosen: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import transformers

    from . import check  # noqa: F401 - imported once, for all processes
    from .models import model_types

    transformers.logging.set_verbosity_error()
    HERE.mkdir(parents=True, exist_ok=True)
    now = code()

    def due(model_type: str) -> bool:
        before = results.get(model_type)
        if before is None or chosen.again or (chosen.stale and before.get("code") != now):
            return True
        return before["outcome"] in (chosen.outcome or ())

    types = [each for each in chosen.only or model_types() if due(each)]
    for model_type, found, seconds in _apart(types, chosen.workers):
        results |= _recorded()  # by another sweep meanwhile
        results[model_type] = {**found, "transformers": transformers.__version__, "code": now}
        print(model_type, found["outcome"], round(seconds, 1), str(found.get("reason", ""))[:150], flush=True)
        text = json.dumps(dict(sorted(results.items())), indent=1)
        RESULTS.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
        RESULTS.with_suffix(".part").replace(RESULTS)


def _apart(types: list[str], workers: int) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Look at each in a process of its own: what was found, in the order in which they end, and how long it took."""
    waiting, pipes = list(reversed(types)), selectors.DefaultSelector()
    while waiting or pipes.get_map():
        while waiting and len(pipes.get_map()) < workers:
            _start(waiting.pop(), pipes)
        for key, _ in pipes.select():
            model_type, child, began, parts = key.data
            if text := os.read(key.fd, 1 << 16):
                parts.append(text)
                continue
            pipes.unregister(key.fd)
            os.close(key.fd)
            os.waitpid(child, 0)
            said = b"".join(parts).decode()
            died = {"outcome": "cannot be made", "reason": f"more than {SECONDS} seconds, or {MEMORY >> 30} GiB"}
            yield model_type, json.loads(said) if said else died, time.monotonic() - began


def _start(model_type: str, pipes: selectors.BaseSelector) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                json.dump(_limited(model_type), pipe)
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.close(writer)
    pipes.register(reader, selectors.EVENT_READ, (model_type, child, time.monotonic(), []))


def _limited(model_type: str) -> dict[str, Any]:
    from .check import look

    def late(*_: Any) -> None:
        raise Late

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, 2 * SECONDS))  # the limit: others may use the cores as well
    signal.signal(signal.SIGXCPU, late)
    try:
        return look(model_type)
    except Late:
        return {"outcome": "cannot be made", "reason": f"not done in {SECONDS} seconds"}
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"outcome": "fails", "reason": reason}


if __name__ == "__main__":
    main()
