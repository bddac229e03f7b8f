"""The kinds of stores that --redis-url may name, what they may do to a server, and how it puts up with that."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

import evosample
from evosample.errors import EvosampleError, InternalError, InvalidArgumentError, UnavailableError
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import ExperimentName
from evosample_server import keys
from evosample_server.connection import connect_store, with_password, without_password
from evosample_server.status import to_domain
from stores import ClusterStore, SentinelStore, StandaloneStore, StoreProcess, TlsFront, wait_until
from support import ServerProcess, fixed_losses, train

StartServer = Callable[..., ServerProcess]

SETTINGS: dict[str, Any] = {
    "num_samples": 200,
    "num_epochs": 4,
    "meta_batch_size": 20,
    "mini_batch_size": 5,
    "policy": evosample.EvolvedSampling(prune_ratio=0.2),
    "seed": 3,
}
# The rights that a server needs. In a cluster also +cluster|slots; without +config|get it can't see whether the store
# throws data away when its memory is full.
RIGHTS = (
    "~evosample:* &evosample:* +@read +@write +@pubsub +@scripting +@connection +time -@dangerous +info +config|get"
)


def outcome(
    client: evosample.Client, name: str, before_step: Callable[[evosample.Batch], None] = lambda _: None
) -> tuple[Any, ...]:
    """All that comes of training an experiment, for comparing bit by bit."""
    experiment = client.create_experiment(name, **SETTINGS)
    visits = train(experiment, fixed_losses(200, 4), before_step=before_step)
    exported = experiment.export_scores()
    return [visit.key() for visit in visits], exported.scores.tobytes(), exported.sampling_weights.tobytes()


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess) -> tuple[Any, ...]:
    """What comes of it on a plain store that nothing happens to."""
    with evosample.connect(server.address) as client:
        return outcome(client, "stores-undisturbed")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandaloneStore]:
    store = StandaloneStore(tmp_path_factory.mktemp("plain") / "store")
    yield store
    store.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterStore]:
    """A cluster that tests leave as they found it."""
    store = ClusterStore(tmp_path_factory.mktemp("cluster"))
    yield store
    store.close()


def head_of(name: str) -> str:
    return keys.head(ExperimentName("default", name))


def assert_empty(*processes: StoreProcess) -> None:
    """Nothing is left but keys that expire by themselves."""
    for process in processes:
        keyspace = process.call("INFO", "keyspace").get("db0", {"keys": 0, "expires": 0})
        assert keyspace["keys"] == keyspace["expires"], process.call("KEYS", "*")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Redis | RedisCluster]:
    store = connect_store(url)
    try:
        yield store
    finally:
        await store.aclose()


def refusal(url: str) -> str:
    """What a server says that can't start on a store."""
    command = [sys.executable, "-m", "evosample_server", "--listen", "127.0.0.1:0", "--redis-url", url]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    return refused.stderr


def once(when: tuple[int, int], action: Callable[[], None]) -> Callable[[evosample.Batch], None]:
    """A `before_step` that acts before one step."""

    def before_step(batch: evosample.Batch) -> None:
        if (batch.epoch, batch.step) == when:
            action()

    return before_step


# URLs


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "no URL of a store"),
        ("http://host", "http:// is none of the schemes"),
        ("redis+proxy://host", r"redis\+proxy:// is none of the schemes"),
        ("redis://host:port", "a port from 1 to 65535"),
        ("redis://host:65536", "a port from 1 to 65535"),
        ("redis://host/name", "a database is a number"),
        ("redis://one,two", r"several hosts need redis\+cluster:// or redis\+sentinel://"),
        ("redis://host?frobnicate=1", "there is no option 'frobnicate'"),
        ("redis://host?db=one", "Invalid value for 'db'"),
        ("redis://host?ssl_ca_certs=/ca.pem", "need a URL that begins with rediss"),
        ("rediss://host?ssl_ca_certs=/no/ca.pem", "ssl_ca_certs: there is no file /no/ca.pem"),
        ("unix://relative/path", "the absolute path of a socket"),
        ("redis+cluster://", "a host is a name or an address"),
        ("redis+cluster://host/1", "a cluster has no databases but 0"),
        ("rediss+cluster://host?ssl_cert_reqs=perhaps", "perhaps"),
        ("redis+cluster://host?frobnicate=1", "there is no option 'frobnicate'"),
        ("redis+sentinel://host", "the name of the service that the sentinels watch is missing"),
        ("redis+sentinel://host/service?frobnicate=1", "there is no option 'frobnicate'"),
    ],
)
def test_a_bad_url_is_refused_with_what_was_expected(url: str, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        connect_store(url)
    assert caught.value.field == "redis_url"
    for form in ("redis://", "rediss://", "unix:///", "redis+cluster://", "redis+sentinel://"):
        assert form in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:se/cret@host:6379/0", "redis://host:6379/0"),
        ("redis://me:se?cret@host:6379/0", "redis://..."),
        ("redis://me:se#cret@host:6379/0", "redis://host:6379/0"),
        ("redis://me:se@cret@host:port/0", "redis://host:port/0"),
        ("redis+cluster://me:se:cret@one:1,two:x", "redis+cluster://one:1,two:x"),
        ("redis+sentinel://me:secret@one,two/service/x?sentinel_password=se", "redis+sentinel://one,two/service/x"),
        ("unix://:secret@/path/redis.sock?frobnicate=secret", "unix:///path/redis.sock"),
    ],
)
def test_passwords_never_show(url: str, shown: str) -> None:
    assert without_password(url) == shown
    with pytest.raises(InvalidArgumentError) as caught:
        connect_store(url)
    assert "cret" not in str(caught.value)


def test_sentinels_have_credentials_of_their_own() -> None:
    async def find() -> tuple[Any, Any]:
        async with connected("redis+sentinel://me:a%2Fb@one,[::1]:7/service/4?sentinel_password=c") as store:
            pool: Any = store.connection_pool  # type: ignore[union-attr]
            return pool, [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]

    pool, sentinels = asyncio.run(find())
    options = pool.connection_kwargs
    assert (pool.service_name, options["username"], options["password"], options["db"]) == ("service", "me", "a/b", 4)
    assert [(sentinel["host"], sentinel["port"]) for sentinel in sentinels] == [("one", 26379), ("::1", 7)]
    assert {(sentinel["username"], sentinel["password"]) for sentinel in sentinels} == {(None, "c")}


# What a store answers when it can't serve

WRITE = "redis.call('HSET', KEYS[1], 'field', ARGV[1]) return 1"
MEMORY = "the store is out of memory: give Redis more"
AWAY = "the server can't use its store: "


@pytest.mark.parametrize(
    ("spoil", "mend", "said"),
    [
        (["CONFIG SET maxmemory 1"], ["CONFIG SET maxmemory 0"], MEMORY),
        (["CONFIG SET min-replicas-to-write 1"], ["CONFIG SET min-replicas-to-write 0"], AWAY + "NOREPLICAS"),
        (["REPLICAOF 127.0.0.1 1"], ["REPLICAOF NO ONE"], AWAY + "You can't write against a read only replica"),
        (
            ["REPLICAOF 127.0.0.1 1", "CONFIG SET replica-serve-stale-data no"],
            ["REPLICAOF NO ONE", "CONFIG SET replica-serve-stale-data yes"],
            AWAY + "Link with MASTER is down",
        ),
        (["ACL SETUSER default -evalsha"], ["ACL SETUSER default +@all"], AWAY + "User default has no permissions"),
        (["ACL SETUSER default -hset"], ["ACL SETUSER default +@all"], AWAY + "ACL failure in script"),
        (["CONFIG SET requirepass secret"], None, AWAY),
    ],
)
def test_a_script_that_the_store_refuses_for_now_is_unavailable(
    plain: StandaloneStore, spoil: list[str], mend: list[str] | None, said: str
) -> None:
    async def refused() -> Exception:
        async with connected(plain.url) as store:
            with pytest.raises(redis_errors.RedisError) as caught:
                await store.evalsha(hashlib.sha1(WRITE.encode()).hexdigest(), 1, "key", 1)
        return caught.value

    plain.call("SCRIPT", "LOAD", WRITE)
    with plain.client() as admin:
        admin.ping()
        for command in spoil:
            admin.execute_command(*command.split())
        try:
            error = to_domain(asyncio.run(refused()))
        finally:
            for command in mend or ["CONFIG SET requirepass "]:
                admin.execute_command(*command.split(" "))
    assert type(error) is UnavailableError
    assert str(error).startswith(said)


IN_REDIS_6 = "Error running script (call to f_0123): @user_script:7: @user_script: 7: "


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (redis_errors.ConnectionError("gone"), AWAY + "gone"),
        (redis_errors.MaxConnectionsError("gone"), AWAY + "gone"),
        (redis_errors.TimeoutError("gone"), AWAY + "gone"),
        (redis_errors.BusyLoadingError("gone"), AWAY + "gone"),
        (redis_errors.AuthenticationError("no"), AWAY + "no"),
        (redis_errors.ClusterDownError("down"), AWAY + "down"),
        (redis_errors.ClusterError("TTL exhausted."), AWAY + "TTL exhausted."),
        (redis_errors.TryAgainError("again"), AWAY + "again"),
        (redis_errors.MovedError("7 host:1"), AWAY + "7 host:1"),
        (redis_errors.AskError("7 host:1"), AWAY + "7 host:1"),
        (redis_errors.SlotNotCoveredError("7"), AWAY + "7"),
        (redis_errors.RedisClusterException("7"), AWAY + "7"),
        (redis_errors.ResponseError("MISCONF Errors writing to the AOF file"), AWAY + "MISCONF"),
        (redis_errors.ResponseError("BUSY Redis is busy running a script."), AWAY + "BUSY"),
        (redis_errors.ResponseError(IN_REDIS_6 + "-READONLY You can't write"), AWAY + IN_REDIS_6 + "-READONLY"),
        (redis_errors.ResponseError(IN_REDIS_6 + "The user executing the script can't run this command"), AWAY),
        (redis_errors.ResponseError(IN_REDIS_6 + "-OOM command not allowed"), MEMORY),
    ],
)
def test_a_store_that_is_away_is_unavailable(error: Exception, said: str) -> None:
    found = to_domain(error)
    assert type(found) is UnavailableError
    assert str(found).startswith(said)


@pytest.mark.parametrize(
    "error",
    [
        redis_errors.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
        redis_errors.ResponseError("unknown command 'BUSYNESS'"),
        redis_errors.ClusterCrossSlotError("Keys in request don't hash to the same slot"),
        redis_errors.DataError("Invalid input of type: 'dict'"),
    ],
)
def test_a_mistake_of_the_server_is_not_taken_for_a_store_that_is_away(error: Exception) -> None:
    assert type(to_domain(error)) is InternalError


# One store of its own kind


def test_a_store_behind_tls_needs_few_rights(
    start_server: StartServer, tmp_path: Path, undisturbed: tuple[Any, ...]
) -> None:
    users = [f"evosample on >pass/word {RIGHTS}", f"reader on >pass/word {RIGHTS} -@write"]
    store = StandaloneStore(tmp_path / "store", users=users)
    front = TlsFront(store.port, tmp_path)
    try:
        url = f"rediss://evosample:pass%2Fword@localhost:{front.port}/0?ssl_ca_certs={front.ca_path}"
        server = start_server("--redis-url", url)
        with evosample.connect(server.address) as client:
            assert outcome(client, "e") == undisturbed
            client.delete_experiment("e")
            client.revoke_token(client.create_token("reader")[0].id)
            assert not client.server_status().store_error
        assert_empty(store)
        reader = start_server("--redis-url", url.replace("evosample", "reader"))
        with (
            evosample.connect(reader.address, outage_timeout_s=1) as client,
            pytest.raises(UnavailableError, match="has no permissions"),
        ):
            client.create_experiment("e", **SETTINGS)
        with evosample.connect(reader.address) as client:
            error = client.server_status().store_error
            assert "has no permissions" in error
            assert "word" not in error
        assert "certificate verify failed" in refusal(url.partition("?")[0])
    finally:
        front.close()
        store.close()


def test_a_primary_that_sentinels_replace_costs_nothing(
    start_server: StartServer, tmp_path: Path, undisturbed: tuple[Any, ...]
) -> None:
    store = SentinelStore(tmp_path / "sentinel")
    try:
        first = store.primary()

        def kill() -> None:
            store.replicate()
            first.kill()

        with evosample.connect(start_server("--redis-url", store.url).address) as client:
            assert outcome(client, "e", once((1, 3), kill)) == undisturbed
            # which the sentinel that is asked may learn of later than the server
            wait_until(lambda: store.primary() is not first, "the replica to be promoted")
            client.delete_experiment("e")
        assert_empty(store.primary())
    finally:
        store.close()


def test_a_service_that_the_sentinels_do_not_know_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "conf").touch()
    store = StoreProcess(tmp_path, "conf", "--sentinel", "--port", "{port}")
    try:
        said = refusal(f"redis+sentinel://127.0.0.1:{store.port}/nobody")
        assert "no sentinel that answers knows a running primary of 'nobody'" in said
    finally:
        store.close()


# A cluster


def test_experiments_are_spread_over_a_cluster_and_deleted_without_a_trace(
    start_server: StartServer, cluster: ClusterStore, undisturbed: tuple[Any, ...]
) -> None:
    names = [f"spread-{number}" for number in range(6)]
    assert len({cluster.node_of(head_of(name)).port for name in names}) == 3
    with evosample.connect(start_server("--redis-url", cluster.url).address) as client:
        for name in names:
            assert outcome(client, name) == undisturbed
        assert sorted(status.name for status in client.list_experiments()) == names
        for name in names:
            client.delete_experiment(name)
    assert_empty(*cluster.processes)


def test_servers_of_a_cluster_know_the_same_tokens(
    start_server: StartServer, cluster: ClusterStore, tmp_path: Path
) -> None:
    (tmp_path / "root").write_text(40 * "x")
    options = ["--redis-url", cluster.url, "--tokens", "--root-token-file", str(tmp_path / "root")]
    here, there = start_server(*options).address, start_server(*options).address
    with evosample.connect(here, token=40 * "x") as root:
        token, bearer_token = root.create_token("reader")
        with evosample.connect(there, token=bearer_token) as reader:
            assert reader.server_status().store_used_memory_bytes > 0
            root.revoke_token(token.id)
            time.sleep(1.1)  # for so long a server believes what it has looked up
            with pytest.raises(evosample.UnauthenticatedError, match="it was revoked"):
                reader.server_status()
    assert_empty(*cluster.processes)


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_cluster_that_replaces_a_primary_costs_nothing(
    start_server: StartServer, cluster: ClusterStore, undisturbed: tuple[Any, ...], how: str
) -> None:
    name = f"replaced-by-{how}"
    primary = cluster.node_of(head_of(name))

    def hurt() -> None:
        cluster.replicate(head_of(name))
        getattr(primary, how)()

    with evosample.connect(start_server("--redis-url", cluster.url).address) as client:
        assert outcome(client, name, once((1, 3), hurt)) == undisturbed
        assert cluster.node_of(head_of(name)) is not primary
        getattr(primary, "resume" if how == "pause" else "restart")()
        cluster.wait_until_ok()
        client.delete_experiment(name)
    assert_empty(*cluster.processes)


def test_a_cluster_fails_soon_and_in_ways_that_clients_retry(cluster: ClusterStore) -> None:
    names = [head_of(f"e{number}") for number in range(8)]
    assert len({cluster.node_of(name).port for name in names}) == 3
    primary = cluster.node_of(names[0])

    async def use() -> tuple[list[tuple[float, float, EvosampleError | None]], float]:
        attempts: list[tuple[float, float, EvosampleError | None]] = []
        is_over = asyncio.Event()

        async def work(store: Redis | RedisCluster, name: str) -> None:
            while not is_over.is_set():
                began_s = time.monotonic()
                failure = None
                try:
                    await store.set(name, b"value")
                    await store.get(name)
                    await store.eval(WRITE, 1, f"{name}:hash", 1)
                    await store.unlink(name, f"{name}:hash")
                except redis_errors.RedisError as error:
                    failure = to_domain(error)
                attempts.append((began_s, time.monotonic(), failure))
                await asyncio.sleep(0.02)

        async with connected(cluster.url) as store, asyncio.TaskGroup() as tasks:
            for name in 2 * names:
                tasks.create_task(work(store, name))
            for disturb in (primary.pause, primary.kill, primary.start, cluster.kill, cluster.start):
                await asyncio.to_thread(disturb)
                await asyncio.sleep(1)
            await asyncio.to_thread(cluster.wait_until_ok)
            await asyncio.sleep(1)
            undisturbed_s = time.monotonic()
            await asyncio.sleep(0.5)
            is_over.set()
        return attempts, undisturbed_s

    attempts, undisturbed_s = asyncio.run(use())
    failures = [failure for _, _, failure in attempts if failure is not None]
    assert failures
    assert {type(failure) for failure in failures} == {UnavailableError}, failures
    assert max(ended_s - began_s for began_s, ended_s, failure in attempts if failure) < 8
    afterwards = [failure for began_s, _, failure in attempts if began_s > undisturbed_s]
    assert afterwards
    assert not any(afterwards), "the client finds all nodes again by itself"


def test_a_store_that_is_no_cluster_is_told_of(plain: StandaloneStore) -> None:
    assert "Cluster mode is not enabled" in refusal(plain.url.replace("redis:", "redis+cluster:"))


def test_the_password_of_a_store_may_stand_in_a_file(tmp_path: Path, start_server: StartServer) -> None:
    password = "a/b@c:d?e#f%"
    store = StandaloneStore(tmp_path / "store", users=[f"me on >{password} ~* &* +@all"])
    password_file = tmp_path / "password"
    password_file.write_text(f"{password}\n")
    url = f"redis://me@127.0.0.1:{store.port}/0"
    server = start_server("--redis-url", url, "--redis-password-file", str(password_file))
    with evosample.connect(server.address) as client:
        assert outcome(client, "e")
    store.close()
    with pytest.raises(InvalidArgumentError, match="has a password of its own"):
        with_password("redis://me:secret@host", "other")
    assert with_password("redis://host:6379/0", "a@b") == "redis://:a%40b@host:6379/0"


def test_probes_hear_how_the_server_is(tmp_path: Path, start_server: StartServer) -> None:
    store = StandaloneStore(tmp_path / "store")
    socket = tmp_path / "health.sock"
    server = start_server("--redis-url", f"redis://127.0.0.1:{store.port}/0", "--health-socket", str(socket))

    def probe(*options: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "evosample_server.probe", *options]
        environment = os.environ | {"EVOSAMPLE_HEALTH_SOCKET": str(socket)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert probe() == (0, "")
    with grpc.insecure_channel(f"unix:{socket}") as channel, pytest.raises(grpc.RpcError) as refused:
        pb_grpc.SelectionServiceStub(channel).ListExperiments(pb.ListExperimentsRequest())
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    store.close()
    wait_until(lambda: probe()[0] == 1, "the server to notice that its store is gone")
    assert "takes no writes" in probe()[1]
    assert probe("--alive") == (0, "")
    server.process.send_signal(signal.SIGSTOP)
    try:
        assert probe("--alive")[0] == 1, "it answers no more, although its socket is open"
    finally:
        server.process.send_signal(signal.SIGCONT)
