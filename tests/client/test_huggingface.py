from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from reviews import load_reviews, make_bert, make_tokenizer, tokenized
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
)

import evosample
from evosample.huggingface import Trainer
from evosample.torch import Loader, language_model_losses
from support import ServerProcess

N, EPOCHS, B, MINI, MICRO = 96, 5, 16, 8, 4
SETTINGS: dict[str, Any] = {
    "num_samples": N,
    "num_epochs": EPOCHS,
    "meta_batch_size": B,
    "mini_batch_size": MINI,
    "policy": evosample.EvolvedSampling(prune_ratio=0.25),
}
# By default the first epoch and the last are annealing: the others prune and select.
STEPS = [6, 4, 4, 4, 6]
MICRO_BATCHES = [4, 2, 2, 2, 4]
REVIEWS = load_reviews(N)
TOKENIZER = make_tokenizer(REVIEWS)
SAMPLES = tokenized(REVIEWS, TOKENIZER)
Tensor = torch.Tensor


class SampleFinder:
    """Tells by its tokens which sample a row is."""

    def __init__(self, samples: Any) -> None:
        self._ids = {tuple(sample["input_ids"]): sample_id for sample_id, sample in enumerate(samples)}
        assert len(self._ids) == len(samples)

    def __call__(self, input_ids: torch.Tensor) -> list[int]:
        return [self._ids[tuple(row[row != 0].tolist())] for row in input_ids]


ids_of = SampleFinder(SAMPLES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# Tasks: a small model with dropout, samples, a collator


def bert(kind: str = "SequenceClassification", **config: Any) -> Any:
    return make_bert(kind, TOKENIZER, **config)


def gpt() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=len(TOKENIZER), bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    model = GPT2LMHeadModel(config)
    model.generation_config.pad_token_id = 0
    return model


class Task:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.make_model: Callable[[], Any] = gpt if kind == "language model" else bert
        self.samples: Any = SAMPLES
        self.collate: Any = DataCollatorWithPadding(TOKENIZER)
        if kind == "language model":
            self.samples = [{"input_ids": sample["input_ids"]} for sample in SAMPLES]
            self.collate = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)

    def losses(self, model: Any, inputs: Any) -> Tensor:
        labels = inputs["labels"]
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        if self.kind == "language model":
            return language_model_losses(logits, labels)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


CLASSIFICATION = Task("classification")


def trained_on(model: Any) -> list[int]:
    """Goes on to list the samples of the model's forward passes with gradients."""
    ids: list[int] = []

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            ids.extend(ids_of(inputs["input_ids"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return ids


class Recorder(TrainerCallback):
    """What happens in training, and a stop in the middle of it."""

    def __init__(self, stop: int = 0, save: int = 0) -> None:
        self.events: list[str] = []
        self.epochs: list[float] = []
        self.num_tokens: list[int] = []
        self._stop, self._save = stop, save

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("epoch")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("step")

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("substep")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.epochs.append(state.epoch)
        self.num_tokens.append(state.num_input_tokens_seen)
        control.should_save |= state.global_step == self._save
        control.should_training_stop |= state.global_step == self._stop

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("end")


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": MICRO,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(defaults | options))


def make_trainer(
    experiment: evosample.Experiment,
    folder: Path,
    task: Task = CLASSIFICATION,
    *,
    recorder: Recorder | None = None,
    options: dict[str, Any] | None = None,
    **training_arguments: Any,
) -> Any:
    defaults: dict[str, Any] = {
        "train_dataset": task.samples,
        "eval_dataset": task.samples[:10],
        "data_collator": task.collate,
        "processing_class": TOKENIZER,
        "callbacks": [recorder] if recorder else [],
    }
    options = options or {}
    model = options.pop("model", None) or task.make_model()
    return Trainer(model, arguments(folder, **training_arguments), experiment=experiment, **(defaults | options))


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_same_scores(one: evosample.Experiment, other: evosample.Experiment) -> None:
    for column, other_column in zip(one.export_scores(), other.export_scores(), strict=True):
        np.testing.assert_array_equal(column, other_column)


# What is trained on


@pytest.mark.parametrize("prune_ratio", [0, 0.25])
@pytest.mark.parametrize("kind", ["classification", "language model"])
def test_training_is_that_of_a_plain_loop(
    client: evosample.Client, name: str, tmp_path: Path, kind: str, prune_ratio: float
) -> None:
    task = Task(kind)
    settings = SETTINGS | {"policy": evosample.EvolvedSampling(prune_ratio=prune_ratio)}
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **settings) for suffix in ("", "-twin"))

    trainer = make_trainer(experiment, tmp_path, task, weight_decay=0.01, max_grad_norm=0.5, warmup_steps=3)
    ids = trained_on(trainer.model)
    torch.manual_seed(1)
    trainer.train()

    model = task.make_model().train()
    plain_ids = trained_on(model)
    decayed = set(trainer.get_decay_parameter_names(model))
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        optimizer, 3, twin.total_steps
    )

    def losses(inputs: Any) -> Tensor:
        return task.losses(model, inputs)

    loader = Loader(
        task.samples,
        twin,
        model=model,
        score=losses,
        micro_batch_size=MICRO,
        collate_fn=task.collate,
    )
    torch.manual_seed(1)
    for _ in range(EPOCHS):
        for inputs in loader:
            loader.mean(losses(inputs)).backward()  # type: ignore[no-untyped-call]
            if loader.ends_step:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    assert ids == plain_ids
    assert_same(dict(trainer.model.state_dict()), dict(model.state_dict()))
    assert_same_scores(experiment, twin)
    assert experiment.status().state == "finished"


def test_only_the_chosen_rows_are_back_propagated_and_a_step_is_one_of_the_experiment(
    client: evosample.Client, name: str, tmp_path: Path
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    recorder = Recorder()
    trainer = make_trainer(experiment, tmp_path, recorder=recorder)
    num_backward: list[int] = []
    trainer.model.classifier.weight.register_hook(lambda _: num_backward.append(trainer.loader.position.epoch))
    trainer.train()
    expected = []
    for num_steps, num_micro_batches in zip(STEPS, MICRO_BATCHES, strict=True):
        expected += ["epoch", *(["step"] + ["substep"] * (num_micro_batches - 1)) * num_steps, "end"]
    assert recorder.events == expected
    assert len(num_backward) == sum(np.multiply(STEPS, MICRO_BATCHES))
    assert trainer.state.global_step == experiment.total_steps == sum(STEPS)


def test_epochs_and_schedule_go_by_the_experiment(client: evosample.Client, name: str, tmp_path: Path) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    recorder = Recorder()
    given = arguments(tmp_path)
    trainer = make_trainer(experiment, tmp_path, recorder=recorder)
    trainer.train()
    epochs = [epoch + (step + 1) / num_steps for epoch, num_steps in enumerate(STEPS) for step in range(num_steps)]
    assert recorder.epochs == pytest.approx(epochs)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    total = sum(STEPS)
    assert rates == pytest.approx([1e-3 * (1 - step / total) for step in range(total)])
    assert (trainer.state.max_steps, trainer.state.num_train_epochs) == (total, EPOCHS)
    assert (given.max_steps, given.num_train_epochs) == (-1, 3)  # the caller's own


def test_the_loss_logged_and_the_tokens_counted_are_those_of_the_chosen_rows(
    client: evosample.Client, name: str, tmp_path: Path
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    recorder = Recorder()
    losses: list[list[float]] = []
    num_tokens: list[int] = []

    def noted(model: Any, inputs: Any) -> Tensor:
        found = CLASSIFICATION.losses(model, inputs)
        if torch.is_grad_enabled():
            losses.append(found.tolist())
            num_tokens.append(int(inputs["attention_mask"].sum()))
        return found

    options = {"per_sample_losses": noted}
    settings: dict[str, Any] = {"include_num_input_tokens_seen": "non_padding"}
    trainer = make_trainer(experiment, tmp_path, recorder=recorder, options=options, **settings)
    trainer.train()
    ends = np.cumsum([n for n, num_steps in zip(MICRO_BATCHES, STEPS, strict=True) for _ in range(num_steps)])
    assert recorder.num_tokens == np.cumsum(num_tokens)[ends - 1].tolist()
    means = [np.mean(losses[first:stop]) for first, stop in zip([0, *ends[:-1]], ends, strict=True)]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(means, rel=1e-5)
    assert trainer.state.total_flos > 0


def test_evaluation_and_prediction_are_those_of_the_plain_trainer(
    client: evosample.Client, name: str, tmp_path: Path
) -> None:
    def metrics(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    experiment = client.create_experiment(name, **SETTINGS)
    options = {"compute_metrics": metrics}
    trainer = make_trainer(experiment, tmp_path, options=options, eval_strategy="steps", eval_steps=9)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [9, 18, 24]
    plain = transformers.Trainer(
        trainer.model,
        arguments(tmp_path),
        eval_dataset=SAMPLES[:10],
        data_collator=CLASSIFICATION.collate,
        compute_metrics=metrics,
    )
    found, expected = trainer.evaluate(), plain.evaluate()
    for metric in ("eval_loss", "eval_accuracy"):
        assert found[metric] == expected[metric] == evaluations[-1][metric]
    assert_same(trainer.predict(SAMPLES).predictions, plain.predict(SAMPLES).predictions)


def test_mixed_precision_holds_for_scoring_and_for_training(
    client: evosample.Client, name: str, tmp_path: Path
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    trainer = make_trainer(experiment, tmp_path, bf16=True)
    seen = set()
    layer = trainer.model.pre_classifier
    layer.register_forward_hook(lambda _, __, output: seen.add((output.dtype, torch.is_grad_enabled())))
    trainer.train()
    assert seen == {(torch.bfloat16, True), (torch.bfloat16, False)}
    assert experiment.export_scores().num_visits.min() > 0


def test_a_model_is_scored_as_it_is_trained(client: evosample.Client, name: str, tmp_path: Path) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    modes = set()

    def noted(model: Any, inputs: Any) -> Tensor:
        modes.add(model.training)
        return CLASSIFICATION.losses(model, inputs)

    options = {"per_sample_losses": noted, "model": CLASSIFICATION.make_model().eval()}
    make_trainer(experiment, tmp_path, options=options, eval_strategy="steps", eval_steps=1).train()
    assert modes == {True}


# The losses of each sample


def t5() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "decoder_start_token_id": 0,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
    }
    config = transformers.T5Config(vocab_size=len(TOKENIZER), **sizes)
    return transformers.T5ForConditionalGeneration(config)


def token_labels(input_ids: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask == 1, input_ids % 2, -100)


def own_labels(input_ids: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask == 1, input_ids, -100)


LABELLED: dict[str, tuple[Callable[[], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "classes": (lambda: bert(num_labels=3), lambda ids, _: ids[:, 0] % 3),
    "a number": (lambda: bert(num_labels=1), lambda ids, _: ids[:, 0] / 100),
    "numbers": (
        lambda: bert(num_labels=2, problem_type="regression"),
        lambda ids, _: ids[:, :2] / 100,
    ),
    "several classes": (
        lambda: bert(num_labels=2),
        lambda ids, _: (ids[:, :2] % 2).float(),
    ),
    "tags": (lambda: bert("TokenClassification"), token_labels),
    "masked words": (lambda: bert("MaskedLM"), own_labels),
    "next words": (gpt, own_labels),
    "translation": (t5, own_labels),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_the_default_losses_are_the_model_s_own_of_each_sample_by_itself(
    client: evosample.Client, name: str, tmp_path: Path, kind: str
) -> None:
    make_model, make_labels = LABELLED[kind]
    model = make_model()

    def collate(samples: list[dict[str, Any]]) -> Any:
        batch = TOKENIZER.pad([{"input_ids": sample["input_ids"]} for sample in samples], return_tensors="pt")
        labels = make_labels(batch["input_ids"], batch["attention_mask"])
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    experiment = client.create_experiment(name, **SETTINGS)
    trainer = make_trainer(experiment, tmp_path, options={"model": model, "data_collator": collate})
    losses = trainer._per_sample_losses
    model.eval()
    with torch.no_grad():
        for first in range(0, N, 4):  # the first 20 batches tell which losses these are
            batch = collate(SAMPLES[first : first + 4])
            own = [model(**{key: value[row : row + 1] for key, value in batch.items()}).loss for row in range(4)]
            torch.testing.assert_close(losses(model, batch), torch.stack(own), rtol=1e-4, atol=1e-5)


class Odd(torch.nn.Module):
    """A classifier that returns what a function makes of its logits and labels."""

    def __init__(self, outputs: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.inner = bert()
        self.outputs = outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.outputs(self.inner(input_ids, attention_mask).logits, labels)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (
            lambda logits, labels: {"logits": logits, "loss": weighted(logits, labels)},
            r"the model's own loss is [\d.]+, but the mean of what fits its logits is [\d.]+: ",
        ),
        (lambda logits, _: {"logits": logits}, "the model returns no loss of its own to go by: "),
        (lambda logits, labels: {"loss": weighted(logits, labels)}, "the model returns no logits but loss: "),
        (lambda logits, _: logits, "the model returns no logits but Tensor: "),
        (
            lambda logits, labels: {"logits": logits[:, None], "loss": weighted(logits, labels)},
            r"logits have shape \(4, 1, 2\) and labels torch.int64 \(4,\): ",
        ),
    ],
)
def test_where_the_losses_of_samples_cannot_be_told_a_function_is_asked_for(
    client: evosample.Client,
    name: str,
    tmp_path: Path,
    outputs: Callable[[Tensor, Tensor], dict[str, Tensor]],
    said: str,
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    trainer = make_trainer(experiment, tmp_path, options={"model": Odd(outputs)})
    with pytest.raises(evosample.InvalidArgumentError, match=said + r".*Pass the trainer per_sample_losses"):
        trainer.train()


def test_a_model_of_one_s_own_always_gets_its_labels(client: evosample.Client, name: str, tmp_path: Path) -> None:
    def outputs(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    experiment = client.create_experiment(name, **SETTINGS)
    trainer = make_trainer(experiment, tmp_path, options={"model": Odd(outputs)})
    trainer.train()
    assert trainer.state.global_step == experiment.total_steps


def test_samples_without_labels_are_told(client: evosample.Client, name: str, tmp_path: Path) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    samples = [dict(TOKENIZER(review.text)) for review in REVIEWS]
    trainer = make_trainer(experiment, tmp_path, options={"train_dataset": samples})
    with pytest.raises(evosample.InvalidArgumentError, match=r"no tensor of labels, only input_ids, attention_mask"):
        trainer.train()


# Stopping and resuming


class Finished:
    """What a training has led to."""

    def __init__(self, trainer: Any, ids: list[int], experiment: evosample.Experiment) -> None:
        self.ids = ids
        self.weights = dict(trainer.model.state_dict())
        self.optimizer = trainer.optimizer.state_dict()["state"]
        self.experiment = experiment
        self.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.epochs = [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("huggingface-undisturbed", **SETTINGS)
        trainer = make_trainer(experiment, tmp_path_factory.mktemp("undisturbed"))
        ids = trained_on(trainer.model)
        trainer.train()
        yield Finished(trainer, ids, experiment)


@pytest.mark.parametrize("num_steps", [2, 6, 8, 10, 19])
def test_a_resumed_training_ends_bit_by_bit_as_if_it_had_never_stopped(
    server: ServerProcess, name: str, tmp_path: Path, undisturbed: Finished, num_steps: int
) -> None:
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment(name, **SETTINGS)
        stop = min(num_steps + 13, sum(STEPS) - 1)  # several epochs later, which the server has let go of
        recorder = Recorder(stop=stop, save=num_steps)
        trainer = make_trainer(experiment, tmp_path, recorder=recorder)
        ids = trained_on(trainer.model)
        trainer.train()
        assert trainer.state.global_step == stop
    ends = np.cumsum([n * MICRO for steps, n in zip(STEPS, MICRO_BATCHES, strict=True) for n in [n] * steps])
    del ids[ends[num_steps - 1] :]
    with evosample.connect(server.address) as client:
        experiment = client.get_experiment(name)
        resumed = make_trainer(experiment, tmp_path)
        resumed_ids = trained_on(resumed.model)
        resumed.train(resume_from_checkpoint=True)
        found = Finished(resumed, ids + resumed_ids, experiment)
        assert found.ids == undisturbed.ids
        assert_same(found.weights, undisturbed.weights)
        assert_same(found.optimizer, undisturbed.optimizer)
        assert found.losses == undisturbed.losses
        assert found.epochs == pytest.approx(undisturbed.epochs)
        assert_same_scores(experiment, undisturbed.experiment)


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_random_masks_go_on_where_they_stopped(
    client: evosample.Client, name: str, tmp_path: Path, strategy: str
) -> None:
    def trainer(experiment: evosample.Experiment, folder: str, recorder: Recorder) -> Any:
        options = {"model": bert("MaskedLM"), "data_collator": DataCollatorForLanguageModeling(TOKENIZER, mlm=True)}
        saving: dict[str, Any] = {"save_strategy": strategy, "save_steps": 8, "eval_strategy": "epoch"}
        return make_trainer(experiment, tmp_path / folder, recorder=recorder, options=options, **saving)

    weights = []
    for stop in (0, 10):
        experiment = client.create_experiment(f"{name}-{stop}", **SETTINGS)
        first = trainer(experiment, str(stop), Recorder(stop=stop))
        first.train()
        if stop:
            first = trainer(experiment, str(stop), Recorder())
            first.train(resume_from_checkpoint=True)
        weights.append(dict(first.model.state_dict()))
    assert_same(*weights)


def test_a_checkpoint_without_a_position_is_refused(client: evosample.Client, name: str, tmp_path: Path) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    make_trainer(experiment, tmp_path, recorder=Recorder(stop=2, save=2)).train()
    (tmp_path / "checkpoint-2/evosample.json").unlink()
    with pytest.raises(evosample.InvalidArgumentError, match=r"checkpoint-2': its evosample.json.* is missing"):
        make_trainer(experiment, tmp_path).train(resume_from_checkpoint=True)


def test_a_training_does_not_begin_in_the_middle_of_an_experiment(
    client: evosample.Client, name: str, tmp_path: Path
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    make_trainer(experiment, tmp_path, recorder=Recorder(stop=7)).train()
    with pytest.raises(evosample.UsageError, match=r"stands at epoch 1: pass train\(resume_from_checkpoint"):
        make_trainer(experiment, tmp_path).train()


def test_an_epoch_is_not_ended_by_a_callback(client: evosample.Client, name: str, tmp_path: Path) -> None:
    class Impatient(Recorder):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = True

    trainer = make_trainer(client.create_experiment(name, **SETTINGS), tmp_path, recorder=Impatient())
    with pytest.raises(evosample.UsageError, match="should_epoch_stop before the end of epoch 0"):
        trainer.train()


# What is refused


class Overriding(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs).loss


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(SAMPLES)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_steps": 10}, "max_steps"),
        ({"num_train_epochs": 100}, "num_train_epochs"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"dataloader_in_order": False}, "dataloader_in_order"),
        ({"label_smoothing_factor": 0.1}, "per_sample_losses"),
        ({"options": {"compute_loss_func": sum}}, "per_sample_losses"),
    ],
)
def test_what_contradicts_the_experiment_is_told_at_once(
    client: evosample.Client, name: str, tmp_path: Path, options: dict[str, Any], field: str
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    with pytest.raises(evosample.InvalidArgumentError, match=field) as caught:
        make_trainer(experiment, tmp_path, **options)
    assert caught.value.field == field


@pytest.mark.parametrize("gradient_accumulation_steps", [1, B // MICRO])
def test_what_agrees_with_the_experiment_may_be_said(
    client: evosample.Client, name: str, tmp_path: Path, gradient_accumulation_steps: int
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    said: dict[str, Any] = {
        "max_steps": experiment.total_steps,
        "num_train_epochs": EPOCHS,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    make_trainer(experiment, tmp_path, **said)


def test_a_loss_of_a_batch_is_refused_where_that_of_samples_is_needed(
    client: evosample.Client, name: str, tmp_path: Path
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    with pytest.raises(evosample.InvalidArgumentError, match="Overriding overrides compute_loss"):
        Overriding(CLASSIFICATION.make_model(), arguments(tmp_path), experiment=experiment)


@pytest.mark.parametrize(
    ("dataset", "said"), [(None, "train_dataset=None"), (Stream(), "map-style"), (SAMPLES[1:], "95")]
)
def test_a_dataset_that_does_not_fit_is_told_before_training(
    client: evosample.Client, name: str, tmp_path: Path, dataset: Any, said: str
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    trainer = make_trainer(experiment, tmp_path, options={"train_dataset": dataset})
    with pytest.raises(evosample.InvalidArgumentError, match=said):
        trainer.train()


# Several processes


def test_two_processes_take_their_parts_and_keep_their_buffers_alike(
    client: evosample.Client, name: str, server: ServerProcess, tmp_path: Path
) -> None:
    job = Path(__file__).parents[1] / "huggingface_job.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(job), server.address, name, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for of_first, of_second in zip(first["buffers"], second["buffers"], strict=True):
        assert torch.equal(of_first, of_second)
    assert len(first["buffers"]) == sum(STEPS)
    for key, value in first["model"].items():
        if "running" not in key:  # each process's last forward pass
            assert torch.equal(value, second["model"][key]), key
    steps = zip(first["loaded"], second["loaded"], strict=True)
    twin = client.create_experiment(f"{name}-twin", **SETTINGS)
    planned = [batch.sample_ids.tolist() for batch in next(twin.epochs(read_ahead=N))]
    assert [one + other for one, other in steps][: STEPS[0]] == planned
