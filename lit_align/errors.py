"""The one exception that is shown to a user as a sentence, without a stack of library frames."""

from collections.abc import Mapping


class ConfigError(ValueError):
    """A value that the user gave cannot work.

    The message names the value, the place where it was given and the remedy; ``cli.py`` prints it alone and
    exits with status 2.
    """


def check_positive(values: Mapping[str, float | None]) -> None:
    """Refuse settings that are not above 0; None is a setting that was left out.

    Raises:
        ConfigError: One is not; NaN is none either.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name}: {value} must be positive")
