"""Read rows out of files and from the Hub.

JSON and CSV files, also those of a folder, are read as they are, so that a null of a row stays a null and a text stays a text.
Parquet files, other folders and Hub datasets go through Hugging Face datasets, which may turn a text into a date or a number;
the nulls that a table holds for the fields of other rows are removed from lists, and a class of a label column is its name.
"""

import codecs
import csv
import glob
import io
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torchtune.utils import log_rank_zero

from pidistill.chat.messages import without_nulls
from pidistill.config import COMPONENT
from pidistill.errors import InputError, check_count
from pidistill.jsonl import parse_jsonl

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
LONGEST_CELL = 2**31 - 1  # characters of a CSV cell; Python's own limit is 131,072, and a prompt may have more

_NULL_MEANS = {  # by option: what follows "set dataset.<option>"
    "privileged_key": ", or null for rows without privileged information",
    "reward_key": ", or null where every trace counts as a success",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Hold the rows of one source as plain dicts; ``name`` is what errors call it."""

    name: str
    rows: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (id, row) of every row; ids count from 0."""
        return ((f"{self.name} row {i}", row) for i, row in enumerate(self.rows))

    def require_all(self, **keys: str | None) -> None:
        """Refuse keys that no row has, by the options of the builder that hold them; an option may be None."""
        for option, key in keys.items():
            if key is not None and all(get(row, key) is None for row in self.rows):
                columns = ", ".join(_dotted_keys(self.rows[0]))
                raise InputError(
                    f"{self.name} has no column {key!r} with values (it has: {columns}); set dataset.{option}"
                    f"{_NULL_MEANS.get(option, '')}"
                )


def get(row: Any, key: str) -> Any:
    """Return the value under a dotted path such as ``extra_info.privileged_context``; None where a part of it is missing.

    A name within the path may have dots itself, at every level.
    """
    if not isinstance(row, Mapping) or key in row:
        return row[key] if isinstance(row, Mapping) else None
    names = (key[:i] for i, character in enumerate(key) if character == ".")
    found = (get(row[name], key[len(name) + 1 :]) for name in names if name in row)
    return next((value for value in found if value is not None), None)


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
    """Return the rows of a .jsonl, .json, .parquet or .csv file, of several (a glob), of a folder, or of a dataset on the Hub.

    Args:
        source: a path as given (relative to the working directory), a glob, or a Hub name such as ``openai/gsm8k``.
        split: a split, or a slice such as ``train[:100]``; a file is its whole split, whatever its name.
        data_files: which files of a folder or Hub dataset.
        max_rows: only the first rows.
        config_name: configuration of a Hub dataset, e.g. ``main``.

    Local sources are read without network access.
    """
    check_count("dataset.max_rows", max_rows, null="all rows")
    files = _local_files(source)
    if files and files[0].suffix != ".parquet":
        rows = _slice([row for file in files for row in read_rows(file)], source, split)[:max_rows]
    elif by_split := _files_of_folder(source, data_files, config_name):
        rows = _rows_of_folder(by_split, source, split)[:max_rows]
    else:
        loaded = _load_table(source, files, split, data_files, config_name)
        loaded = loaded if max_rows is None else loaded.select(range(min(max_rows, len(loaded))))
        rows = [_without_table_nulls(_with_class_names(row, loaded.features)) for row in loaded]
    if max_rows is not None and rows and len(rows) < max_rows:
        log_rank_zero(
            _log, f"dataset.max_rows={max_rows}, and {source} has {len(rows)} rows; all are taken", level=logging.WARNING
        )
    name = Path(source).name if files or Path(source).is_dir() else f"{source} {split}"
    if not rows:
        raise _no_rows(source, split)
    return Rows(name, rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of one JSON, JSON-lines or CSV file; errors name the file, the line and what is wrong there."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        written = "utf-16" if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
        raise InputError(
            f"dataset.source {file} cannot be loaded (line {line} holds the byte 0x{byte:02x}, which is not UTF-8); write it "
            f"as UTF-8, for example with `iconv -f {written} -t utf-8 {file.name}`"
        ) from error
    if file.suffix == ".csv":
        return _csv_rows(file, text)
    lines = file.suffix == ".jsonl" and not text[:99].lstrip().startswith("[")
    rows = _json_lines(file, text) if lines else _json_rows(file, text)
    for where, row in rows:
        _check_row(row, f"dataset.source {file} {where}")
    return [row for _, row in rows]


def _csv_rows(file: Path, text: str) -> list[dict[str, Any]]:
    """Return the rows of a CSV file; every value is text, as it is written, and an empty cell has no value."""
    first = text.lstrip().partition("\n")[0]
    other = next((mark for mark in ";\t" if mark in first and "," not in first), None)
    if other:
        raise InputError(f"dataset.source {file} separates its columns by {other!r}; save it with commas between them")
    lines = list(_csv_lines(file, text))
    header = lines[0][1] if lines else []
    while header and not header[-1] and not any("".join(cells[len(header) - 1 :]) for _, cells in lines[1:]):
        header = header[:-1]  # spreadsheets write empty columns behind the last one
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise InputError(
            f"dataset.source {file} has {header.count(twice[0])} columns with the name {twice[0]!r} in its header; give each "
            "column a name of its own"
        )
    rows = []
    for line, cells in lines[1:]:
        while len(cells) > len(header) and not cells[-1]:
            cells = cells[:-1]
        # Spreadsheets leave out empty cells at the end of a row; one cell alone is the rest of a text with a line break.
        if len(cells) > len(header) or (len(cells) == 1 < len(header)):
            raise InputError(
                f"dataset.source {file} line {line} has {len(cells)} cells and the header has {len(header)}; put a text "
                'with a comma, a quote or a line break between quotes ("), and double each quote in it'
            )
        rows.append({name: cell or None for name, cell in itertools.zip_longest(header, cells)})
    return rows


def _csv_lines(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which it starts, cells) of the header and of every row; blank lines are none."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"dataset.source {file} cannot be loaded ({error} in the row that starts on line {start}); check the line: a quote "
            '(") may be missing or not doubled'
        ) from error


def _json_rows(file: Path, text: str) -> list[tuple[str, Any]]:
    """Return the rows of a file that holds one list; several objects, one a line, are read too."""
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            return _json_lines(file, text)
        raise InputError(f"dataset.source {file} cannot be loaded (not valid JSON: {error}); check the file") from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InputError(f"dataset.source {file} is not a list of objects, one for each row; check the file")
    return [(f"row {i}", row) for i, row in enumerate(value)]


def _json_lines(file: Path, text: str) -> list[tuple[str, Any]]:
    try:
        return [(f"line {number}", row) for number, row in parse_jsonl(text)]
    except ValueError as error:
        raise InputError(
            f"dataset.source {file} cannot be loaded ({error}); check the file: the line may be cut off"
        ) from error


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where} is a {type(row).__name__}, not an object with named fields; check the file")
    for key, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise InputError(
                f"{where}: {key} holds {half}, half of a surrogate pair, which is no character and has no tokens; mend the "
                "text (it was probably cut within an emoji) or leave the row out"
            ) from error


def _slice(rows: Sequence[Any], source: str, split: str) -> Sequence[Any]:
    """Return the part of the rows that a split such as ``train[:100]`` names; a file is its whole split, whatever its name."""
    name, bracket, _ = split.partition("[")
    if not bracket:
        return rows
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"dataset.split {split!r} names no part of the {len(rows)} rows of {source} ({error}); set dataset.split"
        ) from error
    return rows[part.from_ : part.to]


def _without_table_nulls(value: Any) -> Any:
    """Return the value without the nulls that a table holds, in a list of objects, for the fields of the other objects."""
    if isinstance(value, Mapping):
        return {key: _without_table_nulls(item) for key, item in value.items()}
    return without_nulls(value) if isinstance(value, list) else value


def _with_class_names(value: Any, feature: Any) -> Any:
    """Return the value with the names of classes in the place of their numbers, at any depth; None where there is no class."""
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if value is not None and value >= 0 else None  # a row without a label has -1
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: _with_class_names(item, feature.get(key)) for key, item in value.items()}
    item_feature = getattr(feature, "feature", None)
    return [_with_class_names(item, item_feature) for item in value] if item_feature and isinstance(value, list) else value


def _local_files(source: str) -> list[Path]:
    """Return the files that ``source`` names; none where it is a folder or a name on the Hub."""
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


def check_sources(key: str, node: Any) -> None:
    """Refuse a file that a dataset's config node names, at any depth, and that is not there; ``key`` is the node's own."""
    if isinstance(node, list):
        for i, part in enumerate(node):
            check_sources(f"{key}[{i}]", part)
    if not isinstance(node, Mapping):
        return
    for name, part in node.items():
        check_sources(f"{key}.{name}", part)
    if str(node.get(COMPONENT)).startswith("pidistill.") and isinstance(node.get("source"), str):
        try:
            _local_files(node["source"])
        except InputError as error:
            raise InputError(str(error).replace("dataset.source", f"{key}.source")) from error


def _load_table(source: str, files: list[Path], split: str, data_files: Any, config_name: str | None) -> Any:
    if files:
        return _load(source, "parquet", split, {split.partition("[")[0]: [str(file) for file in files]})
    if _is_saved(Path(source)):
        return _load_saved(source, split)
    return _load(source, source, split, data_files, config_name, local=Path(source).is_dir())


def _files_of_folder(source: str, data_files: Any, config_name: str | None) -> dict[str, list[Path]]:
    """Return the JSON or CSV files of a folder by split, which Hugging Face datasets tells by their names or the folder's card.

    Return nothing where that library must read the folder: it has files of another type, or a card that says how to read them.
    """
    folder = Path(source)
    if not folder.is_dir() or _is_saved(folder):
        return {}
    if data_files is None:
        _warn_of_mixed_files(folder)
    local = datasets.DownloadConfig(local_files_only=True)
    try:
        config = datasets.load_dataset_builder(source, config_name, data_files=data_files, download_config=local).config
    except Exception:  # the folder cannot be read; `_load`, which meets the same error, says why
        return {}
    plain = type(config)(config.name, config.version, config.data_dir, config.data_files, config.description)
    by_split = {str(name): [Path(file) for file in files] for name, files in (config.data_files or {}).items()}
    suffixes = {file.suffix if file.is_file() else None for files in by_split.values() for file in files}
    return by_split if config == plain and suffixes <= {".json", ".jsonl", ".csv"} else {}


def _rows_of_folder(by_split: Mapping[str, list[Path]], source: str, split: str) -> list[dict[str, Any]]:
    rows = []
    for part in by_split if split == "all" else split.split("+"):
        name = part.partition("[")[0].strip()
        if name not in by_split:
            raise _no_split(source, by_split, name)
        rows += _slice([row for file in by_split[name] for row in read_rows(file)], source, part.strip())
    return rows


def _warn_of_mixed_files(folder: Path) -> None:
    """Warn where a folder has files of several types, of which only one type is read; a .json may be about the others."""
    types = sorted({file.suffix for file in folder.rglob("*") if file.suffix in FORMATS} - {".json"})
    if len(types) > 1:
        log_rank_zero(
            _log,
            f"dataset.source {folder} has files of type {', '.join(types)}, of which only one type is read; name the files in "
            "dataset.data_files",
            level=logging.WARNING,
        )


def _is_saved(folder: Path) -> bool:
    """Return whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_saved(source: str, split: str) -> Any:
    """Return the split of a folder for which :func:`_is_saved` holds."""
    saved = datasets.load_from_disk(source)
    name, bracket, _ = split.partition("[")
    if isinstance(saved, datasets.DatasetDict):
        if name not in saved:
            raise _no_split(source, saved, name)
        saved = saved[name]
    return saved.select(_slice(range(len(saved)), source, split)) if bracket else saved


def _load(source: str, path: str, split: str, data_files: Any, config_name: str | None = None, local: bool = True) -> Any:
    download = datasets.DownloadConfig(local_files_only=True) if local else None
    try:
        return datasets.load_dataset(path, config_name, data_files=data_files, split=split, download_config=download)
    except Exception as error:  # the library raises its own and its backends' errors; all mean: this source cannot be read
        if "corresponds to no data" in str(error):
            raise _no_rows(source, split) from error
        reason = re.sub(r"\s+", " ", str(error.__cause__ or error)).strip()[:300]
        advice = "check the file" if local else "it is no file or folder here; check dataset.source, split and config_name"
        raise InputError(f"dataset.source {source} cannot be loaded ({reason}); {advice}") from error


def _no_split(source: str, splits: Iterable[str], name: str) -> InputError:
    return InputError(f"dataset.source {source} has the splits {', '.join(splits)}, and not {name!r}; set dataset.split")


def _no_rows(source: str, split: str) -> InputError:
    return InputError(f"dataset.source {source} has no rows in the split {split!r}; check dataset.source and dataset.split")


def _dotted_keys(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in row.items():
        keys += _dotted_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return keys
