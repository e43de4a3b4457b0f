"""The flow model of Shapes: how it is made, and the one that ships."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lit_align.backbones import StableDiffusion3Backbone
from lit_align.samplers.flow import FlowSDE
from lit_align.shapes import CLIP, FLOW_PIPELINE, PIPELINE
from lit_align.shapes.recipe import flow, training
from lit_align.shapes.recipe.clip import load_clip, tokenize
from lit_align.shapes.recipe.flow import FlowStage, Teacher, embed, make_transformer, with_projection
from lit_align.shapes.recipe.images import numpy_rng
from lit_align.shapes.recipe.pipeline import load_pipeline, save_flow_pipeline
from lit_align.shapes.recipe.quality import FLOW_RECOMMENDED, Sampling, draw, rates, sample
from lit_align.shapes.recipe.training import Batches, Budget, fit
from lit_align.shapes.recipe.unet import make_scheduler, make_unet
from lit_align.shapes.recipe.vae import make_vae
from lit_align.shapes.world import PromptSpace

PROMPTS = ["two red stars and a blue circle on a white background", "a star"]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer", model_max_length=flow.POSITIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """An untrained pipeline as the recipe writes it, but of one block, which is not the identity."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "LAYERS", 1)
        transformer = make_transformer()
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.1)
    tower = CLIPTextModel.from_pretrained(PIPELINE, subfolder="text_encoder")
    text = with_projection(tower, load_clip(CLIP).text_projection)
    place = tmp_path_factory.mktemp("flow") / "flow"
    save_flow_pipeline(place, tokenizer, text, make_vae(), transformer)
    return place


def test_no_caption_is_cut(tokenizer: CLIPTokenizer) -> None:
    rng = numpy_rng(0, "length")
    space = PromptSpace(["pair", "relation"])
    prompts = [space[int(i)] for i in rng.integers(len(space), size=2000)]
    longest = max(len(ids) for ids in tokenizer(prompts).input_ids)
    assert longest == flow.POSITIONS


def test_the_teacher_says_noise_minus_image() -> None:
    """A denoiser that is right, asked at a state of the flow that has its scale."""
    scheduler = make_scheduler()
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(5, 16, 8, 8, generator=generator) for _ in range(2))
    steps = torch.tensor([1, 100, 500, 800, 998])
    ratio = (1 / scheduler.alphas_cumprod[steps] - 1).sqrt()
    sigmas = ratio / (1 + ratio)
    asked = {}

    class Right:
        def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, states: object) -> SimpleNamespace:
            asked.update(noisy=noisy, timesteps=timesteps)
            return SimpleNamespace(sample=scheduler.get_velocity(image, noise, steps))

    level = sigmas[:, None, None, None]
    state = (1 - level) * image + level * noise
    velocities = Teacher(Right(), scheduler).velocities(state, sigmas, torch.zeros(()))  # type: ignore[arg-type]
    assert asked["timesteps"] == pytest.approx(steps, abs=2e-2)
    assert asked["noisy"] == pytest.approx(scheduler.add_noise(image, noise, steps), abs=1e-4)
    assert velocities == pytest.approx(noise - image, abs=1e-4)


def make_stage(budget: Budget, kind: type[FlowStage] = FlowStage) -> FlowStage:
    """The whole model, on latents that are noise, with a teacher whose velocity is known from the state."""
    tower = CLIPTextModel(
        CLIPTextConfig(hidden_size=128, projection_dim=128, num_hidden_layers=2, num_attention_heads=4)
    )
    text = with_projection(tower, torch.nn.Linear(128, tower.config.projection_dim, bias=False))
    latents, tokens = torch.randn(256, 16, 8, 8).half(), torch.zeros(256, 24, dtype=torch.long)
    unet = make_unet().requires_grad_(False)
    torch.nn.init.zeros_(unet.conv_out.weight)  # it says v = 0: its velocity is known from the state alone
    torch.nn.init.zeros_(unet.conv_out.bias)
    teacher = Teacher(unet, make_scheduler())
    return kind(text, make_transformer(), teacher, latents, tokens, tokens[0], budget)


def test_the_transformer_begins_with_a_velocity_of_0() -> None:
    stage = make_stage(Budget(1.0))
    torch.manual_seed(0)
    with torch.no_grad():
        errors = stage.errors(torch.arange(64))
    # With v = 0 the velocity is (sigma - (1 - sigma)) / scale^2 times a state of variance scale^2.
    sigmas = (torch.randn(100_000) + flow.MEAN).sigmoid()
    expected = ((2 * sigmas - 1) ** 2 / ((1 - sigmas) ** 2 + sigmas**2)).mean()
    assert errors.mean() == pytest.approx(float(expected), rel=0.1)


@pytest.mark.slow
def test_an_interrupted_stage_goes_on_with_both_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", timedelta(0))

    class Interrupted(FlowStage):
        def on_train_batch_end(self, outputs: object, batch: torch.Tensor, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            if self.global_step == 2:
                raise KeyError("the plug is pulled")

    budget, batches = Budget(60.0, steps=3), partial(Batches, 256, 4, 0)
    with pytest.raises(KeyError):
        fit(make_stage(budget, Interrupted), batches(), tmp_path, "32-true")
    stage = make_stage(budget)
    fit(stage, batches(), tmp_path, "32-true")
    assert stage.global_step == 4  # the last at a rate of 0
    muon, adamw = stage.trainer.optimizers
    assert {float(state["step"]) for state in adamw.state.values()} == {4.0}
    trained = [weight for one in (muon, adamw) for group in one.param_groups for weight in group["params"]]
    every = [*stage.model["transformer"].parameters()]
    assert {id(weight) for weight in trained} == {id(weight) for weight in every}
    assert len(trained) == len(every)
    assert len(muon.state) + len(adamw.state) == len(every)  # DDP would wait for one without a gradient
    assert all(torch.isfinite(weight).all() for weight in every)
    assert stage.model["transformer"].proj_out.weight.any()


def test_one_more_layer_changes_nothing_that_is_read() -> None:
    clip = load_clip(CLIP)
    tokens = torch.randint(1, 600, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tower = clip.text_model(input_ids=tokens, output_hidden_states=True)
        text = with_projection(clip.text_model, clip.text_projection)
        output = text(input_ids=tokens, output_hidden_states=True)
    assert torch.equal(output.hidden_states[-2], tower.hidden_states[-1])
    assert torch.equal(output.text_embeds, clip.text_projection(tower.pooler_output))


def test_the_text_is_embedded_as_in_the_pipeline(folder: Path, tokenizer: CLIPTokenizer) -> None:
    pipeline = load_pipeline(folder)
    states, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    with torch.no_grad():
        given = embed(
            pipeline.text_encoder(input_ids=tokenize(tokenizer, PROMPTS), output_hidden_states=True)
        )
    assert states.shape == (2, flow.POSITIONS, 256)
    assert torch.equal(given["encoder_hidden_states"], states)
    assert torch.equal(given["pooled_projections"], pooled)


def test_the_backbone_draws_what_the_pipeline_draws(folder: Path) -> None:
    pipeline = load_pipeline(folder)
    expected = sample(pipeline, PROMPTS, Sampling(3, 0.0, 2.0), 0)
    backbone = StableDiffusion3Backbone(str(folder))
    assert backbone.is_shapes
    sampler = backbone.make_sampler(partial(FlowSDE, num_steps=3, noise_level=0.0))
    policy = backbone.policy(sampler, backbone.encode(PROMPTS), guidance=2.0)
    x = torch.cat([torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    with torch.no_grad():
        for k in range(3):
            x = policy(x, k).mean
        images = backbone.decode(x)
    assert (images - expected).abs().max() < 1e-4


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return load_pipeline(FLOW_PIPELINE)


def test_the_flow_pipeline_loads_in_float32_as_it_is(pipeline: StableDiffusion3Pipeline) -> None:
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    assert pipeline.text_encoder_3 is None
    assert pipeline.tokenizer.model_max_length == flow.POSITIONS
    assert pipeline.scheduler.config.shift == 1.0


def test_it_has_the_autoencoder_and_the_text_tower_of_the_other_pipeline(
    pipeline: StableDiffusion3Pipeline,
) -> None:
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    assert pipeline.vae.config.scaling_factor == vae.config.scaling_factor
    assert (vae.config.shift_factor, pipeline.vae.config.shift_factor) == (None, 0.0)  # this one adds it
    tower = CLIPTextModel.from_pretrained(PIPELINE, subfolder="text_encoder").state_dict()
    assert pipeline.vae.state_dict().keys() == vae.state_dict().keys()
    for text in (pipeline.text_encoder, pipeline.text_encoder_2):
        *_, last = text.text_model.encoder.layers  # the tower has no such layer, and it adds nothing
        assert len(text.text_model.state_dict()) == len(tower) + len(last.state_dict())
        assert not any(
            part.any() for one in (last.self_attn.out_proj, last.mlp.fc2) for part in one.parameters()
        )
    pairs = [(pipeline.vae.state_dict(), vae.state_dict())]
    pairs += [
        (text.text_model.state_dict(), tower) for text in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    for own, other in pairs:
        assert all(torch.equal(own[name], value) for name, value in other.items())


@pytest.mark.slow  # test_weights.py has the samples of the other pipeline
def test_flow_samples_follow_their_prompts(pipeline: StableDiffusion3Pipeline) -> None:
    captions, _ = draw(64, 3, "samples")
    images = sample(pipeline, captions, FLOW_RECOMMENDED, 3)
    shares, others = rates(images, captions), rates(images, captions[1:] + captions[:1])
    assert shares["background"] > 0.8 > others["background"] + 0.4
    assert shares["colours"] > others["colours"] + 0.15
    assert shares["score"] > others["score"] + 0.15  # .35 and .12


@pytest.mark.slow
def test_zeros_in_the_place_of_t5_do_no_harm(pipeline: StableDiffusion3Pipeline) -> None:
    captions, _ = draw(16, 3, "samples")
    without = rates(sample(pipeline, captions, Sampling(5, 0.0, 3.0), 3), captions)
    images = pipeline(
        captions,
        num_inference_steps=5,
        sigmas=[1.0, 0.8, 0.6, 0.4, 0.2],
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(3 * 1_000_003 + i) for i in range(16)],
        output_type="pt",
    ).images
    assert rates(images, captions)["score"] > without["score"] - 0.1
