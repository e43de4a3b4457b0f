"""The embeddings of prompts, each computed once and remembered."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class PromptCache:
    """What a text encoder made of the prompts that were used last, on the CPU.

    Args:
        embed: Encodes prompts: for each, tensors by name of one row.
        size: How many prompts are remembered.
    """

    def __init__(self, embed: Callable[[Sequence[str]], list[dict[str, Tensor]]], size: int) -> None:
        self._embed = embed
        self._size = size
        self._known: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings of the distinct prompts, and which of them each prompt has.

        Returns:
            Row numbers, one for each prompt, and the tensors that these are rows of.
        """
        distinct = list(dict.fromkeys(prompts))
        if new := [prompt for prompt in distinct if prompt not in self._known]:
            for prompt, made in zip(new, self._embed(new), strict=True):
                self._known[prompt] = {name: value.cpu() for name, value in made.items()}
        found = {prompt: self._known[prompt] for prompt in distinct}
        for prompt in distinct:
            self._known.move_to_end(prompt)
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        places = {prompt: place for place, prompt in enumerate(found)}
        first = found[prompts[0]]
        tensors = {name: torch.cat([one[name] for one in found.values()]) for name in first}
        return torch.tensor([places[prompt] for prompt in prompts]), tensors
