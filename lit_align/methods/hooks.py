"""A user's method may add to the hooks of the base, and may not replace what every method does there."""

import inspect
from itertools import takewhile

from lit_align.errors import ConfigError
from lit_align.rewards.calling import is_ours


def check_hooks(kind: type) -> None:
    """Refuse a class whose ``setup`` or ``on_...`` does not call that of its base.

    Checks, measurements, clipping and counters are there: a run would go on without them, and its
    checkpoints could not be read again.

    Raises:
        ConfigError: One does not.
    """
    bases = kind.__mro__
    ours = {name for base in bases if is_ours(base) for name in vars(base)}
    for own in takewhile(lambda base: not is_ours(base), bases):
        for name in sorted(vars(own).keys() & ours):
            code = getattr(inspect.unwrap(vars(own)[name]), "__code__", None)
            if (name == "setup" or name.startswith("on_")) and code and name not in code.co_names:
                given = ", ".join(code.co_varnames[1 : code.co_argcount])
                raise ConfigError(
                    f"{own.__name__}.{name} replaces what every method does there; begin it with "
                    f"super().{name}({given})"
                )
