"""Prompt sets that ship as files: ``python -m lit_align.shapes.recipe.prompts --out DIR``; 5 s on a CPU.

| file | prompts | what |
|---|---|---|
| ``small.txt`` | 45 | "a blue circle" and its like: one object of every look but three |
| ``large.parquet`` | 120,000 | everything but the open prompts, in the shares of ``LARGE`` |
| ``open.txt`` | 789 | one group of objects whose colour is unsaid: all of them |
| ``pairs.txt`` | 2,048 | two objects joined by "and" |
| ``validation.txt``, ``test.txt`` | 512 each | of all kinds, in the shares of ``HELD_OUT_KINDS`` |

No prompt is in two files. Those of the last two are of the splits that a ``PromptDataModule`` makes by hash,
and unknown to every reward model; the other files hold none that is. So a run that is trained on one of these
validates and tests on those two: of its own prompts a split by hash would keep none back. The shipped files
have seed 0.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
from jsonargparse import CLI
from pyarrow import parquet

from lit_align.randomness import place
from lit_align.shapes.recipe.images import held_out, numpy_rng
from lit_align.shapes.world import COLOURS, RADII, SHAPES, Caption, Group, Kind, PromptSpace

NUM_SMALL = 45
"""As many as there are animals in the small-scale experiments of DDPO (arXiv 2305.13301)."""

LARGE: dict[Kind, int] = {"single": 3_000, "pair": 67_000, "relation": 50_000}
"""Numbers of each kind; more than 100,000 prompts are the large scale of PRDP (arXiv 2402.08714).

Some 3,650 of the 4,032 single prompts are allowed; pairs and relations share the rest about as they share
the 2.6 million prompts of the world.
"""

NUM_PAIRS = 2_048

HELD_OUT_KINDS: dict[Kind, int] = {"single": 131, "open": 29, "pair": 176, "relation": 176}
"""Numbers of each kind in each of the two files.

Of the 864 open prompts only 75 are held out, 29 of them for the test.
"""


def make_prompts(out: Path, seed: int = 0) -> None:
    """Write all sets.

    Args:
        out: The folder; made if need be.
        seed: Of what is drawn.
    """
    out.mkdir(parents=True, exist_ok=True)
    pairs = list(islice(filter(_two_objects, _shuffled("pair", seed, "pairs", _allowed)), NUM_PAIRS))
    taken = set(pairs)
    large = [
        prompt
        for kind, num in LARGE.items()
        for prompt in islice((p for p in _shuffled(kind, seed, "large", _allowed) if p not in taken), num)
    ]
    _write_lines(out / "small.txt", small_prompts())
    _write_lines(out / "open.txt", [prompt for prompt in PromptSpace(["open"]) if _allowed(prompt)])
    _write_lines(out / "pairs.txt", pairs)
    for name, wanted in (("validation", _last), ("test", _first)):
        unseen = [islice(_shuffled(kind, seed, name, wanted), num) for kind, num in HELD_OUT_KINDS.items()]
        _write_lines(out / f"{name}.txt", [prompt for prompts in unseen for prompt in prompts])
    _write_table(out / "large.parquet", sorted(large))


def small_prompts() -> list[str]:
    """One object of each of the first 45 looks; its size is said where the prompt without is held out."""
    looks = [(colour, shape) for colour in COLOURS for shape in SHAPES][:NUM_SMALL]
    return [next(filter(_allowed, _sized(*look))) for look in looks]


def _sized(colour: str, shape: str) -> Iterator[str]:
    """A look without a size, and with each."""
    return (str(Caption((Group(1, size, colour, shape),), None, None)) for size in (None, *RADII))


def _allowed(prompt: str) -> bool:
    return not held_out(prompt)


def _last(prompt: str) -> bool:
    """Whether a prompt is of the validation split."""
    return held_out(prompt) and place(prompt) > 0.5


def _first(prompt: str) -> bool:
    """Whether a prompt is of the test split."""
    return held_out(prompt) and place(prompt) < 0.5


def _two_objects(prompt: str) -> bool:
    """Whether a prompt of two groups asks for one object in each."""
    return prompt.startswith("a ") and " and a " in prompt


def _shuffled(kind: Kind, seed: int, purpose: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """The wanted prompts of one kind in an order of their own."""
    space = PromptSpace([kind])
    order = numpy_rng(seed, f"prompts {purpose} {kind}").permutation(len(space))
    return filter(wanted, (space[int(number)] for number in order))


def _write_lines(path: Path, prompts: Sequence[str]) -> None:
    path.write_text("\n".join(prompts) + "\n", "utf-8")


def _write_table(path: Path, prompts: Sequence[str]) -> None:
    """A sorted column, each text stored as what differs from the one before: a tenth of the size."""
    parquet.write_table(
        pa.table({"prompt": prompts}),
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
        column_encoding={"prompt": "DELTA_BYTE_ARRAY"},
        write_statistics=False,
    )


if __name__ == "__main__":
    CLI(make_prompts, as_positional=False)
