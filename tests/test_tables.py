"""Tests of tables in every dialect: read with exactly the rows that were written, or refused with line and remedy."""

import csv
import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ieft.data.sources import read_source
from ieft.data.tables import parse_cell

pd = pytest.importorskip("pandas")

# Captions with all special characters of tables; a backslash before a quote is ambiguous and refused.
CAPTION = st.text(alphabet="ab ,;|\"'\tü河.\n", min_size=1, max_size=25).filter(
    lambda text: text.strip("\" '\t\n,;|.[(")
)
ROWS = st.lists(st.tuples(CAPTION, st.sampled_from(["train", "val", "test"])), min_size=1, max_size=6)


def excel(rows, *, sep, encoding="utf-8-sig", hint=False):
    """As saved by Excel: CRLF between rows, LF in cells, quotes if needed."""
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=sep, lineterminator="\r\n").writerows([("image", "caption", "split"), *rows])
    return ((f"sep={sep}\r\n" if hint else "") + file.getvalue()).encode(encoding)


def from_pandas(rows, **options):
    table = pd.DataFrame(rows, columns=["image", "caption", "split"])
    return table.to_csv(index=False, **options).encode()


WRITERS = {
    "excel, commas": lambda rows: excel(rows, sep=","),
    "excel, semicolons": lambda rows: excel(rows, sep=";"),
    "excel, sep=": lambda rows: excel(rows, sep="|", hint=True, encoding="utf-8"),
    "excel, unicode text": lambda rows: excel(rows, sep="\t", encoding="utf-16"),
    "csv, unix": lambda rows: excel(rows, sep=",", encoding="utf-8").replace(b"\r\n", b"\n"),
    "csv, pipes": lambda rows: excel(rows, sep="|", encoding="utf-8"),
    "pandas": lambda rows: from_pandas(rows),
    "pandas, tabs": lambda rows: from_pandas(rows, sep="\t"),
    "pandas, all quoted": lambda rows: from_pandas(rows, quoting=csv.QUOTE_ALL),
    "pandas, escaped quotes": lambda rows: from_pandas(
        rows, doublequote=False, escapechar="\\", quoting=csv.QUOTE_ALL
    ),
}


def captions_of(path):
    return {row["filename"]: (row["captions"], row["split"]) for row in read_source(path, "x").rows}


@pytest.mark.parametrize("writer", WRITERS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS)
def test_a_table_comes_back_exactly(writer, rows):
    named = [(f"{number}.png", caption, split) for number, (caption, split) in enumerate(rows)]
    spelled = {"train": "train", "val": "validation", "test": "test"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        path.write_bytes(WRITERS[writer](named))
        try:
            found = captions_of(path)
        except ValueError as error:  # right or refused; what Excel, pandas and the csv module write unasked is right
            assert writer == "pandas, escaped quotes" and "the two readings differ" in str(error)
        else:
            assert found == {name: ([caption], spelled[split]) for name, caption, split in named}


LISTS = st.lists(CAPTION, min_size=1, max_size=4)


@pytest.mark.parametrize(
    "write", [json.dumps, str, lambda each: str(np.array(each, dtype=object))], ids=["JSON", "Python", "numpy"]
)
@settings(max_examples=60, deadline=None)
@given(captions=LISTS)
def test_a_list_that_was_written_as_text_comes_back(write, captions):
    assert parse_cell(write(captions)) == captions


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[np.str_('a'), np.str_('b')]", ["a", "b"]),
        ("array(['a', 'b'], dtype=object)", ["a", "b"]),
        ("('a', 'b')", ["a", "b"]),
        ("[{'raw': 'a'}]", [{"raw": "a"}]),
        ("[]", []),
        ("[a river] .", "[a river] ."),
        ('("big")', '("big")'),
    ],
)
def test_lists_in_cells(text, expected):
    assert parse_cell(text) == expected


def test_a_list_that_was_cut_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("image,captions\na.png,\"['a' 'b' ... 'y' 'z']\"\n")
    with pytest.raises(ValueError, match="row 0 holds a list that cannot be read"):
        read_source(tmp_path / "a.csv", "a")


KINDS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
NESTED = [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.large_string(), 2)]


@pytest.mark.parametrize("kind", KINDS + NESTED, ids=str)
def test_each_type_of_parquet(tmp_path, kind):
    lists = kind in NESTED
    captions = [["a river .", "b, c"], ["d", 'e "f"']] if lists else ["a river .", "b, c"]
    array = pa.array(captions, kind) if lists else pa.array(captions).cast(kind)
    pq.write_table(pa.table({"image": ["0.png", "1.png"], "caption": array}), tmp_path / "train.parquet")
    expected = captions if lists else [[each] for each in captions]
    assert [row["captions"] for row in read_source(tmp_path / "train.parquet", "x").rows] == expected


@pytest.mark.parametrize("image", ["path", "url", "bytes", "bytes and path", "bytes without path"])
def test_captions_a_row_are_grouped_whatever_holds_the_image(tmp_path, image):
    """Five captions of each of six images, some of them in the next part of the table."""
    held = {
        "path": lambda number: f"{number}.png",
        "url": lambda number: f"https://example.org/{number}.png",
        "bytes": lambda number: bytes([number] * 9),
        "bytes and path": lambda number: {"bytes": bytes([number] * 9), "path": "same.png" if number else "0.png"},
        "bytes without path": lambda number: {"bytes": bytes([number] * 9), "path": None},
    }[image]
    records = [{"image": held(number), "text": f"image {number} caption {each}"}
               for number in range(6) for each in range(5)]  # fmt: skip
    (tmp_path / "data").mkdir()
    for part, chosen in enumerate((records[:13], records[13:])):
        pq.write_table(pa.Table.from_pylist(chosen), tmp_path / "data" / f"train-{part:05d}-of-00002.parquet")
    rows = read_source(tmp_path, "x").rows
    assert [len(row["captions"]) for row in rows] == [5] * 6
    assert len({row["filename"] for row in rows}) == 6


@pytest.mark.parametrize(
    "content, message",
    [
        (b"image,caption\na.png,a river, and a bridge\n", "a.csv, line 2: 4 fields|line 2: 3 fields where the first"),
        (b"image,description\na.png,a river, and a bridge\n", "columns are image, description. Pass --image_column"),
        (b"image,caption\na.png,\"a river\nb.png,b\n", "line 2: the quotes of this row do not match"),
        (b"image;caption\na.png;ein gr\xfcner Wald\n", "a.csv, line 2: not valid UTF-8 .*0xfc.*Save it as UTF-8"),
        ("image,caption\na.png,a".encode("utf-16-le"), "looks like UTF-16 without a byte order mark"),
        (b"image,caption,image\na.png,b,c.png\n", "line 1: the column 'image' stands twice"),
        (b"a.png,a river .\nb.png,a lake .\n", "or name the columns in the first line"),
        (b"image,caption,split\na.png,a river .,train\nb.png,a lake .\n", "row 1 has split None"),
        (b"image,caption,split\na.png,a river .,train\nb.png,a lake .,holdout\n", "row 1 has split 'holdout'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_line_and_remedy(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path / "a.csv", "a")


@pytest.mark.parametrize(
    "content, captions",
    [
        ('image, caption\na.png, "a river, wide"\nb.png, a lake\n', ["a river, wide", " a lake"]),
        ('image,caption\na.png," ""a"""\nb.png, a\n', [' "a"', " a"]),
        ('image,caption,split\na.png,"\\"big\\" river\nwide",train\n', ['"big" river\nwide']),
    ],
)
def test_quotes_after_blanks_and_backslashes(tmp_path, content, captions):
    (tmp_path / "a.csv").write_text(content)
    found = [each["captions"][0] for each in read_source(tmp_path / "a.csv", "a").rows]
    if content.startswith("image, "):  # blanks around captions are taken off when captions are checked
        found, captions = [each.strip() for each in found], [each.strip() for each in captions]
    assert found == captions


def test_headers_as_people_write_them(tmp_path):
    text = "Filename , Caption,Caption, Split\n\na.png,one,two,Train\n,,,\nb.png,three,,Testing\nc.png,four,five,dev\n"
    (tmp_path / "a.csv").write_text(text)
    assert captions_of(tmp_path / "a.csv") == {
        "a.png": (["one", "two"], "train"), "b.png": (["three"], "test"), "c.png": (["four", "five"], "validation"),
    }  # fmt: skip
    (tmp_path / "b.csv").write_text("image,caption,subset\na.png,one,train\nb.png,two,test\n")
    assert [row["split"] for row in read_source(tmp_path / "b.csv", "b").rows] == ["train", "test"]


@pytest.mark.parametrize("name", ["type", "fold", "usage"])
def test_splits_in_a_column_of_another_name_are_never_drawn_anew(tmp_path, name):
    table = pd.DataFrame(
        {"image": list("abcdef"), "caption": ["a field ."] * 6, name: ["train"] * 4 + ["val", "test"]}
    )
    table.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ValueError, match=f"column '{name}' holds the names of splits. Rename it `split`"):
        read_source(tmp_path / "rows.csv", "rows")
    table[name] = "train"  # of one value alone, nothing follows
    table.to_csv(tmp_path / "rows.csv", index=False)
    assert len(read_source(tmp_path / "rows.csv", "rows").rows) == 6


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_captions_of_a_webdataset_end_at_line_ends_alone(tmp_path):
    captions = ["a field\u2028 with\x85 a \x0bpond\x0c .", "a second\x1c one .", "a third ."]
    for line_end in ("\n", "\r\n", "\r"):
        text = line_end.join([*captions, "", ""]).encode()
        tar = write_tar(tmp_path / "train.tar", {"a.png": b"a", "a.txt": text})
        assert [row["captions"] for row in read_source(tar, "train").rows] == [captions]


def test_captions_of_a_webdataset_in_two_files_are_never_left_out(tmp_path):
    def read(record):
        members = {"a.png": b"a", "a.txt": b"a field .", "a.json": json.dumps(record).encode()}
        return read_source(write_tar(tmp_path / "train.tar", members), "train").rows[0]["captions"]

    for record in ({"captions": ["a field .", "a pond ."]}, {"sentences": ["a", "b"]}, ["a", "b"]):
        with pytest.raises(ValueError, match=r"a\.json holds 2 captions and a\.txt 1"):
            read(record)
    for record in ({"caption": "a field .", "width": 3}, {"captions": ["a field ."]}, {"key": 1}, 5):
        assert read(record) == ["a field ."]
