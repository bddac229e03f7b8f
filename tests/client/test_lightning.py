from __future__ import annotations

import itertools
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Subset

import evosample
import lightning_job
from evosample.lightning import DataModule
from lightning_job import (
    EPOCHS,
    ESWP,
    MINI,
    SETTINGS,
    STEPS,
    B,
    Batch,
    Digits,
    Net,
    ValidatedNet,
    quiet_trainer,
    train_plainly,
)
from support import ServerProcess

ESWP_STEPS = [12, 9, 9, 12]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),  # by Lightning
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def assert_same_scores(one: evosample.Experiment, other: evosample.Experiment) -> None:
    """Bit for bit."""
    for column, other_column in zip(one.export_scores(), other.export_scores(), strict=True):
        np.testing.assert_array_equal(column, other_column)


def assert_same_models(one: LightningModule, other: LightningModule) -> None:
    """Bit for bit, parameters and buffers."""
    for (key, value), other_value in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, other_value), key


def validation_loader() -> DataLoader[Batch]:
    return DataLoader(Subset(Digits(), range(100)), batch_size=50)


# What is trained on


@pytest.mark.parametrize(
    "policy", [evosample.EvolvedSampling(), ESWP, evosample.RandomSubset(prune_ratio=0.25), evosample.Uniform()]
)
def test_fit_trains_bit_by_bit_as_a_plain_loop_does(
    client: evosample.Client, name: str, policy: evosample.Policy
) -> None:
    experiment, twin = (client.create_experiment(f"{name}{end}", **SETTINGS, policy=policy) for end in ("", "-twin"))
    net, plain = (Net(experiment.total_steps, dropout=0.2) for _ in range(2))
    torch.manual_seed(1)
    quiet_trainer().fit(net, DataModule(Digits(), experiment))
    torch.manual_seed(1)
    train_plainly(twin, plain)
    assert net.steps == plain.steps
    assert_same_models(net, plain)
    assert_same_scores(experiment, twin)
    assert experiment.status().state == "finished"


# Going on


class Saving(Callback):
    """Saves a checkpoint once."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Crash(Callback):
    """Ends training with an error before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


# Trainers are told in either way how long to train; in the second, Lightning resumes differently.
WITH_VALIDATION = ({"max_epochs": -1}, True)
BY_STEPS = ({"max_steps": sum(ESWP_STEPS)}, False)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("saved_step", "when", "limit", "validates"),
    [
        *((step, {"every_n_train_steps": step}, *how) for step in (1, 15, 41) for how in (WITH_VALIDATION, BY_STEPS)),
        *((21, {"every_n_train_steps": 21}, *how) for how in (WITH_VALIDATION, BY_STEPS)),  # an epoch's last
        *((21, {"save_on_train_epoch_end": True}, *how) for how in (WITH_VALIDATION, BY_STEPS)),
        (21, {"save_on_train_epoch_end": False}, *WITH_VALIDATION),  # Lightning saves after validation
    ],
)
def test_a_resumed_job_ends_bit_by_bit_as_if_it_had_never_stopped(
    server: ServerProcess,
    name: str,
    tmp_path: Path,
    saved_step: int,
    when: dict[str, Any],
    limit: dict[str, int],
    validates: bool,
) -> None:
    make, loaders = (ValidatedNet, validation_loader()) if validates else (Net, None)

    def trainer(*callbacks: Callback) -> Trainer:
        save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when)
        return quiet_trainer(**limit, callbacks=[save, *callbacks], enable_checkpointing=True)

    with evosample.connect(server.address) as client:
        experiment, twin = (client.create_experiment(f"{name}{end}", **SETTINGS, policy=ESWP) for end in ("", "-twin"))
        undisturbed, begun = (make(experiment.total_steps) for _ in range(2))
        quiet_trainer(**limit).fit(undisturbed, DataModule(Digits(), twin, val_dataloaders=loaders))
        crash = Crash(min(saved_step + 2, sum(ESWP_STEPS) - 1))
        with pytest.raises(InterruptedError):
            trainer(crash).fit(begun, DataModule(Digits(), experiment, val_dataloaders=loaders))
    with evosample.connect(server.address) as client:
        experiment, twin = (client.get_experiment(f"{name}{end}") for end in ("", "-twin"))
        resumed, resumer = make(experiment.total_steps), trainer()
        data = DataModule(Digits(), experiment, val_dataloaders=loaders)
        resumer.fit(resumed, data, ckpt_path=tmp_path / f"step={saved_step}.ckpt")
        assert begun.steps[:saved_step] + resumed.steps == undisturbed.steps
        assert_same_models(resumed, undisturbed)
        assert_same_scores(experiment, twin)
        assert resumer.global_step == sum(ESWP_STEPS)


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_a_checkpoint_of_the_end_leaves_nothing_to_train(client: evosample.Client, name: str, tmp_path: Path) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    net, again = Net(experiment.total_steps), Net(experiment.total_steps)
    trainer = quiet_trainer()
    trainer.fit(net, DataModule(Digits(), experiment))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    quiet_trainer().fit(again, DataModule(Digits(), experiment), ckpt_path=tmp_path / "end.ckpt")
    assert again.steps == []
    assert_same_models(net, again)


def test_a_fit_after_another_goes_on_where_that_one_stopped(client: evosample.Client, name: str) -> None:
    experiment, twin = (client.create_experiment(f"{name}{end}", **SETTINGS, policy=ESWP) for end in ("", "-twin"))
    undisturbed, first, second = (Net(experiment.total_steps) for _ in range(3))
    train_plainly(twin, undisturbed)
    data = DataModule(Digits(), experiment)
    quiet_trainer(max_epochs=2).fit(first, data)
    assert data.loader.position == (2, 0)
    quiet_trainer(max_steps=5).fit(first, data)
    assert data.loader.position == (2, 5)
    quiet_trainer().fit(second, data)
    assert first.steps[:21] == undisturbed.steps[:21]  # then the optimizer and its momentum are new
    assert len(second.steps) == sum(ESWP_STEPS) - 26
    assert second.layers[2].num_batches_tracked == 16, "scoring disturbs the second model"


def test_the_last_checkpoint_can_be_resumed_however_far_training_has_gone_on(
    client: evosample.Client, name: str, tmp_path: Path
) -> None:
    experiment = client.create_experiment(name, **SETTINGS, policy=ESWP)
    callbacks = [Saving(tmp_path / "saved.ckpt", 5), Crash(35)]  # in the last epoch; the server retains two
    with pytest.raises(InterruptedError):
        quiet_trainer(callbacks=callbacks).fit(Net(experiment.total_steps), DataModule(Digits(), experiment))
    resumed = Net(experiment.total_steps)
    quiet_trainer().fit(resumed, DataModule(Digits(), experiment), ckpt_path=tmp_path / "saved.ckpt")
    assert len(resumed.steps) == sum(ESWP_STEPS) - 5


def test_testing_a_checkpoint_leaves_training_where_it_was(client: evosample.Client, name: str, tmp_path: Path) -> None:
    class Tested(ValidatedNet):
        def test_step(self, batch: Batch, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    experiment = client.create_experiment(name, **SETTINGS, policy=ESWP)
    data = DataModule(Digits(), experiment, val_dataloaders=validation_loader())
    data.test_dataloader = validation_loader  # type: ignore[method-assign]
    net = Tested(experiment.total_steps)
    first = quiet_trainer(max_epochs=1)
    first.fit(net, data)
    first.save_checkpoint(tmp_path / "first.ckpt")
    quiet_trainer(max_epochs=1).fit(net, data)
    for evaluate in ("validate", "test"):
        getattr(quiet_trainer(), evaluate)(net, data, ckpt_path=tmp_path / "first.ckpt", verbose=False)
        assert data.loader.position == (2, 0)
    quiet_trainer().fit(net, data)
    assert len(net.steps) == sum(ESWP_STEPS)


# How it fits into Lightning


class Log(Callback):
    """Notes what Lightning tells."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append(("begin", trainer.global_step))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.events.append(("validate", trainer.global_step))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append(("end", trainer.global_step))


@pytest.mark.parametrize("limit", [{"max_epochs": -1}, {"max_epochs": 1000}, {"max_steps": sum(ESWP_STEPS)}])
def test_a_trainers_epochs_are_those_of_the_experiment_and_training_ends_with_the_last(
    client: evosample.Client, name: str, limit: dict[str, int]
) -> None:
    experiment = client.create_experiment(name, **SETTINGS, policy=ESWP)
    trainer = quiet_trainer(**limit, callbacks=[log := Log()])
    data = DataModule(Digits(), experiment, val_dataloaders=validation_loader())
    trainer.fit(ValidatedNet(experiment.total_steps), data)
    ends = np.cumsum([0, *ESWP_STEPS]).tolist()
    assert log.events == [
        event
        for first, stop in itertools.pairwise(ends)
        for event in (("begin", first), ("validate", stop), ("end", stop))
    ]
    assert trainer.current_epoch == EPOCHS
    assert data.loader.progress == 1


def test_validation_every_few_steps_is_possible(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS, policy=ESWP)
    data = DataModule(Digits(), experiment, val_dataloaders=validation_loader())
    trainer = quiet_trainer(val_check_interval=10, check_val_every_n_epoch=None, callbacks=[log := Log()])
    trainer.fit(ValidatedNet(experiment.total_steps), data)
    assert [step for event, step in log.events if event == "validate"] == [10, 20, 30, 40, 42]


def test_max_steps_tells_schedulers_how_long_training_is(client: evosample.Client, name: str) -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            self.total_steps = int(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    experiment = client.create_experiment(name, **SETTINGS, policy=ESWP)
    net = Scheduled(0)
    quiet_trainer(max_steps=experiment.total_steps).fit(net, DataModule(Digits(), experiment))
    assert net.total_steps == sum(ESWP_STEPS) == len(net.steps)


def test_accumulated_steps_are_those_of_a_plain_loop_that_accumulates(client: evosample.Client, name: str) -> None:
    experiment, twin = (client.create_experiment(f"{name}{end}", **SETTINGS, policy=ESWP) for end in ("", "-twin"))
    net, plain = (Net(experiment.total_steps) for _ in range(2))
    trainer = quiet_trainer(accumulate_grad_batches=2)
    trainer.fit(net, DataModule(Digits(), experiment))
    train_plainly(twin, plain, accumulate=2)
    assert trainer.global_step == 6 + 5 + 5 + 6  # Lightning steps the optimizer at an epoch's end, too
    assert net.steps == plain.steps
    assert_same_models(net, plain)
    assert_same_scores(experiment, twin)


@pytest.mark.parametrize(
    ("precision", "dtypes"),
    [
        ("bf16-mixed", (torch.float32, torch.bfloat16)),
        ("bf16-true", (torch.bfloat16, torch.bfloat16)),
        ("64-true", (torch.float64, torch.float64)),
    ],
)
def test_scoring_is_done_in_the_trainers_precision(
    client: evosample.Client, name: str, precision: Any, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    class Noting(Net):
        def per_sample_losses(self, batch: Batch) -> torch.Tensor:
            noted.add((torch.is_grad_enabled(), batch[1].dtype, self.layers(batch[1]).dtype))
            return super().per_sample_losses(batch)

    noted: set[tuple[bool, torch.dtype, torch.dtype]] = set()
    experiment = client.create_experiment(name, **SETTINGS)
    quiet_trainer(precision=precision).fit(Noting(experiment.total_steps), DataModule(Digits(), experiment))
    assert noted == {(False, *dtypes), (True, *dtypes)}


@pytest.mark.filterwarnings("ignore:You have overridden .* in both `LightningModule` and `LightningDataModule`")
def test_a_modules_hooks_change_the_samples_before_they_are_scored(client: evosample.Client, name: str) -> None:
    class Hooked(ValidatedNet):
        def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
            sizes.append(("before", len(batch[0])))
            return batch[0], batch[1] + 1, batch[2]

        def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
            return batch[0], batch[1] * 2, batch[2]

        def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
            sizes.append(("after", len(batch[0])))
            return batch[0], batch[1] - 1, batch[2]

        def per_sample_losses(self, batch: Batch) -> torch.Tensor:
            images = torch.stack([Digits()[i][1] for i in batch[0].tolist()])
            assert torch.equal(batch[1], (images + 1) * 2 - 1)
            sizes.append(("losses", len(batch[0])))
            return super().per_sample_losses(batch)

    sizes: list[tuple[str, int]] = []
    experiment = client.create_experiment(name, **SETTINGS)
    data = DataModule(Digits(), experiment, val_dataloaders=validation_loader())
    quiet_trainer(max_epochs=2, num_sanity_val_steps=0).fit(Hooked(experiment.total_steps), data)
    validation = [(what, 50) for _ in range(2) for what in ("before", "after", "losses")]
    annealing = [(what, B) for what in ("before", "after", "losses")]
    selecting = [*annealing, ("losses", MINI)]
    assert sizes == annealing * STEPS + validation + selecting * STEPS + validation


def test_another_method_may_score(client: evosample.Client, name: str) -> None:
    class Cheap(Net):
        def cheap(self, batch: Batch) -> torch.Tensor:
            sizes.add(len(batch[0]))
            return self.per_sample_losses(batch)

    sizes: set[int] = set()
    experiment = client.create_experiment(name, **SETTINGS)
    quiet_trainer().fit(Cheap(experiment.total_steps), DataModule(Digits(), experiment, score="cheap"))
    assert sizes == {B}


def test_a_trial_run_takes_a_step_of_the_experiment(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    net = Net(experiment.total_steps)
    quiet_trainer(fast_dev_run=True, max_epochs=None).fit(net, DataModule(Digits(), experiment))
    assert len(net.steps) == 1


def test_two_processes_train_bit_by_bit_as_a_plain_loop_with_ddp(
    server: ServerProcess, client: evosample.Client, name: str, tmp_path: Path
) -> None:
    experiment, twin = (client.create_experiment(f"{name}{end}", **SETTINGS, policy=ESWP) for end in ("", "-twin"))
    subprocess.run([sys.executable, lightning_job.__file__, server.address, name, tmp_path], check=True, timeout=120)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for result in results:
        net, plain = result["lightning"], result["plain"]
        assert net["steps"] == plain["steps"]
        for found in ("means", "state"):
            torch.testing.assert_close(net[found], plain[found], rtol=0, atol=0)
    ranks = [result["lightning"] for result in results]
    for key, value in ranks[0]["state"].items():
        if "running" not in key:
            assert torch.equal(value, ranks[1]["state"][key]), key
    torch.testing.assert_close(ranks[0]["means"], ranks[1]["means"], rtol=0, atol=0)  # as DDP has it: scoring or not
    for step, (ids, others) in enumerate(zip(ranks[0]["steps"], ranks[1]["steps"], strict=True)):
        assert len({*ids, *others}) == (B if step < 12 or step >= 30 else MINI)
    assert_same_scores(experiment, twin)


# What can't be


def test_a_step_whose_losses_are_not_handed_over_is_an_error_at_the_next(client: evosample.Client, name: str) -> None:
    class Skipping(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None if self.trainer.global_step == 14 else super().training_step(batch, batch_idx)

    experiment = client.create_experiment(name, **SETTINGS)
    with (
        pytest.warns(UserWarning, match="`training_step` returned `None`"),
        pytest.raises(
            evosample.UsageError, match=r"datamodule\.mean\(losses\) .* step 2 of epoch 1 were not handed over"
        ),
    ):
        quiet_trainer().fit(Skipping(experiment.total_steps), DataModule(Digits(), experiment))


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_there_is_no_more_training_than_the_experiment_has(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    net = Net(experiment.total_steps)
    quiet_trainer(min_steps=1000, max_epochs=10).fit(net, DataModule(Digits(), experiment))
    assert len(net.steps) == experiment.total_steps
    with pytest.raises(evosample.FailedPreconditionError, match="finished"):
        quiet_trainer().fit(Net(experiment.total_steps), DataModule(Digits(), experiment))


@pytest.mark.parametrize("limit", [{"limit_train_batches": 5}, {"limit_train_batches": 0.5}, {"overfit_batches": 1}])
def test_limits_that_cut_epochs_are_refused(client: evosample.Client, name: str, limit: dict[str, Any]) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    with pytest.raises(evosample.InvalidArgumentError, match="limit_train_batches or overfit_batches is"):
        quiet_trainer(**limit).fit(Net(experiment.total_steps), DataModule(Digits(), experiment))


def test_a_module_without_the_method_that_scores_is_refused(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    with pytest.raises(evosample.InvalidArgumentError, match=r"Net has no method losses\(batch\)"):
        quiet_trainer().fit(Net(experiment.total_steps), DataModule(Digits(), experiment, score="losses"))


@pytest.mark.parametrize("option", [{"device": "cpu"}, {"micro_batch_size": 4}, {"model": None}, {"read_ahead": 1}])
def test_what_is_up_to_lightning_is_refused(client: evosample.Client, name: str, option: dict[str, Any]) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match=f"{next(iter(option))}=.*(Lightning|passed to fit)"):
        DataModule(Digits(), client.create_experiment(name, **SETTINGS), **option)


def test_without_a_trainer_there_is_no_loader(client: evosample.Client, name: str) -> None:
    data = DataModule(Digits(), client.create_experiment(name, **SETTINGS))
    with pytest.raises(evosample.UsageError, match=r"pass it to Trainer\.fit"):
        data.mean(torch.zeros(3))


def test_a_data_module_of_one_s_own_may_make_its_dataset_in_setup(client: evosample.Client, name: str) -> None:
    class Own(DataModule):
        def setup(self, stage: str) -> None:
            self.dataset = Digits()

    experiment = client.create_experiment(name, **SETTINGS)
    net = Net(experiment.total_steps)
    quiet_trainer().fit(net, Own(None, experiment))
    assert len(net.steps) == experiment.total_steps
    with pytest.raises(evosample.InvalidArgumentError, match=r"dataset=None: .* set self.dataset in setup"):
        quiet_trainer().fit(net, DataModule(None, experiment))


def test_a_data_module_that_would_change_batches_itself_is_told_where_to(client: evosample.Client, name: str) -> None:
    class Augmenting(DataModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    experiment = client.create_experiment(name, **SETTINGS)
    with pytest.raises(evosample.UsageError, match=r"Augmenting overrides on_after_batch_transfer.*LightningModule"):
        quiet_trainer().fit(Net(experiment.total_steps), Augmenting(Digits(), experiment))


@pytest.mark.parametrize(
    ("limit", "is_told"), [({"max_epochs": 2}, True), ({"max_epochs": EPOCHS}, False), ({}, False)]
)
def test_a_trainer_that_ends_before_the_experiment_is_told(
    client: evosample.Client, name: str, caplog: pytest.LogCaptureFixture, limit: dict[str, int], is_told: bool
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    quiet_trainer(**limit).fit(Net(experiment.total_steps), DataModule(Digits(), experiment))
    assert ("its last ones are left out" in caplog.text) == is_told


def test_an_epoch_that_lightning_takes_for_a_whole_one_is_told(
    client: evosample.Client, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    stopped = quiet_trainer(max_steps=STEPS + 2)
    stopped.fit(Net(experiment.total_steps), DataModule(Digits(), experiment))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    experiment.pin_epoch("stopped", 1)
    resumed = Net(experiment.total_steps)
    path = tmp_path / "stopped.ckpt"
    quiet_trainer(max_epochs=EPOCHS).fit(resumed, DataModule(Digits(), experiment), ckpt_path=path)
    assert "Trainer(max_epochs=4) has 2 epochs left, the experiment 3" in caplog.text
    again = Net(experiment.total_steps)
    quiet_trainer(max_steps=experiment.total_steps).fit(again, DataModule(Digits(), experiment), ckpt_path=path)
    assert len(again.steps) == experiment.total_steps - STEPS - 2


def test_persistent_workers_end_with_fit(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    data = DataModule(Digits(), experiment, num_workers=1, persistent_workers=True)
    quiet_trainer(max_epochs=1).fit(Net(experiment.total_steps), data)
    assert not multiprocessing.active_children()
    quiet_trainer().fit(net := Net(experiment.total_steps), data)
    assert len(net.steps) == experiment.total_steps - STEPS
