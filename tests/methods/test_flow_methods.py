"""The methods on flow models: what test_protocol.py asks of each, for each family of them."""

import warnings
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.callbacks import BatchCheckpoint
from lit_align.errors import ConfigError
from lit_align.methods import (
    AlignmentModule,
    AlignPropModule,
    DDPOModule,
    DPOModule,
    MSDDAModule,
    NFTModule,
    PRDPModule,
    SFTModule,
    SPINModule,
)
from lit_align.samplers import DDIM, FlowSDE
from tests.methods.build import (
    assert_close_gradients,
    assert_same,
    data_for,
    fit,
    make,
    randomise,
    trained,
    trainer,
)
from tests.methods.recorders import Killed, Recorder

MODELS = ("sd3", "sd3_without_t5", "flux", "schnell", "klein", "z_image")
METHODS = (
    DDPOModule,
    NFTModule,
    PRDPModule,
    AlignPropModule,
    MSDDAModule,
    SPINModule,
    DPOModule,
    SFTModule,
)
OF_PAIRS = (SPINModule, DPOModule, SFTModule)

SAMPLER = partial(FlowSDE, num_steps=3, noisy_steps=2)

CASES = [
    pytest.param(method, model, id=f"{method.__name__}-{model}") for model in MODELS for method in METHODS
]


def flow(method: Any, model: str, folder: Callable[[str], Path], **options: Any) -> AlignmentModule:
    """A module on a tiny flow model; the images of pairs are square, others are not."""
    size = 32 if issubclass(method, OF_PAIRS) else (16, 32)
    given: dict[str, Any] = {"size": size, "sampler": SAMPLER, "guidance": 2.0} | options
    module: AlignmentModule = make(method, folder(model), **given)
    randomise(module, 0.1)
    return module


def data(module: AlignmentModule) -> Any:
    if isinstance(module, OF_PAIRS):
        return data_for(module, resolution=32)
    return data_for(module, prompts=2, images=2)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "model"), CASES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    method: Any, model: str, flow_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    whole, cut, resumed = (flow(method, model, flow_folder) for _ in range(3))
    start = trained(whole)
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 1}
    one = fit(whole, tmp_path / "whole", 2, data=data(whole), **options)
    killed = Recorder(4)
    with pytest.raises(Killed):
        fit(cut, tmp_path / "cut", 2, BatchCheckpoint(), data=data(cut), recorder=killed, **options)
    (last,) = (tmp_path / "cut").rglob("last.ckpt")
    rest = fit(resumed, tmp_path / "cut", 2, data=data(resumed), ckpt_path=last, **options)
    assert_same(trained(whole), trained(resumed))
    assert not all(torch.equal(*pair) for pair in zip(start, trained(whole), strict=True))
    assert one.index == killed.index + rest.index
    losses = [[metrics["train/loss"] for metrics in some.logged] for some in (one, killed, rest)]
    assert losses[0] == losses[1] + losses[2]
    assert all(torch.tensor(losses[0]).isfinite())
    assert "kl" in whole.latest
    (folder,) = [tmp_path / "adapter"]
    whole.export(folder)
    assert list(folder.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "model"), CASES)
def test_two_ranks_are_one(
    method: Any, model: str, flow_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recorded = []
    for devices in (1, 2):
        descent = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
        module = flow(method, model, flow_folder, optimizer=descent)
        recorded.append(fit(module, tmp_path / str(devices), 3, data=data(module), devices=devices))
    assert len(recorded[0].gradients) == len(recorded[1].gradients) >= 3
    for alone, together in zip(recorded[0].gradients, recorded[1].gradients, strict=True):
        assert_close_gradients(together, alone)


# ---- samplers of training and evaluation


def test_evaluation_may_have_a_sampler_of_its_own(flow_folder: Callable[[str], Path], tmp_path: Path) -> None:
    module = flow(DDPOModule, "sd3", flow_folder, eval_sampler=partial(FlowSDE, num_steps=5, noise_level=0.0))
    steps: list[tuple[str, int]] = []
    sample = module.sample

    def recording(policy: Any, batch: Any, purpose: str, *rest: Any, **options: Any) -> Any:
        samples = sample(policy, batch, purpose, *rest, **options)
        steps.append((purpose, len(samples.trajectory.means)))
        return samples

    module.sample = recording  # type: ignore[method-assign]
    recorder = fit(module, tmp_path, 2, data=data(module), limit_val_batches=1)
    assert steps == [("validation", 5), ("rollout", 3), ("rollout", 3), ("validation", 5)]
    assert {"drift"} == {"kl", "drift"} & set(module.latest)  # without noise there is no KL
    assert recorder.logged[-1]["train/kl"] > 0
    assert module.sampler.num_steps == 3
    assert module.generate(["a star"], seed=1).shape == (1, 3, 16, 32)
    trainer(tmp_path, 1, limit_predict_batches=1).predict(module, data(module))
    trainer(tmp_path, 1, limit_test_batches=1).test(module, data(module), verbose=False)
    assert steps[4:] == [("predict", 5)] * 2 + [("test", 5)] * 2


def test_experts_with_samplers_of_their_own_are_not_given_another(flow_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"eval_sampler"):
        flow(MSDDAModule, "sd3", flow_folder, samplers={"red": SAMPLER}, eval_sampler=SAMPLER)


def test_exact_chains_of_images_need_a_rule_that_keeps_the_forward_process(
    flow_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"set sampler\.init_args\.rule to precise, or exact to false"):
        flow(SPINModule, "sd3", flow_folder, exact=True)
    module = flow(
        SPINModule, "sd3", flow_folder, exact=True, sampler=partial(FlowSDE, num_steps=3, rule="precise")
    )
    recorder = fit(module, tmp_path, 1, data=data(module))
    assert recorder.logged[0]["train/loss"] > 0


def test_a_method_that_needs_noise_says_which_option_gives_it(flow_folder: Callable[[str], Path]) -> None:
    still = partial(FlowSDE, num_steps=3, noise_level=0.0)
    for method in (DDPOModule, PRDPModule):
        with pytest.raises(ConfigError, match=r"noise_level is 0.*init_args\.noise_level to null"):
            flow(method, "sd3", flow_folder, sampler=still)


def test_a_diffusion_sampler_does_not_fit_a_flow_model_nor_the_reverse(
    flow_folder: Callable[[str], Path], tiny: Path
) -> None:
    with pytest.raises(ConfigError, match=r"FlowMatchEulerDiscreteScheduler.*class_path to FlowSDE"):
        flow(DDPOModule, "sd3", flow_folder, sampler=partial(DDIM, num_steps=3))
    with pytest.raises(ConfigError, match=r"PNDMScheduler, of a diffusion model.*class_path to DDIM"):
        make(DDPOModule, tiny, sampler=SAMPLER)


@pytest.mark.parametrize("method", [NFTModule, SFTModule, DPOModule])
@pytest.mark.parametrize(("model", "wanted"), [("flux", {2.0}), ("schnell", {1.0})])
def test_a_model_that_is_told_the_guidance_is_trained_with_that_of_its_images(
    method: Any, model: str, wanted: set[float], flow_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    module = flow(method, model, flow_folder)
    predict, told = module.backbone.predict, []

    def recording(*given: Any, **named: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            told.append(signature(predict).bind(*given, **named).arguments.get("guidance", 1.0))
        return predict(*given, **named)

    module.backbone.predict = recording  # type: ignore[method-assign]
    fit(module, tmp_path, 1, data=data(module))
    assert set(told) == wanted


def test_a_run_tells_of_guidance_that_its_training_has_not(
    flow_folder: Callable[[str], Path], tmp_path: Path
):
    for model, told in (("schnell", True), ("flux", False)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            module = flow(NFTModule, model, flow_folder)
            fit(module, tmp_path / model, 1, data=data(module))
        texts = [str(one.message) for one in found]
        assert any("drawn with guidance 2" in text and "set it to 1" in text for text in texts) == told
