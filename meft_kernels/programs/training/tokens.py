"""Tokens of one row, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from .columns import Layout
from .conversations import instruction_prompt

IGNORED = -100
"""The label of a token that is not learnt; torch's and transformers' own convention."""


@dataclass
class Encoder:
    """Rows of plain columns as the model takes them, at most ``max_length`` tokens each."""

    tokenizer: Any
    max_length: int
    cut: int = field(default=0, init=False)
    """Of the texts so far, how many were longer."""

    def for_layout(self, layout: Layout) -> Callable[[tuple[Any, ...]], dict[str, Any] | None]:
        """The function for a row of this layout; it returns None where nothing is left to learn.

        Raises:
            ValueError: conversations, and the tokenizer has no chat template.
        """
        if layout.task == "classification":
            return self.labelled
        first = layout.needed[0]
        if first in ("messages", "conversations"):
            self._check_template()
            return self.conversation
        if first == "prompt":
            return self.completion
        return self.instruction if first == "instruction" else self.text

    def labelled(self, row: tuple[str, int]) -> dict[str, Any] | None:
        """A text and its class."""
        encoded = dict(self.tokenizer(row[0], truncation=True, max_length=self.max_length))
        if len(encoded["input_ids"]) >= self.max_length:
            self.cut += len(self.tokenizer(row[0], verbose=False).input_ids) > self.max_length
        return {**encoded, "labels": row[1]} if encoded["input_ids"] else None

    def text(self, row: tuple[str]) -> dict[str, Any] | None:
        """Every token is learnt, and the end after them."""
        ids = self._ended(self.tokenizer(row[0]).input_ids)
        return self._made(ids, [True] * len(ids))

    def completion(self, row: tuple[str, str]) -> dict[str, Any] | None:
        """The completion is learnt, and the end after it."""
        prompt = self.prompt_ids(row[0])
        follows = self._ended(self.tokenizer(row[1], add_special_tokens=False).input_ids)
        return self._made(prompt + follows, [False] * len(prompt) + [True] * len(follows))

    def instruction(self, row: tuple[str, str, str]) -> dict[str, Any] | None:
        """The answer is learnt: what the assistant says, or what follows Alpaca's prompt without a chat template."""
        chat = self.tokenizer.chat_template is not None
        prompt, answer = instruction_prompt(row[0], row[1], chat=chat), row[2]
        if not chat:
            return self.completion((prompt, answer))
        return self.conversation(([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],))

    def conversation(self, row: tuple[list[dict[str, Any]]]) -> dict[str, Any] | None:
        """The assistant's turns are learnt, as the tokenizer's chat template writes them.

        Raises:
            ValueError: there is no template, or it changes earlier turns when another follows, so that what the
                assistant says cannot be told from the rest.
        """
        messages = row[0]
        self._check_template()
        whole = self._render(messages)
        learnt = [False] * len(whole)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], add_generation_prompt=True)
            after = self._render(messages[: turn + 1])
            if whole[: len(before)] != before or whole[: len(after)] != after:
                raise ValueError(
                    "the chat template of this model writes a conversation's beginning otherwise when more follows; "
                    "use the columns prompt and completion"
                )
            learnt[len(before) : len(after)] = [True] * (len(after) - len(before))
        return self._made(whole, learnt)

    def prompt_ids(self, prompt: str) -> list[int]:
        """What a completion follows: a special token at the end (BERT's [SEP], T5's) would stand between the two."""
        ids = list(self.tokenizer(prompt).input_ids)
        end = self.tokenizer.eos_token_id
        return ids[:-1] if ids and ids[-1] == end and not prompt.endswith(self.tokenizer.eos_token) else ids

    def chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """What the assistant's next turn follows.

        Raises:
            ValueError: there is no chat template, or it refuses the messages.
        """
        self._check_template()
        return self._render(messages, add_generation_prompt=True)

    def _check_template(self) -> None:
        if self.tokenizer.chat_template is None:
            raise ValueError("this model's tokenizer has no chat template: use the columns prompt and completion")

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        if not messages:
            return []
        try:
            made = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        except TemplateError as error:
            raise ValueError(f"the chat template of this model does not take a conversation: {error}") from None
        return list(made["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _made(self, ids: list[int], learnt: list[bool]) -> dict[str, Any] | None:
        whole = len(ids)
        ids, learnt = ids[: self.max_length], learnt[: self.max_length]
        if not any(learnt[1:]):  # the first token is predicted from nothing
            return None
        self.cut += len(ids) < whole
        labels = [token if wanted else IGNORED for token, wanted in zip(ids, learnt, strict=True)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
