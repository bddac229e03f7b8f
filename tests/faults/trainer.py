"""A training job as a process of its own, for tests that kill it: `trainer.py ADDRESS NAME FOLDER WORLD_SIZE RUN_ID`.

All ranks are threads of the process. Every few steps it saves its position in FOLDER, and begins there when started
again; everything that it sees goes to FOLDER/visits, a line a step.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import evosample
from faults.harness import SETTINGS
from support import Visit, fixed_losses

STEPS_BETWEEN_CHECKPOINTS = 7
PACE_S = 0.02


def main() -> None:
    address, name, folder, world_size, run_id = sys.argv[1:]
    path = Path(folder) / "position"
    position = tuple(json.loads(path.read_text())) if path.exists() else None
    ranks = int(world_size)
    losses = fixed_losses(SETTINGS["num_samples"], SETTINGS["num_epochs"])
    saving = threading.Barrier(ranks)
    with evosample.connect(address) as client, (Path(folder) / "visits").open("a", buffering=1) as file:
        experiment = client.create_experiment(name, **SETTINGS)

        def run_rank(rank: int) -> None:
            run = experiment.epochs(rank=rank, world_size=ranks, run_id=run_id, position=position)
            for epoch in run:
                for batch in epoch:
                    time.sleep(PACE_S)
                    batch_losses = losses[batch.epoch, batch.sample_ids]
                    visit = Visit(rank, batch, batch.select(batch_losses), batch_losses)
                    file.write(json.dumps([ranks, *visit.key()[:4], visit.positions.tolist()]) + "\n")
                    if batch.step % STEPS_BETWEEN_CHECKPOINTS == 0:
                        run.flush()
                        if saving.wait() == 0:  # all ranks are here, at the same position
                            path.with_suffix(".new").write_text(json.dumps(run.position))
                            path.with_suffix(".new").rename(path)
                        saving.wait()

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
