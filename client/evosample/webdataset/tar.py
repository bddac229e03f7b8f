"""The members of one sample, out of its range of bytes of a tar file."""

from __future__ import annotations

import io
import re
import tarfile

from webdataset.tariterators import base_plus_ext

BLOCK_BYTES = 512

_REGULAR, _PAX = tarfile.REGTYPE[0], tarfile.XHDTYPE[0]
# Records of a PAX header that say something else than the header of the member; others, such as mtime, don't matter.
_PAX_RECORDS = (b" path=", b" size=", b" GNU.sparse", b" hdrcharset=")
_METADATA = re.compile(r"__[^/]*__($|/)")  # skip_meta of webdataset's tar_file_iterator


def key_and_extension(name: str) -> tuple[str, str] | None:
    """What webdataset takes a member for: the key of its sample, its extension; None if it belongs to none."""
    if name.startswith("__") and _METADATA.match(name):
        return None
    key, extension = base_plus_ext(name)
    return None if key is None else (key, extension.lower())


def members_of(sample: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of the regular members in a sample's range, whose crc32 was found right.

    tarfile has read the same bytes when the index was made. Here it would take twice as long as decoding a small image,
    so the usual headers are read directly, and it sees only what is unusual.
    """
    members = []
    offset = 0
    while offset < len(sample):
        data = offset + BLOCK_BYTES
        kind = sample[offset + 156]
        try:
            size = int(sample[offset + 124 : offset + 136].rstrip(b"\0 "), 8)
        except ValueError:  # such as those over 8 GiB
            return _members_by_tarfile(sample)
        stop = data + size
        if kind == _REGULAR and not sample[offset + 345]:  # no prefix of a long name
            name = sample[offset : offset + 100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
            members.append((name, sample[data:stop]))
        elif kind != _PAX or any(record in sample[data:stop] for record in _PAX_RECORDS):
            return _members_by_tarfile(sample)
        offset = stop + -size % BLOCK_BYTES
    return members


def _members_by_tarfile(sample: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(sample), mode="r:", encoding="utf-8") as tar:
        members = [(member.name, tar.extractfile(member)) for member in tar if member.isreg()]
        return [(name, file.read()) for name, file in members if file]
