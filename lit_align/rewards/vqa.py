"""Whether an image shows its prompt, by what a vision-language model answers to a question about it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.pretrained import Dtype, shared
from lit_align.rewards.base import Reward, are_whole
from lit_align.rewards.vision_language import VisionLanguage, checked_question

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
"""A model that many use as a judge. The paper's own, CLIP-FlanT5, is not in transformers."""

QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
"""The question of VQAScore (Lin et al. 2024, arXiv:2404.01291); ``{}`` is the prompt."""


class VQAScore(Reward):
    """The probability that a model answers "Yes" to whether the image shows the prompt, in [0, 1].

    Lin et al. 2024, arXiv:2404.01291, with any image-text-to-text model of transformers. It has no gradient:
    each model's processor works on 8-bit images.

    With ``questions`` the prompt's own questions are asked, and the score is the geometric mean of the
    probabilities of their answers: Soft-TIFA of GenEval 2 (Kamath et al. 2025, arXiv:2512.16853). Of an
    answer of several tokens the first counts.

    Args:
        pretrained: A hub id or a folder. Safetensors only.
        question: What is asked; ``{}`` is the prompt.
        answer: The word whose probability is the score.
        questions: The data's column with pairs of a question and its answer, such as ``vqa_list``.
        dtype: Precision of the weights.

    Raises:
        ConfigError: The model cannot be loaded, or the question has no ``{}``; on scoring, if there is no
            such column.
    """

    differentiable = False
    scope = "sample"
    documented = (0.0, 1.0)  # a probability

    def __init__(
        self,
        pretrained: str = MODEL,
        question: str = QUESTION,
        answer: str = "Yes",
        questions: str | None = None,
        dtype: Dtype = "bfloat16",
    ) -> None:
        super().__init__()
        self.question = checked_question(question, "VQAScore")
        self.answer, self.questions = answer, questions
        self.model = shared(VisionLanguage, pretrained, dtype)
        self.model.first_token(answer)
        self.freeze()

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        asked = self._asked(prompts, columns)
        whole = are_whole(images).tolist()
        rows = [row for row, pairs in enumerate(asked) if whole[row] for _ in pairs]
        scores = torch.full((len(images),), torch.nan, device=images.device)
        if not rows:
            return scores
        texts, answers = zip(*(pair for row in dict.fromkeys(rows) for pair in asked[row]), strict=True)
        places = torch.tensor(rows, device=images.device)
        log_probs = self.model.probabilities(images[places], texts, answers).log()
        for row in dict.fromkeys(rows):
            scores[row] = log_probs[places == row].mean().exp()
        return scores

    def check_columns(self, columns: Mapping[str, list[Any]]) -> None:
        if self.questions is not None:
            remedy = "Set questions to the one with pairs of a question and an answer."
            self.need(self.questions, columns, remedy)
            for entry in columns[self.questions]:
                if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in entry or []):
                    raise ConfigError(
                        f"VQAScore: the column '{self.questions}' holds {entry!r}; give a list of pairs of a "
                        "question and its answer, such as [[Is there a cat?, Yes]]."
                    )

    def _asked(self, prompts: list[str], columns: dict[str, list[Any]] | None) -> list[list[tuple[str, str]]]:
        """Questions and answers of each image."""
        if self.questions is None:
            return [[(self.question.replace("{}", prompt), self.answer)] for prompt in prompts]
        self.check_columns(columns or {})
        assert columns is not None, "it has the column"
        return [[(str(q), str(a)) for q, a in entry or []] for entry in columns[self.questions]]
