"""Bytes that every kernel moves, counted load by load and store by store in Triton's interpreter.

    python -m benchmarks.byte_account            # no GPU needed; about a minute

Per op: bytes per element of the hidden states read from and written to memory (addresses touched twice by one launch
count once, the caches being larger than what a program shares: weights, and a row that it reads again), the floor (each
of the op's own tensors once), what is above it, flops per byte, and all accesses, those that a cache answers included.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated

import numpy as np
import torch

from benchmarks import kernel_cases
from benchmarks.kernel_cases import Case


class Traffic(NamedTuple):
    """Bytes of all launches of one call."""

    memory: int
    """Distinct bytes read, and distinct bytes written, launch by launch."""
    accesses: int
    """Every load and store that no mask suppressed."""


class _Counter:
    """Addresses of the launch under way, and the totals of those before."""

    def __init__(self) -> None:
        self.touched: dict[tuple[str, int], list[np.ndarray[Any, Any]]] = {}
        self.memory = self.accesses = 0

    def note(self, kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        self.accesses += addresses.size * size
        self.touched.setdefault((kind, size), []).append(addresses.ravel())

    def end_launch(self) -> None:
        self.memory += sum(np.unique(np.concatenate(parts)).size * size for (_, size), parts in self.touched.items())
        self.touched.clear()


@contextmanager
def counting() -> Iterator[_Counter]:
    """Count what the interpreter loads and stores within the block."""
    from triton.runtime import interpreter

    counter, builder, executor = _Counter(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counter.note("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.note("write", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = launch(self, *args, **kwargs)
        counter.end_launch()
        return done

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    executor.__call__ = counted_launch
    try:
        yield counter
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = launch


def traffic(call: Callable[[], Any]) -> Traffic:
    """Traffic of everything that a call launches."""
    with counting() as counter:
        call()
    return Traffic(counter.memory, counter.accesses)


def account(case: Case) -> dict[str, Any]:
    """One op's figures, per element of the hidden states."""
    moved = traffic(kernel_cases.rivals(case, torch.device("cpu"), compiled=False)["fused"])
    elements, floor = case.rows * case.width, kernel_cases.least_bytes(case)
    return {
        "op": case.op, "rows": case.rows, "width": case.width, "rank": case.rank, "dtype": str(case.dtype)[6:],
        "bytes": moved.memory / elements, "floor": floor / elements, "over_floor": moved.memory / floor,
        "flops_per_byte": kernel_cases.flops(case) / moved.memory, "accesses": moved.accesses / elements,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.byte_account", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    results = []
    print(f"{'op':26} {'bytes':>7} {'floor':>7} {'over':>7} {'flops/byte':>11} {'accesses':>9}   (per element)")
    for op in kernel_cases.OPS:
        rank = options.rank if op in kernel_cases.WITH_RANK else None
        results.append(account(Case(op, options.rows, options.width, rank, torch.bfloat16)))
        print(
            "{op:26} {bytes:7.2f} {floor:7.2f} {over_floor:6.2f}x {flops_per_byte:11.1f} {accesses:9.2f}".format(
                **results[-1]
            ),
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
