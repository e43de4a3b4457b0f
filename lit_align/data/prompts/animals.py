"""The 45 common animals on which reward finetuning is usually tried first."""

from typing import ClassVar

from lit_align.data.prompts.sources import PromptSource
from lit_align.errors import ConfigError

ANIMALS = """
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig
turkey fly llama camel bat gorilla hedgehog kangaroo
""".split()  # noqa: SIM905
"""DDPO's list (Black et al., 2024, appendix; ``simple_animals.txt`` of its code), in its order."""


class Animals(PromptSource):
    """A prompt for each of 45 common animals, as DDPO, AlignProp and PRDP use them.

    DDPO and AlignProp give the bare name, PRDP ``A painting of a {animal}`` (supplement, Table 4),
    DDPO's alignment task ``{an animal} riding a bike`` and two more activities.

    Args:
        template: The prompt; ``{animal}`` becomes the name and ``{an animal}`` the name with its article.

    Raises:
        ConfigError: The template names no animal, or something else.
    """

    distinct: ClassVar[bool] = True

    def __init__(self, template: str = "{animal}") -> None:
        self.template = template
        try:
            prompts = {self.prompt(row) for row in range(len(self))}
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            what = f"template of Animals is '{template}', which cannot be filled in ({error})"
            raise ConfigError(f"{what}: use {{animal}} or {{an animal}}") from error
        if len(prompts) < len(self):
            raise ConfigError(f"template of Animals is '{template}': put {{animal}} or {{an animal}} into it")

    def __len__(self) -> int:
        return len(ANIMALS)

    def prompt(self, row: int) -> str:
        name = ANIMALS[row]
        article = "an" if name[0] in "aeiou" else "a"
        return self.template.format(**{"animal": name, "an animal": f"{article} {name}"})

    def __str__(self) -> str:
        return f"the {len(self)} animals"
