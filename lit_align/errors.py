"""The one exception that is shown to a user as a sentence, without a stack of library frames."""


class ConfigError(ValueError):
    """A value that the user gave cannot work.

    The message names the value, the place where it was given and the remedy; ``cli.py`` prints it alone and
    exits with status 2.
    """
