"""Tests of malicious files and text: a documented error, nothing written outside, bounded memory and time."""

import http.server
import io
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image
from test_archives import write_tar, write_zip

pytest.importorskip("lancedb", reason="the vector store, extra `search`, is not installed")

import ieft  # noqa: E402, F401 (makes the auto classes know it)
from configuration_ieft import IeftConfig  # noqa: E402
from fuzz.targets import TARGETS, TINY, call  # noqa: E402
from ieft.data.archives import UnsafeArchiveError, extract, tar_members  # noqa: E402
from ieft.data.downloads import download  # noqa: E402
from ieft.data.invalid_examples import usable_rows  # noqa: E402
from ieft.data.sources import read_source  # noqa: E402
from ieft.data.streaming import stream_hub_dataset  # noqa: E402
from prepare_datasets import find_source, image_fault, read_hub_dataset  # noqa: E402

ROOT = Path(__file__).parent.parent
BRIEF = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
PNG = io.BytesIO()
Image.new("RGB", (9, 7)).save(PNG, "PNG")
PNG = PNG.getvalue()


# Properties --------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, seeds):
    """A valid input with some bytes changed, deleted, repeated or inserted."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([0, 1, 2, 4, 100, 10**6])))
        new = draw(st.one_of(st.binary(max_size=9), st.just(bytes(data[start:stop]) * 2)))
        data[start:stop] = new
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused_with_a_documented_error(name):
    target, seeds = TARGETS[name]

    @BRIEF
    @given(damaged(list(seeds())))
    def check(data):
        call(target, data)

    check()


KEYS = st.sampled_from(
    "images annotations filename file_name id image_id split sentences raw raw_1 caption captions image bytes path "
    "train val fit image_size patch_size hidden_size enhancement_layers num_labels dtype id2label".split()
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=9),
    KEYS,
    st.sampled_from(
        ["\ud800", "a\0b", "../x.png", "/etc/passwd", "x" * 5000, "日" * 200, "http://[", "http://\ud800"]
    ),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=5)
)
ENTRY = st.dictionaries(KEYS, JSON, max_size=7)


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("shape", ["images", "coco", "any"])
def test_annotations_of_any_content(kind, shape):
    lists = st.lists(ENTRY | JSON, max_size=4)
    content = {
        "images": st.fixed_dictionaries({"images": lists}),
        "any": JSON | lists,
        "coco": st.fixed_dictionaries({"images": lists, "annotations": lists}),
    }[shape]

    @BRIEF
    @given(content)
    def check(value):
        text = json.dumps(value, ensure_ascii=kind != 5)
        call(TARGETS["annotations"][0], bytes([kind]) + text.encode("utf-8", "surrogatepass"))

    check()


@BRIEF
@given(
    st.dictionaries(
        st.sampled_from(
            [
                *IeftConfig().to_dict(),
                "num_labels",
                "attn_implementation",
                "to_dict",
                "__class__",
                "attribute_map",
                "quantization_config",
            ]
        ),
        JSON,
        max_size=3,
    )
)
def test_configurations_of_any_content(fields):
    call(TARGETS["configs"][0], json.dumps(TINY | fields).encode())


@BRIEF
@given(st.dictionaries(KEYS, JSON, max_size=4))
def test_image_processors_of_any_content(fields):
    call(TARGETS["processors"][0], json.dumps(fields).encode())


@BRIEF
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "dataset_name",
                "learning_rate",
                "seed",
                "eval_datasets",
                "network",
                "do_train",
                "lr_scheduler_kwargs",
                "optim",
                "report_to",
                "fsdp",
                "warmup_steps",
                "nosuch",
                "save_strategy",
                "eval_strategy",
                "label_names",
                "bf16",
            ]
        ),
        JSON,
        max_size=3,
    )
)
def test_settings_of_any_content(options):
    call(TARGETS["settings"][0], json.dumps(options).encode())


@settings(BRIEF, max_examples=100)
@given(st.text(st.sampled_from("width file north '\"();%?$|<>=-/*\\,0123 \n\0\ud800") | st.characters(), max_size=60))
def test_filters_of_any_characters(where):
    call(TARGETS["filters"][0], where.encode("utf-8", "surrogatepass"))


@BRIEF
@given(st.text(st.characters() | st.sampled_from("\0\ud800\u202e\u200d"), max_size=200))
def test_captions_of_any_characters(caption):
    call(TARGETS["captions"][0], caption.encode("utf-8", "surrogatepass"))


# Limits are tested in a process that may be killed -----------------------------------------------------------------


def run_limited(code, *arguments, seconds=60, gigabytes=16):
    """Run Python code in a process with limits on address space and CPU time: what it printed."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds,) * 2)

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    package = "import sys, types\nsys.modules['ieft'] = types.ModuleType('ieft')\n"  # without its front and torch
    package += f"sys.modules['ieft'].__path__ = [{str(ROOT / 'ieft')!r}]\n"
    command = [sys.executable, "-c", f"{package}try:\n    {code}\nexcept ValueError as error:\n    print(error)"]
    ended = subprocess.run(
        [*command, *map(str, arguments)], preexec_fn=limit, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, (ended.returncode, ended.stderr[-2000:])
    return ended.stdout


def raw_tar(*members):
    """A tar of (name, declared size, type, content, further fields)."""
    blocks = b""
    for name, size, kind, content in members:
        header = tarfile.TarInfo(name)
        header.type = kind
        block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
        blocks += bytes(block) + content + bytes(-len(content) % 512)
    return blocks + bytes(1024)


@pytest.mark.parametrize("read", ["extract(sys.argv[1], sys.argv[2])", "tar_members(sys.argv[1])"])
def test_a_tar_that_goes_back_over_itself_ends(tmp_path, read):
    """With a negative size, Python's reader returns to the same header forever (CVE-2025-8194)."""
    (tmp_path / "a.tar").write_bytes(raw_tar(("a", 0, tarfile.REGTYPE, b""), ("b", -1024, tarfile.REGTYPE, b"")))
    code = f"from ieft.data.archives import extract, tar_members; print({read})"
    assert "a header of -1,024 bytes" in run_limited(code, tmp_path / "a.tar", tmp_path / "out", seconds=20)


def test_a_name_without_end_in_a_tar_is_not_read_into_memory(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as archive:
        member = tarfile.TarInfo("long")
        member.type, member.size = tarfile.GNUTYPE_LONGNAME, 50 * 2**20
        archive.addfile(member, open("/dev/zero", "rb"))
    code = "from ieft.data.archives import extract; extract(sys.argv[1], sys.argv[2])"
    assert "a header of 52,428,800 bytes" in run_limited(code, tmp_path / "a.tar.gz", tmp_path / "o")


def test_a_tar_is_not_cut_short_by_a_damaged_header(tmp_path):
    content = bytearray(write_tar(tmp_path / "a.tar", {"a": b"1", "b": b"2", "c": b"3"}).read_bytes())
    content[1024 + 150] ^= 1  # the checksum of b
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="damaged header"):
        extract(tmp_path / "a.tar", tmp_path / "out")
    with pytest.raises(ValueError, match="damaged header"):
        tar_members(tmp_path / "a.tar")


def test_a_sparse_member_of_a_webdataset_is_refused(tmp_path):
    """Its declared size, here eight terabytes, would be allocated before it is read."""
    block = bytearray(raw_tar(("a.png", 512, tarfile.GNUTYPE_SPARSE, b"x" * 512)))
    block[483:495] = tarfile.itn(2**43, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block[:512])
    (tmp_path / "a.tar").write_bytes(block)
    with pytest.raises(ValueError, match="declares 8,796,093,022,208 bytes"):
        read_source(tmp_path / "a.tar", "a")


def test_two_samples_of_one_name_in_a_webdataset_are_an_error(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for content in (b"one", b"two"):
            member = tarfile.TarInfo("a.txt")
            member.size = 3
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="'a.txt' twice"):
        read_source(tmp_path / "a.tar", "a")


@pytest.mark.parametrize("ending", ["zip", "tar.gz", "tar.xz", "tar.bz2"])
def test_damage_anywhere_in_an_archive_is_an_error_of_ours(tmp_path, ending):
    """zlib, lzma and bz2 raise their own kinds of errors."""
    path = tmp_path / f"a.{ending}"
    files = {"a": os.urandom(3000)}
    write_zip(path, files) if ending == "zip" else write_tar(path, files, f"w:{ending[4:]}")
    whole = path.read_bytes()
    for place in range(20, len(whole), len(whole) // 25):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            extract(path, tmp_path / f"out{place}")
        except ValueError as error:
            assert "cannot be unpacked" in str(error) or isinstance(error, UnsafeArchiveError)


def test_an_archive_unpacks_to_so_many_times_its_size(tmp_path, monkeypatch):
    """A zip of a few kilobytes must not fill the disk up to the limit for large datasets."""
    archive = write_zip(tmp_path / "a.zip", {str(number): bytes(3_000_000) for number in range(3)})
    monkeypatch.setattr("ieft.data.archives.MAX_RATIO", 100)
    monkeypatch.setattr("ieft.data.archives.FREE_BYTES", 4_000_000)
    with pytest.raises(UnsafeArchiveError, match="more than is allowed"):
        extract(archive, tmp_path / "out")


def test_a_table_of_kilobytes_that_stands_for_gigabytes_is_refused(tmp_path):
    one = pa.array(["x" * 50_000])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), one)
    pq.write_table(pa.table({"image": column, "caption": column}), tmp_path / "rows.parquet", compression="zstd")
    assert (tmp_path / "rows.parquet").stat().st_size < 200_000
    code = "from ieft.data.sources import read_source; read_source(sys.argv[1], 'rows')"
    assert "bytes once unpacked" in run_limited(code, tmp_path / "rows.parquet")


def test_the_offsets_of_an_arrow_file_are_not_followed_outside_it(tmp_path):
    table = pa.table({"image": [b"abc", b"de"], "caption": [["a"], ["b"]]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    whole, offsets = (tmp_path / "a.arrow").read_bytes(), struct.pack("<3i", 0, 3, 5)
    assert whole.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(whole.replace(offsets, struct.pack("<3i", 0, 3, 2**30)))
    code = "from ieft.data.sources import read_source; read_source(sys.argv[1], 'a')"
    assert "is not an arrow file" in run_limited(code, tmp_path / "a.arrow")


# Annotations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dataset.json", "rows.jsonl", "a.tar"])
def test_json_that_nests_without_end(tmp_path, name):
    text = b"[" * 100_000 + b"]" * 100_000
    (tmp_path / name).write_bytes(text) if name != "a.tar" else write_tar(tmp_path / name, {"a.json": text})
    with pytest.raises(ValueError, match="not JSON|read as a table"):
        read_source(tmp_path / name, "a")


def test_a_caption_nested_as_deep_as_json_allows_is_a_bad_row():
    caption = []
    for _ in range(900):
        caption = [caption]
    _, bad = usable_rows([{"filename": "a", "split": "train", "captions": [caption]}], {})
    assert bad[0].reason.startswith("a caption that is not text")


@pytest.mark.parametrize("filename", ["a\0b.png", "\udcff.png"])
def test_a_file_name_that_no_table_can_hold_is_a_bad_row(filename):
    usable, bad = usable_rows([{"filename": filename, "split": "train", "captions": ["a house ."]}], {})
    assert not usable and bad[0].reason.startswith("a file name that is not text")


def test_a_file_name_that_is_an_object_is_an_error_that_says_so(tmp_path):
    content = {"images": [{"id": 1, "file_name": {"a": 1}}], "annotations": [{"image_id": 1, "caption": "a ."}]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a file name that is {'a': 1}"):
        read_source(tmp_path / "captions.json", "a")


@pytest.mark.parametrize("image", ["日" * 200 + ".png", "a" * 300 + "/b.png", "x/" * 3000, "\ud800.png"])
def test_a_path_that_no_system_has_is_a_missing_image(tmp_path, image):
    (tmp_path / "rows.json").write_text(json.dumps([{"image": image, "caption": "a house ."}]))
    assert read_source(tmp_path / "rows.json", "rows").rows[0]["image"] is None


def test_names_that_differ_by_case_alone_are_two_images(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("A.png", "a.png"):
        (tmp_path / "images" / name).write_bytes(PNG)
    entries = [{"filename": name, "split": "train", "sentences": [{"raw": "a ."}]} for name in ("A.png", "a.png")]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": entries}))
    found = [row["image"] and row["image"].name for row in read_source(tmp_path, "x").rows]
    assert found == ["A.png", "a.png"]


def test_lines_of_json_are_parted_by_newlines_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "caption": "a\u2028house\x85."}\n', encoding="utf-8")
    assert read_source(tmp_path / "rows.jsonl", "rows").rows[0]["captions"] == ["a\u2028house\x85."]


@pytest.mark.parametrize(
    "columns", [{"image": ["file:///etc/passwd"], "caption": [["a"]]}, {"image": [3], "caption": ["a"]}]
)
def test_an_arrow_file_holds_images_as_bytes(tmp_path, columns):
    table = pa.table(columns)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"columns image \(bytes\)"):
        read_source(tmp_path / "a.arrow", "a")


def test_an_arrow_file_with_a_column_twice(tmp_path):
    table = pa.table([pa.array([b"a"]), pa.array([b"b"]), pa.array([["c"]])], names=["image", "image", "caption"])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="each once"):
        read_source(tmp_path / "a.arrow", "a")


# Nothing from outside ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [True, False])
def test_an_archive_names_no_image_outside_itself(tmp_path, absolute):
    (tmp_path / "private.png").write_bytes(PNG)
    path = str(tmp_path / "private.png") if absolute else "../../../private.png"
    archive = write_zip(tmp_path / "a.zip", {"metadata.csv": f"file_name,text\n{path},a house .\n"})
    with pytest.raises(ValueError, match="outside itself"):
        find_source(str(archive), None, {}, tmp_path / "kept")


def test_a_dataset_of_the_hub_names_no_file_of_this_machine(tmp_path, monkeypatch):
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setattr(f"datasets.config.{name}", tmp_path / "cache")
    (tmp_path / "private.png").write_bytes(PNG)
    (tmp_path / "hub").mkdir()
    record = {"image": str(tmp_path / "private.png"), "caption": "a house ."}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "hub" / "train.parquet")
    with pytest.raises(ValueError, match="outside itself"):
        read_hub_dataset(str(tmp_path / "hub"), {}, tmp_path / "kept")
    streams = stream_hub_dataset(str(tmp_path / "hub"), {}, image_fault=image_fault, on_bad_rows="stop")
    with pytest.raises(Exception, match="no such image file"):
        next(iter(streams["train"]))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://\ud800", "http://[", "data:,a", "http://"]
)
def test_only_http_is_fetched(tmp_path, url):
    path, reason = download(url, tmp_path, timeout=1)
    assert path is None and reason.startswith("cannot be downloaded")


@contextmanager
def serving(handle):
    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = handle

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1:{port}/a"])
def test_a_redirect_leads_to_http_alone(tmp_path, target):
    def redirect(self):
        self.send_response(302)
        self.send_header("Location", target.format(port=listener.getsockname()[1]))
        self.end_headers()

    with socket.create_server(("127.0.0.1", 0)) as listener, serving(redirect) as url:
        path, reason = download(url, tmp_path, timeout=2)
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):  # nobody has come to ask
            listener.accept()
    assert path is None and reason.startswith("cannot be downloaded") and not any(tmp_path.iterdir())


def test_a_server_that_drips_is_given_up(tmp_path):
    ended = threading.Event()

    def drip(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(200):  # ten seconds, should nobody give up
            if ended.wait(0.05):
                return
            try:
                self.wfile.write(b"x")
            except OSError:
                return

    with serving(drip) as url:
        try:
            assert download(url, tmp_path, timeout=5, total_timeout=0.5) == (None, "cannot be downloaded: too slow")
        finally:
            ended.set()
