import torch

from lit_align.randomness import derive_seed, generator


def test_a_generator_is_a_pure_function_of_its_arguments():
    first = torch.randn(4, generator=generator(1, "rollout", 7))
    torch.manual_seed(123)
    assert torch.equal(first, torch.randn(4, generator=generator(1, "rollout", 7)))


def test_every_argument_matters_and_so_does_their_order():
    seeds = {
        derive_seed(1, "rollout", 7, 2),
        derive_seed(1, "rollout", 2, 7),
        derive_seed(1, "rollout", 72),
        derive_seed(1, "steps", 7, 2),
        derive_seed(2, "rollout", 7, 2),
        derive_seed(1, "rollout"),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbouring_images_are_uncorrelated():
    noise = torch.stack([torch.randn(4096, generator=generator(0, "rollout", i)) for i in range(16)])
    correlation = torch.corrcoef(noise) - torch.eye(16)
    assert correlation.abs().max() < 5 / 4096**0.5
