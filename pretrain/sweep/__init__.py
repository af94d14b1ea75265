"""Methods, backbones and seeds under an equal budget: run, measured, put in one table and one picture."""

from pretrain.sweep.plan import Comparison, Cost, Entry, Protocol, Unit, steps_for
from pretrain.sweep.results import Group, Result, groups, mean_and_deviation, reach
from pretrain.sweep.sweep import Compared, compare

__all__ = [
    "Compared",
    "Comparison",
    "Cost",
    "Entry",
    "Group",
    "Protocol",
    "Result",
    "Unit",
    "compare",
    "groups",
    "mean_and_deviation",
    "reach",
    "steps_for",
]
