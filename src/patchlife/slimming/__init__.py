"""The method: a scorer scores the patches once, a plan records the decision, fixed and adaptive runs follow it."""

from .calibration import Calibration
from .flop_report import Flops, flops
from .lives import Lives
from .model import SlimModel, wrap
from .plan import Plan
from .schedule import Cost, Schedule
from .scorers import AttentionRule, LifeHead

__all__ = [
    "AttentionRule",
    "Calibration",
    "Cost",
    "Flops",
    "LifeHead",
    "Lives",
    "Plan",
    "Schedule",
    "SlimModel",
    "flops",
    "wrap",
]
