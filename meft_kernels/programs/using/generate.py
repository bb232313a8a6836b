"""Continuations of prompts, which are written as the training wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..training.conversations import instruction_prompt
from ..training.tokens import Encoder

_CHATS = ("messages", "conversations")


@dataclass(frozen=True)
class Prompts:
    """How prompts become tokens."""

    tokenizer: Any
    layout: str | None
    """What the training's rows held first, None if that is not known."""
    chat: bool | None = None
    """As the user's turn of a conversation, or as it is; None: as in training."""

    def ids(self, prompt: str, given: str = "") -> list[int]:
        """Tokens of one, up to where the answer begins.

        Args:
            prompt: or the instruction.
            given: with what an instruction is to be done; may be empty.

        Raises:
            ValueError: a conversation is wanted, and the tokenizer has no chat template, or one that refuses it.
        """
        encoder = Encoder(self.tokenizer, max_length=0)
        has_template = self.tokenizer.chat_template is not None
        instructed = self.layout == "instruction"
        chat = self.chat if self.chat is not None else self.layout in _CHATS or (instructed and has_template)
        if instructed or given:
            prompt = instruction_prompt(prompt, given, chat=chat)
        return encoder.chat_ids([{"role": "user", "content": prompt}]) if chat else encoder.prompt_ids(prompt)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float
    """0: always the likeliest."""
    top_p: float

    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``; the model's own defaults for sampling are put out of the way."""
        made: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            return {**made, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**made, "temperature": None, "top_p": None, "top_k": None}


def continuations(
    model: Any, tokenizer: Any, batches: Iterable[Sequence[list[int]]], sampling: Sampling
) -> Iterator[str]:
    """The text that follows each prompt in turn, up to its end.

    Args:
        model: in eval mode.
        tokenizer: with a padding token.
        batches: prompts as token ids.
        sampling: how to choose.
    """
    for prompts in batches:
        width = max(map(len, prompts))
        # On the left: what is generated follows the last token of a row.
        rows = [[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        with torch.no_grad():
            made = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                pad_token_id=tokenizer.pad_token_id,
                **sampling.options(),
            )
        yield from tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)


def check_lengths(model: Any, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Before the first is generated.

    Raises:
        ValueError: a prompt is empty, or with what is to follow longer than the model has positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(prompts, 1):
        if not ids:
            raise ValueError(f"prompt {number} has no tokens")
        if positions and len(ids) + new > positions:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, and with --max-new-tokens {new} more than the {positions} "
                "positions of this model"
            )
