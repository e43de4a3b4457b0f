"""One thing that is wrong, or will be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        name: Of the kind, such as ``reward_constant``.
        where: The option that decides it.
        what: The fault, with the value.
        remedy: What to do; empty where the fault says it.
    """

    name: str
    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.where}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")
