"""Prompts of the Shapes world: all of them, or one of the sets that ship with the package."""

from typing import ClassVar, Literal, get_args

from pyarrow import parquet

from lit_align.data.prompts.sources import PromptSource
from lit_align.errors import ConfigError
from lit_align.shapes import PROMPTS
from lit_align.shapes.world import ALL_PAIRS, Kind, PromptSpace, shape_pairs

SetName = Literal["small", "large", "open", "pairs", "validation", "test"]


class ShapesPrompts(PromptSource):
    """The captions of the Shapes world: millions, each made when it is asked for.

    Args:
        kinds: Which kinds of caption, each of "single", "open", "pair", "relation" at most once.
        only: Captions of two groups have these shapes together, such as "circle and star", and no others.
        without: They have not these: to test on pairs of shapes that were never trained on.

    Raises:
        ConfigError: A kind is unknown or there twice, none is given, or a pair is not a pair of shapes.
    """

    distinct: ClassVar[bool] = True

    def __init__(
        self, kinds: list[Kind], only: list[str] | None = None, without: list[str] | None = None
    ) -> None:
        pairs = (ALL_PAIRS if only is None else shape_pairs(only)) - shape_pairs(without or [])
        if not pairs:
            raise ConfigError("only and without of ShapesPrompts leave no pair of shapes; name other pairs")
        if (only or without) and not {"pair", "relation"} & set(kinds):
            raise ConfigError(
                f"only and without of ShapesPrompts are of captions with two groups, and kinds is {kinds}; "
                "add pair or relation, or take them out"
            )
        self._space = PromptSpace(kinds, pairs)
        self._length = len(self._space)

    def __len__(self) -> int:
        return self._length

    def prompt(self, row: int) -> str:
        return self._space[row]


class ShapesPromptSet(PromptSource):
    """One of the shipped sets of Shapes prompts; no prompt is in two of them.

    ==============  =======  ===============================================================
    ``small``            45  one object of each colour and shape: the small scale
    ``large``       120,000  one group, pairs and relations: the large scale
    ``open``            789  one group whose colour is not named: the world is biased here
    ``pairs``         2,048  two objects joined by "and"
    ``validation``      512  of every kind; no reward model was trained on them
    ``test``            512  the same
    ==============  =======  ===============================================================

    The other sets hold no prompt of the last two, nor of the default validation and test splits: give these
    as ``validation_source`` and ``test_source`` with them.

    Args:
        name: Which set.

    Raises:
        ConfigError: There is no such set.
    """

    distinct: ClassVar[bool] = True

    def __init__(self, name: SetName) -> None:
        if name not in (names := get_args(SetName)):
            there = ", ".join(names)
            raise ConfigError(f"name: there is no set '{name}' of Shapes prompts; give one of {there}")
        self.name, (file,) = name, PROMPTS.glob(f"{name}.*")
        table = file.suffix == ".parquet"
        self._prompts: list[str] = (
            parquet.read_table(file)["prompt"].to_pylist() if table else file.read_text("utf-8").splitlines()
        )

    def __len__(self) -> int:
        return len(self._prompts)

    def prompt(self, row: int) -> str:
        return self._prompts[row]

    def __str__(self) -> str:
        return f"Shapes prompts ({self.name})"
