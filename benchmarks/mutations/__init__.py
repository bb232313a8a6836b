"""Breaks the engine on purpose, one place at a time, and tells which test notices; see ``__main__``."""
