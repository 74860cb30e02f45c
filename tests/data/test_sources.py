"""Where rows come from: files, folders, saved datasets; drawing, renaming, processing; what is said when it fails."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from aligntune.config.rl import DatasetConfig as RLDatasetConfig
from aligntune.config.sft import DatasetConfig
from aligntune.data.sources import SCHEMES, load_rows, row_source
from aligntune.errors import ConfigError, DataError

ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}, {"text": "three", "n": 3}]


def load(name, **settings):
    return load_rows(DatasetConfig(name=str(name), **settings), seed=1)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.jsonl", lines(ROWS)),
            ("a.json", lines(ROWS)),
            ("a.json", "\n" + lines(ROWS).replace("\n", "\n\n")),
            ("a.json", json.dumps(ROWS)),
            ("a.json", "\n " + json.dumps(ROWS, indent=2)),
            ("a.json", json.dumps({"version": 1, "data": ROWS})),
            ("a.json", json.dumps({"test": [], "train": ROWS}, indent=1)),
            ("a.csv", "text,n\none,1\ntwo,2\nthree,3\n"),
            ("a.tsv", "text\tn\none\t1\ntwo\t2\nthree\t3\n"),
        ],
    )
    def test_text_files(self, tmp_path, name, text):
        assert list(load(write(tmp_path / name, text))) == ROWS

    def test_compressed(self, tmp_path):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
        assert list(load(tmp_path / "a.jsonl.gz")) == ROWS

    def test_parquet_and_arrow(self, tmp_path):
        Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
        assert list(load(tmp_path / "a.parquet")) == ROWS

    def test_numbers_in_text_stay_text(self, tmp_path):
        rows = [{"text": "007"}, {"text": "2020-01-01"}]
        assert list(load(write(tmp_path / "a.json", json.dumps({"data": rows})))) == rows
        assert list(load(write(tmp_path / "b.json", json.dumps(rows)))) == rows

    def test_words_for_nothing_in_csv_are_words(self, tmp_path):
        path = write(tmp_path / "a.csv", "text,label\nNA,yes\nnull,no\n,None\n")
        assert load(path)["text"][:] == ["NA", "null", None]
        assert load(path)["label"][:] == ["yes", "no", "None"]

    def test_one_row_object(self, tmp_path):
        row = {"messages": [{"role": "user", "content": "Hi"}]}
        assert list(load(write(tmp_path / "a.json", json.dumps(row)))) == [row]

    def test_rows_of_mixed_shape_keep_their_values(self, tmp_path):
        rows = [{"tools": [{"a": 1}]}, {"tools": [{"b": {"c": "x"}}]}]
        assert list(load(write(tmp_path / "a.json", "\n" + json.dumps(rows)))) == rows

    def test_conll(self, tmp_path):
        text = "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\nPeter\tB-PER\nBlack Burn\tI-PER\r\n"
        assert list(load(write(tmp_path / "a.conll", text))) == [
            {"tokens": ["EU", "rejects"], "ner_tags": ["B-ORG", "O"]},
            {"tokens": ["Peter", "Black Burn"], "ner_tags": ["B-PER", "I-PER"]},
        ]
        with pytest.raises(DataError, match="line 2: expected a token and a tag, got 'alone'"):
            load(write(tmp_path / "b.conll", "a O\nalone\n"))


class TestFoldersAndSplits:
    def test_files_are_splits_by_name(self, tmp_path):
        write(tmp_path / "f" / "train-00000.jsonl", lines(ROWS[:1]))
        write(tmp_path / "f" / "train-00001.jsonl", lines(ROWS[1:2]))
        write(tmp_path / "f" / "sub" / "dev.jsonl", lines(ROWS[2:]))
        write(tmp_path / "f" / "README.md", "words")
        assert list(load(tmp_path / "f")) == ROWS[:2]
        assert list(load(tmp_path / "f", split="validation")) == ROWS[2:]
        with pytest.raises(DataError, match="has no split 'test'; it has: validation, train"):
            load(tmp_path / "f", split="test")

    def test_files_without_split_words_are_train(self, tmp_path):
        write(tmp_path / "f" / "b.csv", "text\nb\n")
        write(tmp_path / "f" / "a.csv", "text\na\n")
        assert load(tmp_path / "f")["text"][:] == ["a", "b"]

    def test_mixed_and_empty_folders(self, tmp_path):
        (tmp_path / "e").mkdir()
        with pytest.raises(DataError, match="has no data files"):
            load(tmp_path / "e")
        write(tmp_path / "f" / "a.csv", "text\na\n")
        write(tmp_path / "f" / "a.jsonl", lines(ROWS))
        with pytest.raises(DataError, match="mixes csv, json files"):
            load(tmp_path / "f")

    def test_saved_datasets(self, tmp_path):
        whole = Dataset.from_list(ROWS)
        whole.save_to_disk(tmp_path / "one")
        DatasetDict(train=whole, test=whole.select([2])).save_to_disk(tmp_path / "two")
        assert list(load(tmp_path / "one")) == ROWS
        assert list(load(tmp_path / "two", split="test")) == ROWS[2:]
        with pytest.raises(DataError, match="has no split 'dev'; it has: train, test"):
            load(tmp_path / "two", split="dev")

    @pytest.mark.parametrize("text", [lines(ROWS), "\n" + json.dumps(ROWS)], ids=["built", "read"])
    def test_slices(self, tmp_path, text):
        assert list(load(write(tmp_path / "a.json", text), split="train[1:]")) == ROWS[1:]
        assert list(load(tmp_path / "a.json", split="train[:67%]")) == ROWS[:2]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_slices_of_saved_datasets(self, tmp_path, streaming):
        Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        found = load(tmp_path / "saved", split="train[1:]", streaming=streaming)
        assert [row["n"] for row in found] == [2, 3]
        for split in ("train[:", "train[:1]+other[:1]"):
            with pytest.raises(DataError, match="split 'train"):
                load(tmp_path / "saved", split=split, streaming=streaming)

    def test_descriptions_beside_the_files_hold_no_rows(self, tmp_path):
        write(tmp_path / "d" / "train.jsonl", lines(ROWS))
        for name in ("dataset_info.json", "dataset_infos.json"):
            write(tmp_path / "d" / name, '{"default": {"license": "mit"}}')
        assert list(load(tmp_path / "d")) == ROWS

    def test_a_single_file_has_one_split(self, tmp_path):
        path = write(tmp_path / "a.jsonl", lines(ROWS))
        with pytest.raises(DataError, match="has no split 'test'; it has: train"):
            load(path, split="test")
        assert list(load(write(tmp_path / "test.jsonl", lines(ROWS)), split="test")) == ROWS


class TestBadInput:
    def test_missing_file_suggests_close_names(self, tmp_path):
        write(tmp_path / "train_data.jsonl", lines(ROWS))
        with pytest.raises(DataError, match=r"no file or folder .*train_dta.jsonl.*Did you mean .*train_data.jsonl\?"):
            load(tmp_path / "train_dta.jsonl")

    def test_a_relative_path_says_where_it_was_looked_for(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=f"no file or folder rows.jsonl in {tmp_path}, where the run was started"):
            load("rows.jsonl")

    def test_a_name_that_is_neither_file_nor_reachable(self, monkeypatch):
        def unreachable(*args, **kwargs):
            raise ConnectionError("no network")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(DataError, match=r"'org/data' is neither a local file or folder nor .*no network"):
            load("org/data")

    def test_hub_names_go_to_datasets_with_subset_and_split(self, monkeypatch):
        seen = []

        def fake(*args, **kwargs):
            seen.append((args, kwargs))
            return Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", fake)
        load("org/data", subset="main", split="test[:2]")
        load_rows(RLDatasetConfig(name="org/data", config_name="other"), seed=1)
        assert seen[0] == (("org/data", "main"), {"split": "test[:2]", "streaming": False})
        assert seen[1] == (("org/data", "other"), {"split": "train", "streaming": False})

    def test_unknown_subset_or_split_of_a_hub_dataset(self, monkeypatch):
        def unknown(*args, **kwargs):
            raise ValueError("Unknown split \"dev\". Should be one of ['train'].")

        monkeypatch.setattr(datasets, "load_dataset", unknown)
        with pytest.raises(DataError, match=r"org/data: Unknown split \"dev\""):
            load("org/data", split="dev")

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.jsonl", "", "is empty"),
            ("a.json", "[]", "has no rows"),
            ("a.json", '{"data": []}', "has no rows"),
            ("a.csv", "text,n\n", "has no rows"),
            ("a.jsonl", '{"text": "a"}\n"hello"\n', r"line 2: a row should be an object, got str: \"hello\""),
            ("a.jsonl", '{"text": "a"}\n{"text": \n', r"line 2: not JSON .*\{\"text\": "),
            ("a.json", '[{"text": "a"},\n {"text": ]', "line 2: not JSON"),
            ("a.json", ' [{"text": "a"}, 3]', "row 2 should be an object, got int: 3"),
            ("a.json", '{"meta": {},\n "name": "x"}', "holds no list of rows: it has meta, name"),
            ("a.xyz", "text", r"cannot tell the kind of .*a\.xyz"),
        ],
    )
    def test_files_that_hold_no_rows(self, tmp_path, name, text, message):
        with pytest.raises(DataError, match=message):
            load(write(tmp_path / name, text))


class TestDrawing:
    def test_percent_comes_before_the_cap(self, tmp_path):
        path = write(tmp_path / "a.jsonl", lines([{"n": n} for n in range(100)]))
        assert len(load(path, percent=20.0)) == 20
        assert len(load(path, percent=20.0, max_samples=7)) == 7
        assert len(load(path, percent=20.0, max_samples=50)) == 20

    def test_draws_are_random_nested_in_order_and_the_seeds(self, tmp_path):
        path = write(tmp_path / "a.jsonl", lines([{"n": n} for n in range(100)]))

        def drawn(seed, **settings):
            return load_rows(DatasetConfig(name=str(path), **settings), seed=seed)["n"][:]

        ten = drawn(1, max_samples=10)
        assert ten == sorted(ten) == drawn(1, percent=10.0) != list(range(10))
        assert set(ten) < set(drawn(1, max_samples=11))
        assert ten != drawn(2, max_samples=10)

    def test_a_small_share_keeps_one_row(self, tmp_path):
        assert len(load(write(tmp_path / "a.jsonl", lines(ROWS)), percent=0.1)) == 1


class TestColumns:
    def names(self, tmp_path, mapping, **other):
        return load(write(tmp_path / "a.jsonl", lines(ROWS)), column_mapping=mapping, **other).column_names

    def test_source_to_canonical(self, tmp_path):
        assert self.names(tmp_path, {"n": "label"}) == ["text", "label"]

    def test_read_the_other_way_round_when_only_that_fits(self, tmp_path):
        assert self.names(tmp_path, {"label": "n"}) == ["text", "label"]

    def test_swap(self, tmp_path):
        assert self.names(tmp_path, {"n": "text", "text": "n"}) == ["n", "text"]

    def test_errors_list_the_columns(self, tmp_path):
        with pytest.raises(DataError, match=r"names 'm', but the columns of .* are: text, n"):
            self.names(tmp_path, {"m": "label", "n": "k"})
        with pytest.raises(DataError, match="two columns the name 'text'"):
            self.names(tmp_path, {"n": "text"})

    def test_rl_name_of_the_setting(self, tmp_path):
        path = write(tmp_path / "a.jsonl", lines(ROWS))
        config = RLDatasetConfig(name=str(path), field_mappings={"text": "prompt"})
        assert load_rows(config, seed=1).column_names == ["prompt", "n"]


class TestProcessing:
    def test_callable_after_renaming(self, tmp_path):
        path = write(tmp_path / "a.jsonl", lines(ROWS))
        rows = load(
            path,
            column_mapping={"n": "k"},
            processing_fn=lambda row, by: {"k": row["k"] * by},
            processing_fn_kwargs={"by": 10},
        )
        assert rows["k"][:] == [10, 20, 30]

    def test_batched_may_change_the_number_of_rows(self, tmp_path):
        path = write(tmp_path / "a.jsonl", lines(ROWS))
        rows = load(path, processing_fn=lambda batch: {"t": batch["text"] * 2}, processing_batched=True)
        assert rows["t"][:] == ["one", "two", "three"] * 2

    @pytest.mark.parametrize("where", ["my_rows_module", "{}/my_rows_module.py"])
    def test_by_address(self, tmp_path, monkeypatch, where):
        write(tmp_path / "my_rows_module.py", "def shout(row):\n    return {'text': row['text'].upper()}\n")
        monkeypatch.syspath_prepend(tmp_path)
        path = write(tmp_path / "a.jsonl", lines(ROWS))
        assert load(path, processing_fn=where.format(tmp_path) + ":shout")["text"][:] == ["ONE", "TWO", "THREE"]
        with pytest.raises(ConfigError, match=r"has no function 'shot' \(it has: shout\)"):
            load(path, processing_fn=where.format(tmp_path) + ":shot")

    def test_a_changed_function_gives_new_rows(self, tmp_path):
        path = write(tmp_path / "a.jsonl", lines(ROWS))
        for at, word in enumerate(("old", "new")):
            code = write(tmp_path / str(at) / "made.py", f"def add(row):\n    return {{'text': {word!r}}}\n")
            assert load(path, processing_fn=f"{code}:add")[0]["text"] == word

    def test_missing_module_or_file(self, tmp_path):
        path = write(tmp_path / "a.jsonl", lines(ROWS))
        with pytest.raises(ConfigError, match="processing_fn: there is no module 'no_such_module'"):
            load(path, processing_fn="no_such_module:f")
        with pytest.raises(ConfigError, match=r"there is no file nowhere\.py"):
            load(path, processing_fn="nowhere.py:f")

    def test_must_return_a_dict(self, tmp_path):
        with pytest.raises(ConfigError, match="should return a dict, got str"):
            load(write(tmp_path / "a.jsonl", lines(ROWS)), processing_fn=lambda row: "x")


class TestStreaming:
    def test_rows_come_lazily_with_the_same_steps(self, tmp_path):
        path = write(tmp_path / "a.jsonl", lines(ROWS))
        rows = load(
            path,
            streaming=True,
            max_samples=2,
            column_mapping={"n": "k"},
            processing_fn=lambda row: {"k": row["k"] + 1},
        )
        assert isinstance(rows, IterableDataset)
        assert list(rows) == [{"text": "one", "k": 2}, {"text": "two", "k": 3}]

    def test_a_stream_without_rows(self, tmp_path):
        with pytest.raises(DataError, match="has no rows"):
            load(write(tmp_path / "a.csv", "text,n\n"), streaming=True)

    def test_percent_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="percent needs the number of rows"):
            load(write(tmp_path / "a.jsonl", lines(ROWS)), streaming=True, percent=10.0)


def test_schemes_are_made_by_their_function(monkeypatch):
    monkeypatch.setitem(SCHEMES, "made", None)

    @row_source("made")
    def make(rest, *, split, max_samples, seed):
        return Dataset.from_list([{"a": f"{rest} {split} {max_samples} {seed}"}])

    rows = load("made:task", max_samples=5, column_mapping={"a": "prompt"})
    assert list(rows) == [{"prompt": "task train 5 1"}]


class TestLoadKwargs:
    def test_reach_the_loader(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("text;label\na,b;1\n", encoding="utf-8")
        rows = load_rows(DatasetConfig(name=str(path)), seed=0, load_kwargs={"delimiter": ";"})
        assert rows[0] == {"text": "a,b", "label": 1}

    def test_one_with_a_setting_of_its_own_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"dataset\.split"):
            load_rows(DatasetConfig(name="x"), seed=0, load_kwargs={"split": "test"})

    def test_files_that_no_loader_reads_refuse_them(self, tmp_path):
        path = tmp_path / "rows.conll"
        path.write_text("a O\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="no effect"):
            load_rows(DatasetConfig(name=str(path)), seed=0, load_kwargs={"delimiter": ";"})


@pytest.mark.parametrize("row", ['{"text": "caf\xe9 "}', '{"messages": [{"role": "user", "content": "caf\xe9 "}]}'])
def test_bytes_that_are_not_utf8_are_refused_when_loading(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{row.replace('caf', 'tea').encode('ascii', 'ignore').decode()}\n{row}\n".encode("latin1"))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not UTF-8 text"):
        load(path)


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_with_another_separator(tmp_path, mark):
    path = write(tmp_path / "rows.csv", f"prompt{mark}completion\na{mark}b\n")
    with pytest.raises(DataError, match=r"has one column, .*dataset_kwargs: \{sep: "):
        load(path)
    assert load_rows(DatasetConfig(name=str(path)), seed=1, load_kwargs={"sep": mark})[:] == {
        "prompt": ["a"],
        "completion": ["b"],
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_csv_lines_longer_than_the_header(tmp_path, streaming):
    path = write(tmp_path / "a.csv", "text,n\nyes, indeed,1\nno, never,2\n")  # pandas: an index, then text " indeed"
    with pytest.raises(DataError, match="more cells than its header"):
        load(path, streaming=streaming)
    trailing = write(tmp_path / "b.csv", "text,n\none,1,\ntwo,2,\n")
    with pytest.raises(DataError, match="index_col: false"):
        load(trailing)
    options = {"index_col": False}
    assert list(load_rows(DatasetConfig(name=str(trailing)), seed=1, load_kwargs=options)) == ROWS[:2]


def test_a_compressed_file_that_is_cut_short_or_none(tmp_path):
    whole = gzip.compress(lines(ROWS).encode())
    for name, held in (("cut.jsonl.gz", whole[:30]), ("plain.jsonl.gz", lines(ROWS).encode())):
        (tmp_path / name).write_bytes(held)
        with pytest.raises(DataError, match=f"{name} could not be read"):
            load(tmp_path / name)
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{bad\n'))
    with pytest.raises(DataError, match="could not be read as json: JSON parse error"):
        load(tmp_path / "bad.jsonl.gz")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"text": "a"}\n{bad\n'), ("a.csv", "a,b\n1,2\n3,4,5\n")])
def test_a_malformed_stream_is_an_error_before_training(tmp_path, name, text):
    with pytest.raises(DataError, match=name):
        load(write(tmp_path / name, text), streaming=True)
