"""A vision-language model behind an OpenAI-compatible server, spoken by a small one on loopback."""

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_align.errors import ConfigError
from lit_align.rewards import RewardBank, VLMJudge
from lit_align.rewards.templates import UNIFIED_REWARD
from tests.rewards.servers import answering, faulty

PROMPTS = ["a red circle", "a {curious} one", "a square"]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Model:
    """Answers with the mean of the image that it was sent, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, path: str, body: Any) -> Any:
        assert path == "/v1/chat/completions"
        self.asked.append(body)
        image, text = body["messages"][0]["content"]
        head, _, data = image["image_url"]["url"].partition(",")
        assert (head, text["type"]) == ("data:image/png;base64", "text")
        level = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean() / 255
        if not body.get("logprobs"):
            return {"choices": [{"message": {"content": f"It is fine.\nFinal Score: {level:.4f}"}}]}
        odds = {"No": 1 - level, "Yes": level / 2, " Yes": level / 2, "Maybe": 1e-9}
        ranked = sorted(odds, key=odds.__getitem__, reverse=True)
        told = [{"token": word, "logprob": math.log(odds[word])} for word in ranked]
        return {"choices": [{"logprobs": {"content": [told[0] | {"top_logprobs": told}]}}]}


def levels(images: torch.Tensor) -> torch.Tensor:
    return ((images * 255).round() / 255).mean((1, 2, 3))


def test_the_probability_of_yes(images: torch.Tensor) -> None:
    model = Model()
    with answering(model) as url:
        judge = VLMJudge(f"{url}/v1", "some-model")
        scores = RewardBank({"judge": judge}, {"judge": 1.0})(images, PROMPTS).total
        torch.testing.assert_close(scores, levels(images))
        assert torch.equal(judge(images, PROMPTS), scores)
        assert VLMJudge(f"{url}/v1", "some-model", answer=" Yes").answer == judge.answer
    assert len(model.asked) == 3
    by_text = {body["messages"][0]["content"][1]["text"]: body for body in model.asked}
    assert set(by_text) == {f'Does this figure show "{p}"? Please answer Yes or No.' for p in PROMPTS}
    body = model.asked[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some-model", 0, 1)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)


def test_a_number_that_is_written(images: torch.Tensor) -> None:
    model = Model()
    with answering(model) as url:
        judge = VLMJudge(f"{url}/v1", "some-model", question=UNIFIED_REWARD, answer=None)
        torch.testing.assert_close(judge(images, PROMPTS), levels(images), rtol=0, atol=1e-4)
        silent = VLMJudge(f"{url}/v1", "some-model", answer=None, pattern=r"Points: (\d)")
        assert silent(images, PROMPTS).isnan().all()
    assert model.asked[0]["max_tokens"] == 256
    assert "Text Caption: [a " in model.asked[0]["messages"][0]["content"][1]["text"]


def test_faults_lose_nothing(images: torch.Tensor) -> None:
    with answering(faulty(Model(), share=0.5, seconds=0.4)) as url:
        judge = VLMJudge(f"{url}/v1", "some-model", timeout=0.2, retries=30)
        torch.testing.assert_close(judge(images, PROMPTS), levels(images))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"choices": []}, "it sent no choices"),
        ({"choices": [{"logprobs": None}]}, "gives no probabilities of words; start it with them, or set"),
        (
            (404, {"error": {"message": "no model some-model"}}),
            r"refuses: status 404 \(no model some-model\)",
        ),
    ],
)
def test_what_is_no_answer(answer: Any, said: str, images: torch.Tensor) -> None:
    with answering(lambda path, body: answer) as url, pytest.raises(ConfigError, match=said):
        VLMJudge(f"{url}/v1", "some-model", retries=1)(images, PROMPTS)


def test_a_key_is_sent_and_not_shown(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = VLMJudge("http://127.0.0.1:9/v1", "some-model", retries=0)
    assert judge.server.headers["authorization"] == "Bearer secret"
    with pytest.raises(ConfigError) as caught:
        judge(images, PROMPTS)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"question": "Is it?"}, "has no"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": r"Points: (\d)"}, "pattern reads a number .* set answer to null"),
        ({"url": "x"}, "not an address"),
        ({"answer": " "}, "answer is empty"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        VLMJudge(**({"url": "http://localhost/v1", "model": "m"} | options))
