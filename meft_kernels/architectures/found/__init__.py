"""Specs found, not written: of models for which there is no family file."""

from .spec import FoundArchitecture, FoundLayers, find

__all__ = ["FoundArchitecture", "FoundLayers", "find"]
