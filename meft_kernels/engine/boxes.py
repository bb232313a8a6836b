"""Boxes: mappings among a layer's arguments by which layers hand tensors to later ones, beside the hidden states.

Gemma's layers share keys and values so. A layer that is computed again must find in its box what was in it then, and
gradients must go through it: what is in a box goes into a call as arguments, and what the layer writes comes out of it
as something that it returns.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

Content = dict[str, dict[Any, Any]]
"""What is in each box, by the argument's name."""


class Boxes:
    """The boxes of one layer's calls.

    Args:
        names: of the arguments.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._types: dict[str, Any] = {}

    def open(self, kwargs: dict[str, Any]) -> dict[str, MutableMapping[Any, Any]]:
        """Take the boxes out of a call's arguments, by name; their content stays in their place."""
        found = {name: kwargs[name] for name in self.names if isinstance(kwargs.get(name), Mapping)}
        for name, box in found.items():
            self._types[name] = type(box)
            kwargs[name] = dict(box)
        return found

    def closed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with new boxes around the content, for the layer to read and to write into."""
        if not self.names:
            return kwargs
        content = self._content(kwargs)
        return {**kwargs, **{name: self._types[name](dict(held)) for name, held in content.items()}}

    def written(self, before: dict[str, Any], after: dict[str, Any]) -> Content:
        """What a layer that was called with ``after``, which is ``closed(before)``, put into its boxes."""
        return {
            name: {key: value for key, value in after[name].items() if value is not held.get(key)}
            for name, held in self._content(before).items()
        }

    def _content(self, kwargs: dict[str, Any]) -> Content:
        return {name: kwargs[name] for name in self.names if name in self._types and isinstance(kwargs.get(name), dict)}


def put_back(boxes: dict[str, MutableMapping[Any, Any]], extras: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Put what a layer wrote, the last of what it returned beside hidden states, into the model's own boxes.

    Returns:
        The rest: None where the layer returned hidden states bare.
    """
    if not boxes:
        return extras
    assert extras is not None
    *rest, (bare, written) = extras
    for name, values in written.items():
        boxes[name].update(values)
    return None if bare else tuple(rest)
