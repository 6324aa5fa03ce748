"""Tests of archive extraction: valid archives, and archives that try to escape the folder or to fill the disk."""

import io
import tarfile
import zipfile

import pytest

from ieft.data.archives import Limits, UnsafeArchiveError, extract, tar_members


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


WRITERS = {"a.zip": write_zip, "a.tar": write_tar, "a.tar.gz": lambda path, files: write_tar(path, files, "w:gz")}


@pytest.mark.parametrize("name", WRITERS)
def test_plain_files_come_out_whole(tmp_path, name):
    files = {"data/one.txt": b"one", "data/deep/two.bin": bytes(range(256)) * 9000}
    archive = WRITERS[name](tmp_path / name, files)
    assert extract(archive, tmp_path / "out") == 2
    for path, content in files.items():
        assert (tmp_path / "out" / path).read_bytes() == content


@pytest.mark.parametrize("bad", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:\\evil", "a\\..\\..\\evil"])
@pytest.mark.parametrize("name", WRITERS)
def test_no_path_leads_outside(tmp_path, name, bad):
    (tmp_path / "in").mkdir()
    archive = WRITERS[name](tmp_path / "in" / name, {"fine": b"fine", bad: b"evil"})
    with pytest.raises(UnsafeArchiveError, match="outside its folder"):
        extract(archive, tmp_path / "in" / "out")
    assert [each.name for each in tmp_path.rglob("*") if each.is_file()] == [name]
    assert not (tmp_path / "in" / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_no_links_or_devices_from_a_tar(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(UnsafeArchiveError, match="link or device, 'link'"):
        extract(tmp_path / "a.tar", tmp_path / "out")


def test_no_links_from_a_zip(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UnsafeArchiveError, match="a link"):
        extract(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "limits, message",
    [
        (Limits(members=1), "more than 1 members"),
        (Limits(file_bytes=2_000_000), "more than is allowed"),
        (Limits(total_bytes=4_000_000), "more than is allowed"),
    ],
)
def test_sizes_are_limited_by_what_is_read(tmp_path, name, limits, message):
    archive = WRITERS[name](tmp_path / name, {"a": bytes(2_500_000), "b": bytes(2_500_000)})
    with pytest.raises(UnsafeArchiveError, match=message):
        extract(archive, tmp_path / "out", limits=limits)
    assert not list(tmp_path.glob("out*"))
    assert extract(archive, tmp_path / "out", limits=Limits(2, 2_500_000, 5_000_000)) == 2  # exactly so much may be


@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_archive_is_an_error_that_says_so(tmp_path, name):
    archive = WRITERS[name](tmp_path / name, {"a": bytes(range(256)) * 400})
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        extract(archive, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_name_that_stands_twice_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for content in (b"one", b"two"):
            member = tarfile.TarInfo("same")
            member.size = 3
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UnsafeArchiveError, match="twice"):
        extract(tmp_path / "a.tar", tmp_path / "out")


def test_members_of_a_tar_are_found_in_place(tmp_path):
    archive = write_tar(tmp_path / "a.tar", {"one": b"first", "two": b"second"})
    content = archive.read_bytes()
    found = {name: content[offset : offset + size] for name, offset, size in tar_members(archive)}
    assert found == {"one": b"first", "two": b"second"}
    archive.write_text("not a tar")
    with pytest.raises(ValueError, match="not a tar"):
        tar_members(archive)
