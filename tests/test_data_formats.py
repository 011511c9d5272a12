"""Tables: what is read is what was written, and what is wrong is named by file and line or row."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from memrt.data_arrow import HubTable, _hub_dataset
from memrt.data_files import is_hub_dataset, is_stream, require_file
from memrt.data_records import RecordFile
from memrt.data_settings import DataSettings

TEXTS = [
    "plain",
    'a "quoted" word, and a comma',
    "two\nlines, one cell",
    '"starts with a quote',
    "  spaces stay  ",
    "2020-01-01",
    "0012",
    "naïve 🙂",
    "\u2028 separates no line",
]


def read(path: str, **settings: Any) -> list[tuple[int, tuple[Any, ...]]]:
    asked = DataSettings(path=path, **settings)
    source = RecordFile.open(path, asked)
    return [(row.line, row.values) for row in source.rows()]


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


# --- what is read ---------------------------------------------------------------------------------


def test_csv_cells_are_what_the_csv_module_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)  # quotes, and CRLF
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(TEXTS))
    rows = read(str(path))
    assert [values[0] for _, values in rows] == TEXTS
    assert [line for line, _ in rows] == [2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_quotes_of_a_tsv_are_text_and_eat_no_line(tmp_path: Path) -> None:
    lines = ['"open quote\t1', 'it "said" so\t0', '"all of it"\t1', "last\t0"]
    path = write(tmp_path, "a.tsv", ("\n".join(lines) + "\n").encode())
    rows = read(path, columns=["text", "label"])
    assert [values[0] for _, values in rows] == [
        '"open quote',
        'it "said" so',
        '"all of it"',
        "last",
    ]
    quoted = write(tmp_path, "b.tsv", b'text\tlabel\n"a ""tab""\tinside"\t1\n')
    assert read(quoted, quoting=True) == [(2, ('a "tab"\tinside',))]


def test_long_cells_are_read_and_the_limit_of_the_csv_module_is_left_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", b"text\n" + b"x" * (before + 5) + b"\n")
    [(_, (text,))] = read(path)
    assert len(text) == before + 5
    assert csv.field_size_limit() == before


def test_parquet_of_any_text_type_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memrt.data_arrow._ROWS_PER_BATCH", 4)
    for kind in (pyarrow.string(), pyarrow.large_string()):
        array = pyarrow.array(TEXTS, kind)
        table = pyarrow.table({"x": pyarrow.array(range(9)), "text": array})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
        rows = read(str(tmp_path / "a.parquet"))
        assert rows == [(n, (text,)) for n, text in enumerate(TEXTS, start=1)]
    coded = pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()})
    pyarrow.parquet.write_table(coded, tmp_path / "a.parquet")
    assert [values for _, values in read(str(tmp_path / "a.parquet"))] == [("a",), ("b",), ("a",)]


def test_chats_in_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    datasets.Dataset.from_dict({"messages": [messages]}).to_parquet(tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == [(1, (messages,))]


def test_every_format_gives_the_same_classes(tmp_path: Path) -> None:
    records = [{"text": f"text {n}", "label": str(n % 2)} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        lines = ["text" + separator + "label", *(separator.join(r.values()) for r in records)]
        (tmp_path / name).write_text("\n".join(lines))  # no line feed at the end
    numbers = {"text": [r["text"] for r in records], "label": [int(r["label"]) for r in records]}
    datasets.Dataset.from_dict(numbers).to_parquet(tmp_path / "a.parquet")
    expected = [(r["text"], r["label"]) for r in records]
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.parquet"):
        rows = read(str(tmp_path / name), label_column="label")
        assert [values for _, values in rows] == expected, name


# --- what is wrong --------------------------------------------------------------------------------

CSV = b"text,label\nfine,1\n"
BAD = [
    ("a.csv", b"", "a.csv: the file is empty; line 1 must name the columns"),
    ("a.csv", b"text,label\n", "a.csv: no record follows the header in line 1"),
    ("a.csv", CSV + b"\nfine,1\n", "line 3: the line is empty"),
    ("a.csv", CSV + b"fine\n", r"line 3: 1 cells, and the header names 2 \('text', 'label'\)"),
    ("a.csv", CSV + b"fine,but,1\n", "line 3: 3 cells, and the header names 2"),
    ("a.csv", CSV + b",1\n", "line 3, column 'text': the text is empty"),
    ("a.csv", CSV + b" ,1\n", "line 3, column 'text': the text is empty"),
    ("a.csv", b"Text,label\nfine,1\n", "line 1: none of .*the columns are 'Text', 'label'"),
    ("a.csv", b"good film,1\nbad film,0\n", "line 1 is no header, name the columns with columns"),
    ("a.csv", b"text;label\nfine;1\n", "separated by commas, and this line has semicolons"),
    ("a.csv", b"text,text\na,b\n", "line 1: the header names 'text' more than once"),
    ("a.csv", CSV + b"a \xe9,1\n", "line 3: byte 3 of the line .offset 20 of the file. is not UTF"),
    ("a.csv", CSV + b'"fine" or not,1\n', "line 3: malformed: ',' expected after '\"'"),
    (
        "a.csv",
        CSV + b'"fine,1\nfine,0\n',
        r"line 3 \(read on to line 4\): malformed: the file ends inside a quoted cell",
    ),
    ("a.csv", CSV + b'"fine,1\n"fine",1\n', r"line 3 .read on to line 4.: malformed: ',' expected"),
    ("a.csv", CSV + b"a\rb,1\n", "line 3: malformed: new-line character seen in unquoted field"),
    ("a.tsv", b"text\tlabel\nfine\n", "a.tsv, line 2: 1 cells, and the header names 2"),
    ("a.tsv", b"text\tlabel\n\n", "a.tsv, line 2: the line is empty"),
    ("a.parquet", b"", "a.parquet: not a readable parquet file .*size is 0 bytes"),
    ("a.parquet", b"PAR1 no table PAR1", "a.parquet: not a readable parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_tables_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(path)
    assert "\n" not in str(raised.value)


LABELS = [
    (b"text,label\nfine,\n", "line 2, column 'label': the text is empty"),
    (b"text,lable\nfine,1\n", "line 1: no column 'label'; .*did you mean 'lable'"),
    (b"sentence,label\nfine,1\n", "line 1: no column 'text'; .*name yours with text_column"),
]


@pytest.mark.parametrize(("content", "message"), LABELS)
def test_bad_labels_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, "a.csv", content), label_column="label")


def test_a_header_is_not_taken_for_data(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", b"text\tlabel\nfine\t1\n")
    with pytest.raises(ValueError, match=r"line 1: columns=.* this line is a header with the same"):
        read(path, columns=["text", "label"])
    path = write(tmp_path, "b.tsv", b"fine\t1\nfine\t0\t?\n")
    with pytest.raises(ValueError, match=r"b.tsv, line 2: 3 cells, and columns names 2"):
        read(path, columns=["text", "label"])


PARQUET: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"text": []}, {}, "the file has no rows"),
    ({"text": ["a", None]}, {}, "row 2, column 'text': must be text, not null"),
    ({"text": ["a", "b", ""]}, {}, "row 3, column 'text': the text is empty"),
    ({"text": [1, 2]}, {}, "row 1, column 'text': must be text, not 1"),
    ({"text": [b"a"]}, {}, "row 1, column 'text': must be text, not \"b'a'\""),
    ({"Text": ["a"]}, {"text_column": "text"}, "no column 'text'; .*did you mean 'Text'"),
    ({"body": ["a"]}, {}, "none of 'text'.*the columns are 'body'"),
    ({"text": ["a"], "label": [0.5]}, {"label_column": "label"}, "row 1, column 'label': a label"),
    ({"text": ["a"], "label": [None]}, {"label_column": "label"}, "whole number, not null"),
    ({"text": ["a"], "label": [True]}, {"label_column": "label"}, "whole number, not true"),
]


@pytest.mark.parametrize(("columns", "settings", "message"), PARQUET)
def test_bad_rows_are_named(
    columns: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(ValueError, match=message) as raised:
        read(path, **settings)
    assert str(raised.value).startswith(path)


def test_a_column_that_is_twice_in_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    cells = [pyarrow.array([text]) for text in ("a", "b", "c")]
    table = pyarrow.Table.from_arrays(cells, names=["text", "text", "x"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match="2 columns are called 'text'; rename all but one"):
        read(path)
    table = pyarrow.Table.from_arrays(cells, names=["text", "x", "x"])
    pyarrow.parquet.write_table(table, path)
    assert [values for _, values in read(path)] == [("a",)]  # what is not read may be twice


def test_a_parquet_cell_that_is_not_utf8_and_a_damaged_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pyarrow.array([b"fine", b"bad \xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), path)
    with pytest.raises(ValueError, match=r"row 2, column 'text': byte 5 is not UTF-8"):
        read(str(path))
    table = pyarrow.table({"text": [f"words {n}" * 9 for n in range(999)]})
    pyarrow.parquet.write_table(table, path, compression="gzip")
    content = bytearray(path.read_bytes())
    content[40:400] = b"\xff" * 360
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet: not a readable parquet file") as raised:
        read(str(path))
    assert "\n" not in str(raised.value)


# --- the Hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("owner/name", True),
        ("owner/name:test", True),
        ("owner/name:train[:10%]", True),
        ("owner/fineweb-1.5", True),
        ("owner/name.csv:train", True),
        ("owner/name.txt", False),
        ("owner/name.csv", False),
        ("owner/name.json", False),
        ("./name", False),
        ("../name", False),
        ("/owner/name", False),
        ("a/b/c", False),
        ("name", False),
    ],
)
def test_the_suffix_tells_a_file_from_a_dataset(path: str, expected: bool) -> None:
    assert is_hub_dataset(path) is expected


def test_a_local_path_is_not_taken_for_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"path='owner/name': this is a folder; name a .txt"):
        require_file("owner/name", "path")
    Path("owner/name.txt").write_text("text")
    assert is_stream("owner/name.txt", "path")
    require_file("owner/name.txt", "path")
    require_file("owner/other", "path")  # of the Hub, which is asked later


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a dataset where a download would have left it; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    _hub_dataset.cache_clear()

    def add(name: str, columns: dict[str, Any], features: Any = None) -> None:
        made = datasets.Dataset.from_dict(columns, features=features)
        made.to_parquet(tmp_path / "train.parquet")
        made.select(range(1)).to_parquet(tmp_path / "test.parquet")
        files = {part: str(tmp_path / f"{part}.parquet") for part in ("train", "test")}
        builder = datasets.load_dataset_builder(
            "parquet", data_files=files, cache_dir=str(tmp_path / "made"), features=made.features
        )
        target = tmp_path / "cache" / name.replace("/", "___") / "default" / "0.0.0" / "abc"
        builder.dataset_name = name.partition("/")[2]
        builder.config.name = "default"
        builder.info.config_name, builder.info.dataset_name = "default", builder.dataset_name
        builder.download_and_prepare(output_dir=str(target))

    yield add
    _hub_dataset.cache_clear()


def test_a_dataset_of_the_hub_is_read_from_its_cache(hub_cache: Callable[..., None]) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    hub_cache("owner/films", {"text": ["a", "b"], "label": [1, 0]}, features)
    assert read("owner/films", label_column="label") == [(1, ("a", "good")), (2, ("b", "bad"))]
    assert read("owner/films:test") == [(1, ("a",))]
    table = HubTable(name="owner/films")
    assert table.class_names("label") == ("bad", "good")
    assert table.fingerprint()["rows"] == 2
    assert table.fingerprint() != HubTable(name="owner/films:test").fingerprint()
    assert len(table.fingerprint()["sha256"]) == 1
    with pytest.raises(ValueError, match=r"owner/films: no column 'lable'; .*did you mean 'label'"):
        read("owner/films", label_column="lable")
    with pytest.raises(ValueError, match=r"'owner/films:dev' is neither .*Unknown split") as raised:
        read("owner/films:dev")
    assert "\n" not in str(raised.value)


def test_without_network_it_is_said_in_one_line_and_soon(
    hub_cache: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"neither a file nor a dataset .*does not answer") as told:
        read("nobody/nothing")
    assert time.monotonic() - started < 5
    assert "\n" not in str(told.value)
    assert capfd.readouterr() == ("", "")


# --- real files -----------------------------------------------------------------------------------


def test_sst2() -> None:
    folder = os.environ.get("MEMRT_DATA")
    if not folder:
        pytest.skip("MEMRT_DATA is not set: it names the folder with sst2-dev.tsv")
    path = Path(folder) / "sst2-dev.tsv"
    rows = read(str(path), columns=["text", "label"], label_column="label")
    lines = path.read_text("utf-8").splitlines()
    assert ["\t".join(values) for _, values in rows] == lines
    assert {values[1] for _, values in rows} == {"0", "1"}
    with pytest.raises(ValueError, match=r"sst2-dev.tsv, line 1: no column 'text'.*with columns"):
        read(str(path), label_column="label")
