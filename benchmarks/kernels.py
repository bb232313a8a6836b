"""Speed of the fused ops on a GPU, against what people would write instead.

    python -m benchmarks.kernels --json benchmarks/results/kernels.json --plot benchmarks/results/kernels.png
    python -m benchmarks.kernels --dry-run    # no GPU: runs everything once on small tensors, times nothing

First every op is checked against the torch reference; a mismatch ends the run before any speed is printed. Then, per
op and shape, interleaved: the fused op, the same mathematics in eager torch, that under ``torch.compile``, and code
with ``addmm`` and in-place ops as a careful user would write it. Printed: median and 20 % / 80 % quantiles, GB/s of the
bytes that the op must at least move, and these in percent of the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import kernel_cases
from benchmarks.kernel_cases import Case

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTILES = (0.5, 0.2, 0.8)
COPY_BYTES = 2**30


class Timing(NamedTuple):
    """Milliseconds: median and quantiles over the rounds' medians."""

    median: float
    low: float
    high: float


def sweep(options: argparse.Namespace) -> Iterator[Case]:
    """Every op at every shape; the rank is varied only for ops that have one."""
    for dtype, width, rows in itertools.product(options.dtypes, options.widths, options.rows):
        for op in options.ops:
            ranks = options.ranks if op in kernel_cases.WITH_RANK else options.ranks[:1]
            for rank in ranks:
                yield Case(op, rows, width, rank if op in kernel_cases.WITH_RANK else None, DTYPES[dtype])


def check(device: torch.device, ops: list[str]) -> list[str]:
    """What does not agree with the reference; empty when all is well."""
    wrong = []
    for op, dtype, (rows, width) in itertools.product(ops, DTYPES.values(), [(63, 100), (256, 384)]):
        for rank in (8, 64) if op in kernel_cases.WITH_RANK else (None,):
            case = Case(op, rows, width, rank, dtype)
            if message := kernel_cases.mismatch(case, device):
                wrong.append(f"{case.label}: {message}")
    return wrong


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a plain copy far larger than the caches."""
    from triton.testing import do_bench

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * COPY_BYTES / (milliseconds * 1e-3)


def time_together(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Each call timed in turn, ``rounds`` times over, caches cleared in between by ``do_bench``."""
    from triton.testing import do_bench

    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(tuple(do_bench(call, quantiles=list(QUANTILES), warmup=10, rep=40)))
    return {
        name: Timing(*(statistics.median(each[place] for each in times) for place in range(3)))
        for name, times in found.items()
    }


def measure(case: Case, device: torch.device, rounds: int, bandwidth: float) -> dict[str, Any]:
    """One case on every rival."""
    calls = kernel_cases.rivals(case, device)
    times = time_together(calls, rounds)
    bytes_moved, flops = kernel_cases.least_bytes(case), kernel_cases.flops(case)
    rate = bytes_moved / (times["fused"].median * 1e-3)
    return {
        "op": case.op, "rows": case.rows, "width": case.width, "rank": case.rank, "dtype": str(case.dtype),
        "milliseconds": {name: timing._asdict() for name, timing in times.items()},
        "least_bytes": bytes_moved, "flops": flops, "gb_per_s": rate / 1e9, "of_copy_bandwidth": rate / bandwidth,
        "times_faster_than": {name: timing.median / times["fused"].median for name, timing in times.items()},
    }  # fmt: skip


def line(result: dict[str, Any]) -> str:
    """A result for people."""
    fused = result["milliseconds"]["fused"]
    others = "  ".join(
        f"{name} {factor:5.2f}x" for name, factor in result["times_faster_than"].items() if name != "fused"
    )
    rank = "" if result["rank"] is None else f" r={result['rank']}"
    return (
        f"{result['op']:26} {result['dtype'][6:]:9} {result['rows']:6} x {result['width']:<5}{rank:6} "
        f"{fused['median']:8.4f} ms ({fused['low']:.4f} to {fused['high']:.4f})  {result['gb_per_s']:7.0f} GB/s "
        f"{100 * result['of_copy_bandwidth']:5.1f} %   {others}"
    )


def dry_run(ops: list[str]) -> None:
    """Every path of the benchmark but the clock, on small CPU tensors."""
    for op in ops:
        case = Case(op, 16, 32, 8 if op in kernel_cases.WITH_RANK else None, torch.float32)
        for name, call in kernel_cases.rivals(case, torch.device("cpu"), compiled=False).items():
            call()
            print(f"{case.label}: {name} runs")
        print(f"{case.label}: at least {kernel_cases.least_bytes(case)} bytes, {kernel_cases.flops(case)} flops")
    print("dry run: nothing was timed")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--ops", nargs="+", default=list(kernel_cases.OPS), choices=list(kernel_cases.OPS))
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1024, 2048, 4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures, with the device's name, here")
    parser.add_argument("--plot", type=Path, help="draw the roofline here (PNG; needs matplotlib)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, once, without timing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The exit status is 1 where the ops are wrong, 2 where there is no GPU."""
    options = parse(arguments)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu and not options.dry_run else "cpu")
    if not has_gpu and not options.dry_run:
        print("benchmarks.kernels times kernels and needs a CUDA GPU; --dry-run tries the rest without one")
        return 2
    if wrong := check(device, options.ops):
        print("\n".join(["no speeds, the ops are wrong:", *wrong]))
        return 1
    print(f"every op agrees with the reference on {device}")
    if options.dry_run:
        dry_run(options.ops)
        return 0
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name(device)
    print(f"{name}: copy bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
    results = []
    for case in sweep(options):
        results.append(measure(case, device, options.rounds, bandwidth))
        print(line(results[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"device": name, "torch": torch.__version__, "copy_bandwidth": bandwidth, "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        from benchmarks.roofline import draw

        draw(name, bandwidth, results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
