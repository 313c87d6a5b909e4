"""Give the package a readme whose links hold on a package index, where links relative to the repository lead nowhere.

The repository has no public address yet. The one place to name it is `source` in pyproject.toml's `[project.urls]`, such as
`source = "https://github.com/OWNER/pidistill"`; until then the packaged readme keeps the words of these links, and
no pictures.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def readme_for_index(text: str, source: str | None) -> str:
    """Return Markdown in which no link is relative: they lead to ``source``, and without it only their texts are left."""

    def replaced(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        if source is None:
            return "" if picture else words
        return f"{picture}[{words}]({source.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replaced, text)


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    setup(
        long_description=readme_for_index((ROOT / "README.md").read_text(encoding="utf-8"), urls.get("source")),
        long_description_content_type="text/markdown",
    )
