"""An epoch's rows as the bytes of their message: protobuf itself would copy the columns again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from evosample.v1 import selection_pb2 as pb

_COLUMNS = ("sample_ids", "prior_scores", "importance_weights")
_VARINT, _BYTES = 0, 2  # kinds of fields


class Rows(NamedTuple):
    """What an EpochRows message has; the columns are within the message's own bytes."""

    first_step: int = 0
    num_steps: int = 0
    sample_ids: memoryview = memoryview(b"")
    prior_scores: memoryview = memoryview(b"")
    importance_weights: memoryview = memoryview(b"")


_NAMES = {field.number: field.name for field in pb.EpochRows.DESCRIPTOR.fields if field.name in Rows._fields}


def encode_rows(first_step: int, *columns: NDArray[Any] | None) -> bytes:
    """A StreamEpochResponse of rows: ids, prior scores and, unless they are None, importance weights, [steps, rows]."""
    assert columns[0] is not None
    pieces: list[Any] = [pb.EpochRows(first_step=first_step, num_steps=len(columns[0])).SerializeToString()]
    for field, values in zip(_COLUMNS, columns, strict=True):
        if values is not None:
            rows = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
            pieces += [_key_and_length(pb.EpochRows, field, rows.nbytes), rows.reshape(-1).view(np.uint8)]
    return b"".join([_key_and_length(pb.StreamEpochResponse, "rows", sum(map(len, pieces))), *pieces])


def decode_event(data: bytes) -> pb.StreamEpochResponse | Rows:
    """A StreamEpochResponse; rows as such.

    Raises:
        DecodeError: it is none.
    """
    if data.startswith(_ROWS_KEY):
        with suppress(DecodeError):
            _, rows = next(_fields(memoryview(data)))
            return Rows(**{_NAMES[number]: value for number, value in _fields(rows) if number in _NAMES})
    message = pb.StreamEpochResponse.FromString(data)  # another event, or a later version's rows
    if message.WhichOneof("event") != "rows":
        return message
    columns = (memoryview(getattr(message.rows, name)) for name in _COLUMNS)
    return Rows(message.rows.first_step, message.rows.num_steps, *columns)


def _key(message: type[Message], field: str) -> int:
    """What a field with a length begins with."""
    return int(message.DESCRIPTOR.fields_by_name[field].number) << 3 | _BYTES


_ROWS_KEY = bytes([_key(pb.StreamEpochResponse, "rows")])


def _key_and_length(message: type[Message], field: str, num_bytes: int) -> bytes:
    encoded = bytearray([_key(message, field)])
    while num_bytes > 0x7F:
        encoded.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    encoded.append(num_bytes)
    return bytes(encoded)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field.

    Raises:
        DecodeError: one is of another kind than these messages have, or ends too late.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 not in (_VARINT, _BYTES):
            raise DecodeError(f"field {key >> 3} is of kind {key & 7}")
        value, place = _varint(data, place)
        if key & 7 == _BYTES:
            if value > len(data) - place:
                raise DecodeError(f"field {key >> 3} has {value} bytes, of which {len(data) - place} are there")
            yield key >> 3, data[place : place + value]
            place += value
        else:
            yield key >> 3, value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """An integer, and where it ends."""
    value = shift = 0
    while place < len(data):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise DecodeError("the message ends early")
