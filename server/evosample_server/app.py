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
from redis.exceptions import RedisError

from evosample.errors import UnavailableError
from evosample.v1 import selection_pb2, selection_pb2_grpc
from evosample_server.connection import connect_store, without_password
from evosample_server.decoding import DecodingInterceptor
from evosample_server.embedded import EmbeddedStore
from evosample_server.experiments import Experiments, Limits
from evosample_server.planner import Planner
from evosample_server.service import SelectionService
from evosample_server.settings import Settings
from evosample_server.store import Store

_log = structlog.get_logger()

_SERVICE = selection_pb2.DESCRIPTOR.services_by_name["SelectionService"].full_name
_GRACE_S = 5.0
_PROBE_INTERVAL_S = 1.0
_PROBE_TIMEOUT_S = 3.0
_SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake
    # clients may ping while they wait, so that either side soon sees that the other is gone
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # what newer gRPC goes by; a minute if not set
    ("grpc.max_connection_idle_ms", 600_000),  # clients connect again by themselves
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
    store = Store(connect_store(redis_url), retain_epochs=settings.retain_epochs, cache_bytes=settings.cache_bytes)
    try:
        await store.check()
    except RedisError as error:
        raise UnavailableError(f"can't use Redis at {without_password(redis_url)}: {error}") from error
    server = grpc.aio.server(
        interceptors=[DecodingInterceptor()],
        # More than is taken: what is over the limit is then told by us, with what to do.
        options=[*_SERVER_OPTIONS, ("grpc.max_receive_message_length", 4 * settings.max_message_bytes)],
    )
    address = _bind(server, settings.listen)
    async with asyncio.TaskGroup() as tasks:
        if settings.parent_pid is not None:  # watched by pid: a parent-death signal would fire when its thread ends
            tasks.create_task(_stop_when(lambda: os.getppid() != settings.parent_pid, stopping))
        planner = Planner(store, tasks)
        limits = Limits(
            settings.max_samples, settings.max_experiments, settings.max_streams, settings.max_message_bytes
        )
        experiments = Experiments(store, planner, limits)
        selection_pb2_grpc.add_SelectionServiceServicer_to_server(SelectionService(experiments, stopping), server)
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        reflection.enable_server_reflection(
            [_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
        )
        if not settings.listen.startswith(("unix:", "127.", "localhost:", "[::1]:")):
            _log.warning("others can reach this server, and nothing asks who they are: keep it on a trusted network")
        await server.start()
        await _set_health(health, is_serving=True)
        background: list[asyncio.Task[None]] = [
            tasks.create_task(planner.listen()),
            tasks.create_task(_follow_store(store, health)),
        ]
        if embedded is not None:
            background.append(tasks.create_task(_keep_running(embedded, stopping)))
        print(f"listening on {address}", flush=True)  # noqa: T201  # whoever started the server reads it
        await stopping.wait()
        _log.info("stopping")
        pending = set(background)
        while pending:  # redis-py may swallow a cancellation while it connects
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.2)
        await health.enter_graceful_shutdown()
        await server.stop(_GRACE_S)
    await store.close()
    if embedded is not None and not embedded.is_running:
        raise UnavailableError(
            f"the embedded store ends as soon as it has started: see {embedded.log_path} for what it lacks"
        )


def _bind(server: grpc.aio.Server, listen: str) -> str:
    """Bind, and return the address with the port that it got."""
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise UnavailableError(
            f"can't listen on {listen}: is the address right (HOST:PORT or unix:/PATH), and free?"
        ) from error
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


async def _set_health(health: HealthServicer, *, is_serving: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for service in ("", _SERVICE):
        await health.set(service, status)


async def _follow_store(store: Store, health: HealthServicer) -> None:
    """The server is healthy while its store takes writes."""
    is_serving = True
    while True:
        await asyncio.sleep(_PROBE_INTERVAL_S)
        cause = ""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await store.probe()
        except (RedisError, OSError, TimeoutError) as error:
            cause = str(error) or "no answer"
        if bool(cause) == is_serving:
            is_serving = not cause
            _log.warning("the store takes writes again" if is_serving else "the store takes no writes", cause=cause)
            await _set_health(health, is_serving=is_serving)


async def _keep_running(embedded: EmbeddedStore, stopping: asyncio.Event) -> None:
    """Start the embedded store again when it has ended; stop the server if that does not help."""
    while not stopping.is_set():
        if not embedded.keep_running():
            stopping.set()
        await asyncio.sleep(0.1)


async def _stop_when(has_ended: Callable[[], bool], stopping: asyncio.Event) -> None:
    """Stop once something that the server can't be without has ended, however it did."""
    while not stopping.is_set():
        if has_ended():
            stopping.set()
        await asyncio.sleep(0.2)
