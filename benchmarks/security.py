"""What tokens and TLS cost: calls a second, and rows streamed a second, against an open server on the same machine."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import trustme

import evosample
from evosample.v1 import selection_pb2 as pb

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import ServerProcess

NUM_SAMPLES, NUM_CALLS, NUM_ROUNDS = 4_000_000, 200, 15
ROOT_TOKEN = 40 * "x"


class Side(NamedTuple):
    """A server, and a rank of a run on it."""

    client: evosample.Client
    member: pb.Member

    def calls_per_s(self) -> float:
        began_s = time.perf_counter()
        for _ in range(NUM_CALLS):
            self.client._connection.call("GetExperiment", pb.GetExperimentRequest(ref=self.member.ref))
        return NUM_CALLS / (time.perf_counter() - began_s)

    def rows_per_s(self) -> float:
        began_s = time.perf_counter()
        responses = self.client._connection.stub().StreamEpoch(pb.StreamEpochRequest(member=self.member))
        num_rows = sum(len(response.rows.sample_ids) // 4 for response in responses)
        return num_rows / (time.perf_counter() - began_s)


def main() -> None:
    """Print medians, and their ratios to the open server's."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        issued.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
        (folder / "root-token").write_text(ROOT_TOKEN)
        tokens = ["--tokens", "--root-token-file", str(folder / "root-token")]
        tls = ["--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server.pem")]
        sides = {}
        for name, options in {"open": [], "tokens": tokens, "tokens and TLS": [*tokens, *tls]}.items():
            server = ServerProcess(folder / name, *options)
            stack.callback(server.stop)
            client = evosample.connect(
                server.address,
                token=ROOT_TOKEN if options else "",
                tls=evosample.Tls(ca=folder / "ca.pem") if "TLS" in name else False,
            )
            stack.enter_context(client)
            ref = client.create_experiment(
                "e", num_samples=NUM_SAMPLES, num_epochs=1, meta_batch_size=1_000, policy=evosample.Uniform()
            ).ref
            joined = client._connection.call("JoinRun", pb.JoinRunRequest(ref=ref, run_id="run", world_size=1))
            sides[name] = Side(client, pb.Member(ref=ref, generation=joined.generation, claim=joined.claim))
        speeds: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(NUM_ROUNDS):  # in turn, so that whatever else the machine does hits all of them
            for name, side in sides.items():
                speeds[name].append((side.calls_per_s(), side.rows_per_s()))
    medians = {name: [statistics.median(each) for each in zip(*found, strict=True)] for name, found in speeds.items()}
    for name, (calls_per_s, rows_per_s) in medians.items():
        calls = f"{calls_per_s:5,.0f} calls/s ({calls_per_s / medians['open'][0]:.2f})"
        rows = f"{rows_per_s / 1e6:4.0f} M rows/s ({rows_per_s / medians['open'][1]:.2f})"
        print(f"{name:15} {calls}  {rows}")


if __name__ == "__main__":
    main()
