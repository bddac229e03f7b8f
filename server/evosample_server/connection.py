"""What --redis-url names: one Redis or Valkey, a cluster, or whichever server Sentinel calls the primary.

Everything is bounded, for a store that is frozen is as good as one that is away.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from evosample.errors import InvalidArgumentError

_MAX_CONNECTIONS = 100
_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 5.0
# Where another node may take over, one that is silent is given up sooner.
_NODE_TIMEOUT_S = 4.0
_NODE_CONNECT_TIMEOUT_S = 2.0
_CLUSTER_TIMEOUT_S = 5.0

_FORMS = (
    "redis://[user:password@]host:6379/0, "
    "rediss://[user:password@]host:6379/0?ssl_ca_certs=/path/ca.pem (TLS), "
    "unix:///path/redis.sock?db=0, "
    "redis+cluster://[user:password@]host:6379,host:6379 (or rediss+cluster), or "
    "redis+sentinel://[user:password@]host:26379,host:26379/SERVICE/0?sentinel_password=... (or rediss+sentinel); "
    "in user and password, characters such as / @ ? # are percent-encoded"
)
_URL = re.compile(
    r"(?P<scheme>[a-z+]+)://(?:(?P<user>[^/?#@]*)@)?(?P<hosts>[^/?#@]*)(?P<path>/[^?#]*)?(?:\?(?P<options>[^#]*))?"
)
_HOST = re.compile(r"(?P<name>[^:\[\]]+|\[[0-9a-fA-F:.]+\])(?::(?P<port>\d+))?")
_FILE_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


def connect_store(url: str) -> Redis | RedisCluster:
    """A client of the store that a URL names, which connects when it is first used and does not decode responses.

    What keeps it from being used is raised by its commands, as RedisError. A fail-over needs no new client: commands
    fail while it lasts, within some seconds, and then find the new primary.

    Raises:
        InvalidArgumentError: the URL names no store in any of the forms.
    """
    try:
        parsed = _parse(url)
        match parsed.kind:
            case "cluster":
                return _cluster(parsed)
            case "sentinel":
                return _sentinel(parsed)
            case _:
                return _single(parsed)
    # redis-py's errors for options that it does not know, or that don't go together
    except (ValueError, TypeError, redis_errors.RedisError, redis_errors.RedisClusterException) as error:
        reason = re.sub(".*unexpected keyword argument", "there is no option", str(error))
        raise InvalidArgumentError(f"--redis-url: {reason}. Expected {_FORMS}", field="redis_url") from error


def with_password(url: str, password: str) -> str:
    """A URL with a password put in; raises InvalidArgumentError if it has one."""
    scheme, separator, rest = url.partition("://")
    user, at, address = rest.rpartition("@")
    if ":" in user:
        raise InvalidArgumentError(
            "--redis-password-file: --redis-url has a password of its own; leave one of them out", field="redis_url"
        )
    return f"{scheme}{separator}{user}:{quote(password, safe='')}@{address if at else rest}"


def without_password(url: str) -> str:
    """A URL as it may be shown: without user, password and options, which may hold passwords too."""
    scheme, _, rest = url.partition("://")
    address, _, options = rest.partition("?")
    # A "?" in a password that is not percent-encoded: where the password ends can't be told.
    return f"{scheme}://{'...' if '@' in options else address.rpartition('@')[2]}"


class _StoreUrl(NamedTuple):
    kind: str
    """single, cluster or sentinel."""
    url: str
    """For redis-py: with the first of several hosts."""
    hosts: list[tuple[str, int]]
    service: str


def _parse(url: str) -> _StoreUrl:
    """Take a URL apart. Its errors say nothing of the URL but its scheme: any piece may belong to a password."""
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError("this is no URL of a store")
    scheme, plus, kind = found["scheme"].partition("+")
    if scheme not in ("redis", "rediss", "unix") or kind not in (("cluster", "sentinel") if plus else ("",)):
        raise ValueError(f"{found['scheme']}:// is none of the schemes")
    path = (found["path"] or "").removesuffix("/")
    if scheme == "unix":
        if plus or found["hosts"] or not path:
            raise ValueError("unix:// is followed by the absolute path of a socket")
        return _StoreUrl("single", url, [], "")
    hosts = [_host(host, 26379 if kind == "sentinel" else 6379) for host in found["hosts"].split(",")]
    if not plus and len(hosts) > 1:
        raise ValueError(f"several hosts need {scheme}+cluster:// or {scheme}+sentinel://")
    service = ""
    if kind == "sentinel":
        service, _, path = path.removeprefix("/").partition("/")
        if not service:
            raise ValueError("the name of the service that the sentinels watch is missing")
    if not re.fullmatch(r"/?0?" if kind == "cluster" else r"/?\d*", path):
        raise ValueError("a cluster has no databases but 0" if kind == "cluster" else "a database is a number")
    user = f"{found['user']}@" if found["user"] is not None else ""
    name, port = hosts[0]
    options = f"?{found['options']}" if found["options"] else ""
    address = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    return _StoreUrl(kind or "single", f"{scheme}://{user}{address}/{path.removeprefix('/')}{options}", hosts, service)


def _host(text: str, default_port: int) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    if found is None or not 0 < int(found["port"] or default_port) < 65536:
        raise ValueError("a host is a name or an address, with a port from 1 to 65535")
    return found["name"].strip("[]"), int(found["port"] or default_port)


def _options(parsed: _StoreUrl, **bounds: Any) -> dict[str, Any]:
    """The bounds, and what the URL asks for: credentials, database, options."""
    options: dict[str, Any] = bounds | dict(parse_url(parsed.url))
    if not parsed.url.startswith("rediss:") and any(name.startswith("ssl_") for name in options):
        raise ValueError("options that begin with ssl_ need a URL that begins with rediss")
    for name in _FILE_OPTIONS:
        if name in options and not Path(options[name]).is_file():
            raise ValueError(f"{name}: there is no file {options[name]}")
    return options


def _single(parsed: _StoreUrl) -> Redis:
    options = _options(
        parsed,
        max_connections=_MAX_CONNECTIONS,
        timeout=_TIMEOUT_S,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
    )
    return _client(BlockingConnectionPool(**options))


def _cluster(parsed: _StoreUrl) -> RedisCluster:
    options = _options(parsed, socket_timeout=_NODE_TIMEOUT_S, socket_connect_timeout=_NODE_CONNECT_TIMEOUT_S)
    is_tls = options.pop("connection_class", None) is SSLConnection
    for name in ("host", "port"):
        options.pop(name)
    cluster = _Cluster(parsed.hosts, ssl=is_tls, **options)
    node = cluster.startup_nodes[0]
    node.release(node.acquire_connection())  # as in _client
    return cluster


def _sentinel(parsed: _StoreUrl) -> Redis:
    options = _options(
        parsed,
        max_connections=_MAX_CONNECTIONS,
        timeout=_TIMEOUT_S,
        socket_timeout=_NODE_TIMEOUT_S,
        socket_connect_timeout=_NODE_CONNECT_TIMEOUT_S,
    )
    is_tls = options.pop("connection_class", None) is SSLConnection
    for name in ("host", "port"):
        options.pop(name)
    of_sentinels: dict[str, Any] = {name: value for name, value in options.items() if name.startswith("ssl_")}
    for name in ("username", "password"):
        of_sentinels[name] = options.pop(f"sentinel_{name}", None)
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        parsed.hosts,
        sentinel_kwargs={
            **of_sentinels,
            "ssl": is_tls,
            "socket_timeout": _NODE_CONNECT_TIMEOUT_S,
            "socket_connect_timeout": _NODE_CONNECT_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
        },
    )
    return _client(_PrimaryPool(parsed.service, sentinel, ssl=is_tls, **options))  # type: ignore[no-untyped-call]


def _client(pool: Any) -> Redis:
    pool.make_connection()  # not yet connected; but it fails if there is an option that it does not know
    return Redis.from_pool(pool)


class _Cluster(RedisCluster):
    """Bounded like a blocking pool, with few retries, and raising RedisError alone."""

    def __init__(self, hosts: list[tuple[str, int]], **options: Any) -> None:
        self._free = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._num_running = 0
        # Beside commands there are subscriptions.
        options = {"max_connections": 2 * _MAX_CONNECTIONS, "retry": Retry(NoBackoff(), 1), **options}
        super().__init__(startup_nodes=[ClusterNode(*host) for host in hosts], **options)

    async def initialize(self, *args: Any, **options: Any) -> RedisCluster:
        try:
            return await super().initialize(*args, **options)
        except redis_errors.RedisClusterException as error:  # which is no RedisError
            # All nodes may have come back under other addresses: begin again with those that the URL names.
            self.nodes_manager.startup_nodes.update({node.name: node for node in self.startup_nodes})
            raise redis_errors.ConnectionError(str(error)) from error

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        self._num_running += 1
        try:
            async with asyncio.timeout(_CLUSTER_TIMEOUT_S), self._free:
                return await super().execute_command(*args, **options)
        except TimeoutError as error:
            raise redis_errors.TimeoutError("the cluster did not answer in time") from error
        except redis_errors.SlotNotCoveredError as error:
            raise redis_errors.ConnectionError(str(error)) from error
        except AttributeError as error:  # another command has failed, and closed the connection that this one was using
            raise redis_errors.ConnectionError(f"the connection was closed: {error}") from error
        finally:
            self._num_running -= 1

    async def aclose(self) -> None:
        if self._num_running:  # redis-py itself, to look at the cluster anew: what others use must stay open
            self._initialize = True
        else:
            self._initialize = False  # or nothing is closed after a failure
            await super().aclose()

    # redis-py splits these by slots, and goes around execute_command; our keys are always of one slot.

    async def delete(self, *names: Any) -> Any:
        return await self.execute_command("DEL", *names)

    async def unlink(self, *names: Any) -> Any:
        return await self.execute_command("UNLINK", *names)


class _PrimaryPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the primary that the sentinels name when they are made."""

    async def get_master_address(self) -> Any:
        try:
            return await super().get_master_address()  # type: ignore[no-untyped-call]
        except MasterNotFoundError:  # its text is about redis-py's objects
            raise redis_errors.ConnectionError(
                f"no sentinel that answers knows a running primary of {self.service_name!r}. Do they watch it under "
                "that name, and do they ask for sentinel_username and sentinel_password?"
            ) from None

    async def aclose(self) -> None:
        await super().aclose()
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()
