"""Asks a server on this machine, over its health socket, how it is: `python -m evosample_server.probe`, for containers.

Exit code 0: it serves, and its store takes writes; with `--alive`: it answers at all.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 4.0


def main() -> int:
    """Ask, and return the exit code."""
    path = os.environ.get("EVOSAMPLE_HEALTH_SOCKET", "")
    if not path:
        print("EVOSAMPLE_HEALTH_SOCKET is not set: start the server with it", file=sys.stderr)  # noqa: T201
        return 2
    with grpc.insecure_channel(f"unix:{path}") as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            print(error.details(), file=sys.stderr)  # noqa: T201
            return 1
    if "--alive" not in sys.argv[1:] and reply.status != health_pb2.HealthCheckResponse.SERVING:
        print("the server's store takes no writes", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
