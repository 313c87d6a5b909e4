"""Rows out of files and the Hub, through Hugging Face datasets."""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from pidistill.errors import InputError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

_MISSING = object()


@dataclass(frozen=True)
class Rows:
    """Rows of one source as plain dicts; ``name`` is what errors call it."""

    name: str
    rows: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(id, row) of every row; ids count from 0."""
        return ((f"{self.name} row {i}", row) for i, row in enumerate(self.rows))

    def require(self, key: str, option: str, hint: str = "") -> None:
        """Refuse a key that no row has, naming the option of the builder that holds it."""
        if all(get(row, key) is None for row in self.rows):
            columns = ", ".join(_dotted_keys(self.rows[0]))
            raise InputError(f"{self.name} has no column {key!r} with values (it has: {columns}); set dataset.{option}{hint}")


def get(row: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted path such as ``extra_info.privileged_context``; None where a part of it is missing."""
    if key in row:  # a column whose own name has dots
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
    return None if value is _MISSING else value


def require_value(row: Mapping[str, Any], key: str, where: str, option: str) -> Any:
    value = get(row, key)
    if value is None:
        raise InputError(f"{where} has no value in {key!r}; fill it, leave the row out, or set dataset.{option}")
    return value


def load_rows(
    source: str,
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    max_rows: int | None = None,
    config_name: str | None = None,
) -> Rows:
    """The rows of a .jsonl, .json or .parquet file, of several (a glob), of a folder, or of a dataset on the Hub.

    Args:
        source: a path as given (relative to the working directory), a glob, or a Hub name such as ``openai/gsm8k``.
        split: a split, or a slice such as ``train[:100]``; a file is its whole split, whatever its name.
        data_files: which files of a folder or Hub dataset.
        max_rows: only the first rows.
        config_name: configuration of a Hub dataset, e.g. ``main``.

    Local sources are read without network access.
    """
    if max_rows is not None and max_rows < 1:
        raise InputError(f"dataset.max_rows is {max_rows}; give at least 1, or null for all rows")
    files = _local_files(source)
    if files:
        loaded = _load(source, FORMATS[files[0].suffix], split, {split.partition("[")[0]: [str(file) for file in files]})
    else:
        loaded = _load(source, source, split, data_files, config_name, local=Path(source).is_dir())
    rows = list(loaded if max_rows is None else loaded.select(range(min(max_rows, len(loaded)))))
    name = Path(source).name if files or Path(source).is_dir() else f"{source} {split}"
    if not rows:
        raise _no_rows(source, split)
    return Rows(name, rows)


def _local_files(source: str) -> list[Path]:
    """The files that ``source`` names; none where it is a folder or a name on the Hub."""
    path = Path(source)
    if path.is_dir():
        return []
    files = [path] if path.is_file() else [Path(match) for match in sorted(glob.glob(source, recursive=True))]
    looks_local = path.suffix in FORMATS or glob.has_magic(source) or path.is_absolute() or source.startswith(("./", "../"))
    if not files and looks_local:
        raise InputError(f"dataset.source {source} does not exist; relative paths start at the working directory")
    suffixes = {file.suffix for file in files}
    if len({FORMATS.get(suffix) for suffix in suffixes}) > 1 or suffixes - set(FORMATS):
        known = ", ".join(FORMATS)
        raise InputError(f"dataset.source {source} names files of type {', '.join(sorted(suffixes))}; give one type of {known}")
    return files


def _load(source: str, path: str, split: str, data_files: Any, config_name: str | None = None, local: bool = True) -> Any:
    download = datasets.DownloadConfig(local_files_only=True) if local else None
    try:
        loaded = datasets.load_dataset(path, config_name, data_files=data_files, split=split, download_config=download)
    except Exception as error:  # the library raises its own and its backends' errors; all mean: this source cannot be read
        if "corresponds to no data" in str(error):
            raise _no_rows(source, split) from error
        reason = re.sub(r"\s+", " ", str(error.__cause__ or error)).strip()[:300]
        advice = "check the file" if local else "it is no file or folder here; check dataset.source, split and config_name"
        raise InputError(f"dataset.source {source} cannot be loaded ({reason}); {advice}") from error
    return loaded


def _no_rows(source: str, split: str) -> InputError:
    return InputError(f"dataset.source {source} has no rows in the split {split!r}; check dataset.source and dataset.split")


def _dotted_keys(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in row.items():
        keys += _dotted_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return keys
