"""Rows as bytes: just what protobuf makes of them, in both directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from evosample.rows import Rows, decode_event, encode_rows
from evosample.v1 import selection_pb2 as pb


@pytest.mark.parametrize("num_steps", [0, 1, 70_000])
@pytest.mark.parametrize("first_step", [0, 1, 2**40])
@pytest.mark.parametrize("id_type", [np.uint32, np.uint64])
@pytest.mark.parametrize("has_weights", [False, True])
def test_rows_are_those_of_protobuf(num_steps: int, first_step: int, id_type: type, has_weights: bool) -> None:
    ids: Any = np.arange(4 * num_steps, dtype=id_type).reshape(num_steps, 4)[:, 1:3]  # not in one stretch
    scores = ids.astype(np.float32)
    weights = scores + 1 if has_weights else None
    encoded = encode_rows(first_step, ids, scores, weights)
    rows = pb.EpochRows(
        first_step=first_step, num_steps=num_steps, sample_ids=ids.tobytes(), prior_scores=scores.tobytes()
    )
    if weights is not None:
        rows.importance_weights = weights.tobytes()
    assert pb.StreamEpochResponse.FromString(encoded) == pb.StreamEpochResponse(rows=rows)
    for data in (encoded, pb.StreamEpochResponse(rows=rows).SerializeToString()):
        found = decode_event(data)
        assert isinstance(found, Rows)
        assert found[:2] == (first_step, num_steps)
        assert tuple(map(bytes, found[2:])) == (rows.sample_ids, rows.prior_scores, rows.importance_weights)


def test_fields_of_later_versions_are_passed_over() -> None:
    rows = (
        pb.EpochRows(first_step=3, num_steps=1, sample_ids=b"1234").SerializeToString() + b"\x78\x96\x01\x82\x01\x01x"
    )
    found = decode_event(b"\x1a" + bytes([len(rows)]) + rows + b"\x78\x96\x01")
    assert isinstance(found, Rows)
    assert (found.first_step, bytes(found.sample_ids)) == (3, b"1234")
    fixed = rows + b"\x7d\x00\x00\x80\x3f"  # a float
    for data in (b"\x1a" + bytes([len(fixed)]) + fixed, b"\x78\x96\x01\x1a" + bytes([len(rows)]) + rows):
        found = decode_event(data)
        assert isinstance(found, Rows)
        assert (found.first_step, found.num_steps, bytes(found.sample_ids)) == (3, 1, b"1234")


def test_other_events_are_protobuf_s() -> None:
    wait = pb.StreamEpochResponse(wait=pb.EpochWait(waiting_for_ranks=[3]))
    assert decode_event(wait.SerializeToString()) == wait
    assert decode_event(b"") == pb.StreamEpochResponse()


def test_what_is_cut_off_or_no_message_is_refused() -> None:
    whole = encode_rows(300, np.ones((2, 3), np.uint32), np.ones((2, 3), np.float32), None)
    for length in range(1, len(whole)):
        with pytest.raises(DecodeError):
            decode_event(whole[:length])
    with pytest.raises(DecodeError):
        decode_event(b"\x1a\x02\x0d\x00")
