"""Puts a server together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from opentelemetry import trace
from redis.exceptions import RedisError

from evosample.errors import FailedPreconditionError, UnavailableError
from evosample.v1 import administration_pb2, administration_pb2_grpc, selection_pb2, selection_pb2_grpc
from evosample_server.access import Access
from evosample_server.administration import AdministrationService
from evosample_server.connection import connect_store, with_password, without_password
from evosample_server.embedded import EmbeddedStore
from evosample_server.experiments import Experiments, Limits
from evosample_server.interceptor import CallInterceptor
from evosample_server.logs import configure_logging
from evosample_server.metrics import Metrics
from evosample_server.observing import ObservingInterceptor
from evosample_server.planner import Planner
from evosample_server.service import SelectionService
from evosample_server.settings import Settings
from evosample_server.store import Store
from evosample_server.tasks import cancelled
from evosample_server.tls import server_context, server_credentials
from evosample_server.tokens import Tokens
from evosample_server.tracing import traced

if TYPE_CHECKING:
    from evosample_server.dashboard import Dashboard

_log = structlog.get_logger()

_SERVICES = [
    selection_pb2.DESCRIPTOR.services_by_name["SelectionService"].full_name,
    administration_pb2.DESCRIPTOR.services_by_name["AdministrationService"].full_name,
]
_GRACE_S = 5.0
_MIN_ROOT_TOKEN_CHARACTERS = 32
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
    ("grpc.max_connection_age_grace_ms", 3_600_000),  # for calls under way: ours end within a tenth of it
]


def run(settings: Settings) -> None:
    """Run a server until SIGTERM or SIGINT; raises EvosampleError if it can't start."""
    configure_logging(settings.log_level, settings.log_format)
    metrics = Metrics(
        max_experiments=settings.most_named_experiments,
        max_streams=settings.max_streams,
        max_project_streams=settings.most_project_streams,
    )
    embedded = None if settings.redis_url else EmbeddedStore(settings.data_dir)
    redis_url = embedded.url if embedded else _redis_url(settings)
    try:
        with _served(metrics, settings.metrics), traced(settings.otlp_endpoint) as tracer:
            asyncio.run(_serve(settings, redis_url, embedded, metrics, tracer))
    finally:
        if embedded is not None:
            embedded.close()
        if settings.parent_pid is not None and os.getppid() != settings.parent_pid:  # nobody else is left to do it
            shutil.rmtree(Path(settings.listen.removeprefix("unix:")).parent, ignore_errors=True)


@contextmanager
def _served(metrics: Metrics, address: str | None) -> Iterator[None]:
    if address is None:
        yield
        return
    with metrics.served(address) as bound:
        _log.info("metrics are served", address=bound)
        yield


async def _serve(
    settings: Settings, redis_url: str, embedded: EmbeddedStore | None, metrics: Metrics, tracer: trace.Tracer
) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    redis = connect_store(redis_url)
    store = Store(redis, retain_epochs=settings.retain_epochs, cache_bytes=settings.cache_bytes, metrics=metrics)
    tokens = Tokens(redis)
    access = Access(tokens, needs_tokens=settings.needs_tokens, root_token=_root_token(settings.root_token_file))
    try:
        await store.check()
    except RedisError as error:
        raise UnavailableError(f"can't use Redis at {without_password(redis_url)}: {error}") from error
    # All ranks may call at once: gRPC drops some of over 1,000 calls that have yet to be begun unless it is told. They
    # may share a connection: if some waited there for others' calls to end, these would wait for them, too.
    max_calls = max(settings.max_streams, 3_000)
    server = grpc.aio.server(
        interceptors=[ObservingInterceptor(metrics, tracer), CallInterceptor(access)],
        options=[
            *_SERVER_OPTIONS,
            ("grpc.max_connection_age_ms", 1_000 * settings.max_connection_age_s),
            # More than is taken: what is over the limit is then told by us, with what to do.
            ("grpc.max_receive_message_length", 4 * settings.max_message_bytes),
            ("grpc.max_concurrent_streams", max_calls),
            ("grpc.server.max_pending_requests", max_calls),
            ("grpc.server.max_pending_requests_hard_limit", max_calls),
        ],
    )
    address = _bind(server, settings)
    health = HealthServicer()
    probes = _probe_server(settings.health_socket, health)
    dashboard = None if settings.http is None else _dashboard(settings.http, settings, access)
    async with asyncio.TaskGroup() as tasks:
        if settings.parent_pid is not None:
            tasks.create_task(_stop_after(settings.parent_pid, stopping))
        planner = Planner(store, tasks, metrics=metrics, tracer=tracer)
        limits = Limits(
            max_samples=settings.max_samples,
            max_experiments=settings.max_experiments,
            max_project_samples=settings.max_project_samples,
            max_streams=settings.max_streams,
            max_project_streams=settings.most_project_streams,
            max_message_bytes=settings.max_message_bytes,
        )
        experiments = Experiments(store, planner, limits, metrics=metrics)
        selection = SelectionService(experiments)
        selection_pb2_grpc.add_SelectionServiceServicer_to_server(selection, server)
        administration = AdministrationService(tokens, access, store)
        administration_pb2_grpc.add_AdministrationServiceServicer_to_server(administration, server)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        reflection.enable_server_reflection(
            [*_SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
        )
        await server.start()
        await probes.start()
        await _set_health(health, is_serving=True)
        background: list[asyncio.Task[None]] = [
            tasks.create_task(planner.listen()),
            tasks.create_task(_follow_store(store, health, metrics)),
            tasks.create_task(access.count_refusals()),
        ]
        if embedded is not None:
            background.append(tasks.create_task(_keep_running(embedded, stopping)))
        print(f"listening on {address}", flush=True)  # noqa: T201  # whoever started the server reads it
        if dashboard is not None:
            tasks.create_task(dashboard.serve(experiments, stopping))
            print(f"dashboard on {dashboard.address}", flush=True)  # noqa: T201
        await stopping.wait()
        _log.info("stopping")
        await selection.end_streams()
        await cancelled(background)
        await health.enter_graceful_shutdown()
        await server.stop(_GRACE_S)
        await probes.stop(None)
    await store.close()
    if embedded is not None and not embedded.is_running:
        raise UnavailableError(
            f"the embedded store ends as soon as it has started: see {embedded.log_path} for what it lacks"
        )


def _redis_url(settings: Settings) -> str:
    url = str(settings.redis_url)
    if settings.redis_password_file is None:
        return url
    return with_password(url, _secret("--redis-password-file", settings.redis_password_file))


def _secret(option: str, file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError as error:
        raise FailedPreconditionError(f"can't read {option} {file}: {error.strerror}") from error


def _root_token(file: Path | None) -> str | None:
    if file is None:
        return None
    token = _secret("--root-token-file", file)
    if len(token) < _MIN_ROOT_TOKEN_CHARACTERS or not token.isascii() or " " in token or not token.isprintable():
        raise FailedPreconditionError(
            f"--root-token-file {file}: expected one token of at least {_MIN_ROOT_TOKEN_CHARACTERS} ASCII characters "
            "without spaces, such as `openssl rand -hex 32` makes"
        )
    return token


def _bind(server: grpc.aio.Server, settings: Settings) -> str:
    """Bind, and return the address with the port that it got."""
    listen = settings.listen
    try:
        if settings.tls_cert is not None and settings.tls_key is not None:
            credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
            port = server.add_secure_port(listen, credentials)
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise UnavailableError(
            f"can't listen on {listen}: is the address right (HOST:PORT or unix:/PATH), and free?"
        ) from error
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


def _probe_server(socket: Path | None, health: HealthServicer) -> grpc.aio.Server:
    """The health service alone, bound to a socket of its own if one is wanted."""
    server = grpc.aio.server()
    if socket is not None:
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        try:
            server.add_insecure_port(f"unix:{socket}")
        except RuntimeError as error:
            raise UnavailableError(f"can't listen on --health-socket {socket}: is its folder there?") from error
    return server


def _dashboard(address: str, settings: Settings, access: Access) -> Dashboard:
    try:
        from evosample_server.dashboard import Dashboard  # not everyone wants it, and it takes a second
    except ModuleNotFoundError as error:
        raise UnavailableError(f"--http needs {error.name}: pip install 'evosample[dashboard]'") from error
    cert, key = settings.tls_cert, settings.tls_key
    tls = None if cert is None or key is None else server_context(cert, key, settings.tls_client_ca)
    return Dashboard(address, sign_in=access.sign_in if settings.needs_tokens else None, tls=tls)


async def _set_health(health: HealthServicer, *, is_serving: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for service in ("", *_SERVICES):
        await health.set(service, status)


async def _follow_store(store: Store, health: HealthServicer, metrics: Metrics) -> None:
    """The server is healthy while its store takes writes."""
    is_serving = True
    metrics.store_up.set(is_serving)
    while True:
        await asyncio.sleep(_PROBE_INTERVAL_S)
        cause = ""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await store.probe()
        except (RedisError, OSError, TimeoutError) as error:
            cause = str(error) or "no answer"
        metrics.store_up.set(not cause)
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


async def _stop_after(parent_pid: int, stopping: asyncio.Event) -> None:
    """Stop once the parent has ended, however it did. (A parent-death signal would fire when its thread ends.)"""
    while not stopping.is_set():
        if os.getppid() != parent_pid:
            stopping.set()
        await asyncio.sleep(0.2)
