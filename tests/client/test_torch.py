from __future__ import annotations

import io
import itertools
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import Dataset, IterableDataset, default_collate

import evosample
from evosample.torch import Loader, take_rows
from stores import wait_until
from support import ServerProcess, Visit, fixed_losses, train

N, EPOCHS, B, MINI = 96, 4, 16, 4
STEPS = N // B
END = evosample.Position(EPOCHS, 0)
# By default the first epoch and the last are annealing: epochs 1 and 2 select.
SETTINGS: dict[str, Any] = {"num_samples": N, "num_epochs": EPOCHS, "meta_batch_size": B, "mini_batch_size": MINI}
LOSSES = fixed_losses(N, 1)[0]

# PyTorch warns where a machine has fewer processors than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

Tensor = torch.Tensor
Steps = list[tuple[evosample.Position, list[int]]]
"""The position of each step, and the ids of the samples that it trained on."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Ids(Dataset[int]):
    """Samples that are their own ids; some of them may be out of order."""

    def __init__(self, num_samples: int = N) -> None:
        self.num_samples = num_samples
        self.damaged: set[int] = set()

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample_id: int) -> int:
        if sample_id in self.damaged:
            raise OSError(f"sample {sample_id} is damaged")
        return sample_id


def loss_of(ids: Tensor) -> Tensor:
    return torch.from_numpy(LOSSES)[ids]


def ids_loader(experiment: evosample.Experiment, **options: Any) -> Loader:
    """A loader of ids, whose losses are LOSSES."""
    defaults: dict[str, Any] = {"dataset": Ids(), "model": torch.nn.Linear(1, 1), "score": loss_of}
    return Loader(experiment=experiment, **(defaults | options))


def go_through(
    loader: Loader, stop: tuple[int, int] = END, *, ids_of: Callable[[Any], Tensor] = lambda batch: batch
) -> Steps:
    """Train on all that is left before `stop`; micro-batches are put together again."""
    steps: dict[evosample.Position, list[int]] = {}
    while loader.position < stop:
        for batch in loader:
            ids = ids_of(batch)
            steps.setdefault(loader.position, []).extend(ids.tolist())
            loader.mean(loss_of(ids))
            if loader.position >= stop:
                break
    return list(steps.items())


def plain_visits(experiment: evosample.Experiment) -> list[Visit]:
    """All steps of an experiment with the same losses, taken without a loader."""
    return train(experiment, np.broadcast_to(LOSSES, (EPOCHS, N)))


def plain_steps(experiment: evosample.Experiment) -> Steps:
    visits = plain_visits(experiment)
    return [
        (evosample.Position(visit.epoch, visit.step), visit.sample_ids[visit.positions].tolist()) for visit in visits
    ]


def assert_same_scores(one: evosample.Experiment, other: evosample.Experiment) -> None:
    """Bit for bit."""
    for column, other_column in zip(one.export_scores(), other.export_scores(), strict=True):
        np.testing.assert_array_equal(column, other_column)


class Net(torch.nn.Module):
    """Has what a second forward pass disturbs: BatchNorm, dropout, buffers of its own."""

    seen_mean: Tensor
    num_calls: Tensor

    def __init__(self, *, replaces_buffers: bool = False) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 8)
        self.rest = torch.nn.Sequential(
            torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
        )
        self.register_buffer("num_calls", torch.tensor(0))
        self.register_buffer("seen_mean", torch.zeros(4))
        self._replaces_buffers = replaces_buffers

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        seen_mean = 0.9 * self.seen_mean + 0.1 * x.detach().mean(0)
        if self._replaces_buffers:
            self.seen_mean = seen_mean
        else:
            self.seen_mean.copy_(seen_mean)
        prediction: Tensor = self.rest(self.first(x)).squeeze(1)
        return prediction


class Points(Dataset[tuple[int, Tensor, Tensor]]):
    """A small regression: (id, x, y)."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(N, 4, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + torch.randn(N, generator=generator) / 4

    def __len__(self) -> int:
        return N

    def __getitem__(self, sample_id: int) -> tuple[int, Tensor, Tensor]:
        return sample_id, self.x[sample_id], self.y[sample_id]


def squared_errors(model: torch.nn.Module, batch: Any) -> Tensor:
    errors: Tensor = model(batch[1]) - batch[2]
    return errors**2


def fresh(model: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    return (made := model()), torch.optim.SGD(made.parameters(), lr=0.02, momentum=0.9)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


class Job:
    """A training job whose every bit follows from its start: model, optimizer, loader, PyTorch's random state."""

    def __init__(
        self,
        experiment: evosample.Experiment,
        *,
        make_model: Callable[[], torch.nn.Module] = Net,
        score: Callable[[torch.nn.Module, Any], Tensor] = squared_errors,
        **options: Any,
    ) -> None:
        self.model, self.optimizer = fresh(make_model)
        self.batches: list[Any] = []
        self.steps: Steps = []
        self.scored: list[Any] = []
        model, scored = self.model, self.scored  # no cycle of references may keep a loader's workers waiting for us

        def scores(batch: Any) -> Tensor:
            assert not torch.is_grad_enabled()
            scored.append(batch)
            return score(model, batch)

        self.loader = Loader(Points(), experiment, model=self.model, score=scores, **options)

    def train(self, stop: tuple[int, int] = END) -> None:
        while self.loader.position < stop:
            for batch in self.loader:
                self.batches.append(batch)
                self.steps.append((self.loader.position, batch[0].tolist()))
                update(self.optimizer, self.loader.mean(squared_errors(self.model, batch)))
                if self.loader.position >= stop:
                    break

    def save(self) -> bytes:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "loader": self.loader}
        states = {key: part.state_dict() for key, part in parts.items()}
        torch.save(states | {"rng": torch.get_rng_state()}, file := io.BytesIO())
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved))
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.loader.load_state_dict(states["loader"])
        torch.set_rng_state(states["rng"])


def assert_same_models(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Bit for bit, parameters and buffers."""
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


# What is yielded


@pytest.mark.parametrize(
    "policy",
    [
        evosample.EvolvedSampling(),
        evosample.EvolvedSampling(prune_ratio=0.25),
        evosample.RandomSubset(prune_ratio=0.25),
        evosample.Uniform(),
    ],
)
def test_the_rows_yielded_are_those_that_a_client_without_a_loader_selects(
    client: evosample.Client, name: str, policy: evosample.Policy
) -> None:
    experiment = client.create_experiment(name, **SETTINGS, policy=policy, seed=5)
    twin = client.create_experiment(f"{name}-twin", **SETTINGS, policy=policy, seed=5)
    score = loss_of if policy.batch_level == "scored" else None
    assert go_through(ids_loader(experiment, score=score)) == plain_steps(twin)
    assert_same_scores(experiment, twin)
    assert experiment.status().state == "finished"


def test_ranks_train_on_the_rows_that_are_selected_for_them(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    loaders = [
        ids_loader(client.get_experiment(name), data_parallel_rank=r, data_parallel_size=2, run_id="run")
        for r in range(2)
    ]
    yielded: list[Steps] = [[], []]
    for _ in range(EPOCHS):
        for parts in zip(*loaders, strict=False):
            for rank, ids in enumerate(parts):
                yielded[rank].append((loaders[rank].position, ids.tolist()))
                loaders[rank].mean(loss_of(ids))
    twin = client.create_experiment(f"{name}-twin", **SETTINGS)
    runs = [twin.epochs(rank=rank, world_size=2, run_id="run") for rank in range(2)]
    for rank, epoch in itertools.chain.from_iterable(enumerate(epochs) for epochs in zip(*runs, strict=True)):
        for batch in epoch:
            chosen = batch.sample_ids[batch.select(LOSSES[batch.sample_ids]).positions]
            assert yielded[rank].pop(0) == ((batch.epoch, batch.step), chosen.tolist())
    assert yielded == [[], []]
    assert_same_scores(experiment, twin)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_change_nothing(client: evosample.Client, name: str, options: dict[str, Any]) -> None:
    experiments = [client.create_experiment(f"{name}-{suffix}", **SETTINGS) for suffix in ("none", "some")]
    assert go_through(ids_loader(experiments[0])) == go_through(ids_loader(experiments[1], **options))
    assert_same_scores(*experiments)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damaged_step", [0, 3, STEPS, 2 * STEPS + 1])
def test_after_an_error_while_loading_training_goes_on_at_the_position(
    client: evosample.Client, name: str, num_workers: int, damaged_step: int
) -> None:
    undisturbed = plain_steps(client.create_experiment(f"{name}-twin", **SETTINGS))
    position, ids = undisturbed[damaged_step]
    dataset = Ids()
    loader = ids_loader(client.create_experiment(name, **SETTINGS), dataset=dataset, num_workers=num_workers)
    before = go_through(loader, position)
    dataset.damaged = {ids[1]}
    with pytest.raises(OSError, match=f"sample {ids[1]} is damaged"):
        go_through(loader)
    assert loader.position == position
    dataset.damaged = set()
    assert before + go_through(loader) == undisturbed


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.parametrize("options", [{"pin_memory": True}, {"device": "cpu"}, {"pin_memory": True, "num_workers": 1}])
def test_pinned_memory_and_a_device_change_nothing(
    client: evosample.Client, name: str, options: dict[str, Any]
) -> None:
    loader = ids_loader(client.create_experiment(name, **SETTINGS), **options)
    assert go_through(loader) == plain_steps(client.create_experiment(f"{name}-twin", **SETTINGS))


def test_a_device_is_where_all_tensors_of_a_batch_go(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS, policy=evosample.Uniform())
    loader = ids_loader(
        experiment,
        collate_fn=lambda ids: {"ids": torch.tensor(ids), "names": list(map(str, ids)), "more": [torch.tensor(1.0)]},
        device="meta",
    )
    batch = next(iter(loader))
    assert batch["ids"].is_meta
    assert batch["more"][0].is_meta
    assert len(batch["names"]) == MINI


def test_what_can_move_itself_to_a_device_is_left_to_do_so(client: evosample.Client, name: str) -> None:
    loader = ids_loader(
        client.create_experiment(name, **SETTINGS),
        collate_fn=lambda ids: (torch.tensor(ids), pack_sequence([torch.ones(i % 3 + 1) for i in ids], False)),
        device="meta",
    )
    _, packed = next(iter(loader))
    assert packed.data.is_meta
    assert not packed.batch_sizes.is_meta, "nowhere but there do PyTorch's functions take them"


# Batches of any kind


class Pair(NamedTuple):
    ids: Tensor
    names: list[str]


@dataclass(frozen=True)
class Record:
    ids: Tensor
    pair: Pair


COLLATE: dict[str, tuple[Callable[[list[int]], Any], Callable[[Any], Tensor]]] = {
    "tensor": (torch.tensor, lambda batch: batch),
    "tuple": (lambda ids: (torch.tensor(ids), torch.ones(len(ids), 3)), lambda batch: batch[0]),
    "list": (lambda ids: [torch.ones(len(ids), 3), torch.tensor(ids)], lambda batch: batch[1]),
    "dict": (lambda ids: {"ids": torch.tensor(ids), "x": torch.ones(len(ids), 2, 2)}, lambda batch: batch["ids"]),
    "nested": (
        lambda ids: ({"x": {"ids": torch.tensor(ids)}, "y": [torch.tensor(ids) + 1]}, torch.tensor(ids) * 2),
        lambda batch: batch[0]["x"]["ids"],
    ),
    "named tuple": (lambda ids: Pair(torch.tensor(ids), list(map(str, ids))), lambda batch: batch.ids),
    "dataclass": (
        lambda ids: Record(torch.tensor(ids), Pair(torch.tensor(ids), list(map(str, ids)))),
        lambda batch: batch.pair.ids,
    ),
    "default_collate": (
        lambda ids: default_collate([{"ids": i, "name": str(i), "pair": (i, bytes(2))} for i in ids]),
        lambda batch: batch["ids"],
    ),
    "one element a sample": (
        lambda ids: {"ids": torch.tensor(ids), "boxes": [{"corners": torch.ones(i % 5, 4)} for i in ids]},
        lambda batch: batch["ids"],
    ),
    "sequences of any length": (
        lambda ids: (torch.tensor(ids), [torch.arange(i % (B + 1)) for i in ids]),
        lambda batch: batch[0],
    ),
    "numpy": (
        lambda ids: {"ids": np.array(ids), "names": np.array(list(map(str, ids)), object)},
        lambda batch: torch.from_numpy(batch["ids"]),
    ),
    "scalars": (
        lambda ids: (torch.tensor(ids), torch.tensor(2.0), 0.5, np.array(3), np.float32(1), None, "train"),
        lambda batch: batch[0],
    ),
    "OrderedDict": (lambda ids: OrderedDict(ids=torch.tensor(ids)), lambda batch: batch["ids"]),
    "UserDict": (lambda ids: UserDict(ids=torch.tensor(ids)), lambda batch: batch["ids"]),
    "defaultdict": (lambda ids: defaultdict(list, ids=torch.tensor(ids)), lambda batch: batch["ids"]),
}


@pytest.mark.parametrize("kind", COLLATE)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_rows_of_whatever_a_collate_fn_makes_are_what_it_makes_of_the_chosen_samples(
    client: evosample.Client, name: str, kind: str, micro_batch_size: int | None
) -> None:
    collate, ids_of = COLLATE[kind]

    def checked_ids(batch: Any) -> Tensor:
        ids = ids_of(batch)
        of_the_same_ids = collate(ids.tolist())
        assert type(batch) is type(of_the_same_ids)
        assert repr(batch) == repr(of_the_same_ids)
        return ids

    loader = ids_loader(
        client.create_experiment(name, **SETTINGS),
        collate_fn=collate,
        score=lambda batch: loss_of(checked_ids(batch)),
        micro_batch_size=micro_batch_size,
    )
    expected = plain_steps(client.create_experiment(f"{name}-twin", **SETTINGS))[: 2 * STEPS]
    assert go_through(loader, (2, 0), ids_of=checked_ids) == expected


@pytest.mark.parametrize(
    ("batch", "second_of_two"),
    [
        ((torch.arange(2), torch.ones(2, 3)), (torch.tensor([1]), torch.ones(1, 3))),
        ((torch.arange(2), 0.5), (torch.tensor([1]), 0.5)),
        ([("a", "b"), torch.arange(2)], [("b",), torch.tensor([1])]),
        (({"x": torch.arange(2)}, {"y": torch.arange(2)}), ({"x": torch.tensor([1])}, {"y": torch.tensor([1])})),
        ([torch.ones(2), torch.ones(5)], [torch.ones(5)]),
        ([{"x": 1}, {"x": 2}], [{"x": 2}]),
    ],
)
def test_batches_of_as_many_columns_as_samples_are_told_from_lists_of_samples(batch: Any, second_of_two: Any) -> None:
    assert repr(take_rows(batch, torch.tensor([1]), 2)) == repr(second_of_two)


@pytest.mark.parametrize("column", [torch.ones(3, 2), np.ones((3, 2)), torch.ones(B + 1)])
def test_a_column_that_has_no_row_a_sample_is_named_and_take_can_split_it(
    client: evosample.Client, name: str, column: Any
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    options = {"collate_fn": lambda ids: (torch.tensor(ids), column), "score": lambda batch: loss_of(batch[0])}
    loader = ids_loader(experiment, **options)
    steps = go_through(loader, (1, 0), ids_of=lambda batch: batch[0])
    shape = ", ".join(map(str, column.shape))
    with pytest.raises(
        evosample.InvalidArgumentError, match=rf"shape \({shape},?\), expected 16 rows: .*take="
    ) as told:
        next(iter(loader))
    assert told.value.field == "take"

    def ids_of(batch: Any) -> Tensor:
        assert batch[1] is column
        ids: Tensor = batch[0]
        return ids

    taking = ids_loader(experiment, **options, take=lambda batch, rows: (batch[0][rows], batch[1]), micro_batch_size=3)
    taking.load_state_dict(loader.state_dict())
    steps += go_through(taking, ids_of=ids_of)
    assert steps == plain_steps(client.create_experiment(f"{name}-twin", **SETTINGS))


# The model and PyTorch's random state


def in_bfloat16(model: torch.nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(batch[1]).dtype == torch.bfloat16
        return squared_errors(model, batch).bfloat16()


def in_eval_mode(model: torch.nn.Module, batch: Any) -> Tensor:
    model.eval()
    losses = squared_errors(model, batch)
    model.train()
    return losses


def in_inference_mode(model: torch.nn.Module, batch: Any) -> Tensor:
    with torch.inference_mode():
        return squared_errors(model, batch)


def cheaper(model: torch.nn.Module, batch: Any) -> Tensor:
    hidden: Tensor = model.get_submodule("first")(batch[1] + torch.randn(4))
    return hidden.square().mean(1)


@pytest.mark.parametrize("score", [squared_errors, in_bfloat16, in_eval_mode, in_inference_mode, cheaper])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_scoring_leaves_buffers_and_random_state_as_if_there_were_no_scoring(
    client: evosample.Client, name: str, score: Callable[[torch.nn.Module, Any], Tensor], num_workers: int
) -> None:
    job = Job(client.create_experiment(name, **SETTINGS), score=score, num_workers=num_workers)
    job.train()
    assert len(job.scored) == 2 * STEPS
    assert_trained_as_without_scoring(job, Net)


def test_scoring_leaves_buffers_alone_that_the_model_replaces(client: evosample.Client, name: str) -> None:
    def model() -> Net:
        return Net(replaces_buffers=True)

    job = Job(client.create_experiment(name, **SETTINGS), make_model=model)
    job.train()
    assert_trained_as_without_scoring(job, model)


def test_a_compiled_model_is_left_alone_by_scoring_as_well(client: evosample.Client, name: str) -> None:
    """It is compiled for batches of two sizes, and scored under autocast."""

    def model() -> torch.nn.Module:
        torch.compiler.reset()
        return cast(torch.nn.Module, torch.compile(Net(), backend="aot_eager"))

    job = Job(client.create_experiment(name, **SETTINGS), make_model=model, score=in_bfloat16)
    job.train()
    assert len(job.scored) == 2 * STEPS
    assert_trained_as_without_scoring(job, model)


def assert_trained_as_without_scoring(job: Job, make_model: Callable[[], torch.nn.Module]) -> None:
    """Train another model on the batches of a job: it and the random state must end where the job's did."""
    random_state = torch.get_rng_state()
    model, optimizer = fresh(make_model)
    for batch in job.batches:
        update(optimizer, squared_errors(model, batch).sum() / len(batch[0]))
    assert_same_models(job.model, model)
    assert torch.equal(random_state, torch.get_rng_state())


def test_annealing_steps_are_one_ordinary_pass_whose_losses_become_scores(
    client: evosample.Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = client.create_experiment(name, **(SETTINGS | {"meta_batch_size": 20}))  # 16 samples fill no step
    job = Job(experiment)
    num_forward = 0

    def count(*_: Any) -> None:
        nonlocal num_forward
        num_forward += 1

    job.model.register_forward_hook(count)
    losses = np.full(N, np.nan)
    mean = job.loader.mean

    def noted(batch_losses: Tensor) -> Tensor:
        losses[job.batches[-1][0]] = batch_losses.detach()
        return mean(batch_losses)

    monkeypatch.setattr(job.loader, "mean", noted)
    job.train((1, 0))
    assert num_forward == 4
    assert not job.scored
    visited = np.isfinite(losses)
    assert visited.sum() == 80
    exported = experiment.export_scores(epoch=1)
    np.testing.assert_allclose(exported.scores, np.where(visited, 0.9 / N + 0.1 * losses, 1 / N), rtol=1e-6)
    weights = 0.2 / N + 0.8 * losses
    expected = np.where(visited, weights, weights[visited].mean())
    np.testing.assert_allclose(exported.sampling_weights, expected, rtol=1e-6)
    np.testing.assert_array_equal(exported.num_visits, visited)


def test_in_selecting_steps_the_losses_of_the_scoring_pass_become_scores(client: evosample.Client, name: str) -> None:
    losses = np.zeros(N)

    def score(model: torch.nn.Module, batch: Any) -> Tensor:
        values = squared_errors(model, batch)
        losses[batch[0]] = values
        return values

    experiment = client.create_experiment(name, **SETTINGS)
    job = Job(experiment, score=score)
    job.train((2, 0))
    before, after = experiment.export_scores(epoch=1), experiment.export_scores(epoch=2)
    np.testing.assert_allclose(after.scores, 0.9 * before.scores + 0.1 * losses, rtol=1e-6)
    np.testing.assert_allclose(after.sampling_weights, 0.2 * before.scores + 0.8 * losses, rtol=1e-6)
    assert (after.num_visits == 2).all()


# The loss to back-propagate


@pytest.mark.parametrize("micro_batch_size", [5, MINI, B, 100])
def test_gradients_of_micro_batches_add_up_to_those_of_the_mini_batch(
    client: evosample.Client, name: str, micro_batch_size: int
) -> None:
    settings: dict[str, Any] = SETTINGS | {"mini_batch_size": 8, "importance_weight": "unbiased"}

    def gradients(suffix: str, **options: Any) -> tuple[Steps, list[Tensor], list[int]]:
        """Of every step: the samples, the gradient, the number of backward passes."""
        model = torch.nn.Linear(4, 1)
        torch.nn.init.constant_(model.weight, 0.1)
        torch.nn.init.constant_(model.bias, 0.1)

        def loss(batch: Any) -> Tensor:
            error: Tensor = model(batch[1])[:, 0] - batch[2]
            return error**2

        experiment = client.create_experiment(f"{name}-{suffix}", **settings)
        loader = Loader(Points(), experiment, model=model, score=loss, **options)
        steps: dict[evosample.Position, list[int]] = {}
        gradients, num_backward = [], [0]
        for batch in itertools.chain.from_iterable(loader for _ in range(EPOCHS)):
            steps.setdefault(position := loader.position, []).extend(batch[0].tolist())
            loader.mean(loss(batch)).backward()  # type: ignore[no-untyped-call]
            num_backward[-1] += 1
            assert loader.ends_step == (loader.position != position)
            if loader.ends_step:
                gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))  # type: ignore[union-attr]
                model.zero_grad()
                num_backward.append(0)
        return list(steps.items()), gradients, num_backward[:-1]

    whole_steps, whole_gradients, whole_passes = gradients("whole")
    steps, split_gradients, passes = gradients("split", micro_batch_size=micro_batch_size)
    assert steps == whole_steps
    torch.testing.assert_close(split_gradients, whole_gradients)
    assert whole_passes == [1] * EPOCHS * STEPS
    all_rows, chosen_rows = (-(-num_rows // micro_batch_size) for num_rows in (B, 8))
    assert passes == [all_rows] * STEPS + [chosen_rows] * 2 * STEPS + [all_rows] * STEPS


def test_scoring_takes_no_more_samples_at_once_than_a_micro_batch(client: evosample.Client, name: str) -> None:
    sizes = []

    def score(ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return loss_of(ids)

    go_through(ids_loader(client.create_experiment(name, **SETTINGS), score=score, micro_batch_size=5))
    assert sizes == [4, 4, 4, 4] * 2 * STEPS  # nearly equal: BatchNorm can do nothing with a last one of one sample


def test_scoring_may_take_more_samples_at_once_than_training(client: evosample.Client, name: str) -> None:
    sizes = []

    def score(ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return loss_of(ids)

    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    loader = ids_loader(experiment, score=score, micro_batch_size=2, scoring_micro_batch_size=8)
    assert go_through(loader) == plain_steps(twin)
    assert sizes == [8, 8] * 2 * STEPS


@pytest.mark.parametrize("importance_weight", ["none", "unbiased", "self_normalized"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_mean_is_weighted_with_the_importance_weights(
    client: evosample.Client,
    name: str,
    importance_weight: evosample.sampling.ImportanceWeight,
    micro_batch_size: int | None,
) -> None:
    settings = SETTINGS | {
        "policy": evosample.EvolvedSampling(prune_ratio=0.25),
        "importance_weight": importance_weight,
    }
    visits = plain_visits(client.create_experiment(f"{name}-twin", **settings))
    expected = [np.mean(visit.importance_weights * visit.losses[visit.positions]) for visit in visits]
    weights = np.concatenate([visit.importance_weights for visit in visits])
    assert (weights == 1).all() == (importance_weight == "none")
    loader = ids_loader(client.create_experiment(name, **settings), micro_batch_size=micro_batch_size)
    means, total = [], 0.0
    for ids in itertools.chain.from_iterable(loader for _ in range(EPOCHS)):
        mean = loader.mean(loss_of(ids))
        assert mean.shape == ()
        total += mean.item()
        if loader.ends_step:
            means.append(total)
            total = 0.0
    np.testing.assert_allclose(means, expected, rtol=1e-6)


# Order of calls


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_may_take_the_next_batch_before_it_trains_on_this_one(
    client: evosample.Client, name: str, num_workers: int
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    loader = ids_loader(experiment, num_workers=num_workers)
    steps = []
    for epoch in range(EPOCHS):
        batches = iter(loader)
        ids = next(batches)
        for step in range(STEPS):
            following = next(batches, None)
            assert loader.position == (epoch, step)
            assert loader.progress == (epoch * STEPS + step) / (EPOCHS * STEPS)
            steps.append((loader.position, ids.tolist()))
            loader.mean(loss_of(ids))
            ids = following
        assert following is None
        assert loader.position == (epoch + 1, 0)
    assert loader.progress == 1
    twin = client.create_experiment(f"{name}-twin", **SETTINGS)
    assert steps == plain_steps(twin)
    assert_same_scores(experiment, twin)


def test_an_epoch_ends_with_its_last_losses_not_with_its_last_batch(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    loader = ids_loader(experiment)
    go_through(loader, (0, STEPS - 1))
    batches = iter(loader)
    ids = next(batches)
    assert next(batches, None) is None
    assert loader.state_dict() == {"experiment": name, "uid": experiment.uid, "epoch": 0, "step": STEPS - 1}
    assert (experiment.status().epoch, experiment.status().finished_ranks) == (0, ())
    loader.mean(loss_of(ids))
    assert loader.state_dict() == {"experiment": name, "uid": experiment.uid, "epoch": 1, "step": 0}
    assert experiment.export_scores(epoch=1).num_visits.min() == 1


@pytest.mark.parametrize("read_ahead", [0, 1, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_losses_that_are_not_handed_over_are_an_error_at_the_next_step(
    client: evosample.Client, name: str, read_ahead: int, epoch: int
) -> None:
    loader = ids_loader(client.create_experiment(name, **SETTINGS), read_ahead=read_ahead)
    go_through(loader, (epoch, 0))
    batches = iter(loader)
    for _ in range(read_ahead + 1):
        next(batches)
    said = rf"losses of step 0 of epoch {epoch} were not handed over: call loader\.mean\(losses\)"
    with pytest.raises(evosample.UsageError, match=said):
        next(batches)
    assert loader.position == (epoch, 0)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_losses_that_are_not_handed_over_are_an_error_however_short_the_epochs(
    client: evosample.Client, name: str, num_steps: int
) -> None:
    num_samples = num_steps * B
    experiment = client.create_experiment(name, **(SETTINGS | {"num_samples": num_samples}))
    loader = ids_loader(experiment, dataset=Ids(num_samples))
    with pytest.raises(evosample.UsageError, match="losses of step 0 of epoch 0 were not handed over"):
        for _ in itertools.chain.from_iterable(loader for _ in range(EPOCHS)):
            pass


def test_losses_without_a_batch_are_an_error(client: evosample.Client, name: str) -> None:
    loader = ids_loader(client.create_experiment(name, **SETTINGS))
    with pytest.raises(evosample.UsageError, match="without a batch"):
        loader.mean(torch.ones(B))
    ids = next(iter(loader))
    loader.mean(loss_of(ids))
    with pytest.raises(evosample.UsageError, match="without a batch"):
        loader.mean(loss_of(ids))
    assert loader.position == (0, 1)


def test_after_the_last_epoch_there_are_no_more_batches_and_a_warning(
    client: evosample.Client, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    loader = ids_loader(client.create_experiment(name, **SETTINGS))
    go_through(loader)
    for _ in range(2):
        caplog.clear()
        assert list(loader) == []
        assert "the experiment's 4 epochs are done" in caplog.text


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "persistent_workers": True}, {"run_id": "only"}])
@pytest.mark.parametrize("trains_before_break", [False, True])
def test_after_a_break_training_goes_on_where_it_stopped(
    client: evosample.Client, name: str, trains_before_break: bool, options: dict[str, Any]
) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    loader, steps = ids_loader(experiment, **options), []
    stops = [(0, 0), (0, 2), (0, STEPS - 1), (1, 0), (1, 3), (2, STEPS - 1), (3, STEPS - 1)]
    while loader.position < END:
        for ids in loader:
            position = loader.position
            breaks = bool(stops) and position == stops[0]
            if not breaks or trains_before_break:
                steps.append((position, ids.tolist()))
                loader.mean(loss_of(ids))
            if breaks:
                stops.pop(0)
                break
    assert not stops
    assert steps == plain_steps(twin)
    assert_same_scores(experiment, twin)


# Stopping and resuming


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("stop", [(0, 0), (0, 3), (1, 0), (1, 1), (2, STEPS - 1), (3, 4), (3, STEPS - 1)])
def test_a_resumed_job_ends_bit_by_bit_as_if_it_had_never_stopped(
    server: ServerProcess, client: evosample.Client, name: str, stop: tuple[int, int], options: dict[str, Any]
) -> None:
    undisturbed = Job(client.create_experiment(f"{name}-undisturbed", **SETTINGS))
    undisturbed.train()
    job = Job(client.create_experiment(name, **SETTINGS), **options)
    job.train(stop)
    saved = job.save()
    num_steps = len(job.steps)
    job.train(undisturbed.steps[min(num_steps + 3, EPOCHS * STEPS - 1)][0])  # lost in a crash
    job.loader.state_dict()  # and with it nothing is left to report, which its client could not do any more
    with evosample.connect(server.address) as another_client:
        resumed = Job(another_client.get_experiment(name), **options)
        resumed.load(saved)
        assert resumed.loader.position == stop
        resumed.train()
        assert job.steps[:num_steps] + resumed.steps == undisturbed.steps
        assert_same_scores(resumed.loader.experiment, undisturbed.loader.experiment)
        assert_same_models(resumed.model, undisturbed.model)


def test_a_loader_can_go_back_to_a_state_of_its_own(client: evosample.Client, name: str) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    loader = ids_loader(experiment)
    steps = go_through(loader, (2, 3))
    state = loader.state_dict()
    go_through(loader, (3, 2))
    loader.load_state_dict(state)
    assert steps + go_through(loader) == plain_steps(twin)
    assert_same_scores(experiment, twin)


def test_the_state_of_a_finished_job_says_so(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    loader = ids_loader(experiment)
    go_through(loader)
    assert loader.state_dict() == {"experiment": name, "uid": experiment.uid, "epoch": EPOCHS, "step": 0}
    resumed = ids_loader(experiment)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.progress == 1
    assert list(resumed) == []


def test_a_new_loader_stands_where_its_experiment_does(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    first = ids_loader(experiment)
    go_through(first, (2, 0))
    next(iter(first))
    loader = ids_loader(experiment)
    assert loader.position == (2, 0)
    assert loader.state_dict() == {"experiment": name, "uid": experiment.uid, "epoch": 2, "step": 0}


def test_an_epoch_that_the_others_end_is_over_for_the_loader_too_and_it_goes_on_with_the_next(
    client: evosample.Client, name: str
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    loader = ids_loader(experiment, data_parallel_rank=0, data_parallel_size=2, run_id="job")
    taken = 0
    for batch in loader:
        loader.mean(loss_of(batch))
        taken += 1
        if taken == 2:
            loader.state_dict()  # what is handed over is in the store
            assert experiment.force_finish(0) == (0, 1)
        if taken == 3:
            loader.state_dict()  # by now it knows
    assert 3 <= taken < STEPS
    assert loader.position == (1, 0)
    for batch in loader:
        assert len(batch) == MINI // 2
        loader.mean(loss_of(batch))
        break
    assert loader.position == (1, 1)


def test_with_uniform_draws_a_loader_outlives_its_server(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    with evosample.connect(server.address, outage_timeout_s=1) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        loader = ids_loader(experiment, run_options={"on_unavailable": "uniform"})
        num_rows = []
        for _ in range(EPOCHS):
            num_rows.append(0)
            for batch in loader:
                if loader.position == (1, 2):
                    wait_until(lambda: loader._epoch is not None and loader._epoch.num_received == STEPS, "ids")
                    server.kill()
                if loader.position == (2, 3):
                    server.restart()
                    wait_until(lambda: not client._connection.outage_s(), "the client to find the server again")
                num_rows[-1] += len(batch)
                loader.mean(loss_of(batch))
        assert num_rows == [N, MINI * STEPS, MINI * STEPS, N]
        assert experiment.export_scores().epoch == EPOCHS
        status = experiment.status()
    assert status.state == "finished"
    assert status.unreported_rows == N, "those of the epoch without a server"


def test_the_state_of_another_experiment_is_refused(client: evosample.Client, name: str) -> None:
    loader = ids_loader(client.create_experiment(name, **SETTINGS))
    with pytest.raises(evosample.InvalidArgumentError, match=f"experiment 'other', the loader to '{name}'"):
        loader.load_state_dict({"experiment": "other", "epoch": 0, "step": 0})


# What does not fit


WRONG_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "scalar": lambda losses: losses.mean(),
    "a column": lambda losses: losses[:, None],
    "one too many": lambda losses: torch.cat([losses, losses[:1]]),
}


@pytest.mark.parametrize("wrong", WRONG_SHAPES)
@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_scores_of_a_wrong_shape_are_refused_and_the_right_ones_may_follow(
    client: evosample.Client, name: str, wrong: str, micro_batch_size: int | None
) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    is_wrong = True

    def score(ids: Tensor) -> Tensor:
        return WRONG_SHAPES[wrong](loss_of(ids)) if is_wrong else loss_of(ids)

    loader = ids_loader(experiment, score=score, micro_batch_size=micro_batch_size)
    steps = go_through(loader, (1, 0))
    with pytest.raises(evosample.InvalidArgumentError, match=r"losses have shape .* expected \((8|16),\)") as told:
        next(iter(loader))
    assert told.value.field == "losses"
    assert loader.position == (1, 0)
    is_wrong = False
    assert steps + go_through(loader) == plain_steps(twin)
    assert_same_scores(experiment, twin)


@pytest.mark.parametrize("wrong", WRONG_SHAPES)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_losses_of_a_wrong_shape_are_refused_and_the_right_ones_may_follow(
    client: evosample.Client, name: str, wrong: str, micro_batch_size: int | None
) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    loader = ids_loader(experiment, micro_batch_size=micro_batch_size)
    for ids in itertools.chain.from_iterable(loader for _ in range(EPOCHS)):
        position, losses = loader.position, loss_of(ids)
        with pytest.raises(evosample.InvalidArgumentError, match=rf"expected \({len(ids)},\)") as told:
            loader.mean(WRONG_SHAPES[wrong](losses))
        assert told.value.field == "losses"
        assert loader.position == position
        loader.mean(losses)
    plain_steps(twin)
    assert_same_scores(experiment, twin)


@pytest.mark.parametrize("epoch", [0, 1])
def test_negative_losses_are_refused_and_right_ones_may_follow(client: evosample.Client, name: str, epoch: int) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    sign = 1

    def score(ids: Tensor) -> Tensor:
        return sign * loss_of(ids)

    loader = ids_loader(experiment, score=score)
    steps = go_through(loader, (epoch, 2))
    sign = -1
    with pytest.raises(evosample.InvalidArgumentError, match="expected losses >= 0"):
        loader.mean(score(next(iter(loader))))
    assert loader.position == (epoch, 2)
    sign = 1
    assert steps + go_through(loader) == plain_steps(twin)
    assert_same_scores(experiment, twin)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(N))


@pytest.mark.parametrize(
    ("options", "field", "said"),
    [
        ({"score": None}, "score", r"score=None: EvolvedSampling\(.*scores samples"),
        ({"dataset": Ids(N - 1)}, "dataset", r"dataset has 95 samples, experiment 'experiment-\d+' was created for 96"),
        ({"dataset": Stream()}, "dataset", "dataset=Stream: expected a map-style dataset"),
        ({"num_workers": 1, "in_order": False}, "in_order", "in_order=False"),
        ({"micro_batch_size": 0}, "micro_batch_size", "micro_batch_size=0: expected an integer from 1"),
    ],
)
def test_what_does_not_fit_the_experiment_is_told_at_once(
    client: evosample.Client, name: str, options: dict[str, Any], field: str, said: str
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    with pytest.raises(evosample.InvalidArgumentError, match=said) as told:
        ids_loader(experiment, **options)
    assert told.value.field == field


# All together


def test_a_model_learns_on_what_is_selected_and_pruned(client: evosample.Client, name: str) -> None:
    settings = SETTINGS | {"num_epochs": 30, "policy": evosample.EvolvedSampling(prune_ratio=0.25)}
    experiment = client.create_experiment(name, **settings)
    job = Job(experiment, make_model=lambda: torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0)))
    everything = default_collate([Points()[i] for i in range(N)])
    before = squared_errors(job.model, everything).mean()
    job.train((30, 0))
    after = squared_errors(job.model, everything).mean()
    assert before > 3
    assert after < 0.1
    assert len(job.steps) == experiment.total_steps
    assert experiment.export_scores().epoch == 30
    assert experiment.status().state == "finished"
