"""Rewards on servers: real ones on loopback, with faults between."""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import urllib3
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.rewards import (
    BlackBoxReward,
    CLIPScore,
    FunctionReward,
    JPEGCompressibility,
    PairwiseDiversity,
    Redness,
    RemoteReward,
    Reward,
    RewardBank,
)
from lit_align.rewards.contents import contents
from lit_align.rewards.http import Server
from lit_align.rewards.serving import answer, application
from tests.rewards.servers import answering, faulty, serving

PROMPTS = ["a red circle", "two blue squares", "a circle", "a square", "red", "blue", "a circle and a square"]


def lengths(images: Tensor, prompts: list[str], worth: list[Any]) -> list[float | None]:
    """Depends on all that is sent; has no score where a prompt says so."""
    return [
        None if prompt == "red" else len(prompt) + float(image.double().sum()) + value["is"]
        for image, prompt, value in zip(images, prompts, worth, strict=True)
    ]


COLUMNS = {"worth": [{"is": n} for n in range(7)], "other": [object()] * 7}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bank(clip_folder: Path) -> RewardBank:
    rewards = {
        "lengths": FunctionReward(lengths),
        "clip": CLIPScore(str(clip_folder)),
        "jpeg": JPEGCompressibility(),
    }
    return RewardBank(rewards, {"clip": 2.0, "jpeg": -0.5})


@pytest.fixture(scope="module")
def url(bank: RewardBank) -> Any:
    with serving(bank) as url:
        yield url


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(-99), other.nan_to_num(-99))


@pytest.mark.parametrize("name", ["lengths", "clip", "jpeg"])
@pytest.mark.parametrize("batch", [4, 7, 16])
def test_remote_scores_are_the_local_ones_to_the_bit(
    name: str, batch: int, url: str, bank: RewardBank, images: Tensor
) -> None:
    columns = ["worth"] if name == "lengths" else None
    remote = RemoteReward(url, name, columns=columns, batch=batch)
    own = RewardBank({"it": bank.rewards[name]}, {"it": 1.0})
    for sent in (COLUMNS, COLUMNS | {"worth": COLUMNS["worth"][::-1]}):  # what is remembered is of others
        local = own(images, PROMPTS, None, sent).total
        assert same(remote(images, PROMPTS, None, sent), local)
    assert local.isnan().any().item() is (name == "lengths")


def test_the_weighted_sum_of_a_bank(url: str, bank: RewardBank, images: Tensor) -> None:
    remote = RemoteReward(url, columns=["worth"])
    assert same(remote(images, PROMPTS, None, COLUMNS), bank(images, PROMPTS, None, COLUMNS).total)


def test_png_is_exact_for_rewards_that_look_at_8_bits(url: str, images: Tensor) -> None:
    remote = RemoteReward(url, "jpeg", images="png")
    assert torch.equal(remote(images, PROMPTS), JPEGCompressibility()(images, PROMPTS))
    rounded = (images * 255).round() / 255
    remote = RemoteReward(url, "clip", images="png")
    assert torch.equal(remote(images, PROMPTS), RemoteReward(url, "clip")(rounded, PROMPTS))


class Counts(BlackBoxReward):
    """Counts the images that it is asked for."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def score(self, image: Any, prompt: str) -> float:
        self.seen.append(prompt)
        return float(image.mean())


def test_ahead_asks_in_the_same_batches_and_once(images: Tensor) -> None:
    counts = Counts()
    bank = RewardBank({"counts": counts}, {"counts": 1.0})
    counts.seen.clear()  # the trial of the bank
    with serving(bank) as url:
        remote = RemoteReward(url, batch=3, connections=1)
        own = RewardBank({"far": remote}, {"far": 1.0})
        for rows in torch.arange(7).split(2):
            own.ahead(images[rows], [PROMPTS[row] for row in rows.tolist()])
        deadline = time.monotonic() + 20
        while len(counts.seen) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert counts.seen == PROMPTS[:6]  # two whole batches; the seventh image waits
        first = own(images, PROMPTS).total
        assert counts.seen == PROMPTS
        assert torch.equal(own(images, PROMPTS).total, first)
        assert counts.seen == PROMPTS  # remembered
        assert own(images[:1], ["another prompt"]).total.tolist() == first[:1].tolist()
        assert counts.seen == [*PROMPTS, "another prompt"]
    expected = bank(images, PROMPTS).total
    assert torch.equal(first, expected)


def test_scores_that_are_remembered_are_bounded(url: str, images: Tensor) -> None:
    remote = RemoteReward(url, "jpeg", cached=3)
    remote(images, PROMPTS)
    assert len(remote._scores) == 3


def test_images_of_two_sizes_and_a_broken_one(url: str, images: Tensor) -> None:
    remote = RemoteReward(url, "jpeg", batch=8)
    other = torch.rand(2, 3, 8, 24)
    remote.ahead(images, PROMPTS, None)
    both = remote(other, ["", ""]), remote(images, PROMPTS)
    assert torch.equal(both[0], JPEGCompressibility()(other, ["", ""]))
    assert torch.equal(both[1], JPEGCompressibility()(images, PROMPTS))
    images[2, 0, 0, 0] = torch.nan
    assert remote(images, PROMPTS).isnan().tolist() == [n == 2 for n in range(7)]


# What goes wrong


def scoring(path: str, body: Any) -> Any:
    """A server that scores by the length of the prompt."""
    if path == "/rewards":
        return {"rewards": ["length"]}
    return {"scores": [float(len(prompt)) / 3 for prompt in body["prompts"]]}


EXPECTED = torch.tensor([len(prompt) / 3 for prompt in PROMPTS])


def test_faults_of_all_kinds_lose_nothing(images: Tensor) -> None:
    with answering(faulty(scoring, share=0.5, seconds=0.4)) as url:
        remote = RemoteReward(url, batch=1, timeout=0.2, retries=30)
        for turn in range(3):
            prompts = [prompt + " " * turn for prompt in PROMPTS]
            expected = torch.tensor([len(prompt) / 3 for prompt in prompts])
            assert torch.equal(remote(images, prompts), expected)


@pytest.mark.slow
def test_a_thousand_calls_with_a_fifth_of_faults_lose_nothing() -> None:
    """With the retries that a reward has by default."""
    bank = RewardBank({"clip": CLIPScore("shapes")}, {"clip": 1.0})

    def right(path: str, body: Any) -> Any:
        if path == "/rewards":
            return {"rewards": ["clip"]}
        return {"scores": answer(bank, body, torch.device("cpu"))}

    draw = torch.Generator().manual_seed(0)
    with answering(faulty(right, share=0.2, seconds=2.0)) as url:
        remote = RemoteReward(url, timeout=1.0)
        for call in range(1000):
            images = torch.rand(2, 3, 64, 64, generator=draw)
            prompts = [f"a red circle {call}", "a blue star"]
            assert torch.equal(remote(images, prompts), bank(images, prompts).total)


def told(answer: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda path, body: {"rewards": ["it"]} if path == "/rewards" else answer(path, body)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda path, body: (500, {"error": "out of memory"}), r"status 500 \(out of memory\)"),
        (lambda path, body: (503, "<html>busy</html>"), "status 503"),
        (lambda path, body: (429, {"error": "too many requests"}), r"status 429 \(too many requests\)"),
        (lambda path, body: {"scores": [1.0]}, "no list of 7 scores"),
        (lambda path, body: {"scores": [float("nan")] * 7}, "it sent NaN, which is not a number; null is"),
        (lambda path, body: {"scores": ["1"] * 7}, "scores that are not numbers"),
        (lambda path, body: {"scores": [True] * 7}, "scores that are not numbers"),
        (lambda path, body: [1.0] * 7, "no list of 7 scores"),
        (lambda path, body: (200, "text"), "no list of 7 scores"),
        (lambda path, body: b'{"scores": [1.0', "IncompleteRead"),
        (lambda path, body: None, "(?i)aborted|disconnected|closed"),
        (lambda path, body: time.sleep(0.6), "(?i)timed out"),
    ],
)
def test_what_a_server_says_when_it_fails(answer: Any, said: str, images: Tensor) -> None:
    with answering(told(answer)) as url:
        remote = RemoteReward(url, retries=1, timeout=0.3)
        with pytest.raises(ConfigError, match=said) as caught:
            remote(images, PROMPTS)
        assert "did not answer in 2 tries" in str(caught.value)
        assert "on_failure to nan" in str(caught.value)
        assert "\n" not in str(caught.value)
        lenient = RemoteReward(url, retries=0, timeout=0.3, on_failure="nan")
        with pytest.warns(UserWarning, match="7 of 7 images have no score"):
            scores = RewardBank({"it": lenient}, {"it": 1.0})(images, PROMPTS).total
        assert scores.isnan().all()


def test_a_server_that_drips_is_slow(images: Tensor) -> None:
    """Each byte comes in time, and the answer never does."""
    listening = __import__("socket").create_server(("127.0.0.1", 0))

    def drip() -> None:
        while True:
            try:
                peer, _ = listening.accept()
            except OSError:
                return
            if peer.recv(65536).startswith(b"GET"):
                body = b'{"rewards": ["it"]}'
                peer.sendall(
                    b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
                )
                peer.sendall(body)
                peer.close()
                continue
            peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
            try:
                for _ in range(40):
                    peer.sendall(b" ")
                    time.sleep(0.05)
            except OSError:
                pass
            peer.close()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    remote = RemoteReward(f"http://127.0.0.1:{listening.getsockname()[1]}", retries=0, timeout=0.3)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="did not answer in 1 try"):
        remote(images, PROMPTS)
    assert time.monotonic() - began < 1.5  # and not the two seconds of all bytes
    listening.close()


def test_after_a_failure_it_can_be_asked_again(images: Tensor) -> None:
    down = threading.Event()
    down.set()

    def sometimes(path: str, body: Any) -> Any:
        return (500, {}) if down.is_set() and body else scoring(path, body)

    with answering(sometimes) as url:
        stop = RemoteReward(url, retries=0)
        nan = RemoteReward(url, retries=0, on_failure="nan")
        with pytest.raises(ConfigError, match="did not answer"):
            stop(images, PROMPTS)
        with pytest.warns(UserWarning, match="no score"):
            nan(images, PROMPTS)
        down.clear()
        assert torch.equal(stop(images, PROMPTS), EXPECTED)
        assert torch.equal(nan(images, PROMPTS), EXPECTED)


def test_what_a_server_refuses_is_not_asked_again(url: str, images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"has no reward 'clap'; it has lengths, clip, jpeg; give one"):
        RemoteReward(url, "clap")
    remote = RemoteReward(url, "lengths", on_failure="nan")
    with pytest.raises(ConfigError, match=r"refuses: status 422 \(test_remote.lengths takes 'worth', and"):
        remote(images, PROMPTS)
    with pytest.raises(ConfigError, match=r"no column 'worth'; its columns: none. Take it out of columns"):
        RemoteReward(url, "lengths", columns=["worth"])(images, PROMPTS)
    with pytest.raises(ConfigError, match=r"a column of other cannot be sent .*take it out"):
        RemoteReward(url, "clip", columns=["other"])(images, PROMPTS, None, COLUMNS)
    other = answering(lambda path, body: (404, {"detail": "Not Found"}))
    with other as at, pytest.raises(ConfigError, match="/rewards refuses: status 404"):
        RemoteReward(at)


class Dimmed(Reward):
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.started = time.monotonic()  # no option: it says nothing about the scores
        self.names = {0: "dark", "other": "bright", ("a", "b"): "both"}

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:  # type: ignore[override]
        return self.factor * images.mean((1, 2, 3))


@pytest.mark.parametrize("reward", ["bright", None])
def test_a_server_that_comes_back_with_another_bank_is_told(reward: str | None, images: Tensor) -> None:
    served = {"bright": Dimmed(), "jpeg": JPEGCompressibility()}
    first = RewardBank(served, {"bright": 1.0})
    same = RewardBank({"bright": Dimmed()}, {"bright": 1.0})
    others = [RewardBank(served | {"bright": Dimmed(2.0)}, {"bright": 1.0})]
    others += [RewardBank(served, {"bright": 1.0, "jpeg": -1.0})] if reward is None else []
    with serving(first) as url:
        remote, again = RemoteReward(url, reward), RemoteReward(url, reward)
        assert contents(remote) == contents(again) != contents(RemoteReward(url, "jpeg"))
    for bank, changed in [(same, False), *((other, True) for other in others)]:
        with serving(bank) as url:
            remote.server = again.server = RemoteReward(url).server
            if not changed:
                assert torch.equal(remote(images, PROMPTS), bank(images, PROMPTS).total)
                continue
            assert contents(RemoteReward(url, reward)) != contents(remote)
            with pytest.raises(
                ConfigError, match=r"with other weights, options or code than when .* serve the bank of then"
            ):
                again(images, PROMPTS)


def test_nobody_there(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"did not answer in 2 tries; .*efused.*start it with python -m"):
        RemoteReward("http://127.0.0.1:9", retries=1)
    with pytest.raises(ConfigError, match="did not answer in 6 tries"):
        RemoteReward("http://127.0.0.1:9", retries=5)
    assert [re.sub(r"\(.*\)", "()", record.message) for record in caplog.records] == [
        "http://127.0.0.1:9/rewards has not answered yet (); it is asked 2 more times"
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "localhost:8000"}, "'localhost:8000' is not an address; give http://"),
        ({"timeout": 0}, "timeout: 0 must be positive"),
        ({"connections": 0}, "connections: 0 must be positive"),
        ({"retries": -1}, "retries: -1 must not be negative"),
        ({"batch": 0}, "batch: 0 must be positive"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], said: str, url: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RemoteReward(**({"url": url} | options))


def test_waits_double() -> None:
    waits: list[float] = []
    server = Server("http://127.0.0.1:9", retries=9, timeout=0.5)
    server.first_wait = 0.5
    server._stopped.wait = lambda seconds: waits.append(seconds) or False  # type: ignore[assignment, func-returns-value]
    with pytest.raises(ConnectionError):
        server.ask("/", None, lambda answer: answer)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


# The server


def request(url: str, body: bytes) -> tuple[int, Any]:
    response = urllib3.request(
        "POST", f"{url}/score", body=body, headers={"content-type": "application/json"}
    )
    return response.status, json.loads(response.data)


def test_requests_that_cannot_be_understood(url: str, images: Tensor) -> None:
    packed = {"safetensors": base64.b64encode(save({"images": images[:1]})).decode()}
    whole = {"images": packed, "prompts": ["a"], "columns": {}, "reward": "jpeg"}
    assert request(url, json.dumps(whole).encode())[0] == 200
    Image.new("RGB", (8, 8)).save(postscript := io.BytesIO(), "EPS")  # which Pillow hands to Ghostscript
    Image.new("RGB", (8, 8)).save(jpeg := io.BytesIO(), "JPEG")
    others = [base64.b64encode(file.getvalue()).decode() for file in (postscript, jpeg)]
    for change, said in (
        ({"prompts": ["a", "b"]}, "differ in length"),
        *(({"images": {"png": [other]}}, "cannot be read (UnidentifiedImageError") for other in others),
        ({"reward": "clap"}, "no reward 'clap'"),
        ({"images": {"png": ["????"]}}, "images cannot be read"),
        ({"images": {"safetensors": "aaaa"}}, "images cannot be read"),
        ({"images": "text"}, "images cannot be read"),
        ({"columns": 3}, "the request must be"),
    ):
        status, answer = request(url, json.dumps(whole | change).encode())
        assert (status, said in answer["error"]) == (422, True), answer
    assert request(url, b"{")[0] == 422
    assert request(url, b'"text"')[0] == 422


def test_a_reward_that_fails_may_work_another_time(images: Tensor) -> None:
    left = [3]

    def sometimes(images: Tensor, prompts: list[str]) -> Tensor:
        left[0] -= 1
        if left[0] in (0, 1):
            raise RuntimeError("CUDA out of memory")
        return images.mean((1, 2, 3))

    bank = RewardBank({"it": FunctionReward(sometimes)}, {"it": 1.0})
    with serving(bank) as url:
        remote = RemoteReward(url, retries=2)
        torch.testing.assert_close(remote(images, PROMPTS), images.mean((1, 2, 3)))


def test_rewards_of_sets_are_not_served(clip_folder: Path) -> None:
    rewards = {"it": PairwiseDiversity(str(clip_folder)), "red": Redness()}
    with pytest.raises(ConfigError, match=r"rewards: it score sets of images, .* serve rewards of single"):
        application(RewardBank(rewards, {"it": 1.0}), torch.device("cpu"))
