"""Specs for models that nobody wrote a file for: found in a model's structure, and proven on the model itself."""

from .layers import FoundLayers
from .spec import FoundArchitecture, find
from .without_data import find_on_a_copy, has_no_data

__all__ = ["FoundArchitecture", "FoundLayers", "find", "find_on_a_copy", "has_no_data"]
