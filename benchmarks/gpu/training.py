"""A training step of every rival, on one model and one batch."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS, Budget, UnavailableRivalError

from .measure import START_AGAIN, Runner, attempt, release, seconds_left, synchronize, warm_up_libraries
from .models import batch_of, build
from .progress import Progress

REFERENCES = ("lora_checkpointing", "meft")
"""Measured first, and there for as long as anything is timed: every other time is a ratio to theirs."""
ORDER = (
    *REFERENCES, "full", "lora", "meft_lora", "lora_offload", "meft1", "meft3", "bottleneck", "ia3",
    "meft1_paper", "meft2_paper", "meft3_paper", "meft_compiled", "lora_liger", "lora_liger_checkpointing", "unsloth",
)  # fmt: skip
"""Every rival but meft2, which MEFT's default is; the first ones matter most, should time run out."""
NOTES = {
    "weights": "one base of seed 0; its tensors are shared by all rivals, but for those that a rival trains",
    "optimizer": "AdamW, fused on CUDA, states in the weights' dtype",
    "autocast": "none",
    "warm-up": "two steps, one of which bytes are counted, and one alone are not in seconds",
}
LEAST_ROUNDS = 3
WARM_UP = 2
SLOW_TO_PREPARE = {"meft_compiled": 45.0}
"""Seconds that compiling takes on a GPU's host, about."""


def is_foreign(name: str) -> bool:
    """Whether it brings a package that changes transformers for its whole process."""
    return bool(set(RIVALS[name].packages) - {"peft"})


@dataclass
class Session:
    """What one process has built and timed."""

    progress: Progress
    device: torch.device
    base: nn.Module
    batch: dict[str, Any]
    budget: Budget
    runners: dict[str, Runner] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    """All but the times, of every rival that runs."""
    took: float = 0.0
    """The longest that preparing a rival took."""

    @classmethod
    def begin(cls, progress: Progress, device: torch.device) -> Session:
        """The model, the batch, the budget."""
        settings = progress.piece.settings
        base = build(settings["model"], device, getattr(torch, settings["dtype"]), tiny=settings["tiny"])
        config = MeftConfig(rank=settings["rank"], adapter_dtype="model")
        warm_up_libraries(device, getattr(torch, settings["dtype"]))
        progress.notes.update(NOTES)
        return cls(
            progress, device, base, batch_of(base, settings["rows"], settings["tokens"]), Budget.of(base, config)
        )

    def prepare(self, name: str) -> Runner:
        """Build a rival, let it warm up, and count its bytes."""
        if reason := RIVALS[name].why_unavailable(self.device):
            raise UnavailableRivalError(reason)
        began = time.perf_counter()
        runner = Runner.of(RIVALS[name], self.base, self.budget, self.batch)
        losses = [float(runner.step()) for _ in range(WARM_UP)]
        if losses[0] != losses[0]:
            raise ValueError("the loss of the first step is NaN")
        synchronize(self.device)
        warm_up = time.perf_counter() - began
        self.found[name] = {
            "loss": losses[0],
            "warm_up_seconds": warm_up,
            **runner.weights(),
            **runner.bytes(),
            "alone_seconds": runner.seconds(1),
        }
        self.took = max(self.took, time.perf_counter() - began)
        return runner

    @property
    def references(self) -> list[str]:
        return [name for name in REFERENCES if name in self.runners]

    def blocks(self, rounds: int, steps: int) -> dict[str, list[float]]:
        """The references' times, a block each."""
        return {name: [self.runners[name].seconds(steps) for _ in range(rounds)] for name in self.references}

    def step_seconds(self, names: list[str]) -> float:
        """One step of each."""
        return sum(self.found[name]["alone_seconds"] for name in names)

    def outcome(self, name: str, seconds: list[float], over: dict[str, float], how: str) -> dict[str, Any]:
        """All that is known of a rival."""
        settings, median = self.progress.piece.settings, statistics.median(seconds)
        return {
            **self.found[name],
            "seconds": seconds,
            "median_seconds": median,
            "tokens_per_second": settings["rows"] * settings["tokens"] / median,
            "over": over,
            "how": how,
        }


def run(progress: Progress, device: torch.device) -> None:
    """Every rival without an outcome; the references again if they are needed to compare with."""
    pending = progress.pending()
    session = Session.begin(progress, device)
    for name in REFERENCES:
        if "reason" not in progress.items.get(name, {}):
            _prepare(session, name)
    if "full" in pending:
        _apart(session, ["full"])
    for name in [name for name in pending if name not in (*REFERENCES, "full") and not is_foreign(name)]:
        steps = LEAST_ROUNDS * progress.piece.settings["steps"]
        reserved = steps * session.step_seconds(list(session.runners))
        slow = SLOW_TO_PREPARE.get(name, 0.0) if device.type == "cuda" else 0.0
        if seconds_left() > reserved + max(2 * session.took, slow):
            _prepare(session, name)
    _rounds(session, pending)
    for name in set(session.runners) - set(REFERENCES):
        del session.runners[name]
    release(device)
    _apart(session, [name for name in pending if is_foreign(name)])


def _prepare(session: Session, name: str) -> None:
    runner = attempt(session.progress, name, session.device, lambda: session.prepare(name))
    if runner is not None:
        session.runners[name] = runner
        known = session.progress.items.get(name, {"unfinished": True})
        session.progress.put(name, {**session.found[name], "unfinished": True} if "unfinished" in known else known)


def _rounds(session: Session, pending: list[str]) -> None:
    """All in turns, every other round backwards; who fails is left out from there on."""
    settings, times = session.progress.piece.settings, {name: list[float]() for name in session.runners}
    for round_ in range(settings["rounds"]):
        names = list(session.runners)
        if seconds_left() < settings["steps"] * session.step_seconds(names) or not set(names) & set(pending):
            break
        for name in names if round_ % 2 == 0 else reversed(names):
            runner = session.runners[name]
            before = session.progress.items.get(name, {})
            seconds = attempt(session.progress, name, session.device, lambda r=runner: r.seconds(settings["steps"]))  # type: ignore[misc]
            if seconds is None:
                del session.runners[name], runner
                release(session.device)
                continue
            session.progress.put(name, before)
            times[name].append(seconds)
    for name in session.runners:
        if name in pending and times[name]:
            over = {
                other: statistics.median(mine / theirs for mine, theirs in zip(times[name], times[other], strict=False))
                for other in session.references
                if times[other]
            }
            how = f"{len(times[name])} interleaved rounds of {settings['steps']} steps"
            session.progress.put(name, session.outcome(name, times[name], over, how))


def _apart(session: Session, names: list[str]) -> None:
    """Blocks of the references around a rival's own, or before it if it cannot be undone."""
    settings, progress, device = session.progress.piece.settings, session.progress, session.device
    rounds, steps = min(LEAST_ROUNDS, settings["rounds"]), settings["steps"]
    before: dict[str, list[float]] = {}
    packages: tuple[str, ...] = ()

    def compare(name: str) -> dict[str, Any]:
        theirs = {other: list(seconds) for other, seconds in before.items()}
        runner = session.prepare(name)
        seconds = [runner.seconds(steps) for _ in range(rounds)]
        del runner
        release(device)
        if not is_foreign(name):
            for other, more in session.blocks(rounds, steps).items():
                theirs[other] += more
        over = {other: statistics.median(seconds) / statistics.median(block) for other, block in theirs.items()}
        order = "A-B" if is_foreign(name) else "A-B-A"
        return session.outcome(name, seconds, over, f"blocks {order} of {rounds} x {steps} steps")

    for name in names:
        needed = 2 * session.took + 3 * rounds * steps * session.step_seconds(session.references)
        available = RIVALS[name].why_unavailable(device) is None
        if available and seconds_left() < needed:
            continue
        if available and packages and packages != RIVALS[name].packages:
            raise SystemExit(START_AGAIN)  # another's changes are in this process
        if available and not before:
            before.update(session.blocks(rounds, steps))
        outcome = attempt(progress, name, device, lambda name=name: compare(name))  # type: ignore[misc]
        packages = RIVALS[name].packages if available else packages
        if outcome is not None:
            progress.put(name, outcome)
