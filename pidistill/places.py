"""Where recipes and configs are."""

from pathlib import Path


def folders() -> tuple[Path, Path]:
    """(recipes, configs): inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    root = package if (package / "recipes").is_dir() else package.parent
    return root / "recipes", root / "configs"
