"""Runs the pieces, each in a process of its own, within the minutes there are."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch

from meft_kernels.comparison.records import device_name
from meft_kernels.comparison.rivals import RIVALS

from . import report, training
from .measure import START_AGAIN, UNTIL, one_line
from .pieces import RUN, pieces
from .progress import Piece, Progress, slug

WORKER = (sys.executable, "-m", "benchmarks.gpu")
OUT = "MEFT_BENCHMARK_OUT"
"""Environment: the worker's folder, which no recorded command should name."""
LEAST_SECONDS = {"cuda": 20.0, "cpu": 5.0}
"""Less than that is not worth a process: it starts, imports, and builds a model first."""
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
BROKEN = f"ended with status {START_AGAIN}"
"""It has named the culprit itself."""
GRACE = 0.15
"""Part of a piece's time between a worker's own end and being killed."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    from benchmarks import gpu

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=gpu.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole run")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try everything out")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="these pieces, or those whose names begin so")
    parser.add_argument("--rivals", nargs="+", default=list(training.ORDER), choices=list(RIVALS), metavar="RIVAL",
                        help="beside MEFT and LoRA with checkpointing")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--report", action="store_true", help="tables and plots of every device's records")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.pieces = pieces(tuple(options.rivals), tiny=options.tiny)
    names = [piece.name for piece in options.pieces]
    for wanted in options.only or ():
        if not any(name.startswith(wanted) for name in names):
            parser.error(f"--only {wanted}: the pieces are {', '.join(names)}")
    if options.only:
        options.pieces = [piece for piece in options.pieces if piece.name.startswith(tuple(options.only))]
    return options


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if something is wrong, 2 if there is no device."""
    options = parse(arguments)
    if options.worker:
        return work(options)
    if options.report:
        folders = sorted(path for path in options.out.glob("*") if path.is_dir())
        return max([report.summarise(folder, options.pieces, {}) for folder in folders], default=0)
    device = find_device(options.device)
    if device is None:
        print("torch finds no CUDA device here; --device cpu --tiny tries everything but the speed")
        return 2
    folder = options.out / slug(device)
    print(f"{device}: {options.minutes:g} minutes, results in {options.out.name}/{folder.name}", flush=True)
    not_run = run(options, folder, time.time() + 60 * options.minutes)
    return report.summarise(folder, options.pieces, not_run)


def find_device(kind: str) -> str | None:
    """Its name. CUDA is asked for by another process: this one needs none of its memory."""
    if kind == "cpu":
        return device_name(torch.device("cpu"))
    ask = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        print(last_line(done.stderr))
    return done.stdout.strip() or None


def run(options: argparse.Namespace, folder: Path, until: float) -> dict[str, str]:
    """Piece after piece; returns why some were not run."""
    not_run: dict[str, str] = {}
    least = LEAST_SECONDS[options.device]
    todo = []
    for piece in options.pieces:
        progress = Progress.load(piece, folder, again=options.again)
        if progress.pending():
            todo.append(piece)
        else:
            print(f"{piece.name}: there already", flush=True)
    for place, piece in enumerate(todo):
        left = until - time.time()
        share = left * piece.weight / sum(other.weight for other in todo[place:])
        if share < least:
            not_run[piece.name] = f"its share of the time would be {max(0.0, share):.0f} s"
            continue
        print(f"{piece.name}: at most {share:.0f} s", flush=True)
        if options.again:
            (folder / f"{piece.name}.json").unlink(missing_ok=True)
        if reason := run_piece(piece, options, folder, time.time() + share):
            not_run[piece.name] = reason
    return not_run


def run_piece(piece: Piece, options: argparse.Namespace, folder: Path, until: float) -> str | None:
    """Start workers until every item has an outcome, or the time is over; returns why some have none."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        before = len(Progress.load(piece, folder).pending())
        with (folder / f"{piece.name}.log").open("ab") as log:
            died = start_worker(piece, options, folder, until, log)
        progress = Progress.load(piece, folder)
        if died not in (None, BROKEN):
            last = last_line((folder / f"{piece.name}.log").read_text(errors="replace"))
            running = progress.running
            progress.blame(f"its process {died}; last words: {last}")
            print(f"  {running or 'before anything was measured'}: the process {died}: {last}", flush=True)
        after = len(progress.pending())
        if not after:
            return None
        if died is None or after == before or until - time.time() < LEAST_SECONDS[options.device]:
            why = f"the process {died}" if died else "no time left"
            return f"{', '.join(progress.pending())}: {why}"


def start_worker(piece: Piece, options: argparse.Namespace, folder: Path, until: float, log: IO[bytes]) -> str | None:
    """One process, with all it starts; returns what it died of."""
    grace = GRACE * (until - time.time())
    command = [*WORKER, "--worker", piece.name, "--device", options.device]
    command += [*(["--tiny"] if options.tiny else []), "--rivals", *options.rivals]
    environment = {**ALLOCATOR, **os.environ, UNTIL: str(until - grace), OUT: str(folder), "HF_HUB_OFFLINE": "1"}
    worker = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
    try:
        status = worker.wait(max(0.0, until - time.time()))
    except subprocess.TimeoutExpired:
        return "was stopped, over its time"
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)  # and torch's compiling processes with it
            worker.wait()
    return None if status == 0 else f"ended with status {status}"


def last_line(text: str) -> str:
    """Of what a process had to say before it died."""
    return one_line("\n".join(reversed(text.splitlines())))


def work(options: argparse.Namespace) -> int:
    """The worker: one piece, in this process."""
    piece = next(piece for piece in options.pieces if piece.name == options.worker)
    device = torch.device(options.device)
    name = device_name(device)
    folder = Path(os.environ.get(OUT) or options.out / slug(name))
    RUN[piece.kind](Progress.load(piece, folder, device), device)
    return 0
