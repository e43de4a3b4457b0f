"""Finds what makes runs fail before they start: by a look at the configuration, and by a trial in small."""

from lit_align.doctor.finding import Finding
from lit_align.doctor.look import Asked, look
from lit_align.doctor.trial import Trial
from lit_align.doctor.verdicts import judge

__all__ = ["Asked", "Finding", "Trial", "judge", "look"]
