"""Log lines, ours and those of libraries, in one form: for people, or as JSON."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog


def configure_logging(level: str, log_format: Literal["human", "json"]) -> None:
    """Write what is at least of this level to stderr, one line each.

    JSON lines have the fields timestamp (ISO 8601, UTC), level, event, and others that belong to the event; lines that
    a call has led to have its request_id.
    """
    added: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    rendered: list[Any]
    # Tracebacks are plain: with the frames' variables they would show passwords.
    if log_format == "json":
        rendered = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        rendered = [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    number = getattr(logging, level.upper())
    structlog.configure(
        processors=[*added, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # each line in one piece, also between threads
    )
    of_libraries = logging.StreamHandler(sys.stderr)
    of_libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*added, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
        )
    )
    of_libraries.addFilter(_is_of_interest)
    logging.basicConfig(level=max(number, logging.INFO), handlers=[of_libraries], force=True)
    logging.captureWarnings(capture=True)


def _is_of_interest(record: logging.LogRecord) -> bool:
    """All but what gRPC takes for an error: that a caller has left just when it was to be answered."""
    return not (record.name.startswith("grpc.") and record.getMessage().startswith("ExecuteBatchError"))
