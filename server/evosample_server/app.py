"""Puts a server together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from evosample.errors import InvalidArgumentError, UnavailableError
from evosample.v1 import selection_pb2, selection_pb2_grpc
from evosample_server.embedded import EmbeddedStore
from evosample_server.experiments import Experiments
from evosample_server.planner import Planner
from evosample_server.service import SelectionService
from evosample_server.settings import Settings
from evosample_server.store import Store

_log = structlog.get_logger()

_SERVICE = selection_pb2.DESCRIPTOR.services_by_name["SelectionService"].full_name
_GRACE_S = 5.0
_STORE_TIMEOUT_S = 10.0
_SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake
    # clients may ping while they wait, so that either side soon sees that the other is gone
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
]


def run(settings: Settings) -> None:
    """Run a server until SIGTERM or SIGINT; raises EvosampleError if it can't start."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            # Plain: tracebacks with the frames' variables would show passwords.
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    embedded = None if settings.redis_url else EmbeddedStore(settings.data_dir)
    try:
        asyncio.run(_serve(settings, embedded.url if embedded else str(settings.redis_url), embedded))
    finally:
        if embedded is not None:
            embedded.close()
        if settings.parent_pid is not None and os.getppid() != settings.parent_pid:  # nobody else is left to do it
            shutil.rmtree(Path(settings.listen.removeprefix("unix:")).parent, ignore_errors=True)


async def _serve(settings: Settings, redis_url: str, embedded: EmbeddedStore | None) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    store = Store(_redis(redis_url), retain_epochs=settings.retain_epochs, cache_bytes=settings.cache_bytes)
    try:
        await store.check()
    except RedisError as error:
        raise UnavailableError(f"can't use Redis at {_without_password(redis_url)}: {error}") from error
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    address = _bind(server, settings.listen)
    async with asyncio.TaskGroup() as tasks:
        if settings.parent_pid is not None:  # watched by pid: a parent-death signal would fire when its thread ends
            tasks.create_task(_stop_when(lambda: os.getppid() != settings.parent_pid, stopping))
        experiments = Experiments(store, Planner(store, tasks), max_samples=settings.max_samples)
        if embedded is not None:  # whoever supervises the server starts both anew
            tasks.create_task(_stop_when(lambda: not embedded.is_running, stopping))
        selection_pb2_grpc.add_SelectionServiceServicer_to_server(SelectionService(experiments, stopping), server)
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        reflection.enable_server_reflection(
            [_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
        )
        if not settings.listen.startswith(("unix:", "127.", "localhost:", "[::1]:")):
            _log.warning("others can reach this server, and nothing asks who they are: keep it on a trusted network")
        await server.start()
        for service in ("", _SERVICE):
            await health.set(service, health_pb2.HealthCheckResponse.SERVING)
        print(f"listening on {address}", flush=True)  # noqa: T201  # whoever started the server reads it
        await stopping.wait()
        _log.info("stopping")
        await health.enter_graceful_shutdown()
        await server.stop(_GRACE_S)
    await store.close()
    if embedded is not None and not embedded.is_running:
        raise UnavailableError(
            f"the embedded store ended by itself: see {embedded.log_path}, and start the server again"
        )


def _redis(url: str) -> Redis:
    try:
        # Bounds for everything: a store that is frozen is as good as one that is away.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=100,
            timeout=_STORE_TIMEOUT_S,
            socket_timeout=_STORE_TIMEOUT_S,
            socket_connect_timeout=5,
        )
        return Redis.from_pool(pool)
    except ValueError as error:
        raise InvalidArgumentError(
            f"--redis-url: {error}. Expected redis://[user:password@]host:port/db, rediss://... or unix:///path",
            field="redis_url",
        ) from error


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _bind(server: grpc.aio.Server, listen: str) -> str:
    """Bind, and return the address with the port that it got."""
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise UnavailableError(
            f"can't listen on {listen}: is the address right (HOST:PORT or unix:/PATH), and free?"
        ) from error
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


async def _stop_when(has_ended: Callable[[], bool], stopping: asyncio.Event) -> None:
    """Stop once something that the server can't be without has ended, however it did."""
    while not stopping.is_set():
        if has_ended():
            stopping.set()
        await asyncio.sleep(0.2)
