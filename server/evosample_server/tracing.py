"""Spans of calls and of turns, sent to an OpenTelemetry collector. Needs the extra [tracing]."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace

from evosample.errors import UnavailableError

_LAST_EXPORT_TIMEOUT_S = 2.0  # a server that is told to stop has ten seconds in all, as containers go


@contextmanager
def traced(otlp_endpoint: str | None) -> Iterator[trace.Tracer]:
    """A tracer whose spans leave in the background; what is left of them is sent when the context ends.

    Args:
        otlp_endpoint: base URL of a collector that speaks OTLP over HTTP. Default: a tracer that does nothing.

    Raises:
        UnavailableError: the extra [tracing] is not installed.
    """
    if otlp_endpoint is None:
        yield trace.NoOpTracer()
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise UnavailableError(f"--otlp-endpoint needs {error.name}: pip install 'evosample[tracing]'") from error
    version = importlib.metadata.version("evosample")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "evosample-server", SERVICE_VERSION: version}))
    exporter = OTLPSpanExporter(f"{otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield provider.get_tracer("evosample", version)
    finally:
        giving_up = threading.Timer(_LAST_EXPORT_TIMEOUT_S, exporter.shutdown)
        giving_up.start()
        provider.shutdown()
        giving_up.cancel()
