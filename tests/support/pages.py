"""Read from a page what a newcomer copies from it: its files and its commands."""

import re
from pathlib import Path

BLOCK = r"```\w*\n(.*?)^```"


def files_of(page: Path) -> dict[str, str]:
    """Return the files that a page tells its reader to save, by name."""
    found = re.findall(r"[Ss]ave this as `([\w.]+)`[^`]*?:\n\n" + BLOCK, page.read_text(encoding="utf-8"), re.M | re.S)
    return dict(found)


def commands_of(page: Path) -> list[str]:
    """Return the lines of a page's blocks that start with `pidistill`, without their comments, in the page's order."""
    blocks = re.findall("^" + BLOCK, page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines if line.startswith("pidistill ")]
