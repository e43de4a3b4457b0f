"""``python -m lit_align serve``: a bank of rewards for the runs of other processes and machines."""

import argparse
import socket
from collections.abc import Sequence

from lit_align.cli.bank import read_bank
from lit_align.cli.device import device_of
from lit_align.errors import ConfigError, tell
from lit_align.rewards.serving import application


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        prog="python -m lit_align serve",
        description="Serve a bank of rewards over HTTP, for RemoteReward. There is no password: listen on "
        "this machine or in a network that you trust.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--rewards", required=True, help="YAML file with a bank: rewards and weights, or a configuration"
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all networks")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument(
        "--device", help="where the models run: cpu, cuda, cuda:1; the first GPU if there is one"
    )
    return made


def serve_command(arguments: Sequence[str]) -> None:
    """Serve until the process is ended.

    Raises:
        ConfigError: A package is missing, the bank cannot be served, or the device or address cannot be used.
    """
    options = parser().parse_args(arguments)
    device = device_of(options.device, "serve")
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"serve needs the package uvicorn ({error}); install it with pip install 'lit_align[serve]'."
        ) from error
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:  # before the models are loaded
        listening = socket.create_server((options.host, options.port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port: cannot listen on {options.host}, port {options.port} ({error}); give another, or end "
            "what listens there"
        ) from error
    with listening:
        bank = read_bank(options.rewards)
        app = application(bank, device)
        place = f"http://{options.host}:{listening.getsockname()[1]}"
        tell(f"serving {', '.join(bank.names)} on {place} ({device}); end with Ctrl-C")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        server.run(sockets=[listening])
