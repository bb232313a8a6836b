"""Peers' own tests, unchanged, on patched models: ``python -m benchmarks.peers``."""
