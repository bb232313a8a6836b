"""What the rivals are compared on: a model, texts, and what is asked of it, with a recipe for each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .labelled import LabelledTexts
from .recipes import Recipe, recipe_for
from .tasks import LanguageTask, Task
from .texts import load_texts

LANGUAGE = "next-token"


@dataclass(frozen=True)
class Case:
    """One column of a comparison.

    Attributes:
        model: a name, hub id, folder or GGUF file; see :func:`meft_kernels.pretrained.find_model`.
        data: see :func:`meft_kernels.comparison.texts.load_texts`.
        language: train on the texts' own tokens, and score their loss, instead of classifying.
    """

    model: str
    data: str
    language: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        """``model:data``, or ``model:data:next-token``.

        Raises:
            ValueError: it is neither.
        """
        parts = text.split(":")
        if len(parts) not in (2, 3) or not all(parts) or parts[2:] not in ([], [LANGUAGE]):
            raise ValueError(f"a case is model:data or model:data:{LANGUAGE}, not {text!r}")
        return cls(parts[0], parts[1], bool(parts[2:]))

    def __str__(self) -> str:
        return ":".join([self.model, self.data, *([LANGUAGE] if self.language else [])])

    @property
    def folder(self) -> str:
        """A name for a folder of its results."""
        return "-".join(part.strip("/").replace("/", "_") for part in str(self).split(":"))

    def texts(self, recipe: Recipe, train: int | None, seed: int) -> LabelledTexts:
        """The texts, split by ``seed``."""
        return load_texts(self.data, held_out=recipe.held_out, train=train, seed=seed)

    def task(self, max_length: int = 128) -> Task:
        """What is asked of the model.

        Raises:
            ValueError: the model cannot be asked that.
        """
        if self.language:
            return LanguageTask(self.model, max_length=max_length)
        return Task.of(self.model, load_texts(self.data, held_out=1, train=1), max_length=max_length)

    def recipe(self, task: Task) -> Recipe:
        """How long and on what; for language, few steps that say enough about a loss."""
        recipe = recipe_for(causal=task.causal)
        if self.language:
            return dataclasses.replace(recipe, steps=60, batch_size=4, held_out=64)
        return recipe


CASES = (
    Case("minilm", "rotten_tomatoes"),
    Case("minilm", "imdb"),
    Case("smollm2", "rotten_tomatoes"),
    Case("smollm2", "imdb", language=True),
)
"""Those that need no network."""
