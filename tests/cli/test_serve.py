"""``serve``: the real command, asked by a reward, and what it refuses."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_align.cli.pairs import pairs_command
from lit_align.cli.serve import serve_command
from lit_align.errors import ConfigError
from lit_align.rewards import JPEGCompressibility, RemoteReward

BANK = "rewards: {jpeg: {class_path: JPEGCompressibility}}\nweights: {jpeg: 1.0}\n"


@pytest.fixture
def bank(tmp_path: Path) -> str:
    (tmp_path / "bank.yaml").write_text(BANK)
    return str(tmp_path / "bank.yaml")


@pytest.mark.slow  # a new process imports for 8 CPU-seconds
def test_the_command_serves_until_it_is_ended(bank: str) -> None:
    command = [
        sys.executable,
        "-m",
        "lit_align",
        "serve",
        "--rewards",
        bank,
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"lit_align: serving jpeg on (http://127.0.0.1:\d+) \(cpu\); end .*\n", line)
        assert found is not None, line
        images = torch.rand(5, 3, 16, 16)
        remote = RemoteReward(found[1], "jpeg", retries=3)
        assert torch.equal(remote(images, [""] * 5), JPEGCompressibility()(images, [""] * 5))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize("command", [serve_command, pairs_command])
def test_a_device_that_is_not_there(command: Callable[[list[str]], None], bank: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"prompt": "a", "file_name": "a.png"}\n')
    folder = [str(tmp_path)] if command is pairs_command else ["--port", "0"]
    with pytest.raises(ConfigError, match=r"--device gpu cannot be used \(.*\); give cpu"):
        command([*folder, "--rewards", bank, "--device", "gpu"])


def test_a_port_that_is_taken(bank: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1, port {port} .*in use.*give"):
            serve_command(["--rewards", bank, "--port", port])


@pytest.mark.parametrize("package", ["uvicorn", "starlette.applications"])
def test_a_package_that_is_missing(package: str, bank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"serve needs the package .*pip install 'lit_align\[serve\]'"):
        serve_command(["--rewards", bank, "--port", "0"])
