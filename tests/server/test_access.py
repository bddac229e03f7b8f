"""Who gets in, and who does not: over a raw channel, with and without TLS."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import redis.asyncio
import structlog
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc

import evosample
from evosample.v1 import administration_pb2 as administration_pb
from evosample.v1 import selection_pb2 as pb
from evosample_server import access
from evosample_server.tokens import Tokens
from stores import StandaloneStore
from support import ROOT_TOKEN, Guarded, ServerProcess, fixed_losses, train

SETTINGS: dict[str, Any] = {"num_samples": 100, "num_epochs": 3, "meta_batch_size": 10, "mini_batch_size": 5}
SETTINGS |= {"groups": np.zeros(100, np.uint16)}
METHODS: list[MethodDescriptor] = [
    method
    for file in (pb.DESCRIPTOR, administration_pb.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]
READERS = {"GetExperiment", "ListExperiments", "ExportScores", "WatchExperiment", "GetServer"}
WRITERS = READERS | {"CreateExperiment", "JoinRun", "StreamEpoch", "ReportLosses", "SelectMiniBatch", "FinishEpoch"}
WRITERS |= {"PinEpoch", "ImportScores", "SetGroups", "ExtendDataset"}
ADMINISTRATORS = WRITERS | {"DeleteExperiment", "ForceFinishEpoch", "CreateToken", "ListTokens", "RevokeToken"}
ALLOWED = {"reader": READERS, "writer": WRITERS, "administrator": ADMINISTRATORS}
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]  # channels to one address share one otherwise
NOT_A_TOKEN = "evo_0123456789ab_" + 43 * "x"

Outcome = tuple[str, str, bytes]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    server = Guarded(tmp_path)
    yield server
    server.stop()


@pytest.fixture(params=[False, True], ids=["plain text", "TLS"])
def guarded_both_ways(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guarded]:
    server = Guarded(tmp_path, has_tls=request.param)
    yield server
    server.stop()


def call(channel: grpc.Channel, method: MethodDescriptor, request: Any, token: str | None) -> Outcome:
    """Code, message, and all bytes of the responses."""
    kinds = "_".join("stream" if s else "unary" for s in (method.client_streaming, method.server_streaming))
    send = getattr(channel, kinds)(
        f"/{method.containing_service.full_name}/{method.name}", type(request).SerializeToString, lambda data: data
    )
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    try:
        answer = send(iter([request]) if method.client_streaming else request, timeout=20, metadata=metadata)
        return "OK", "", b"".join(answer) if method.server_streaming else answer
    except grpc.RpcError as error:
        return error.code().name, error.details() or "", b""


def is_refused(outcome: Outcome) -> bool:
    code, message, _ = outcome
    return code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or (code == "NOT_FOUND" and "opens project" in message)


class Requests:
    """For every method a request about an experiment that would be carried out, if its sender may."""

    def __init__(self, experiment: evosample.Experiment, channel: grpc.Channel, token: str) -> None:
        self._ref = experiment.ref
        join = pb.JoinRunRequest(ref=self._ref, run_id="run", world_size=1, process_id="process")
        joined = pb.JoinRunResponse.FromString(call(channel, named("JoinRun"), join, token)[2])
        member = pb.Member(ref=self._ref, generation=joined.generation, claim=joined.claim)
        stream = pb.StreamEpochRequest(member=member, max_steps=1)
        plan_id = pb.StreamEpochResponse.FromString(call(channel, named("StreamEpoch"), stream, token)[2]).start.plan_id
        losses = np.ones(10, "<f4").tobytes()
        spec = pb.ExperimentSpec(uniform=pb.Uniform(), num_samples=10, num_epochs=1, meta_batch_size=5)
        self._fields: dict[str, dict[str, Any]] = {
            "CreateExperiment": {"spec": spec, "ref": pb.ExperimentRef(name="another")},
            "JoinRun": {"run_id": "run", "world_size": 1, "process_id": "process"},
            "StreamEpoch": {"member": member, "max_steps": 1},
            "ReportLosses": {"member": member, "plan_id": plan_id, "num_steps": 1, "losses": losses},
            "SelectMiniBatch": {"member": member, "plan_id": plan_id, "losses": losses},
            "FinishEpoch": {"member": member, "plan_id": plan_id, "reported_rows": 100},
            "PinEpoch": {"pin": "kept", "epoch": 0},
            "ImportScores": {"num_samples": 100, "scores": bytes(400), "sampling_weights": bytes(400)},
            "SetGroups": {"num_samples": 100, "groups": bytes(200)},
            "ExtendDataset": {"num_samples": 100},
            "CreateToken": {"role": administration_pb.ROLE_READER},
            "RevokeToken": {"id": token.split("_")[1]},
        }

    def about(self, method: MethodDescriptor, *, project: str, name: str = "") -> Any:
        """The request, with another project and, if given, another name."""
        request: Any = message_factory.GetMessageClass(method.input_type)(**self._fields.get(method.name, {}))
        fields = request.DESCRIPTOR.fields_by_name
        if "project" in fields:
            request.project = project
        elif "ref" in fields or "member" in fields:
            ref = request.ref if "ref" in fields else request.member.ref
            if not ref.name:
                ref.CopyFrom(self._ref)
            ref.project, ref.name = project, name or ref.name
        return request


def named(name: str) -> MethodDescriptor:
    return next(method for method in METHODS if method.name == name)


def test_the_table_has_every_method() -> None:
    assert {method.name for method in METHODS} == ADMINISTRATORS


def test_nobody_gets_in_but_those_who_may(guarded_both_ways: Guarded) -> None:
    guarded = guarded_both_ways
    tokens: dict[str, str] = {role: guarded.new_token(role) for role in ALLOWED}  # type: ignore[arg-type]
    theirs = guarded.new_token("administrator", "theirs")
    revoked, expired = guarded.new_token("administrator"), guarded.new_token("administrator", ttl_s=1)
    with guarded.connect(ROOT_TOKEN) as root, guarded.channel() as channel:
        root.revoke_token(revoked.split("_")[1], project="mine")
        time.sleep(1)
        experiment = root.create_experiment("e", **SETTINGS, project="mine")
        requests = Requests(experiment, channel, tokens["administrator"])
        for token in (*tokens.values(), theirs):  # tokens that are in use stay so, whatever a host does otherwise
            assert call(channel, named("GetServer"), administration_pb.GetServerRequest(), token)[0] == "OK"
        status, listed = experiment.status(), root.list_tokens(project="mine")
        outcomes: dict[tuple[str, str], Outcome] = {}
        expected: dict[tuple[str, str], tuple[str, ...]] = {}

        def ask(who: str, token: str | None, method: MethodDescriptor, *codes: str) -> None:
            request = requests.about(method, project="mine")
            outcomes[who, method.name], expected[who, method.name] = call(channel, method, request, token), codes

        for method in METHODS:
            ask("nobody", None, method, "UNAUTHENTICATED")
            ask("one without a word", "", method, "UNAUTHENTICATED")
            ask("expired", expired, method, "UNAUTHENTICATED")
            for who, token in {
                "guessed": NOT_A_TOKEN,
                "revoked": revoked,
                "another's secret": tokens["administrator"][:17] + theirs[17:],
                "cut off": tokens["administrator"][:-1],
                "no token": "administrator",
            }.items():
                ask(who, token, method, "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")
            if method.name != "GetServer":
                ask("of another project", theirs, method, "NOT_FOUND")
            for role, token in tokens.items():
                if method.name not in ALLOWED[role]:
                    ask(role, token, method, "PERMISSION_DENIED")
        wrong = {key: outcomes[key][:2] for key, codes in expected.items() if outcomes[key][0] not in codes}
        assert not wrong
        assert {answer for _, _, answer in outcomes.values()} == {b""}
        assert experiment.status() == status, "those who were refused have changed nothing"
        assert root.list_tokens(project="mine") == listed

        for who, token in {**tokens, "root": ROOT_TOKEN}.items():
            for method in METHODS:
                if method.name in ALLOWED.get(who, ADMINISTRATORS) and method.name != "RevokeToken":
                    outcomes[who, method.name] = call(channel, method, requests.about(method, project="mine"), token)
                    assert not is_refused(outcomes[who, method.name]), (who, method.name, outcomes[who, method.name])
    shown = guarded.log + repr([outcomes[key] for key in outcomes if key[1] != "CreateToken"])
    for token in (*tokens.values(), theirs, revoked, expired, NOT_A_TOKEN):
        assert token[17:] not in shown
    assert ROOT_TOKEN not in shown


def test_what_belongs_to_others_cant_be_told_from_what_is_not_there(guarded: Guarded) -> None:
    mine, theirs = guarded.new_token("administrator"), guarded.new_token("administrator", "theirs")
    with guarded.connect(mine) as client, guarded.channel() as channel:
        requests = Requests(client.create_experiment("e", **SETTINGS), channel, mine)
        for method in METHODS:
            if method.name == "GetServer":
                continue
            probes = [("mine", "e"), ("mine", "no-such-experiment"), ("no-such-project", "e")]
            answers = {call(channel, method, requests.about(method, project=p, name=n), theirs) for p, n in probes}
            assert len(answers) == 1, method.name
            ((code, message, _),) = answers
            assert code == "NOT_FOUND"
            assert "opens project 'theirs' alone" in message


def test_projects_share_names_and_see_nothing_of_each_other(guarded: Guarded) -> None:
    with (
        guarded.connect(guarded.new_token("writer", "one")) as one,
        guarded.connect(guarded.new_token("writer", "two")) as two,
    ):
        here = one.create_experiment("e", **SETTINGS)
        there = two.create_experiment("e", **SETTINGS, seed=1)
        two.create_experiment("only-here", **SETTINGS)
        assert (here.project, there.project) == ("one", "two")
        assert [status.name for status in one.list_experiments()] == ["e"]
        train(here, fixed_losses(100, 3))
        assert here.status().state == "finished"
        assert (there.status().visited_rows, there.status().state) == (0, "open")
        with pytest.raises(evosample.NotFoundError, match="opens project 'one' alone"):
            one.get_experiment("only-here", project="two")
        assert one.server_status().project == "one"


def test_a_call_is_refused_before_its_request_is_read(guarded: Guarded) -> None:
    report = pb.ReportLossesRequest(losses=bytes(32 * 2**20))  # more than gRPC would let in
    token = guarded.new_token("writer")
    with guarded.channel() as channel:
        assert call(channel, named("ReportLosses"), report, None)[0] == "UNAUTHENTICATED"
        code, message, _ = call(channel, named("ReportLosses"), report, token)
        assert code == "RESOURCE_EXHAUSTED"
        assert "larger than max" in message


def test_a_revoked_token_is_refused_at_once_and_ends_what_it_had_begun(guarded: Guarded) -> None:
    token = guarded.new_token("writer")
    with guarded.connect(ROOT_TOKEN) as root, guarded.connect(token) as client, guarded.channel() as channel:
        ref = client.create_experiment("e", **SETTINGS).ref
        join = pb.JoinRunRequest(ref=ref, run_id="run", world_size=1)
        joined = pb.JoinRunResponse.FromString(call(channel, named("JoinRun"), join, token)[2])
        member = pb.Member(ref=ref, generation=joined.generation, claim=joined.claim)
        send = channel.unary_stream(
            "/evosample.v1.SelectionService/StreamEpoch",
            pb.StreamEpochRequest.SerializeToString,
            pb.StreamEpochResponse.FromString,
        )
        metadata = (("authorization", f"Bearer {token}"),)
        waiting = send(pb.StreamEpochRequest(member=member, epoch=1), timeout=30, metadata=metadata)
        assert next(waiting).HasField("wait")
        root.revoke_token(token.split("_")[1], project="mine")
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            list(waiting)
        with pytest.raises(evosample.UnauthenticatedError, match="it was revoked"):
            client.get_experiment("e")


@pytest.mark.parametrize("left", ["some of the scores", "nothing but the end"])
def test_a_revoked_token_finishes_no_import(guarded: Guarded, left: str) -> None:
    token = guarded.new_token("writer")
    with guarded.connect(ROOT_TOKEN) as root, guarded.channel() as channel:
        experiment = root.create_experiment("e", **SETTINGS, project="mine")
        before = experiment.export_scores().scores
        is_revoked = threading.Event()

        def rows(first_sample: int, num_rows: int) -> pb.ImportScoresRequest:
            column = np.full(num_rows, 7, "<f4").tobytes()
            return pb.ImportScoresRequest(
                ref=experiment.ref,
                num_samples=100,
                first_sample=first_sample,
                scores=column,
                sampling_weights=column,
            )

        def messages() -> Iterator[pb.ImportScoresRequest]:
            yield rows(0, 50)
            if left == "nothing but the end":
                yield rows(50, 50)
            assert is_revoked.wait(30)
            if left == "some of the scores":
                yield rows(50, 50)

        send = channel.stream_unary(
            "/evosample.v1.SelectionService/ImportScores", pb.ImportScoresRequest.SerializeToString, bytes
        )
        importing = send.future(messages(), timeout=60, metadata=(("authorization", f"Bearer {token}"),))
        guarded.revoke(token)
        time.sleep(1.1)  # for so long a token may be believed
        is_revoked.set()
        assert importing.code() is grpc.StatusCode.UNAUTHENTICATED
        assert np.array_equal(experiment.export_scores().scores, before)


def test_a_call_whose_request_comes_after_its_token_was_revoked_is_refused(guarded: Guarded) -> None:
    token = guarded.new_token("administrator")
    with guarded.connect(ROOT_TOKEN) as root, guarded.channel() as channel:
        ref = root.create_experiment("e", **SETTINGS, project="mine").ref
        is_revoked = threading.Event()

        def late() -> Iterator[pb.DeleteExperimentRequest]:
            assert is_revoked.wait(30)
            yield pb.DeleteExperimentRequest(ref=ref)

        send = channel.stream_unary(  # for the server one that sends its only request late
            "/evosample.v1.SelectionService/DeleteExperiment", pb.DeleteExperimentRequest.SerializeToString, bytes
        )
        deleting = send.future(late(), timeout=60, metadata=(("authorization", f"Bearer {token}"),))
        time.sleep(0.5)
        guarded.revoke(token)
        time.sleep(1.1)
        is_revoked.set()
        assert deleting.code() is grpc.StatusCode.UNAUTHENTICATED
        assert root.get_experiment("e", project="mine").uid == ref.uid


def test_a_host_that_guesses_is_kept_out_for_a_while_and_others_are_served(guarded: Guarded) -> None:
    used, unused = guarded.new_token("reader"), guarded.new_token("reader")
    request = administration_pb.GetServerRequest()
    with guarded.channel() as channel:
        assert call(channel, named("GetServer"), request, used)[0] == "OK"
        guesses = [call(channel, named("GetServer"), request, f"{NOT_A_TOKEN[:-2]}{i:02}") for i in range(12)]
        assert [code for code, *_ in guesses] == 10 * ["UNAUTHENTICATED"] + 2 * ["RESOURCE_EXHAUSTED"]
        assert len({message for _, message, _ in guesses[:10]}) == 1
        assert call(channel, named("GetServer"), request, unused)[0] == "RESOURCE_EXHAUSTED"
        time.sleep(1.1)  # the server asks the store again about the token that was in use
        assert call(channel, named("GetServer"), request, used)[0] == "OK"
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1
    assert guarded.log.count("refused") == 1, "the others are counted, once a minute"
    assert "method=/evosample.v1.AdministrationService/GetServer" in guarded.log


def test_strangers_do_not_learn_where_a_store_is_that_is_away(tmp_path: Path) -> None:
    store = StandaloneStore(tmp_path / "store")
    guarded = Guarded(tmp_path, "--redis-url", store.url)
    store.close()
    with guarded.channel() as channel:
        code, message, _ = call(channel, named("GetServer"), administration_pb.GetServerRequest(), NOT_A_TOKEN)
    guarded.stop()
    assert (code, message) == ("UNAVAILABLE", "the server can't use its store: its log says why")
    assert str(store.port) in guarded.log


def test_refusals_are_counted_and_forgotten_once_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_WINDOW_S", 0.2)
    guard = access.Access(Tokens(redis.asyncio.Redis()), needs_tokens=True)  # what is no token is not looked up

    async def guess() -> str:
        try:
            await guard.admit(f"/{METHODS[0].full_name}", [("authorization", "Bearer guessed")], "ipv4:10.0.0.1:5")
        except evosample.EvosampleError as error:
            return error.code
        return "OK"

    async def guesses() -> list[str]:
        counting = asyncio.create_task(guard.count_refusals())
        codes = [await guess() for _ in range(11)]
        await asyncio.sleep(0.3)
        codes.append(await guess())
        counting.cancel()
        return codes

    with structlog.testing.capture_logs() as logged:
        assert asyncio.run(guesses()) == [*10 * ["UNAUTHENTICATED"], "RESOURCE_EXHAUSTED", "UNAUTHENTICATED"]
    assert [(line["event"], line.get("count")) for line in logged] == [
        ("refused", None),
        ("refused in the last minute", 11),
        ("refused", None),
    ]
    assert "guessed" not in repr(logged)


@pytest.mark.parametrize(
    ("peers", "host"),
    [
        (["ipv6:%5B::1%5D:5", "ipv6:[::1]:0"], "::/64"),  # as gRPC and as the dashboard have it
        (["ipv6:%5B2001:db8:1:2::7%5D:5", "ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5"], "2001:db8:1:2::/64"),
        (["ipv6:%5Bfe80::1%25eth0%5D:5", "ipv6:[fe80::2%eth0]:0"], "fe80::/64"),
        (["ipv4:10.0.0.1:5", "ipv6:[::ffff:10.0.0.1]:6"], "10.0.0.1"),
        (["unix:", "unix:/run/socket"], "unix"),
        (["ipv4::0"], ""),  # of the dashboard, that has gone already
    ],
)
def test_a_host_is_one_however_it_is_spelled(peers: list[str], host: str) -> None:
    guard = access.Access(Tokens(redis.asyncio.Redis()), needs_tokens=True)

    async def guess(peer: str) -> str:
        with pytest.raises(evosample.EvosampleError) as caught:
            await guard.admit(f"/{METHODS[0].full_name}", [("authorization", "Bearer guessed")], peer)
        return str(caught.value)

    async def guesses() -> list[str]:
        return [await guess(peer) for peer in 11 * peers]

    with structlog.testing.capture_logs() as logged:
        assert f"came from {host} within a minute" in asyncio.run(guesses())[-1]
    assert [line["event"] for line in logged] == ["refused"]
    assert "%5B" not in repr(logged)


def test_health_and_reflection_are_open(guarded: Guarded) -> None:
    with guarded.channel() as channel:
        for service in ("", "evosample.v1.SelectionService", "evosample.v1.AdministrationService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health_pb2_grpc.HealthStub(channel).Check(request).status == health_pb2.HealthCheckResponse.SERVING


def test_what_is_open_takes_small_requests_alone(guarded: Guarded) -> None:
    with guarded.channel() as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(health_pb2.HealthCheckRequest(service="")).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="takes at most 4,096") as caught:
            check(health_pb2.HealthCheckRequest(service=14 * 2**20 * "x"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        reflect: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", bytes, bytes
        )
        with pytest.raises(grpc.RpcError, match="takes at most 4,096"):
            list(reflect(iter([bytes(5_000)]), timeout=20))


def test_a_connection_has_so_many_calls_at_a_time(guarded: Guarded) -> None:
    with guarded.channel() as channel, grpc.insecure_channel(guarded.address, OWN_CONNECTION) as another:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(3_000)]
        for watching in watches:
            assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
            stub.Check(health_pb2.HealthCheckRequest(), timeout=0.5)
        assert health_pb2_grpc.HealthStub(another).Check(health_pb2.HealthCheckRequest(), timeout=20).status
        for watching in watches:
            watching.cancel()
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status


def test_the_store_keeps_no_secret(guarded: Guarded) -> None:
    tokens = [guarded.new_token("writer", note="of the nightly job"), ROOT_TOKEN]
    with redis.Redis(unix_socket_path=guarded.store_socket) as store:
        kept = b"".join(b"".join(pair) for pair in store.hgetall("evosample:{tokens}").items())
        assert b"of the nightly job" in kept
        assert not any(token[17:].encode() in store.dump(key) for token in tokens for key in store.keys("*"))


def test_tokens_are_listed_without_their_secrets_and_expire(guarded: Guarded) -> None:
    with guarded.connect(guarded.new_token("administrator")) as client:
        token, bearer_token = client.create_token("reader", note="dashboard", ttl_s=1)
        assert (token.project, token.role, token.note) == ("mine", "reader", "dashboard")
        with guarded.connect(bearer_token) as reader:
            assert reader.server_status().role == "reader"
            assert token in client.list_tokens()
            while not token.has_expired:
                time.sleep(0.1)
            with pytest.raises(evosample.UnauthenticatedError, match=f"the token {token.id} expired on 2"):
                reader.server_status()
        assert token in client.list_tokens()
        client.revoke_token(token.id)
        assert token not in client.list_tokens()
        with pytest.raises(evosample.NotFoundError, match="no such token"):
            client.revoke_token(token.id)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"role": "owner"}, "role"),
        ({"note": 201 * "x"}, "note"),
        ({"note": "a\x1b[2J"}, "note"),
        ({"ttl_s": 0}, "ttl_s"),
    ],
)
def test_a_token_that_makes_no_sense_is_refused(client: evosample.Client, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match=f"{field}="):
        client.create_token(**({"role": "reader"} | changes))


def test_a_whole_token_in_place_of_an_id_is_not_shown(client: evosample.Client) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match="expected the 12 characters") as caught:
        client.revoke_token(NOT_A_TOKEN)
    assert NOT_A_TOKEN not in str(caught.value)


def test_administrative_acts_are_logged_with_who_did_them(guarded: Guarded) -> None:
    administrator = guarded.new_token("administrator")
    with guarded.connect(administrator) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        experiment.import_scores(np.ones(100))
        experiment.epochs(world_size=5, run_id="run").close()
        experiment.force_finish(0)
        token, _ = client.create_token("reader")
        client.revoke_token(token.id)
        client.delete_experiment("e")
    acts = [line for line in guarded.log.splitlines() if " audit " in line]
    expected = ["create token", "set groups", "import scores", "end epoch", "create token", "revoke token"]
    expected.append("delete experiment")
    assert [line.partition("act='")[2].partition("'")[0] for line in acts] == expected
    by = ["root", *6 * [administrator.split("_")[1]]]
    assert all(f" by={name} " in line and " project=mine" in line for line, name in zip(acts, by, strict=True))
    assert all("peer=ipv4:127.0.0.1" in line for line in acts)


def test_a_server_tells_how_it_is_and_what_the_caller_may_do(guarded: Guarded, client: evosample.Client) -> None:
    with guarded.connect(guarded.new_token("reader")) as reader:
        status = reader.server_status()
    assert (status.version, status.needs_tokens) == (evosample.__version__, True)
    assert (status.project, status.role, status.store_error) == ("mine", "reader", "")
    assert status.store_used_memory_bytes > 0
    assert status.store_latency_s > 0
    open_status = client.server_status()
    assert (open_status.needs_tokens, open_status.project, open_status.role) == (False, None, "administrator")


def test_a_project_takes_so_many_samples_and_streams(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-project-samples", "250", "--max-project-streams", "1")
    with evosample.connect(server.address) as client:
        client.create_experiment("a", **SETTINGS)
        client.create_experiment("b", **SETTINGS)
        with pytest.raises(evosample.ResourceExhaustedError, match=r"200 samples, of 250 .*--max-project-samples"):
            client.create_experiment("c", **SETTINGS)
        assert client.create_experiment("a", **SETTINGS).name == "a", "what is there stays"
        client.create_experiment("c", **SETTINGS, project="other")
        client.delete_experiment("b")
        client.create_experiment("c", **SETTINGS)

        def stream(project: str) -> Any:
            ref = client.get_experiment("c", project=project).ref
            join = pb.JoinRunRequest(ref=ref, run_id="run", world_size=1)
            joined = pb.JoinRunResponse.FromString(call(channel, named("JoinRun"), join, None)[2])
            member = pb.Member(ref=ref, generation=joined.generation, claim=joined.claim)
            return channel.unary_stream(
                "/evosample.v1.SelectionService/StreamEpoch",
                pb.StreamEpochRequest.SerializeToString,
                pb.StreamEpochResponse.FromString,
            )(pb.StreamEpochRequest(member=member, epoch=1), timeout=20)

        with grpc.insecure_channel(server.address) as channel:
            waiting = stream("default")
            assert next(waiting).HasField("wait")
            with pytest.raises(grpc.RpcError, match=r"1 streams of project 'default'.*--max-project-streams"):
                next(stream("default"))
            other = stream("other")
            assert next(other).HasField("wait")
            waiting.cancel()
            other.cancel()


@pytest.mark.parametrize("content", ["short", 40 * " x"], ids=["short", "several"])
def test_a_root_token_that_is_too_easy_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "root").write_text(content)
    command = [
        sys.executable,
        "-m",
        "evosample_server",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        str(tmp_path / "data"),
    ]
    command += ["--tokens", "--root-token-file", str(tmp_path / "root")]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "expected one token of at least 32 ASCII characters" in refused.stderr
