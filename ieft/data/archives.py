"""Safe extraction of untrusted zip and tar archives.

Nothing is written outside the target folder, links and devices are not created, and sizes are limited while reading,
since the sizes that an archive declares cannot be trusted. Metadata files of macOS and Windows are ignored.
"""

import shutil
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ieft.data.locate import is_junk

ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
CHUNK = 2**20
EXTENDED_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
MAX_HEADER_BYTES = 2**20  # for long names; tarfile reads such headers into memory
FREE_BYTES = 2**30  # may be unpacked from an archive of any size
MAX_RATIO = 200  # unpacked bytes per byte of a larger archive; images and captions need about 20


@dataclass(frozen=True)
class Limits:
    """Limits on an archive: number of members, bytes per file, bytes in total."""

    members: int = 2_000_000
    file_bytes: int = 8 * 2**30
    total_bytes: int = 256 * 2**30


class UnsafeArchiveError(ValueError):
    """An archive has paths outside its folder, links, or more content than allowed; nothing was extracted."""


class StrictTarInfo(tarfile.TarInfo):
    """A tar member whose header is validated.

    Python's `TarInfo` loops forever over a negative size, reads names of any length into memory, and silently ends the
    archive at a damaged header in its middle.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:
            raise tarfile.ReadError(f"damaged header ({error})") from error
        if member.size < 0 or (member.type in EXTENDED_HEADERS and member.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


def is_archive(path):
    """Whether a file has the name extension of an archive."""
    return str(path).lower().endswith(ARCHIVE_ENDINGS)


def extract(archive, target, *, limits=None):
    """Extract an archive into a folder that does not exist yet; on failure, no folder is left.

    Returns:
        int: the number of files written.

    Raises:
        UnsafeArchiveError: for a member outside the folder, a link, a device, or more than `limits` allow.
        ValueError: if the file is no archive, or a damaged one.
    """
    archive, target = Path(archive), Path(target)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        count = _extract_members(archive, partial, limits or Limits())
        partial.rename(target)
    except UnsafeArchiveError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{archive} cannot be unpacked: {error}. Download it again, or unpack it by hand.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def _extract_members(archive, folder, limits):
    left = min(limits.total_bytes, max(FREE_BYTES, MAX_RATIO * archive.stat().st_size))
    count = 0
    for name, opened in _members(archive, limits):
        path = _inside(folder, name, archive)
        if any(map(is_junk, path.relative_to(folder).parts)):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        left -= _copy(opened, path, min(left, limits.file_bytes), archive)
        count += 1
    return count


def _members(archive, limits):
    """Name and open file of each regular file; folders are created when files need them."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            _check_count(len(members), limits, archive)
            for member in members:
                if (member.external_attr >> 16) & 0o170000 == 0o120000:
                    raise UnsafeArchiveError(f"{archive} holds a link, {member.filename!r}, and was not unpacked.")
                if not member.filename.endswith(("/", "\\")):
                    with opened.open(member) as file:
                        yield _zip_name(member), file
    else:
        with tarfile.open(archive, tarinfo=StrictTarInfo) as opened:
            for count, member in enumerate(opened, start=1):
                _check_count(count, limits, archive)
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name!r} has a negative size")
                if member.isfile():
                    yield member.name, opened.extractfile(member)
                elif not member.isdir():
                    raise UnsafeArchiveError(
                        f"{archive} holds a link or device, {member.name!r}, and was not unpacked."
                    )


def _zip_name(member):
    """The name of a member. Many programs write UTF-8 without setting the flag for it."""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


def _check_count(count, limits, archive):
    if count > limits.members:
        raise UnsafeArchiveError(f"{archive} holds more than {limits.members:,} members, and was not unpacked.")


def _inside(folder, name, archive):
    """The path of a member; slash and backslash both separate folders."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name or not parts.parts or "\0" in name:
        raise UnsafeArchiveError(f"{archive} holds {name!r}, a path outside its folder, and was not unpacked.")
    path = folder.joinpath(*parts.parts)
    if path.exists():
        raise UnsafeArchiveError(f"{archive} holds {name!r} twice, and was not unpacked.")
    return path


def _copy(opened, path, limit, archive):
    size = 0
    with path.open("xb") as file:
        while chunk := opened.read(CHUNK):
            size += len(chunk)
            if size > limit:
                raise UnsafeArchiveError(
                    f"{archive} unpacks to more than is allowed ({limit:,} bytes left at {path.name!r}), and was not "
                    "unpacked."
                )
            file.write(chunk)
    return size


def tar_members(archive):
    """List (name, offset, size) of each regular file in an uncompressed tar, without extracting it.

    Raises:
        ValueError: if the file is no tar or is damaged, or if members are not stored contiguously (sparse files).
    """
    end = Path(archive).stat().st_size
    members = []
    try:
        with tarfile.open(archive, "r:", tarinfo=StrictTarInfo) as opened:
            for member in opened:
                if member.issparse() or not 0 <= member.size <= end - member.offset_data:
                    raise tarfile.ReadError(
                        f"{member.name!r} declares {member.size:,} bytes, but does not contain them"
                    )
                if member.isfile():
                    members.append((member.name, member.offset_data, member.size))
        return members
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{archive} is not a tar that can be read without unpacking: {error}.") from error
