"""Specs written by hand of families that have no file any more: what is found of them is held to these, bit for bit."""

from __future__ import annotations

from meft_kernels import ArchitectureSpec
from meft_kernels.architectures import find_architecture

from . import deberta_v2, distilbert, gpt2, gpt_neox, modernbert, vit

_BY_HAND = {
    model_type: module.SPEC
    for module in (deberta_v2, distilbert, gpt2, gpt_neox, modernbert, vit)
    for model_type in module.SPEC.model_types
}
FOUND = tuple(sorted(_BY_HAND))
"""Model types that the package finds, and these files know."""


def spec_of(model_type: str) -> ArchitectureSpec:
    """The spec that somebody wrote for a family: the package's, or the one here."""
    spec = find_architecture(model_type) or _BY_HAND[model_type]
    assert spec is not None
    return spec
