"""What is shown while training: a bar on a terminal, lines elsewhere; every log as a line of JSON in a file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

_SHOWN_LOSSES = 20
_LINES = 20
"""Without a terminal a run prints about so many lines of its loss."""


def make_bar(console: Any = None, *, loss: bool = True) -> Progress:
    """Steps, time left, loss where there is one."""
    last = [TextColumn("loss {task.fields[loss]:.3f}")] if loss else []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *last)
    return Progress(*columns, console=console)


@contextmanager
def progress(title: str, steps: int, *, loss: bool = True) -> Iterator[Callable[[float], None]]:
    """A progress bar, and the function that moves it on; lines where there is no terminal, and the bar at the end.

    Args:
        title: of what is done.
        steps: how many there will be.
        loss: whether a step has one to show; else any number will do.
    """
    with make_bar(loss=loss) as bar:
        job = bar.add_task(title, total=steps, loss=float("nan"))

        def on_step(value: float) -> None:
            bar.update(job, advance=1, loss=value)
            done = int(bar.tasks[0].completed)
            if not bar.console.is_terminal and done < steps and done % max(1, steps // _LINES) == 0:
                said = f", loss {value:.3f}" if loss else ""
                bar.console.print(f"{title}: step {done}/{steps}{said}", highlight=False, soft_wrap=True)

        yield on_step


class ShowProgress(TrainerCallback):
    """Steps and a running mean of the loss, and what evaluations found."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._losses: list[float] = []
        self._began = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = (state.global_step, time.perf_counter())
        self._losses = [entry["loss"] for entry in state.log_history if "loss" in entry][-_SHOWN_LOSSES:]
        if self._console.is_terminal:
            self._bar = make_bar(self._console)
            self._job = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, loss=self._loss()
            )
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._losses = [*self._losses, logs["loss"]][-_SHOWN_LOSSES:]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._job, completed=state.global_step, loss=self._loss())
        elif state.global_step % max(1, state.max_steps // _LINES) == 0 and self._losses:
            steps = state.global_step - self._began[0]
            seconds = (time.perf_counter() - self._began[1]) / steps
            left = f"{(state.max_steps - state.global_step) * seconds / 60:.0f} min left"
            loss = f"mean loss {self._loss():.4f}"
            line = f"step {state.global_step}/{state.max_steps}: {loss}, {seconds:.2f} s/step, {left}"
            self._console.print(line, highlight=False)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        self._console.print(f"step {state.global_step}: held out: {describe_metrics(metrics or {})}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, whatever happened."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _loss(self) -> float:
        return statistics.fmean(self._losses) if self._losses else float("nan")


class WriteHistory(TrainerCallback):
    """``log_history`` as JSON, one entry a line, while training goes on.

    A run that was killed has logged steps that are done again: the file begins anew from what the checkpoint knows.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        write_history(self._path, state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(state.log_history[-1]) + "\n")


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """All of it at once."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def describe_metrics(metrics: dict[str, float]) -> str:
    """In words, for people."""
    words = []
    if (accuracy := metrics.get("eval_accuracy")) is not None:
        words.append(f"accuracy {100 * accuracy:.1f} %")
    words.append(f"loss {metrics.get('eval_loss', float('nan')):.4f}")
    if (perplexity := metrics.get("eval_perplexity")) is not None:
        words.append(f"perplexity {perplexity:.2f}")
    return ", ".join(words)
