"""The method: a scorer scores the patches once, a plan records the decision, fixed and adaptive runs follow it."""

from .calibration import Calibration
from .cost import Cost
from .flop_report import Flops, flops
from .lives import Lives
from .model import SlimModel
from .plan import Plan
from .schedule import Schedule
from .scorers import AttentionScorer, Scorer
from .wrap import slim_model, variant, wrap

__all__ = [
    "AttentionScorer",
    "Calibration",
    "Cost",
    "Flops",
    "Lives",
    "Plan",
    "Schedule",
    "Scorer",
    "SlimModel",
    "flops",
    "slim_model",
    "variant",
    "wrap",
]
