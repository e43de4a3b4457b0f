"""``python -m lit_align export``: what a run has trained, for other programs."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from lit_align.backbones.text import without_a_line_each
from lit_align.callbacks.console import show
from lit_align.cli.device import device_of
from lit_align.errors import ConfigError, check_positive, tell
from lit_align.export import FORMS, Live, export, mixture_of, read_run
from lit_align.export.card import SOUP, card, is_card
from lit_align.export.forms import check_others
from lit_align.export.live import Run
from lit_align.files import write

ROUNDING = 1 / 255
"""A larger difference of a pixel is reported: a screen shows it."""


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        prog="python -m lit_align export",
        description="Write what runs have trained for diffusers, for A1111 and ComfyUI, or as a whole model, "
        "with a model card; each is loaded again and compared with the live model.",
        allow_abbrev=False,
    )
    made.add_argument(
        "run", nargs="+", type=Path, help="folder of a run, or its adapter/, or a checkpoint of it"
    )
    made.add_argument(
        "--weights", nargs="+", type=float, help="of several runs: their weights in the mixture"
    )
    made.add_argument(
        "--form",
        nargs="+",
        choices=FORMS,
        help="default: adapter, and kohya for UNets; pipeline if all weights were trained",
    )
    made.add_argument("--out", type=Path, help="folder; export/ in that of the first run if not given")
    made.add_argument("--name", help="of the model; the method and the number of the run if not given")
    made.add_argument("--device", default="cpu", help="where images are drawn for the comparison: cpu, cuda")
    made.add_argument("--steps", type=int, default=4, help="of those images")
    return made


def export_command(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: Something that was given cannot work.
    """
    options = parser().parse_args(arguments)
    check_positive({"export: --steps": options.steps})
    device_of(options.device, "export")
    runs = [read_run(path) for path in options.run]
    weights = options.weights or [1.0] * len(runs)
    if len(weights) != len(runs) or (len(runs) > 1 and not options.weights):
        raise ConfigError(f"export: {len(runs)} runs need --weights with a number for each")
    first = runs[0].folder.resolve()
    name = (options.name or f"{first.parent.name}_{first.name}").removesuffix(".safetensors")
    if Path(name).name != name:
        raise ConfigError(f"export: --name {name!r} is not a file name; give --out for the folder")
    if options.out is not None:
        check_replaced(options.out, options.form or FORMS, name, list(zip(runs, weights, strict=True)))
    live = mixture_of(runs, weights, options.device)
    of_adapter = ["adapter", "kohya"] if live.backbone.denoiser == "unet" else ["adapter"]
    forms = options.form or (["pipeline"] if live.whole else of_adapter)
    folder = options.out or runs[0].folder / "export"
    with without_a_line_each():  # of prompts and names of layers on which nobody can act
        made = export(live, forms, folder, name, options.steps)
    grids = _grids(live)
    for grid in grids:
        shutil.copyfile(grid, folder / grid.name)
    write(folder / "README.md", card(live, made, name, [grid.name for grid in grids]))
    for one in made:
        show(f"{one.form:<12} {one.path}")
        show(f"             largest pixel difference to the live model: {one.difference:.3g}")
        if not one.difference <= ROUNDING:  # NaN is none
            tell(f"{one.path} draws other images than the model that was trained")
    show(f"{'model card':<12} {folder / 'README.md'}")
    if any(run.is_soup for run in runs):
        tell(SOUP)
    elif runs[0].is_policy and not live.mixed:
        _tell_of_best(runs[0].folder, options.run[0])


def check_replaced(folder: Path, forms: Sequence[str], name: str, runs: Sequence[tuple[Run, float]]) -> None:
    """Refuse a folder with what no export of this name and these runs wrote, such as a run's own adapter.

    Raises:
        ConfigError: Something there would be replaced.
    """
    if (folder / "config.yaml").is_file():
        raise ConfigError(f"export: --out {folder} is the folder of a run; give another one")
    if not is_card(folder / "README.md", name):
        written = ("README.md", *(f"{name}.safetensors" if form == "kohya" else form for form in forms))
        if there := next((file for file in written if (folder / file).exists()), None):
            raise ConfigError(
                f"export: --out: {folder / there} is there and no earlier export of {name}; give another "
                "folder"
            )
    check_others(runs, folder, name)


def _grids(live: Live) -> list[Path]:
    """The grid of held-out images that these weights drew; empty where there is none."""
    run, images = live.runs[0][0], live.runs[0][0].facts.get("images")
    if live.mixed or images is None or not run.is_policy:
        return []
    grid = run.folder / "images" / f"validation_{images:08d}.png"
    return [grid] if grid.exists() else []


def _tell_of_best(folder: Path, given: Path) -> None:
    """Say that the newest weights were taken, and not the best."""
    best = folder / "checkpoints" / "best.ckpt"
    if given.suffix != ".ckpt" and best.exists():
        tell(
            "these are the newest weights; the best by validation after an update are in "
            f"{best}, which can be given too"
        )
