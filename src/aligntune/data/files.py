"""Which rows are in these local files? JSON, JSONL, CSV, TSV, Parquet, Arrow and CoNLL files, and folders of them."""

from __future__ import annotations

import difflib
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset

from aligntune.errors import ConfigError, DataError

LOADERS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".conll": "conll", ".bio": "conll", ".iob": "conll", ".iob2": "conll",
}  # fmt: skip
"""File ending -> what reads it. All but CoNLL may be compressed (`.jsonl.gz`)."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

UNREADABLE = (EOFError, OSError, lzma.LZMAError, zlib.error, StopIteration)
"""What reading raises for a file that is cut short, or is not compressed as its ending says."""

SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Word in a file's path -> split that the file belongs to."""

WRAPPERS = ("data", "rows", "examples", "samples", "instances", "items", "records")
"""Keys under which a JSON object may hold its list of rows."""

ABOUT = ("dataset_info.json", "dataset_infos.json")
"""Files that lie beside data files and describe them."""


def load_path(
    path: Path, split: str, *, streaming: bool, options: Mapping[str, Any] | None = None
) -> Dataset | IterableDataset:
    """The rows of `split` in a file or folder. `split` may be a slice (`train[:10%]`) unless `streaming`.

    `options` go to the `datasets` loader of the file's kind (e.g. `{"delimiter": ";"}` for CSV).

    Raises:
        ConfigError: `options` for files that we read ourselves.
        DataError: the path is missing, of an unknown kind, malformed, or has no such split.
    """
    if not path.exists():
        raise missing_path(path)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        _no_options(options, path)
        return _saved(path, split, streaming)
    splits = _files_of_folder(path) if path.is_dir() else {"train": [path]}
    name = split.partition("[")[0]
    if path.is_file() and name not in splits:
        splits = {_split_word(Path(path.name)) or "train": [path]}
    if name not in splits:
        raise _unknown_split(split, str(path), list(splits))
    return _load_files(splits[name], name, split, streaming, options or {})


def ending(path: Path) -> str:
    """The lower-case ending that tells a file's kind, without that of compression."""
    name = path.name.lower()
    inner = next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)
    return Path(inner).suffix


def missing_path(path: Path) -> DataError:
    """The error for a path that is not there, with names that look like it."""
    where = "" if path.is_absolute() else f" in {Path.cwd()}, where the run was started"
    return DataError(f"there is no file or folder {path}{where}.{close_paths(path)}")


def close_paths(path: Path) -> str:
    """ " Did you mean ...?" with names beside `path` that look like it, or nothing."""
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""


def _unknown_split(split: str, where: str, known: list[str]) -> DataError:
    return DataError(f"{where} has no split {split!r}; it has: {', '.join(known)}")


def _split_word(path: Path) -> str | None:
    """The split that a path's words name, the file's own name first."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _files_of_folder(folder: Path) -> dict[str, list[Path]]:
    """Split -> files. Without any split word in the names, all files are `train`."""
    files = [
        path for path in sorted(folder.rglob("*"))
        if path.is_file() and ending(path) in LOADERS and path.name not in ABOUT
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]  # fmt: skip
    if not files:
        raise DataError(f"the folder {folder} has no data files ({', '.join(LOADERS)})")
    kinds = {"tsv" if ending(path) == ".tsv" else LOADERS[ending(path)] for path in files}
    if len(kinds) > 1:
        raise DataError(f"the folder {folder} mixes {', '.join(sorted(kinds))} files; name one file, or separate them")
    words = {path: _split_word(path.relative_to(folder)) for path in files}
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(words[path] or "train", []).append(path)
    return splits


def _saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    """A folder written by `datasets.save_to_disk`."""
    saved = datasets.load_from_disk(str(path))
    name = split.partition("[")[0]
    if isinstance(saved, DatasetDict):
        if name not in saved:
            raise _unknown_split(split, str(path), list(saved))
        saved = saved[name]
    elif name not in ("train", str(saved.split)):
        raise _unknown_split(split, str(path), [str(saved.split or "train")])
    rows = _slice(saved, name, split)
    return rows.to_iterable_dataset() if streaming else rows


def _no_options(options: Mapping[str, Any] | None, path: Path) -> None:
    if options:
        raise ConfigError(
            f"dataset_kwargs: {path} is not read by datasets.load_dataset; {', '.join(options)} has no effect"
        )


def _load_files(
    files: list[Path], name: str, split: str, streaming: bool, options: Mapping[str, Any]
) -> Dataset | IterableDataset:
    loader = LOADERS.get(ending(files[0]))
    if loader is None:
        raise DataError(f"cannot tell the kind of {files[0]}; known endings: {', '.join(LOADERS)}")
    for path in files:
        if path.stat().st_size == 0:
            raise DataError(f"the file {path} is empty")
    if loader == "conll":
        rows = Dataset.from_list([row for path in files for row in read_conll(path)])
    elif loader == "json" and (wrapped := _wrapped_rows(files, name)) is not None:
        rows = _from_list(wrapped, files[0])
    else:
        return _built(loader, files, name, split, streaming, options)
    _no_options(options, files[0])
    rows = _slice(rows, name, split)
    return rows.to_iterable_dataset() if streaming else rows


def _slice(rows: Dataset, name: str, split: str) -> Dataset:
    if split == name:
        return rows
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (ValueError, AssertionError) as error:
        raise DataError(f"split {split!r}: {error}") from None
    return rows.select([place for part in parts for place in range(part.from_, part.to)])


def _built(
    loader: str, files: list[Path], name: str, split: str, streaming: bool, given: Mapping[str, Any]
) -> Dataset | IterableDataset:
    """Through `datasets`' own builder, which keeps an Arrow copy for the next start."""
    options: dict[str, Any] = {}
    if loader == "csv":  # only an empty cell is null: "NA", "None" and "null" are words that a text may hold
        options = {"keep_default_na": False, "na_values": [""]}
        if ending(files[0]) == ".tsv":
            options["sep"] = "\t"
    if "data_files" in given:
        raise ConfigError(f"dataset_kwargs.data_files: {files[0]} is a local file; name the files by dataset.name")
    options |= given
    data_files = {name: [str(path) for path in files]}
    try:
        rows = datasets.load_dataset(loader, data_files=data_files, split=split, streaming=streaming, **options)
        if loader == "json" and isinstance(rows, Dataset):
            rows.data.table.validate(full=True)  # Arrow reads bytes that are not UTF-8 and fails at the row, much later
        elif streaming:
            next(iter(rows), None)  # what is wrong with the first block is found now, not in training
    except (*UNREADABLE, datasets.exceptions.DatasetsError, pa.ArrowException, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and "corresponds to no data" in str(error):
            raise DataError(f"{files[0]} has no rows") from None
        raise _malformed(loader, files, error) from error
    if loader == "csv":
        names = list(rows.column_names or next(iter(rows), {}))
        _refuse_one_column(names, files[0])
        if "index_col" not in given:
            _refuse_long_lines(names, files[0])
    return rows


def _refuse_one_column(names: list[str], path: Path) -> None:
    """A single column whose name holds another separator is a table that was not read as one."""
    other = [mark for mark in (";", "\t", "|", ",") if len(names) == 1 and mark in names[0]]
    if other:
        raise DataError(
            f"{path} has one column, {names[0]!r}: write commas, or in SFT name its separator by dataset_kwargs: {{sep: {json.dumps(other[0])}}}"
        )


def _refuse_long_lines(names: list[str], path: Path) -> None:
    """Lines with more cells than the header has names: pandas takes the first ones for an index, and all texts move by one."""
    if any(name.startswith("__index_level_") for name in names):
        raise DataError(
            f"{path} has lines with more cells than its header has names: quote cells that hold the separator; if lines "
            "merely end with a separator, in SFT set dataset_kwargs: {index_col: false}"
        )


def _malformed(loader: str, files: list[Path], error: Exception) -> DataError:
    """Which row a file cannot be read at; the loader's own message where that is not found out."""
    plain = [path for path in files if loader == "json" and path.suffix.lower() not in COMPRESSED]
    for path in plain:
        for number, problem in _json_problems(path):
            return DataError(f"{path}, line {number}: {problem}")
    cause = error.__cause__ or error
    return DataError(f"{files[0]} could not be read as {loader}: {cause}")


def _json_problems(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a JSONL file, or rows of a JSON list, that are not objects."""
    written = path.read_bytes()
    text = written.decode("utf-8", errors="replace")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            yield error.lineno, f"not JSON ({error.msg}): {text.splitlines()[error.lineno - 1][:200]}"
            return
        for place, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                yield place, f"row {place} should be an object, got {type(row).__name__}: {str(row)[:200]}"
        return
    is_utf8 = text.encode("utf-8") == written
    for number, line in enumerate(text.split("\n"), 1):  # other line ends may stand in a JSON text
        if "\N{REPLACEMENT CHARACTER}" in line and not is_utf8:
            yield number, f"not UTF-8 text; convert the file (iconv -f ENCODING -t utf-8): {line[:200]}"
            return
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            yield number, f"not JSON ({error.msg}): {line[:200]}"
            return
        if not isinstance(row, dict):
            yield number, f"a row should be an object, got {type(row).__name__}: {line[:200]}"


def _wrapped_rows(files: list[Path], split: str) -> list[Any] | None:
    """The list of rows inside a JSON object, as {"data": [...]} or {"train": [...]}; None for lists and JSON lines."""
    if len(files) != 1 or files[0].suffix.lower() != ".json":
        return None
    path = files[0]
    with path.open(encoding="utf-8-sig") as handle:
        if handle.read(1) == "[":
            return None
        handle.seek(0)
        head = handle.readline().strip()
        if head.startswith("{") and head.endswith("}") and handle.readline().strip():
            return None
    text = path.read_text(encoding="utf-8-sig").strip()
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # another row follows, blank lines between
            return None
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if isinstance(document, list):
        return document
    for key in (split, *WRAPPERS):
        if isinstance(document, dict) and isinstance(document.get(key), list):
            return document[key]
    if isinstance(document, dict) and "\n" not in text:
        return [document]
    keys = ", ".join(document) if isinstance(document, dict) else type(document).__name__
    raise DataError(
        f"{path} holds no list of rows: it has {keys}, and rows are looked for under {split} and {', '.join(WRAPPERS)}"
    )


def _from_list(rows: list[Any], path: Path) -> Dataset:
    if not rows:
        raise DataError(f"{path} has no rows")
    for place, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {place} should be an object, got {type(row).__name__}: {str(row)[:200]}")
    return Dataset.from_list(rows, on_mixed_types="use_json")


def read_conll(path: Path) -> Iterator[dict[str, list[str]]]:
    """Sentences of a CoNLL file: first column the token, last column the tag; a blank line ends a sentence.

    Columns are separated by tabs where the line has one, else by blanks. `-DOCSTART-` lines are skipped.
    """
    tokens: list[str] = []
    tags: list[str] = []
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            line = line.rstrip("\r\n")
            if not line.strip() or line.startswith("-DOCSTART-"):
                if tokens:
                    yield {"tokens": tokens, "ner_tags": tags}
                tokens, tags = [], []
                continue
            columns = line.split("\t") if "\t" in line else line.split(" ")
            if len(columns) < 2 or not columns[-1].strip():
                raise DataError(f"{path}, line {number}: expected a token and a tag, got {line!r}")
            tokens.append(columns[0])
            tags.append(columns[-1].strip())
    if tokens:
        yield {"tokens": tokens, "ner_tags": tags}
