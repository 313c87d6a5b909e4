"""Check the placeholders of the text templates that a config may set."""

import string
from collections.abc import Sequence

from pidistill.errors import InputError


def check_template(template: str, key: str, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise InputError, naming ``key``, unless the template has every required placeholder and none but the optional ones.

    With nothing required, at least one of the optional ones must be there.
    """
    known = " and ".join(f"{{{name}}}" for name in (*required, *optional))
    hint = f"write {known} where the text goes, and {{{{ and }}}} for braces of the template's own"
    try:
        fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise InputError(f"{key} is malformed ({error}); {hint}") from error
    for name, spec, conversion in fields:
        if name not in (*required, *optional) or spec or conversion:
            raise InputError(f"{key} has the unknown placeholder {{{name}}}; {hint}")
    names = {name for name, _, _ in fields}
    missing = [name for name in required if name not in names]
    if missing or not names:
        raise InputError(f"{key} lacks {{{(missing or optional)[0]}}}, so it would show nothing of it; {hint}")
