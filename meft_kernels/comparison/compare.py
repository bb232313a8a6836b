"""A whole comparison: every case, rival and seed, one record each, skipping what an earlier run has left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..programs.training.progress import progress
from .rivals import Rival
from .runs import Setup, before, is_done, run, settings_before, time_rivals, timing_settings


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        setups: one a case.
        rivals: all of them run in every case; a dashed one with the first seed alone, for it learns what others learn.
        seeds: of texts, new heads, adapters and dropout.
        rounds: of interleaved steps for the times; 0 for none.
        out: folder of the records.
        again: run what is there already, too.
    """

    setups: list[Setup]
    rivals: list[Rival]
    seeds: range
    rounds: int
    out: Path
    again: bool = False

    def run(self, console: Any) -> None:
        """Write every record that is not there yet, telling of each."""
        for setup in self.setups:
            recipe = setup.recipe
            said = f"{setup.case}, {setup.device}, {recipe.steps} steps of {recipe.batch_size}"
            console.print(said, highlight=False, markup=False)
            for seed in self.seeds:
                path = setup.path(self.out, "none", seed)
                if self._wanted(path, settings_before(setup, seed)):
                    before(setup, seed).write(path)
                for rival in self.rivals:
                    if seed == self.seeds[0] or not rival.dashed:
                        self._one(setup, rival, seed, console)
            self._times(setup)

    def _wanted(self, path: Path, settings: dict[str, Any]) -> bool:
        return self.again or not is_done(path, settings)

    def _one(self, setup: Setup, rival: Rival, seed: int, console: Any) -> None:
        path = setup.path(self.out, rival.name, seed)
        if not self._wanted(path, setup.settings_of(rival, seed)):
            return
        with progress(f"{rival.title}, seed {seed}", setup.recipe.steps) as on_step:
            record = run(setup, rival, seed, on_step)
        record.write(path)
        figures = record.figures
        said = figures.get("failed") or f"{figures['metric']} {figures['score']:.3f}"
        console.print(f"{rival.title}, seed {seed}: {said}", highlight=False, markup=False)

    def _times(self, setup: Setup) -> None:
        path = setup.timing_path(self.out)
        if not self.rounds or not self._wanted(path, timing_settings(setup, self.rivals, self.rounds)):
            return
        with progress("step times, interleaved", self.rounds + 1, loss=False) as on_step:
            time_rivals(setup, self.rivals, rounds=self.rounds, on_round=lambda: on_step(0.0)).write(path)
