"""Methods, backbones and seeds under an equal budget: runs, scores, one table and one picture."""

from coma.config.compare import CompareConfig, Entry
from pretrain.sweep.plan import Cost, steps_for
from pretrain.sweep.results import Group, Result, groups
from pretrain.sweep.sweep import SweepResult, compare

__all__ = [
    "CompareConfig",
    "Cost",
    "Entry",
    "Group",
    "Result",
    "SweepResult",
    "compare",
    "groups",
    "steps_for",
]
