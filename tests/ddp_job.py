"""One process of a data-parallel training job, as torchrun would start it: a small DDP model on a shared experiment.

Writes a line a step to DIR/rank-R.jsonl (position, sample ids of its part, those it trained on), a checkpoint after
every CHECKPOINT_STEPS steps, and DIR/rank-R.npz with the model's parameters at the end.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import evosample
from evosample.torch import Loader
from samples import Ids
from support import fixed_losses

CHECKPOINT_STEPS = 4


class Net(torch.nn.Module):
    """Has BatchNorm, whose buffers DDP sends to all ranks before every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Embedding(1000, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 1)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.layers(ids).squeeze(1)
        return predicted


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("address", "experiment", "directory"):
        parser.add_argument(name)
    for name in ("rank", "world-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--create", help="settings of the experiment, as JSON")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--own-servers", action="store_true", help="the mistake of a private server each")
    parser.add_argument("--break-every", type=int, default=0, help="leave the epoch after so many steps, and go on")
    parser.add_argument("--data-parallel-size", type=int, help="processes R and R + this share their data")
    parser.add_argument("--alone", action="store_true", help="without collectives: the ranks don't notice each other")
    parser.add_argument("--straggler-timeout-s", type=float)
    parser.add_argument("--pause-after", type=int, help="stand still after so many steps")
    return parser.parse_args()


def main(job: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    directory = Path(job.directory)
    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=job.rank, world_size=job.world_size
    )
    model: torch.nn.Module = Net()
    state = torch.load(job.checkpoint) if job.checkpoint else None
    if state:
        model.load_state_dict(state["model"])
    whole: torch.nn.Module = model
    if job.fsdp:
        whole = cast(torch.nn.Module, fully_shard(model))
    elif not job.alone:
        whole = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    if job.create:  # on a private server of the job's own
        client = evosample.connect() if job.own_servers else evosample.torch.connect()
        experiment = client.create_experiment(job.experiment, **json.loads(job.create))
    else:
        experiment = evosample.torch.connect(job.address).get_experiment(job.experiment)
    losses = torch.from_numpy(fixed_losses(experiment.spec.num_samples, 1)[0])

    def per_sample(ids: torch.Tensor) -> torch.Tensor:
        """The value of a loss that does not depend on how ranks share the work, with the gradient of one that does."""
        errors = (whole(ids) - losses[ids]) ** 2
        per_sample: torch.Tensor = losses[ids] + (errors - errors.detach())
        return per_sample

    place: dict[str, Any] = {}
    if job.data_parallel_size:
        place["data_parallel_rank"] = job.rank % job.data_parallel_size
        place["data_parallel_size"] = job.data_parallel_size
    loader = Loader(
        Ids(experiment.spec.num_samples),
        experiment,
        model=whole,
        score=per_sample,
        micro_batch_size=job.micro_batch_size,
        run_options={"straggler_timeout_s": job.straggler_timeout_s},
        **place,
    )
    if state:
        loader.load_state_dict(state["loader"])
    num_syncs = 0
    buffers: list[float] = []
    batch_norm = model.get_submodule("layers.1")
    batch_norm.register_forward_pre_hook(
        lambda *_: (
            buffers.append(float(batch_norm.get_buffer("running_mean").sum())) if torch.is_grad_enabled() else None
        )
    )

    def count_sync(hook_state: None, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        nonlocal num_syncs
        num_syncs += 1
        return allreduce_hook(cast(distributed.ProcessGroup, distributed.group.WORLD), bucket)

    if isinstance(whole, DistributedDataParallel):
        whole.register_comm_hook(None, count_sync)
    num_steps = 0
    with (directory / f"rank-{job.rank}.jsonl").open("a") as log:
        while loader.position.epoch < experiment.spec.num_epochs:
            for meta_batch in loader.meta_batches():
                trained: list[int] = []
                num_syncs = 0
                buffers.clear()
                for ids in loader.micro_batches(meta_batch):
                    trained += ids.tolist()
                    with loader.accumulate():
                        loss = loader.mean(per_sample(ids))
                        loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                line = {
                    "step": [*meta_batch.step],
                    "ids": meta_batch.planned.sample_ids.tolist(),
                    "trained": trained,
                    "num_syncs": num_syncs,
                    "buffer": buffers[0],
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
                num_steps += 1
                if job.break_every and num_steps % job.break_every == 0:
                    break
                if num_steps == job.pause_after:
                    print("paused", flush=True)
                    sys.stdin.read()
                if num_steps % CHECKPOINT_STEPS == 0:
                    states: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
                    saved = {key: value.state_dict() for key, value in states.items()}
                    if not job.alone:
                        distributed.barrier()
                    if job.rank == 0:
                        torch.save(saved, directory / "new")
                        (directory / "new").rename(directory / "checkpoint")
    loader.state_dict()  # everything is reported
    values: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        values[key] = (value.full_tensor() if isinstance(value, DTensor) else value).numpy()
    np.savez(directory / f"rank-{job.rank}.npz", **values)
    if not job.alone:
        distributed.barrier()
        assert experiment.status().state in ("sealed", "finished")  # everyone has reported everything
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(options())
