"""Samplers: from a network's prediction to the Gaussian of the next state, on a noise schedule.

A sampler has no state. It is built from a diffusers scheduler config (the backbone hands it over; a user
never writes it) and from what the user chooses: how many steps, how much noise.
"""

from lit_align.samplers.base import Sampler
from lit_align.samplers.ddim import DDIM
from lit_align.samplers.flow import FlowSchedule, FlowSDE
from lit_align.samplers.schedule import DiffusionSchedule, NoiseSchedule

__all__ = ["DDIM", "DiffusionSchedule", "FlowSDE", "FlowSchedule", "NoiseSchedule", "Sampler"]
