"""Chains of a policy against the loop of diffusers: its pipelines, its scheduler, its random draws."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.distributions import Normal

from lit_align.backbones import DiffusersBackbone, StableDiffusionBackbone, StableDiffusionXLBackbone
from lit_align.rollout import rollout
from lit_align.samplers import DDIM
from tests.backbones.conftest import PROMPTS, Family, latents

STEPS, GUIDANCE = 4, 3.0


class Recording(DDIMScheduler):
    """Keeps the mean of each step, the state that is drawn, and its log-probability."""

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        still = torch.zeros_like(sample)
        mean = super().step(model_output, timestep, sample, eta=eta, variance_noise=still).prev_sample
        drawn = super().step(model_output, timestep, sample, eta=eta, generator=generator).prev_sample
        before = timestep - self.config.num_train_timesteps // self.num_inference_steps
        std = eta * self._get_variance(timestep, before) ** 0.5
        self.seen.append((mean, drawn, Normal(mean, std).log_prob(drawn).flatten(1).sum(1)))
        return (drawn,)


@pytest.mark.parametrize(
    ("backbone", "model"),
    [
        (StableDiffusionBackbone, "tiny"),
        (StableDiffusionBackbone, "tiny_v"),
        (StableDiffusionXLBackbone, "tiny_xl"),
    ],
)
def test_means_and_log_probabilities_are_those_of_the_loop_of_diffusers(
    backbone: type[DiffusersBackbone], model: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    ours, pipeline = backbone(str(folder)), Family(backbone, folder, ()).pipeline()
    scheduler: Any = Recording.from_config(pipeline.scheduler.config)
    scheduler.seen, pipeline.scheduler = [], scheduler
    x, height, width = latents(ours), *ours.size
    images = pipeline(
        PROMPTS,
        latents=x,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        eta=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        height=height,
        width=width,
        output_type="pt",
    ).images
    sampler = ours.make_sampler(partial(DDIM, num_steps=STEPS, eta=1.0))
    with torch.no_grad():
        policy = ours.policy(sampler, ours.encode(PROMPTS), GUIDANCE)
        draws = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        chain = rollout(policy, x, STEPS, draws)
        torch.testing.assert_close(ours.decode(chain.states[-1]), images, atol=1e-5, rtol=0)
    means, states, log_probs = (torch.stack(part) for part in zip(*scheduler.seen, strict=True))
    torch.testing.assert_close(chain.means, means, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chain.states[1:], states, atol=1e-5, rtol=1e-5)
    elements = x[0].numel()
    torch.testing.assert_close(chain.log_probs / elements, log_probs / elements, atol=1e-5, rtol=1e-5)
    assert log_probs.abs().min() > 1
