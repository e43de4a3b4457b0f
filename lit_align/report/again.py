"""The commands that make a run and its test again."""

import shlex
from pathlib import Path

from lit_align.files import read_config
from lit_align.report.run import Run


def commands(run: Run) -> list[str]:
    """The commands that repeat a run, as far as its folder says; with the newest configuration of its fit.

    A file of configuration names the checkpoint that its command took. That of a fit that went on is one of
    its own: from the beginning, it takes what the first configuration took.
    """
    said = []
    if run.fitted is not None:
        options = ["fit", "--config", str(run.fitted)]
        first = run.folder / "config.yaml"
        if run.fitted != first:
            said.append(
                f"# {run.fitted.name} is of a run that went on; this trains with it from the beginning"
            )
            options += ["--ckpt_path", _taken(first) or "null"]
        said.append(_command(options))
    if run.tested is not None:
        said.append(_command(["test", "--config", str(run.tested)]))
    return said


def _taken(config: Path) -> str | None:
    """The checkpoint that a configuration names."""
    return read_config(config).get("ckpt_path") if config.is_file() else None


def _command(options: list[str]) -> str:
    return shlex.join(["python", "-m", "lit_align", *options])
