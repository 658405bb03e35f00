from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from expertsteer.data.readers import read_rows, read_text
from expertsteer.errors import DataError


def test_importing_the_room_is_light():
    heavy = ["torch", "transformers", "datasets", "pandas", "pyarrow"]
    code = f"import sys, expertsteer.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_json_lines_carry_their_line_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"text": "ü"}\n', encoding="utf-8")
    assert read_rows(path) == [(f"{path}:1", {"text": "a\u2028b"}), (f"{path}:3", {"text": "ü"})]


def test_json_may_be_one_array_or_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n {"a": 2}\n]')
    assert read_rows(path) == [(f"{path}, element 1", {"a": 1}), (f"{path}, element 2", {"a": 2})]
    path.write_text('{"a": 1}\n{"a": 2}')
    assert [row for _, row in read_rows(path)] == [{"a": 1}, {"a": 2}]


def test_a_byte_order_mark_is_not_part_of_the_first_field(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,1\n", encoding="utf-8-sig")
    assert read_rows(path) == [(f"{path}:2", {"text": "x", "label": "1"})]


def test_csv_fields_may_hold_commas_and_line_breaks(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one, two\nthree",1\nx\u2028y,0\n', encoding="utf-8")
    assert [row["text"] for _, row in read_rows(path)] == ["one, two\nthree", "x\u2028y"]


def test_parquet(tmp_path):
    # Other import errors than a missing package too: pyarrow may not fit the NumPy at hand.
    pa = pytest.importorskip("pyarrow", exc_type=ImportError)
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "choices": [["x", "y"]]}), path)
    assert read_rows(path) == [(f"{path}, row 1", {"text": "a", "choices": ["x", "y"]})]
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not readable Parquet"):
        read_rows(path)
    path.unlink()
    with pytest.raises(DataError, match="there is no such file"):
        read_rows(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(DataError, match=f"{name}, but there is no such file"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "x,y\n")]
)
def test_an_empty_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match="which is empty"):
        read_rows(path)


def test_a_folder(tmp_path):
    with pytest.raises(DataError, match="which is a folder"):
        read_rows(tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "ü"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 at byte 10\. Convert it"):
        read_rows(path)


def test_an_unreadable_file(tmp_path):
    with pytest.raises(DataError, match=r"Cannot read .*: Is a directory\."):
        read_text(tmp_path)


def test_a_suffix_that_no_reader_knows(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("x")
    with pytest.raises(DataError, match=r"expected one of \.jsonl, \.json, \.csv, \.parquet"):
        read_rows(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a\.jsonl:2: not valid JSON \(.*column"),
        ("[1]", r"a\.jsonl:2: got list, but expected an object"),
        ("3", r"a\.jsonl:2: got int, but expected an object"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["x", "x,1,2"])
def test_a_csv_line_of_another_length_is_named(tmp_path, line):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\na,1\n{line}\n")
    with pytest.raises(DataError, match=r"a\.csv:3: got another number of fields .* 2"):
        read_rows(path)


def test_a_csv_quote_that_never_closes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"a,1\n')
    with pytest.raises(DataError, match="not valid CSV"):
        read_rows(path)


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the package datasets, and note what is asked of it."""
    asked = []

    def load_dataset(name, config, data_files):
        assert data_files is None
        asked.append((name, config))
        if name == "owner/broken":
            raise ValueError("first line\n  second line")
        return {"train": [{"text": "a"}], "test": [{"text": "b", "split": "own"}]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name:config", ("owner/name", "config")),
        ("owner/name-1.5", ("owner/name-1.5", None)),
    ],
)
def test_a_hub_data_set_brings_all_of_its_splits(hub, source, asked):
    assert read_rows(source) == [
        (f"{source}, train row 1", {"split": "train", "text": "a"}),
        (f"{source}, test row 1", {"split": "own", "text": "b"}),
    ]
    assert hub == [asked]


@pytest.mark.parametrize("source", ["name", "./a/b", "a/b/c", "/a/b", "folder/data.tsv"])
def test_what_is_no_data_set_name_is_not_asked_for_on_the_hub(hub, source):
    with pytest.raises(DataError, match="there is no such file"):
        read_rows(source)
    assert hub == []


@pytest.mark.usefixtures("hub")
def test_a_hub_error_stays_one_line():
    with pytest.raises(DataError, match="Cannot load the data set 'owner/broken': first line sec"):
        read_rows("owner/broken")


@pytest.mark.parametrize(
    ("package", "source"), [("datasets", "owner/name"), ("pyarrow", "a.parquet")]
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package, source):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf'{package}.*pip install "expertsteer\[data\]"'):
        read_rows(source)


def test_rows_survive_json_escapes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "😀"}))
    assert read_rows(path)[0][1]["text"] == "😀"
