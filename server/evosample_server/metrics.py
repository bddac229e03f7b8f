"""What Prometheus may ask of a server: all its metrics, on a registry of their own."""

from __future__ import annotations

import importlib.metadata
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from evosample.errors import UnavailableError
from evosample.wire import ExperimentName

_log = structlog.get_logger()

TURN_PHASES = ("read", "fold", "plan", "write", "commit", "collect")
TURN_OUTCOMES = ("made", "overtaken", "failed", "interrupted")
FAULT_CODES = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
OTHER_METHOD = "other"

_MAX_CONNECTIONS = 20
_CONNECTED_S = 60.0
_FORGOTTEN_AFTER_S = 3600.0
_REPLACED_AFTER_S = 300.0
_STORE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_RPC_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TURN_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server. Nothing is counted by row, and labels have values from the program alone, but for
    names of experiments, which are bounded.

    Args:
        max_experiments: most experiments whose figures are told by name.
        max_streams: the bound that `evosample_streams` is compared with.
        max_project_streams: the bound that `evosample_project_streams` is compared with.
        now_s: the time in Unix seconds.
    """

    def __init__(
        self,
        *,
        max_experiments: int,
        max_streams: int,
        max_project_streams: int,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # series that nobody asks for
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        Info("evosample", "Version of the server", registry=registry).info(
            {"version": importlib.metadata.version("evosample")}
        )

        self.rpc_seconds = Histogram(
            "evosample_rpc_seconds",
            "Time from a call's arrival to its end; a stream of ids also waits for its epoch",
            ("method", "code"),
            buckets=_RPC_BUCKETS_S,
            registry=registry,
        )
        self.faults = Counter(
            "evosample_faults",
            "Calls that failed for a reason that lies with the server or its store",
            ("code",),
            registry=registry,
        )
        for code in FAULT_CODES:  # what has labels is absent otherwise, until it counts something
            self.faults.labels(code)
        self.streams = Gauge("evosample_streams", "Streams of ids that are open", registry=registry)
        Gauge("evosample_streams_limit", "Most streams of ids at once (--max-streams)", registry=registry).set(
            max_streams
        )
        self.project_streams = Gauge(
            "evosample_project_streams", "Of these, those of the project that has most", registry=registry
        )
        Gauge(
            "evosample_project_streams_limit",
            "Most streams of ids of one project at once (--max-project-streams)",
            registry=registry,
        ).set(max_project_streams)
        self._streamed_rows = Counter("evosample_streamed_rows", "Rows sent to ranks", registry=registry)
        self._streamed_bytes = Counter("evosample_streamed_bytes", "Bytes of columns sent to ranks", registry=registry)
        self._reported_rows = Counter("evosample_reported_rows", "Rows whose loss was received", registry=registry)
        self._reported_bytes = Counter("evosample_reported_bytes", "Bytes of losses received", registry=registry)
        self._non_finite = Counter(
            "evosample_non_finite_losses", "Losses received that were NaN or infinite", registry=registry
        )

        self.turns = Counter(
            "evosample_turns",
            "Turns of an epoch: made, overtaken by another server, failed, interrupted as their client left",
            ("outcome",),
            registry=registry,
        )
        for outcome in TURN_OUTCOMES:
            self.turns.labels(outcome)
        self.turn_seconds = Histogram(
            "evosample_turn_seconds",
            "Time of the phases of turns",
            ("phase",),
            buckets=_TURN_BUCKETS_S,
            registry=registry,
        )
        for phase in TURN_PHASES:
            self.turn_seconds.labels(phase)

        self.store_seconds = Histogram(
            "evosample_store_seconds",
            "Time of the store's commands and of our scripts, from asking for a connection to the answer or failure",
            ("command",),
            buckets=_STORE_BUCKETS_S,
            registry=registry,
        )
        self.store_up = Gauge("evosample_store_up", "Whether the store takes writes: 1 or 0", registry=registry)
        self.cache_hits = Counter("evosample_cache_hits", "Blocks of columns found in memory", registry=registry)
        self.cache_misses = Counter(
            "evosample_cache_misses", "Blocks of columns that had to be read from the store", registry=registry
        )
        self.cache_bytes = Gauge("evosample_cache_bytes", "Memory of the blocks that are kept", registry=registry)

        self._runs = _Runs(max_experiments, now_s)
        registry.register(self._runs)
        Gauge(
            "evosample_connected_ranks", "Ranks that this server has heard of within a minute", registry=registry
        ).set_function(self._runs.num_connected)

    def heard(self, name: ExperimentName, uid: str, *, rank: int, epoch: int, num_epochs: int) -> None:
        """Note that a rank of an experiment's latest run has asked for something, while `epoch` is the current one."""
        self._runs.heard(name, uid, rank, epoch, num_epochs)

    def streamed(self, num_rows: int, num_bytes: int) -> None:
        """Count rows that are sent to a rank."""
        self._streamed_rows.inc(num_rows)
        self._streamed_bytes.inc(num_bytes)

    def reported(
        self, name: ExperimentName, *, num_rows: int, num_bytes: int, num_non_finite: int, progress: float
    ) -> None:
        """Count losses that a rank has sent, which brought it to this share of all steps of all epochs."""
        self._reported_rows.inc(num_rows)
        self._reported_bytes.inc(num_bytes)
        self._non_finite.inc(num_non_finite)
        self._runs.reported(name, num_rows, num_non_finite, progress)

    @contextmanager
    def served(self, address: str) -> Iterator[str]:
        """Serve them over HTTP at HOST:PORT, from threads, until the context ends.

        Yields:
            The address, with the port that it got.

        Raises:
            UnavailableError: the address can't be listened on.
        """
        host, _, port = address.rpartition(":")
        try:
            server = make_server(
                host.strip("[]"),
                int(port),
                make_wsgi_app(self.registry),
                _Listener6 if host.startswith("[") else _Listener,
                _Handler,
            )
        except OSError as error:
            raise UnavailableError(
                f"can't serve metrics on {address}: {error}. Is the address right (HOST:PORT), and free?"
            ) from error
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield f"{host}:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds in which nothing comes

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as it is called there
        """Say nothing of requests."""


class _Listener(ThreadingMixIn, WSGIServer):
    """Answers each connection in a thread, and so many at a time."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a connection to the metrics failed", cause=str(sys.exception()))


class _Listener6(_Listener):
    address_family = socket.AF_INET6


@dataclass
class _Experiment:
    """What one server knows of an experiment that it has served."""

    uid: str
    heard_s: float
    last_report_s: float
    epoch: int = 0
    num_epochs: int = 1
    progress: float = 0.0
    reported_rows: int = 0
    non_finite_losses: int = 0


class _Runs(Collector):
    """The ranks that were heard of lately, and figures of their experiments by name.

    Both are ordered by when they were last heard of, so that what is forgotten stands in front. An experiment that
    comes when there are as many as there may be takes the place of one that has been silent for five minutes, or else
    is left out.
    """

    def __init__(self, max_experiments: int, now_s: Callable[[], float]) -> None:
        self._max_experiments = max_experiments
        self._now_s = now_s
        self._experiments: OrderedDict[ExperimentName, _Experiment] = OrderedDict()
        self._ranks: OrderedDict[tuple[str, int], float] = OrderedDict()
        self._lock = threading.Lock()  # they are asked for from other threads

    def heard(self, name: ExperimentName, uid: str, rank: int, epoch: int, num_epochs: int) -> None:
        now_s = self._now_s()
        with self._lock:
            self._forget(now_s)
            self._ranks[uid, rank] = now_s
            self._ranks.move_to_end((uid, rank))
            found = self._experiments.get(name)
            if found is None or found.uid != uid:
                if found is None and not self._make_room(now_s):
                    return
                found = self._experiments[name] = _Experiment(uid, now_s, now_s)
            if (found.epoch, found.num_epochs) != (epoch, num_epochs):
                found.epoch, found.num_epochs, found.progress = epoch, num_epochs, epoch / num_epochs
            found.heard_s = now_s
            self._experiments.move_to_end(name)

    def _forget(self, now_s: float) -> None:
        while self._ranks and next(iter(self._ranks.values())) < now_s - _CONNECTED_S:
            self._ranks.popitem(last=False)
        while self._experiments and next(iter(self._experiments.values())).heard_s < now_s - _FORGOTTEN_AFTER_S:
            self._experiments.popitem(last=False)

    def _make_room(self, now_s: float) -> bool:
        if len(self._experiments) < self._max_experiments:
            return True
        if not self._experiments or next(iter(self._experiments.values())).heard_s > now_s - _REPLACED_AFTER_S:
            return False
        self._experiments.popitem(last=False)
        return True

    def reported(self, name: ExperimentName, num_rows: int, num_non_finite: int, progress: float) -> None:
        with self._lock:
            found = self._experiments.get(name)
            if found is None:
                return
            found.reported_rows += num_rows
            found.non_finite_losses += num_non_finite
            found.progress = max(found.progress, progress)
            found.last_report_s = self._now_s()

    def num_connected(self) -> int:
        with self._lock:
            self._forget(self._now_s())
            return len(self._ranks)

    def collect(self) -> Iterator[Metric]:
        labels = ("project", "experiment")
        prefix = "evosample_experiment"
        epoch = GaugeMetricFamily(f"{prefix}_epoch", "Current epoch, from 0", labels=labels)
        epochs = GaugeMetricFamily(f"{prefix}_epochs", "Epochs that it has", labels=labels)
        progress = GaugeMetricFamily(
            f"{prefix}_progress_ratio", "Share of all steps that a rank has reported, 1 at the end", labels=labels
        )
        last_report = GaugeMetricFamily(
            f"{prefix}_last_report_timestamp_seconds",
            "When losses last came or, before the first, when it was first heard of",
            labels=labels,
        )
        rows = CounterMetricFamily(f"{prefix}_reported_rows", "Rows whose loss was received", labels=labels)
        non_finite = CounterMetricFamily(
            f"{prefix}_non_finite_losses", "Losses received that were NaN or infinite", labels=labels
        )
        with self._lock:
            self._forget(self._now_s())
            for name, found in self._experiments.items():
                epoch.add_metric(name, found.epoch)
                epochs.add_metric(name, found.num_epochs)
                progress.add_metric(name, found.progress)
                last_report.add_metric(name, found.last_report_s)
                rows.add_metric(name, found.reported_rows)
                non_finite.add_metric(name, found.non_finite_losses)
        yield from (epoch, epochs, progress, last_report, rows, non_finite)
