"""A vision-language model behind an OpenAI-compatible server, such as vLLM or SGLang, as a reward."""

import math
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.rewards.base import to_bytes
from lit_align.rewards.http import NoAnswer, Server
from lit_align.rewards.remote import png
from lit_align.rewards.served import CACHED, Asked, Failure, ServedReward
from lit_align.rewards.unified_reward import PATTERN, checked_pattern, number
from lit_align.rewards.vision_language import checked_question
from lit_align.rewards.vqa import QUESTION

KEY = "OPENAI_API_KEY"
"""Where the key of a server is, if it asks for one."""

ALTERNATIVES = 20
"""Words whose probabilities are asked for: the most that the servers give."""


class VLMJudge(ServedReward):
    """What a served vision-language model says of an image: the probability of an answer, or a number.

    With ``answer`` the score is the probability that the model's first word is it, as :class:`VQAScore`, of
    the words that the server lists; 0 if it is not among them. With ``answer: null`` the score is the number
    that ``pattern`` finds in the text that the model writes, the mean of several; none is no score.

    Args:
        url: The server up to ``/v1``, such as ``http://localhost:8000/v1``. A key, if it wants one, is read
            from the environment variable ``OPENAI_API_KEY``.
        model: The name of the model on the server.
        question: What is asked; ``{}`` is the prompt.
        answer: The word whose probability is the score; null for a number that is written.
        pattern: A regular expression whose first group is a number of the answer.
        max_tokens: Longest answer that is written.
        connections: Requests at the same time; each asks about one image, and the server batches them.
        timeout: Seconds for one try.
        retries: Tries after the first, as of :class:`RemoteReward`.
        on_failure: Where the server does not answer after all tries: ``stop`` or ``nan``.
        cached: Scores that are remembered by the hash of what was sent.

    Raises:
        ConfigError: The question has no ``{}``, or the pattern no group, or no use beside ``answer``; on
            scoring, if the server refuses, gives no probabilities, or, with ``stop``, does not answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str = QUESTION,
        answer: str | None = "Yes",
        pattern: str = PATTERN,
        max_tokens: int = 256,
        connections: int = 16,
        timeout: float = 60.0,
        retries: int = 8,
        on_failure: Failure = "stop",
        cached: int = CACHED,
    ) -> None:
        key = os.environ.get(KEY)
        headers = {"authorization": f"Bearer {key}"} if key else None
        server = Server(url, timeout, retries, connections, headers)
        super().__init__(server, 1, (), on_failure, cached)
        if answer is not None and not answer.strip():
            raise ConfigError("VLMJudge: answer is empty; give a word, or null for a number that is written.")
        self.model, self.answer, self.max_tokens = model, answer and answer.strip(), max_tokens
        self.question, self.pattern = checked_question(question, "VLMJudge"), checked_pattern(pattern)
        if pattern != PATTERN and answer is not None:
            raise ConfigError(
                "VLMJudge: pattern reads a number that is written, and the score is the probability of "
                f"{answer!r}; set answer to null, or take pattern out."
            )

    def ask(self, asked: Sequence[Asked]) -> list[float]:
        """The score of one image."""
        return [self._one(one) for one in asked]

    def _one(self, asked: Asked) -> float:
        (image,) = to_bytes(asked.image[None])
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}},
            {"type": "text", "text": self.question.replace("{}", asked.prompt)},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
        }
        if self.answer is None:
            body["max_tokens"] = self.max_tokens
            return self.server.ask("/chat/completions", body, self._written)
        body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": ALTERNATIVES}
        return self.server.ask("/chat/completions", body, self._probability)

    def encoded(self, image: Tensor) -> bytes:
        return to_bytes(image[None]).tobytes()

    def _written(self, answer: Any) -> float:
        text = _choice(answer).get("message", {}).get("content")
        if not isinstance(text, str):
            raise NoAnswer("it sent no text")
        return number(text, self.pattern)

    def _probability(self, answer: Any) -> float:
        told = _choice(answer).get("logprobs") or {}
        words = told.get("content") if isinstance(told, dict) else None
        if not words:
            raise ConfigError(
                f"VLMJudge: {self.server.url} gives no probabilities of words; start it with them, or set "
                "answer to null and let the model write a number."
            )
        likely = [*words[0].get("top_logprobs", []), words[0]]
        log_probs = {one["token"]: one["logprob"] for one in likely}
        # Some tokenizers write a word with the space before it.
        own = [log_prob for word, log_prob in log_probs.items() if word.strip() == self.answer]
        return math.fsum(map(math.exp, own))


def _choice(answer: Any) -> dict[str, Any]:
    """The first choice of an answer."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise NoAnswer("it sent no choices")
    return choices[0]
