"""The method: heads decide, a plan records, fixed and ragged runs follow it."""

from .calibration import Calibration
from .heads import AttentionRule, LifeHead
from .lives import Lives
from .model import SlimModel, wrap
from .plan import Plan
from .schedule import Cost, Schedule
from .spending import Flops, flops

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
