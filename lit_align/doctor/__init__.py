"""Finds what makes runs fail before they start: checks the configuration, and makes a small trial."""

from lit_align.doctor.finding import Finding
from lit_align.doctor.look import Asked, look
from lit_align.doctor.trial import Trial
from lit_align.doctor.verdicts import judge

__all__ = ["Asked", "Finding", "Trial", "judge", "look"]
