"""Every model type of the installed transformers, tiny and random, through ``patch``.

    OMP_NUM_THREADS=1 nice python -m benchmarks.model_sweep            # goes on where it was stopped
    python -m benchmarks.model_sweep --only gemma4 qwen3_vl --again
    python -m benchmarks.model_sweep --table                           # docs/MODELS.md from what was found

Each type has a process of its own, with a limit of time and memory. A type passes where every rebuilt input is equal
bit for bit, every gradient is within 1e-5 of plain autograd's, and ``unpatch`` leaves the model that was there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1] / "results" / "model_sweep"
RESULTS = HERE / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "MODELS.md"
SECONDS = 45
MEMORY = 12 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these model types")
    parser.add_argument("--again", action="store_true", help="those too that have been looked at")
    parser.add_argument("--table", action="store_true", help="write docs/MODELS.md and stop")
    chosen = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not chosen.table:
        _sweep(results, chosen.only, chosen.again)
    from .table import page

    PAGE.write_text(page(results), encoding="utf-8")


def _sweep(results: dict[str, Any], only: list[str] | None, again: bool) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import transformers

    from . import check  # noqa: F401 - imported once, for all processes
    from .models import model_types

    transformers.logging.set_verbosity_error()
    HERE.mkdir(parents=True, exist_ok=True)
    for model_type in only or model_types():
        if model_type in results and not again:
            continue
        began = time.monotonic()
        results[model_type] = _apart(model_type)
        line = {**results[model_type], "seconds": round(time.monotonic() - began, 1)}
        print(model_type, line["outcome"], line["seconds"], str(line.get("reason", ""))[:150], flush=True)
        text = json.dumps(dict(sorted(results.items())), indent=1)
        RESULTS.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
        RESULTS.with_suffix(".part").replace(RESULTS)


def _apart(model_type: str) -> dict[str, Any]:
    """Look at it in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            json.dump(_limited(model_type), pipe)
        sys.stdout.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    found: dict[str, Any] = json.loads(text) if text else {"outcome": "fails", "reason": "the process died"}
    return found


def _limited(model_type: str) -> dict[str, Any]:
    from .check import look

    def late(*_: Any) -> None:
        raise TimeoutError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))  # for what never comes back to Python
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return look(model_type)
    except TimeoutError:
        return {"outcome": "cannot be made", "reason": f"not done in {SECONDS} seconds"}
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"outcome": "fails", "reason": reason}


if __name__ == "__main__":
    main()
