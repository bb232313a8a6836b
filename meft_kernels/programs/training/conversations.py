"""Conversations and instructions as data sets write them, made one form: what a chat template takes."""

from __future__ import annotations

from typing import Any

KEYS = (("role", "content"), ("from", "value"))
"""How a message names who speaks and what is said: as chat templates have it, and as ShareGPT does."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_KNOWN = ("system", "user", "assistant", "tool")

# As the data of Stanford Alpaca were trained on, for models without a chat template.
_TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_PAIRED = ", paired with an input that provides further context"


def conversation(value: Any) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``, whichever of :data:`KEYS` they came with.

    Args:
        value: what the column holds in one row.

    Raises:
        ValueError: it is no list of messages, or one of them lacks who speaks or what is said.
    """
    if not isinstance(value, list):
        raise ValueError(f"it holds {value!r:.80}, not a list of messages")
    return [_message(message, number) for number, message in enumerate(value, 1)]


def _message(message: Any, number: int) -> dict[str, Any]:
    keys = next((keys for keys in KEYS if isinstance(message, dict) and message.get(keys[0])), None)
    if keys is None:
        raise ValueError(f"message {number} says neither {' nor '.join(who for who, _ in KEYS)}: {message!r:.80}")
    who, what = keys
    # Calls of tools may come without a word.
    if message.get(what) is None and not message.get("tool_calls"):
        raise ValueError(f"message {number} has no {what}: {message!r:.80}")
    if keys == KEYS[0]:
        return dict(message)
    role = _ROLES.get(message[who], message[who])
    if role not in _KNOWN:
        raise ValueError(f"message {number} is from {message[who]!r}; known are {', '.join((*_ROLES, *_KNOWN))}")
    return {"role": role, "content": message[what]}


def instruction_prompt(instruction: str, given: str, *, chat: bool) -> str:
    """What comes before the answer: the user's turn of a conversation, or Alpaca's prompt where there is no template.

    Args:
        instruction: what is to be done.
        given: with what; may be empty.
        chat: for the model's chat template, which marks where the answer begins.
    """
    if chat:
        return f"{instruction}\n\n{given}" if given else instruction
    said = _TASK.format(_PAIRED if given else "") + f"\n\n### Instruction:\n{instruction}\n\n"
    return said + (f"### Input:\n{given}\n\n" if given else "") + "### Response:"
