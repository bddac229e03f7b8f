"""Requests that no honest client sends, made from the protocol's descriptor: new RPCs and fields come by themselves."""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError

from evosample.v1 import selection_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["SelectionService"]

N, B, CHOSEN, NUM_EPOCHS, NUM_GROUPS = 40, 8, 4, 5, 3  # of plausible experiments
_NAMES = [f"fuzz-{i}" for i in range(40)]

# RPCs that change nothing that is there: they may name a bystander.
_HARMLESS = {"CreateExperiment", "GetExperiment", "ListExperiments", "ExportScores", "WatchExperiment", "StreamEpoch"}

# So that what others are about stays as it is for a while, and time is not wasted.
_SELDOM = {"DeleteExperiment": 0.1, "ForceFinishEpoch": 0.1, "JoinRun": 0.4, "WatchExperiment": 0.1}

_STRINGS = ["", "default", "a/b", "{x}", "-a", "..", "*", "\0", "\n", "ü", "\U0001f600", "a" * 128, "a" * 129, "0" * 16]
_DOUBLES = [0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, 1e308, 1 - 2**-53, float("nan"), float("inf"), float("-inf")]
_FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, float("nan"), float("inf"), float("-inf")]
_INTEGERS = [0, 1, 2, 3, 7, 8, 9, 40, 100, 1000, 99_999, 100_000, 100_001, 1_000_000]
_POWERS = [2**k + d for k in (15, 16, 31, 32, 40, 53, 62, 63, 64) for d in (-1, 0, 1)]


@dataclass
class Target:
    """An experiment that requests are about, and what was heard of it.

    Attributes:
        ref: project, name and uid.
        epoch: the current one, as far as known.
        world_size: of its latest run.
        step_rows: of its current epoch, over all ranks.
        columns: what its policy has reported beside losses.
        members: of that and of earlier runs, newest last; all but the newest may be stale.
        plan_ids: newest last.
        is_bystander: no request may change it.
    """

    ref: pb.ExperimentRef
    epoch: int = 0
    world_size: int = 1
    step_rows: int = B
    columns: tuple[str, ...] = ()
    members: deque[pb.Member] = field(default_factory=lambda: deque(maxlen=6))
    plan_ids: deque[str] = field(default_factory=lambda: deque(maxlen=3))
    is_bystander: bool = False


def message_class(descriptor: Descriptor) -> Any:
    """The class of a message."""
    return message_factory.GetMessageClass(descriptor)


def small_spec(**changes: Any) -> pb.ExperimentSpec:
    """A spec whose epochs take no time."""
    spec = pb.ExperimentSpec(num_samples=N, num_epochs=NUM_EPOCHS, meta_batch_size=B, mini_batch_size=CHOSEN)
    spec.evolved_sampling.prune_ratio = 0.25
    spec.MergeFrom(pb.ExperimentSpec(**changes))
    return spec


def policies(chance: random.Random) -> pb.ExperimentSpec:
    """A spec with some policy, and nothing else."""
    one_of = pb.ExperimentSpec.DESCRIPTOR.oneofs_by_name["policy"]
    spec = pb.ExperimentSpec()
    name = chance.choice(one_of.fields).name
    getattr(spec, name).SetInParent()
    match name:
        case "evolved_sampling" | "random_subset":
            getattr(spec, name).prune_ratio = 0.5
        case "custom":  # of halves_of_losses.py
            spec.custom.name = "halves"
            spec.custom.settings["share"].number = chance.choice([0.3, 1])
            spec.custom.settings["least"].integer = 12
    if chance.random() < 0.2:
        spec.num_groups = NUM_GROUPS
        spec.group_floor = chance.choice([0, 0.05])
        if chance.random() < 0.5:
            spec.mixture.weights.extend([1] * chance.choice([0, NUM_GROUPS]))
            if chance.random() < 0.5:
                spec.mixture.step_size = 1
    return spec


class RequestMaker:
    """Makes requests: plausible ones, and what bad luck and bad intent make of them.

    Args:
        chance: where all that is random comes from.
        targets: experiments that are there, or were. May change between calls.
    """

    def __init__(self, chance: random.Random, targets: list[Target]) -> None:
        self._chance = chance
        self._targets = targets

    def make(self) -> tuple[MethodDescriptor, list[bytes]]:
        """A method, and the messages to call it with: one, unless it takes a stream."""
        while True:
            method = self._chance.choices(SERVICE.methods, [_SELDOM.get(each.name, 1.0) for each in SERVICE.methods])[0]
            payloads = self._payloads(method)
            if self._spares_bystanders(method, payloads):
                return method, payloads

    def _odds(self, probability: float) -> bool:
        return self._chance.random() < probability

    def _payloads(self, method: MethodDescriptor) -> list[bytes]:
        if self._odds(0.1):
            return [self._random_bytes() for _ in range(self._num_messages(method))]
        messages = self._plausible_messages(method)
        kind = self._chance.random()
        if kind < 0.55:
            for message in messages:
                if len(messages) == 1 or self._odds(0.4):
                    self._mutate(message)
        payloads = [message.SerializeToString() for message in messages]
        if kind > 0.8 and payloads:
            at = self._chance.randrange(len(payloads))
            payloads[at] = self._damaged(payloads[at], method.input_type)
        if method.client_streaming and self._odds(0.2):  # some lost, repeated or out of order
            payloads = self._chance.choices(payloads, k=self._chance.randint(1, 8))
        return payloads

    def _num_messages(self, method: MethodDescriptor) -> int:
        return self._chance.randint(0, 5) if method.client_streaming else 1

    # What the protocol promises not to change

    def _spares_bystanders(self, method: MethodDescriptor, payloads: list[bytes]) -> bool:
        """Whether no bystander may change by this call, as the protocol has it."""
        if method.name in _HARMLESS:
            return True
        for payload in payloads:
            try:
                message = message_class(method.input_type).FromString(payload)
            except DecodeError:
                continue
            if not all(self._spares(target, message) for target in self._targets if target.is_bystander):
                return False
        return True

    @staticmethod
    def _spares(target: Target, message: Any) -> bool:
        fields = message.DESCRIPTOR.fields_by_name
        ref = message.member.ref if "member" in fields else message.ref
        if (ref.project or "default", ref.name) != (target.ref.project, target.ref.name):
            return True
        if ref.uid not in ("", target.ref.uid):
            return True
        if "member" not in fields:
            return False
        known = [(member.generation, member.rank, member.claim) for member in target.members]
        is_member = (message.member.generation, message.member.rank, message.member.claim) in known
        return not is_member or ("losses" in fields and bool(len(message.losses) % 4 or message.columns))

    # Plausible requests

    def _plausible_messages(self, method: MethodDescriptor) -> list[Any]:
        is_import = method.client_streaming
        takes_run = "member" in method.input_type.fields_by_name

        def weight(target: Target) -> float:
            is_apt = (not takes_run and not is_import) or takes_run == bool(target.members)
            return (1.0 if is_apt else 0.2) * (0.3 if target.is_bystander else 1.0)

        (target,) = self._chance.choices(self._targets, [weight(target) for target in self._targets])
        if is_import:
            return self._streamed(method, target)
        return [self._plausible(method.input_type, target) for _ in range(self._num_messages(method))]

    def _plausible(self, descriptor: Descriptor, target: Target) -> Any:
        """A message about a target that may well be accepted."""
        make = {
            "ExperimentRef": self._ref,
            "Member": self._member,
            "CreateExperimentRequest": self._create,
        }.get(descriptor.name)
        if make is not None:
            return make(target)
        message = message_class(descriptor)()
        for each in self._one_of_each(descriptor):
            if each.message_type is not None:
                if each.name in ("ref", "member") or self._odds(0.4):
                    getattr(message, each.name).CopyFrom(self._plausible(each.message_type, target))
            elif not each.has_presence or self._odds(0.5):
                setattr(message, each.name, self._plausible_value(each, target, message))
        if getattr(descriptor.fields_by_name.get("columns"), "message_type", None) is not None:  # those of a report
            for name in target.columns:
                message.columns[name] = self._floats(target, message)
        return message

    def _one_of_each(self, descriptor: Descriptor) -> Iterator[FieldDescriptor]:
        """The fields that are not repeated, one of each oneof."""
        chosen = {self._chance.choice(one_of.fields).name for one_of in descriptor.oneofs}
        for each in descriptor.fields:
            if each.label != each.LABEL_REPEATED and (each.containing_oneof is None or each.name in chosen):
                yield each

    def _ref(self, target: Target) -> pb.ExperimentRef:
        ref = pb.ExperimentRef()
        ref.CopyFrom(target.ref)
        if self._odds(0.1):
            ref.uid = self._chance.choice(["", "0123456789abcdef", self._chance.choice(self._targets).ref.uid])
        return ref

    def _member(self, target: Target) -> pb.Member:
        if not target.members or self._odds(0.1):
            return pb.Member(ref=self._ref(target), generation=1, claim=self._chance.getrandbits(53))
        member = pb.Member()
        member.CopyFrom(target.members[-1] if self._odds(0.7) else self._chance.choice(target.members))
        if target.is_bystander and self._odds(0.8):  # all but the latest process of its rank
            changed = self._chance.choice(["generation", "rank", "claim"])
            setattr(member, changed, max(getattr(member, changed) + self._chance.choice([-1, 1]), 0))
        return member

    def _create(self, target: Target) -> pb.CreateExperimentRequest:
        name = self._chance.choice([*_NAMES, target.ref.name])
        spec = small_spec(seed=self._chance.randrange(2), warm_start=self._odds(0.3))
        if self._odds(0.7):
            spec.MergeFrom(policies(self._chance))
        return pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=spec)

    def _streamed(self, method: MethodDescriptor, target: Target) -> list[Any]:
        """Columns of all samples, in a few messages."""
        cuts = sorted(self._chance.randint(0, N) for _ in range(self._chance.randint(0, 3)))
        messages: list[Any] = []
        has_reference = self._odds(0.4)
        for begin, end in zip([0, *cuts], [*cuts, N], strict=True):
            columns = [
                struct.pack(f"<{end - begin}f", *(self._chance.random() for _ in range(begin, end))) for _ in "12"
            ]
            if method.name == "SetGroups":
                ids = struct.pack(f"<{end - begin}H", *(self._chance.randrange(NUM_GROUPS) for _ in range(begin, end)))
                losses = columns[0] if has_reference else b""
                messages.append(pb.SetGroupsRequest(first_sample=begin, groups=ids, reference_losses=losses))
                continue
            message = pb.ImportScoresRequest(first_sample=begin, scores=columns[0], sampling_weights=columns[1])
            if self._odds(0.5):
                message.num_visits = struct.pack(f"<{end - begin}I", *range(begin, end))
            messages.append(message)
        messages[0].ref.CopyFrom(self._ref(target))
        messages[0].num_samples = N
        return messages

    def _plausible_value(self, each: FieldDescriptor, target: Target, message: Any) -> Any:
        chance = self._chance
        match each.name:
            case "project":
                return target.ref.project
            case "run_id" | "pin":
                return f"{each.name}-{chance.randrange(4)}"
            case "plan_id":
                return target.plan_ids[-1] if target.plan_ids and self._odds(0.8) else "0123456789abcdef"
            case "epoch":
                return max(target.epoch + chance.choice([0, 0, 0, 0, 1, -1]), 0)
            case "world_size":
                return chance.choice([1, 1, 2, 4])
            case "num_samples":
                return N + chance.choice([0, 0, 0, 10])
            case "num_steps":
                return chance.choice([1, 1, 2, 3])
            case "losses":
                return self._floats(target, message)
            case "chosen":
                num_bytes = -(-target.step_rows // target.world_size // 8) * message.num_steps
                return chance.choice([b"", chance.randbytes(num_bytes)])
        match each.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                return self._random_bytes() if each.type == FieldDescriptor.TYPE_BYTES else ""
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._odds(0.5)
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return chance.random()
            case _:
                return chance.choice([0, 0, 0, 1, 1, 2, 3, 5])

    def _floats(self, target: Target, message: Any) -> bytes:
        """A value for each row of a report."""
        num_rows = target.step_rows // target.world_size * getattr(message, "num_steps", 1)
        return struct.pack(f"<{num_rows}f", *(self._chance.random() for _ in range(num_rows)))

    # What becomes of them

    def _mutate(self, message: Any) -> None:
        """Give extreme values to a few fields, wherever they are."""
        for _ in range(self._chance.choice([1, 1, 1, 2, 3])):
            places = list(_places(message))
            # mostly not where it is about: that would be found out at once, and nothing else be tried
            beyond = [place for place in places if place[0].DESCRIPTOR.name not in ("ExperimentRef", "Member")]
            self._spoil(*self._chance.choice(beyond if beyond and self._odds(0.8) else places))

    def _spoil(self, message: Any, each: FieldDescriptor) -> None:
        if self._odds(0.15):
            message.ClearField(each.name)
        elif each.label == each.LABEL_REPEATED:
            values = getattr(message, each.name)
            for _ in range(self._chance.choice([1, 10, 10_000])):
                if each.message_type is None:
                    values.append(self._extreme(each))
                elif each.message_type.GetOptions().map_entry:
                    self._spoil_map(values, each.message_type)
                else:
                    values.add()
        elif each.message_type is not None:
            getattr(message, each.name).CopyFrom(self._plausible(each.message_type, self._chance.choice(self._targets)))
        else:
            setattr(message, each.name, self._extreme(each))

    def _spoil_map(self, values: Any, entry: Descriptor) -> None:
        """Give an extreme value to a key that is there, or to another one."""
        key = self._chance.choice([*values, self._extreme(entry.fields_by_name["key"])])
        value = entry.fields_by_name["value"]
        if value.message_type is None:
            values[key] = self._extreme(value)
        else:
            setting = self._chance.choice(value.message_type.fields)
            setattr(values[key], setting.name, self._extreme(setting))

    def _extreme(self, each: FieldDescriptor) -> Any:
        chance = self._chance
        match each.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if each.type == FieldDescriptor.TYPE_BYTES:
                return self._random_bytes() if self._odds(0.4) else self._column()
            case FieldDescriptor.CPPTYPE_STRING:
                any_text = "".join(
                    chr(chance.choice([chance.randrange(128), chance.randrange(0xD800)])) for _ in range(9)
                )
                return chance.choice([*_STRINGS, any_text, "x" * chance.choice([1_000, 10_000, 100_000])])
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._odds(0.5)
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return chance.choice([*_DOUBLES, chance.random(), struct.unpack("<d", chance.randbytes(8))[0]])
            case FieldDescriptor.CPPTYPE_ENUM:
                return chance.choice([0, 1, 2, 3, 4, 17, -1, 2**31 - 1, -(2**31)])
        is_long = each.cpp_type in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT64)
        num_bits = 64 if is_long else 32
        value = chance.choice([*_INTEGERS, *_POWERS, chance.getrandbits(num_bits)]) % 2**num_bits
        is_signed = each.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
        return value - 2 ** (num_bits - 1) if is_signed else value

    def _column(self) -> bytes:
        """Values of a column that are special, or too many or too few."""
        num_rows = self._chance.choice([1, B // 4, B // 2, B - 1, B, B + 1, 2 * B, N - 1, N, N + 1, 100_000])
        values = [
            self._chance.choice(_FLOATS) if self._odds(0.3) else self._chance.random()
            for _ in range(min(num_rows, 100))
        ]
        return struct.pack(f"<{len(values)}f", *values) * max(num_rows // 100, 1) + b"\0" * self._chance.choice(
            [0, 0, 0, 1, 2, 3]
        )

    def _random_bytes(self) -> bytes:
        most = self._chance.choices([0, 8, 100, 5_000, 1_000_000, 5_000_000], [10, 40, 40, 10, 0.5, 0.1])[0]
        return self._chance.randbytes(self._chance.randint(0, most))

    def _damaged(self, payload: bytes, descriptor: Descriptor) -> bytes:
        """Bytes of a message that were cut, flipped, or got others between them."""
        chance = self._chance
        at = chance.randint(0, len(payload))
        match chance.randrange(4):
            case 0:
                return payload[:at]
            case 1:
                data = bytearray(payload)
                for _ in range(chance.randint(1, 8) if data else 0):
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
                return bytes(data)
            case 2:
                return payload[:at] + chance.choice([chance.randbytes(chance.randint(1, 9)), payload]) + payload[at:]
            case _:
                return payload + self._wire_field(descriptor)

    def _wire_field(self, descriptor: Descriptor) -> bytes:
        """A field as no library writes it; a later one counts instead of an earlier one."""
        chance = self._chance
        number = chance.choice([each.number for each in descriptor.fields] + [0, 999, 2**29 - 1])
        content = chance.choice([
            (0, b"\xff" * 9 + b"\x01"),  # -1
            (0, b"\xff" * 10 + b"\x01"),  # longer than a varint may be
            (0, b"\x80" * chance.randint(1, 9) + b"\x00"),  # 0, in more bytes than it takes
            (0, b"\x80"),  # cut off
            (1, chance.randbytes(8)),
            (2, b"\xff\xff\xff\xff\x0f" + chance.randbytes(9)),  # 4 GiB announced
            (2, b"\x04\xff\xfe\xc3\x28"),  # no UTF-8
            (2, _varint(chance.randint(0, 20)) + chance.randbytes(10)),
            (3, b"\x0b" * chance.choice([1, 99, 50_000])),  # groups in groups
            (4, b""),
            (5, chance.randbytes(4)),
            (6, b"\x00"),
            (7, b"\x00"),
        ])  # fmt: skip
        return _varint(number << 3 | content[0]) + content[1]


def _places(message: Any) -> Iterator[tuple[Any, FieldDescriptor]]:
    """All fields of a message and of the messages in it, set or not."""
    for each in message.DESCRIPTOR.fields:
        yield message, each
        if each.message_type is not None and each.label != each.LABEL_REPEATED and message.HasField(each.name):
            yield from _places(getattr(message, each.name))


def _varint(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
