"""Rewards of a set of images, such as fairness and diversity.

After Zhang et al. 2024, "Large-scale Reinforcement Learning for Diffusion Models" (arXiv 2401.12244),
section 3.2. Shapes: ``B`` images, ``F`` features, ``n`` images of a set.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from lit_align.errors import ConfigError
from lit_align.pretrained import SHAPES, load_part, load_whole, shared
from lit_align.rewards.base import Reward, Scope, are_whole, domain_of, to_bytes
from lit_align.rewards.clip import CLIP_MODEL, CLIPCosine
from lit_align.shapes import CLASSIFIER as SHAPES_CLASSIFIER

Credit = Literal["leave_one_out", "shared"]


class SetReward(Reward):
    """A reward ``R(S)`` of a set ``S`` of images, shared out among them.

    ``R`` is a function of the sum of the images' features and of their number; a subclass gives the features
    and the function. Two rules say what one image gets:

    - ``shared``: ``R(S)``, the same for all, which is the paper's rule. A baseline that subtracts the mean of
      the set cancels it: the set of a prompt needs a normaliser over the batch (``BatchAdvantages``), the set
      of a batch one with a memory (``PerPromptAdvantages``) and prompts that come again.
    - ``leave_one_out``: ``R(S) - R(S without i)``. The expected policy gradient is the same, since the second
      term does not depend on image ``i``; its variance was 3.5 times smaller with sixteen images and four
      uneven classes (a test). Our own addition.

    An image whose features are not finite is in no set and has no score. The others of its set have one if
    at least :attr:`smallest` are left.

    What is reported of an image is ``R(S)`` under both rules: a mean of leave-one-out credits does not
    describe the set (that of :class:`PairwiseDiversity` is always 0).

    With the scope ``"batch"`` the set is the whole batch, of all processes: then every process must score as
    often as the others. In validation and test that is one batch of ``eval_batch`` images times the
    processes, so metrics of runs with other numbers are of sets of another size.

    Args:
        credit: The rule.

    Raises:
        ConfigError: There is no such rule.
    """

    differentiable = False
    scope: Scope = "group"
    DEFINED_FROM: ClassVar[int]
    """Images from which ``R`` is defined."""

    def __init__(self, credit: Credit) -> None:
        super().__init__()
        if credit not in ("leave_one_out", "shared"):
            raise ConfigError(f"{type(self).__name__}: credit is {credit!r}; give leave_one_out or shared.")
        self.credit = credit

    @property
    def smallest(self) -> int:
        """Images that a set must have for a score: at least two."""
        return max(2, self.DEFINED_FROM + (self.credit == "leave_one_out"))

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """The features of which ``R`` takes the sum: ``(B, F)`` float64, on the CPU.

        A row of NaN is an image without the feature.
        """

    @abstractmethod
    def value(self, total: Tensor, count: Tensor) -> Tensor:
        """``R`` of sets with these sums of features ``(N, F)`` and numbers of images ``(N,)``: ``(N,)``."""

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """Credit of ``(B, 3, H, W)`` images; without ``groups`` they are one set (see :class:`Reward`)."""
        return self.shared_out(images, prompts, groups, columns)[0]

    @torch.no_grad()
    def shared_out(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Credit of each image, and ``R`` of the set that it is in; arguments as in :meth:`forward`."""
        features = self.features(images)
        own = slice(None)
        if self.scope == "batch":
            features, own = _of_all_processes(features)
        if self.scope == "batch" or groups is None:
            groups = torch.zeros(len(features), dtype=torch.long)
        credit, worth = self.credits(features, groups.cpu())
        return credit[own].float().to(images.device), worth[own].float().to(images.device)

    def credits(self, features: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Credit of each image, and ``R`` of its set.

        Args:
            features: ``(B, F)``, float64 so that counts are exact; NaN for an image that is in no set.
            groups: ``(B,)`` long, the number of each image's set.

        Returns:
            ``(B,)`` each; NaN for an image that is in no set, or in one of too few.
        """
        member = features.isfinite().all(dim=1)
        own = torch.where(member[:, None], features, 0.0)
        numbers, place = groups.unique(return_inverse=True)
        total = own.new_zeros(len(numbers), own.shape[1]).index_add(0, place, own)[place]
        count = own.new_zeros(len(numbers)).index_add(0, place, member.to(own))[place]
        worth = self.value(total, count)
        credit = worth - self.value(total - own, count - 1) if self.credit == "leave_one_out" else worth
        known = member & (count >= self.smallest)
        return torch.where(known, credit, torch.nan), torch.where(known, worth, torch.nan)


class StatisticalParity(SetReward):
    """Minus the distance of the shares of a classifier's classes among a prompt's images to wanted shares.

    ``R(S) = -||p - u||_2``, the paper's statistical parity (section 3.2; its word "norm" is taken as the
    root), or minus its square. With ``C`` classes and ``u = 1/C`` it lies between ``-sqrt(1 - 1/C)`` and 0.
    Images that are drawn with exactly the wanted shares still have ``E[SP^2] = (1 - 1/C) / n``: report ``n``
    with every value, and compare with this floor. But for the factor ``1 - 1/n``, the square has the gradient
    of the square for infinitely many images; the root is biased. Both hold for equal shares. With another
    target, sets of few images overshoot it, since ``E[SP^2]`` is least at ``p = (n u - 1/C) / (n - 1)`` (.73,
    .09, .09, .09 for .7, .1, .1, .1 and sixteen images).

    The paper's classifier, of four skin tones, was never released, so there is no default. The bundled one of
    Shapes names the colour of the objects, to find and remove the bias of prompts that leave it open.

    A classifier of skin tones sees the look of an image, never a person's ethnicity or identity. Before you
    train on one: take a scale that was made for the purpose, such as the ten tones of Monk's (Monk 2019,
    skintone.google), not one with few dark tones; measure its errors for every tone on generated images,
    since the policy learns them; state why you chose ``target``; report the share of images without a score;
    and look at the images, since a stereotype counts as fair.

    Args:
        pretrained: ``"shapes"``, a folder with any transformers image classifier and its image processor, or
            a hub id. Safetensors only.
        target: Wanted share by label; uniform over the classes if not given. A label that is left out is
            wanted in no image.
        ignore: Labels that mean that there is nothing to classify.
        min_confidence: An image has no class, and so no score, if the probability of its likeliest class is
            below this; our own rule (the paper's images without a person have no score either).
        squared: Minus the square.
        credit: See :class:`SetReward`. The paper: ``shared``.

    Raises:
        ConfigError: The classifier cannot be loaded, has no such label, or the target is no distribution.
    """

    DEFINED_FROM: ClassVar[int] = 1
    IMAGES_AT_ONCE = 64

    def __init__(
        self,
        pretrained: str,
        target: dict[str, float] | None = None,
        ignore: list[str] | None = None,
        min_confidence: float = 0.5,
        squared: bool = False,
        credit: Credit = "leave_one_out",
    ) -> None:
        super().__init__(credit)
        self.domain = domain_of(pretrained)
        if not 0 <= min_confidence <= 1:
            raise ConfigError(
                f"min_confidence: {min_confidence} is not a probability; above 1 no image would have a class"
            )
        self.model: PreTrainedModel = load_whole(
            AutoModelForImageClassification.from_pretrained,
            pretrained,
            SHAPES_CLASSIFIER,
            "image classifier",
        )
        self.processor = load_part(AutoImageProcessor, pretrained, SHAPES_CLASSIFIER)
        if pretrained == SHAPES:
            self.processor.do_resize = True  # its own images need none; those of another model do
        names = cast(dict[int, str], self.model.config.id2label)
        labels = [names[number] for number in sorted(names)]
        self.min_confidence, self.squared = min_confidence, squared
        ignored = set(ignore or [])
        self.classes = [number for number, label in enumerate(labels) if label not in ignored]
        self.target = torch.tensor(_target(labels, ignored, target), dtype=torch.float64)
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """One-hot classes ``(B, C)``."""
        likely = torch.cat([self._likely(chunk) for chunk in images.split(self.IMAGES_AT_ONCE)])
        confidence, label = likely.max(dim=1)
        shown = label[:, None] == torch.tensor(self.classes)
        found = shown.any(dim=1) & (confidence >= self.min_confidence) & are_whole(images).cpu()
        return torch.where(found[:, None], shown.double(), torch.nan)

    def _likely(self, images: Tensor) -> Tensor:
        """Probabilities of all labels ``(B, labels)``, of images prepared by the model's own processor."""
        inputs = self.processor(
            images=list(to_bytes(images)), return_tensors="pt", input_data_format="channels_last"
        )
        pixels = inputs["pixel_values"].to(images.device, next(self.model.parameters()).dtype)
        return self.model(pixel_values=pixels).logits.float().softmax(dim=1).cpu()

    def value(self, total: Tensor, count: Tensor) -> Tensor:
        """Minus the distance of the shares to the target."""
        squares = (total / count[:, None] - self.target).square().sum(dim=1)
        return -squares if self.squared else -squares.sqrt()


class BatchStatisticalParity(StatisticalParity):
    """:class:`StatisticalParity` over all images of a batch, whatever their prompts."""

    scope: Scope = "batch"


class PairwiseDiversity(SetReward):
    """Mean over the pairs of a prompt's images of ``1 - cos`` of their CLIP embeddings.

    In [0, 2]; 0 where all images look alike to CLIP. One alone has none.

    Args:
        pretrained: A hub id, a folder with a transformers ``CLIPModel``, or ``"shapes"`` for the bundled one.
        credit: See :class:`SetReward`.

    Raises:
        ConfigError: The model cannot be loaded.
    """

    DEFINED_FROM: ClassVar[int] = 2

    def __init__(self, pretrained: str = CLIP_MODEL, credit: Credit = "leave_one_out") -> None:
        super().__init__(credit)
        self.domain = domain_of(pretrained)
        self.clip = shared(CLIPCosine, pretrained)
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """Unit embeddings ``(B, F)``."""
        return F.normalize(self.clip.embed_images(images).cpu().double(), dim=1)

    def value(self, total: Tensor, count: Tensor) -> Tensor:
        """From the identity ``|sum f|^2 = n + sum over ordered pairs of cos``."""
        return 1 - (total.square().sum(dim=1) - count) / (count * (count - 1))


class BatchPairwiseDiversity(PairwiseDiversity):
    """:class:`PairwiseDiversity` over all images of a batch, whatever their prompts."""

    scope: Scope = "batch"


def _target(labels: list[str], ignored: set[str], target: dict[str, float] | None) -> list[float]:
    """Wanted share of each class that is not ignored."""
    for label in [*ignored, *(target or {})]:
        if label not in labels:
            raise ConfigError(
                f"StatisticalParity: the classifier knows no label {label!r}; give some of "
                f"{', '.join(labels)}."
            )
    classes = [label for label in labels if label not in ignored]
    if len(classes) < 2:
        raise ConfigError("StatisticalParity: ignore leaves fewer than two classes; ignore fewer labels.")
    if target is None:
        return [1 / len(classes)] * len(classes)
    if ignored & set(target) or abs(sum(target.values()) - 1) > 1e-6 or min(target.values()) < 0:
        raise ConfigError(
            f"StatisticalParity: target {target} is not a distribution over {', '.join(classes)}; give "
            "shares of at least 0 that sum to 1, and none to an ignored label."
        )
    return [target.get(label, 0.0) for label in classes]


def _of_all_processes(features: Tensor) -> tuple[Tensor, slice]:
    """The rows of all processes in their order, and which of them are this one's."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return features, slice(None)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, features)
    start = sum(len(part) for part in parts[: torch.distributed.get_rank()])
    return torch.cat(parts), slice(start, start + len(features))
