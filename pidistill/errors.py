"""The one exception for wrong input: its message is a sentence that says what to change."""


class InputError(ValueError):
    """Wrong config, data or checkpoint. Recipes print the message alone, without a traceback, and exit with status 2."""
