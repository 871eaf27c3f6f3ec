"""Measure what two models can learn from each other: `diagnose`, and the command `python -m ctcd_trainer.diagnose`."""

from .diagnosis import Diagnosis
from .pairs import diagnose

__all__ = ["Diagnosis", "diagnose"]
