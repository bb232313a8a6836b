"""Real models through their family file and through what is found of them without one.

    python -m benchmarks.found_real                 # smollm2, minilm, gemma3; --models for some

Start loss and gradients must be equal bit for bit. What looking costs is counted in forwards of the batch that is
looked at, without gradients; medians of rounds in which all three take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import meft_kernels
from meft_kernels.architectures import registry
from meft_kernels.architectures.found.batch import made_up

from .real import real_batch, real_model

ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["minilm", "smollm2", "gemma3"])
    warnings.filterwarnings("ignore")
    print(
        "| model | loss, patched | losses, gradients | forward, ms | patch, ms | without a file | more, in forwards |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in parser.parse_args().models:
        print(row(name), flush=True)


def row(name: str) -> str:
    """One model's line of the table."""
    model, batch = real_model(name, torch.float32).eval(), real_batch(name, 2, 64)
    base, start, gradients = steps(model, batch)
    with no_family_file(model):
        found_base, found_start, found = steps(model, batch)
    assert found.keys() == gradients.keys()
    same = (found_base, found_start) == (base, start) and all(torch.equal(found[k], gradients[k]) for k in gradients)
    looked_at = next(made_up(model))
    times: dict[str, list[float]] = {"forward": [], "written": [], "found": []}
    for _ in range(ROUNDS):
        with torch.no_grad():
            times["forward"].append(seconds(lambda: model(**looked_at)))
        times["written"].append(patching(model))
        with no_family_file(model):
            times["found"].append(patching(model))
    forward, written, without = (statistics.median(taken) for taken in times.values())
    shown = " | ".join(f"{1000 * taken:.1f}" for taken in (forward, written, without))
    more = (without - written) / forward
    return f"| {name} | {base:.4f} -> {start:.4f} | {'equal' if same else 'DIFFER'} | {shown} | {more:.2f} |"


def steps(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss before and after ``patch``, and the gradients of adapters that are no longer zero."""
    kwargs = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        base = float(model(**batch, **kwargs).loss)
        start = float(meft_kernels.patch(model)(**batch, **kwargs).loss)
    meft_kernels.unpatch(model)
    torch.manual_seed(0)
    meft_kernels.patch(model, up_init_std=1e-3)
    try:
        model(**batch, **kwargs).loss.backward()
        return base, start, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad()
        meft_kernels.unpatch(model)


@contextmanager
def no_family_file(model: Any) -> Iterator[None]:
    """The registry without the model's type."""
    spec = registry._SPECS.pop(model.config.model_type)
    try:
        yield
    finally:
        registry._SPECS[model.config.model_type] = spec


def patching(model: Any) -> float:
    """Seconds of ``patch``, which is then undone."""
    taken = seconds(lambda: meft_kernels.patch(model))
    meft_kernels.unpatch(model)
    return taken


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
