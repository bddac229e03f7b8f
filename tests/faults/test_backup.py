"""Backup and restore as docs/operations.md says it, by its own commands, while a job runs."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import evosample
from faults.harness import SETTINGS, Outcome, ReplicatedServer, disturbing, run_job
from pages import ROOT, commands_under
from stores import ClusterStore, StandaloneStore, StoreProcess, wait_until
from support import ServerProcess, fixed_losses, train

PAGE = ROOT / "docs/operations.md"
OF_A_SERVER = commands_under(PAGE, "A store that a server has started")
OF_REDIS = commands_under(PAGE, "A Redis or Valkey")
Undisturbed = Callable[..., Outcome]
Work = Callable[[random.Random, threading.Event], None]


def run(commands: Sequence[str], folder: Path) -> None:
    for command in commands:
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


class Witness:
    """What a backup should bring back and what it can't, beside the job that goes on meanwhile."""

    def __init__(self, address: str) -> None:
        self._client = evosample.connect(address, connect_timeout_s=60)
        experiment = self._client.create_experiment("done", **SETTINGS)
        train(experiment, fixed_losses(SETTINGS["num_samples"], SETTINGS["num_epochs"]))
        self._scores = experiment.export_scores()
        self._token, _ = self._client.create_token("reader")

    def wait_for_epoch(self, epoch: int, stopping: threading.Event) -> int:
        """The job's epoch, as soon as it is at least this."""
        found = -1

        def is_reached() -> bool:
            nonlocal found
            names = [status.name for status in self._client.list_experiments()]
            found = self._client.get_experiment("job").status().epoch if "job" in names else -1
            return found >= epoch or stopping.is_set()

        wait_until(is_reached, f"the job's epoch {epoch}", 60)
        assert not stopping.is_set(), "the job had ended too early"
        return found

    def go_on(self) -> None:
        """Do what the backup knows nothing of."""
        self._client.create_experiment("later", **SETTINGS)
        self._client.delete_experiment("done")
        self._client.revoke_token(self._token.id)

    def check(self) -> None:
        """Whether the store is as it was when it was backed up."""
        for before, after in zip(self._scores, self._client.get_experiment("done").export_scores(), strict=True):
            np.testing.assert_array_equal(before, after)
        with pytest.raises(evosample.NotFoundError):
            self._client.get_experiment("later")
        assert [token.id for token in self._client.list_tokens()] == [self._token.id]
        self._client.close()


def check_job(server: ServerProcess, witness: Witness, work: Work, undisturbed: Undisturbed) -> None:
    """Whether a job goes on while the store is restored, and the store is then what it was."""
    with disturbing(work, 0):
        assert run_job(server.address, "job", pace_s=0.03) == undisturbed()
    witness.check()


def test_a_job_goes_on_when_the_data_directory_of_its_server_is_restored(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    server = ServerProcess(tmp_path / "evosample-data")
    backup, restore = OF_A_SERVER[:1], OF_A_SERVER[1:-1]
    assert OF_A_SERVER[-1] == "evosample-server"
    witness = Witness(server.address)

    def work(_: random.Random, stopping: threading.Event) -> None:
        epoch = witness.wait_for_epoch(1, stopping)
        server.stop()
        run(backup, tmp_path)
        server.restart()
        witness.wait_for_epoch(epoch + 1, stopping)
        witness.go_on()
        server.stop()
        run(restore, tmp_path)
        server.restart()

    try:
        check_job(server, witness, work, undisturbed)
    finally:
        server.stop()


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="needs redis-cli, of Debian's package redis-tools")
@pytest.mark.parametrize("kind", [StandaloneStore, ClusterStore])
def test_a_job_goes_on_when_its_redis_is_restored(
    undisturbed: Undisturbed, tmp_path: Path, kind: type[StandaloneStore | ClusterStore]
) -> None:
    store = kind(tmp_path / "store")
    server = ReplicatedServer(tmp_path / "server", store.url)
    backup, restore = OF_REDIS[:1], OF_REDIS[1:]
    assert backup[0].startswith("redis-cli -h 127.0.0.1 -p 6379 ")
    primaries: list[StoreProcess] = store.processes[:3] if isinstance(store, ClusterStore) else [store]
    witness = Witness(server.address)

    def work(_: random.Random, stopping: threading.Event) -> None:
        epoch = witness.wait_for_epoch(1, stopping)
        for process in primaries:
            run([backup[0].replace("6379", str(process.port))], process.folder)
        witness.wait_for_epoch(epoch + 1, stopping)
        witness.go_on()
        store.kill()
        for process in primaries:
            run(restore, process.folder)
        if isinstance(store, ClusterStore):
            for replica in store.processes[3:]:
                shutil.rmtree(replica.folder / "appendonlydir")
        store.start()

    try:
        check_job(server, witness, work, undisturbed)
    finally:
        server.stop()
        store.close()
