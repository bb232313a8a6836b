"""The search: from the fastest settings on, the first with which a training step fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..config import MeftConfig
from ..errors import BudgetError, UnsupportedModelError
from ..estimate.estimator import Estimator
from ..estimate.quantised import Weights
from ..estimate.sizes import gib, memory_size
from ..estimate.step import StepBytes
from .candidates import Settings, settings_in_order, smaller_tiles
from .costs import Costs, patched_layers
from .result import Candidate, Plan, table
from .subject import Subject, of_config, of_model

SHARE = 0.05
"""Of the budget, for no tensor: estimates were off by 0.85 % at most from what torch's allocator had handed out on an
H200 (``python -m benchmarks.estimator --gpu``); the rest is for what it holds in gaps. That is not measured there;
``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` keeps it small."""

CONTEXT = 2**29
"""Of a GPU, beside that: CUDA's context and the workspaces of its libraries, which are a few hundred MiB."""


def plan(
    model: Any,
    config: MeftConfig | None = None,
    *,
    memory: int | str,
    batch: tuple[int, int],
    allow_coefficient: bool = False,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    gpu: bool | None = None,
    any_length: bool = False,
    **overrides: Any,
) -> Plan:
    """The first settings, in the order of their time, with which a step fits into ``memory``. Nothing is patched.

    In this order: as few reversible layers as fit; all of them; a coefficient of -1/8, if allowed; attention in pieces;
    remainders in host memory; both; smaller tiles. What is computed changes with the coefficient alone. A setting that
    was given, by name or as other than its default, is kept.

    Args:
        model: a transformers model, loaded, or a config alone.
        config: settings of :func:`patch`, with ``overrides`` as there.
        memory: for all that the process has on the device: ``"22GiB"``, ``"24GB"``, or bytes.
        batch: rows and tokens of a batch, unpadded; AdamW's states are counted too.
        allow_coefficient: whether what is computed may be changed.
        dtype: of the weights, with a config; of a model its own counts.
        weights: ``"4bit"`` or ``"8bit"``, with a config.
        gpu: whether the step will run on one. None: with a config yes; with a model if it or the machine has one.
        any_length: whether texts may be longer than the model's positions.

    Raises:
        BudgetError: nothing fits; says what the longest text would be.
        UnsupportedModelError: a model that cannot be simulated, or not be patched.
        ValueError: a size, a batch or a setting that is none.
    """
    capacity = memory_size(memory, "memory")
    rows, tokens = check_batch(batch)
    meft = (config or MeftConfig()).changed(**overrides)
    if isinstance(model, nn.Module):
        if dtype is not None or weights is not None:
            raise ValueError("dtype and weights are for a config alone: a model has its own")
        subject = of_model(model, gpu=gpu)
    else:
        subject = of_config(model, dtype, weights, gpu=gpu)
    search = Search(subject, meft, capacity, rows, tokens, any_length=any_length)
    try:
        return search.run(given=set(overrides), allow_coefficient=allow_coefficient)
    except NotImplementedError as error:
        raise UnsupportedModelError(f"memory= is not available for {subject.config.model_type}: {error}") from error


def check_batch(batch: Any) -> tuple[int, int]:
    """Rows and tokens.

    Raises:
        ValueError: it is something else.
    """
    right = isinstance(batch, tuple | list) and len(batch) == 2
    if not right or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in batch):
        raise ValueError(f"batch is (rows, tokens), two positive integers as in batch=(4, 2048), not {batch!r}")
    return batch[0], batch[1]


def check_budget(memory: Any, batch: Any) -> None:
    """Both of them or none.

    Raises:
        ValueError: one is missing, or is no size or no batch.
    """
    if memory is None:
        raise ValueError('batch=(rows, tokens) says what memory= is planned for: give memory="22GiB" as well')
    if batch is None:
        raise ValueError("memory= is planned for a batch: give batch=(rows, tokens) as well, as in batch=(1, 8192)")
    memory_size(memory, "memory")
    check_batch(batch)


class Search:
    """One budget and one batch."""

    def __init__(
        self, subject: Subject, meft: MeftConfig, memory: int, rows: int, tokens: int, *, any_length: bool
    ) -> None:
        self.subject, self.meft, self.memory = subject, meft, memory
        self.rows, self.tokens, self.any_length = rows, tokens, any_length
        self.reserve = int(SHARE * memory) + (CONTEXT if subject.gpu else 0)
        self.capacity = memory - self.reserve - subject.beside
        self.tried: list[Candidate] = []

    def estimator(self, changes: dict[str, Any]) -> Estimator:
        return self.subject.estimator(self.rows, self.meft.changed(**changes), any_length=self.any_length)

    def step(self, estimator: Estimator, tokens: int | None = None) -> StepBytes:
        """One step's bytes, with the weights that the model really has.

        Raises:
            UnsupportedModelError: the model does not run on tensors without data.
        """
        with _as_it_was():
            found = estimator.step(self.subject.rival, tokens or self.tokens)
        return StepBytes(**{**vars(found), "weights": found.weights + self.subject.beside})

    def run(self, *, given: set[str], allow_coefficient: bool) -> Plan:
        config = self.subject.config
        order = settings_in_order(
            config, self.meft, tokens=self.tokens, given=given, allow_coefficient=allow_coefficient
        )
        for number, settings in enumerate(order):
            found = self.candidate(settings)
            self.tried.append(found)
            if found.fits:
                free = self.meft.engine == "reversible" and self.meft.reversible_layers is None
                if number == 0 and free and "reversible_layers" not in given:
                    self.fewer_reversible(found)
                return self.plan()
        least = Settings(self.least.settings, self.least.what, self.least.cost)
        shape = {"rows": self.rows, "tokens": self.tokens}
        for settings in smaller_tiles(least, config, self.meft, **shape, gpu=self.subject.gpu, given=given):
            self.tried.append(self.candidate(settings))
            if self.tried[-1].fits:
                return self.plan()
        raise self.refusal()

    @property
    def least(self) -> Candidate:
        """What takes the least of all that was tried."""
        return min(self.tried, key=lambda each: each.step.total)

    def candidate(self, settings: Settings, step: StepBytes | None = None) -> Candidate:
        """Settings with what they take, simulated if it is not known."""
        step = step or self.step(self.estimator(settings.changes))
        fits = step.total <= self.memory - self.reserve
        return Candidate(settings.what, settings.cost, settings.changes, step, fits)

    def fewer_reversible(self, all_of_them: Candidate) -> None:
        """As few reversible layers as fit, which is what their bytes, linear in their number, tell by halving."""
        layers = patched_layers(self.subject.config, self.meft)
        width = self.subject.config.get_text_config().hidden_size
        # A layer's own inputs and attention's queries and output are the least that one keeps.
        least = 4 * self.rows * self.tokens * width * self.subject.dtype.itemsize
        if self.memory - self.reserve - all_of_them.step.total < least:
            return
        known = self.estimator({}).with_reversible(layers)
        steps: dict[int, StepBytes] = {layers: all_of_them.step}

        def fits(count: int) -> bool:
            if count not in steps:
                steps[count] = self.step(known.with_reversible(count))
            return steps[count].total <= self.memory - self.reserve

        count = least_that_fits(fits, layers)
        if count < layers:
            saved = Costs.of(self.subject.config, self.tokens).kept(layers - count, layers)
            what = f"{count} of {layers} layers reversible"
            settings = Settings({"reversible_layers": count}, what, f"{1 - saved:.2f}")
            self.tried.append(self.candidate(settings, steps[count]))

    def plan(self) -> Plan:
        chosen = self.tried[-1]
        return Plan(
            config=self.meft.changed(**chosen.settings),
            settings=chosen.settings,
            candidates=tuple(self.tried),
            memory=self.memory,
            reserve=self.reserve,
            rows=self.rows,
            tokens=self.tokens,
            notes=self.notes(),
        )

    def notes(self) -> tuple[str, ...]:
        context = f", and {gib(CONTEXT)} for CUDA's context" if self.subject.gpu else ""
        eight = self.subject.weights == "8bit" and self.subject.model_class is not None
        return (
            *(["8-bit weights are simulated as torchao's: bitsandbytes' products take more"] if eight else []),
            "time: against a step with all layers reversible, computed from the model's shapes, not measured",
            f"reserve: {SHARE:.0%} for the allocator's rounding and gaps{context}",
        )

    def refusal(self) -> BudgetError:
        """What to say where nothing fits."""
        last = self.least
        with _as_it_was():
            longest = self.estimator(last.settings).longest(self.subject.rival, self.capacity, max(1, self.tokens // 2))
        help_ = ["fewer rows in a batch"] if self.rows > 1 else []
        if self.subject.weights is None:
            help_.append("4-bit weights")
        if not longest:
            help_.append("a larger GPU")
            reach = f"not even {self.rows} x 1 token does, the weights being {gib(last.step.weights)}"
        else:
            reach = f"the longest that does is {self.rows} x {longest:,} tokens"
        room = self.memory - self.reserve
        if room <= 0:
            return BudgetError(
                f"{gib(self.memory)} is no more than the reserve for CUDA's context and the allocator, "
                f"{gib(self.reserve)}: nothing is left for tensors, of which a step of {self.rows} x {self.tokens:,} "
                f"tokens takes {gib(last.step.total)} at the least",
                0,
                tuple(self.tried),
            )
        rows = Plan(self.meft, {}, tuple(self.tried), self.memory, self.reserve, self.rows, self.tokens)
        return BudgetError(
            f"a step of {self.rows} x {self.tokens:,} tokens does not fit into {gib(self.memory)}: it takes "
            f"{gib(last.step.total)} at the least, and {gib(room)} are for tensors; {reach}. "
            f"What else helps: {', '.join(help_) or 'shorter texts'}.\n" + table(rows.rows_of_table(), rows.title, ()),
            longest,
            tuple(self.tried),
        )


def least_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The smallest number for which ``fits`` is true, of 0 to ``most``, where it is true of ``most`` and above it."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Leaves torch's random numbers as they were, whatever is drawn in a simulation."""
    with torch.random.fork_rng(devices=[]):
        yield
