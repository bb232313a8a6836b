"""A budget of memory: the fastest settings with which a training step fits into it, found without running one."""

from .planner import plan
from .result import Candidate, Plan

__all__ = ["Candidate", "Plan", "plan"]
