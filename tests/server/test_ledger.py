"""The ledger: what an export says of each sample's past, in Python and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import evosample
from support import ServerProcess, columns_of, fixed_losses, process

N, NUM_EPOCHS = 400, 6
IDS = np.random.default_rng(1).integers(0, 4, N)
SETTINGS: dict[str, Any] = {"num_samples": N, "num_epochs": NUM_EPOCHS, "meta_batch_size": 20, "mini_batch_size": 10}
POLICIES: list[tuple[evosample.Policy, bool]] = [
    (evosample.EvolvedSampling(prune_ratio=0.4), True),
    (evosample.EvolvedSampling(prune_ratio=0.4, beta1=0.0), True),
    (evosample.EvolvedSampling(prune_ratio=0.4, beta1=0.0, beta2=0.0), True),
    (evosample.EvolvedSampling(prune_ratio=0.4, beta1=0.5, beta2=0.5), False),
    (evosample.RandomSubset(prune_ratio=0.4), True),
    (evosample.InfoBatch(), True),
    (evosample.Kakurenbo(max_ratio=0.6), True),
    (evosample.UCB(), True),
]


@pytest.mark.parametrize(("policy", "tells_losses"), POLICIES, ids=str)
def test_an_export_tells_how_often_and_when_each_sample_was_kept_and_chosen(
    client: evosample.Client, name: str, policy: evosample.Policy, tells_losses: bool
) -> None:
    losses = fixed_losses(N, NUM_EPOCHS)
    losses[:, 7] = np.nan  # never a finite one
    experiment = client.create_experiment(name, policy=policy, groups=IDS, **SETTINGS)
    num_visits, last_visit = np.zeros(N, int), np.full(N, -1)
    num_chosen, last_chosen = np.zeros(N, int), np.full(N, -1)
    for epoch in experiment.epochs():
        if epoch.number:
            found = experiment.export_scores(epoch=epoch.number)
            assert found.staleness is not None
            assert found.chosen_staleness is not None
            assert found.num_chosen is not None
            assert found.last_losses is not None
            assert found.groups is not None
            assert found.num_visits.tolist() == num_visits.tolist()
            assert (
                found.staleness.tolist()
                == np.where(last_visit < 0, epoch.number, epoch.number - 1 - last_visit).tolist()
            )
            assert found.num_chosen.tolist() == num_chosen.tolist()
            ages = np.where(last_chosen < 0, epoch.number, epoch.number - 1 - last_chosen)
            assert found.chosen_staleness.tolist() == ages.tolist()
            expected = np.where(last_visit < 0, np.nan, losses[last_visit, np.arange(N)])
            np.testing.assert_allclose(found.last_losses, expected if tells_losses else np.nan, rtol=1e-4, atol=1e-6)
            assert found.groups.tolist() == IDS.tolist()
            assert set(found.columns) == set(policy.columns)
        for batch in epoch:
            of_batch = losses[batch.epoch, batch.sample_ids]
            chosen = batch.sample_ids[batch.select(of_batch, **columns_of(policy, of_batch)).positions]
            if batch.trains:
                num_chosen[chosen] += 1
                last_chosen[chosen] = batch.epoch
            visited = batch.sample_ids[np.isfinite(of_batch)]
            num_visits[visited] += 1
            last_visit[visited] = batch.epoch


def test_a_policy_s_own_columns_start_another_experiment(client: evosample.Client, name: str) -> None:
    settings = SETTINGS | {"policy": evosample.UCB()}
    first = client.create_experiment(name, **settings)
    for epoch in first.epochs():
        for batch in epoch:
            batch.select(fixed_losses(N, NUM_EPOCHS)[batch.epoch, batch.sample_ids])
    known = first.export_scores()
    second = client.create_experiment(f"{name}-second", initial_scores=known, **settings)
    assert second.export_scores().columns["variance"].tolist() == known.columns["variance"].tolist() != [0.0] * N
    other = client.create_experiment(f"{name}-other", initial_scores=known, **SETTINGS)
    assert not other.export_scores().columns
    third = client.create_experiment(f"{name}-third", **settings)
    for columns, said in [
        ({"nonsense": np.ones(N)}, "columns='nonsense': expected what UCB keeps: variance, last_loss"),
        ({"variance": np.ones(3)}, "columns.variance: expected numbers of shape"),
        ({"variance": np.full(N, np.inf)}, "columns.variance='not all finite'"),
    ]:
        with pytest.raises(evosample.InvalidArgumentError, match=said):
            third.import_scores(np.ones(N), columns=columns)
    assert third.export_scores().columns["variance"].tolist() == [0.0] * N


def test_files_have_every_column_and_inspect_shows_whom_to_look_at(
    server: ServerProcess, client: evosample.Client, name: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = SETTINGS | {"policy": evosample.UCB(prune_ratio=0.6), "groups": IDS}
    experiment = client.create_experiment(name, **settings)
    losses = fixed_losses(N, NUM_EPOCHS)
    losses[:, [3, 5]] = np.nan
    for epoch in experiment.epochs():
        for batch in epoch:
            batch.report(losses[batch.epoch, batch.sample_ids])
    known = experiment.export_scores()
    columns = {field: values for field, values in known._asdict().items() if field not in ("epoch", "columns")}
    columns |= {f"policy.{field}": values for field, values in known.columns.items()}

    def done(*arguments: str) -> str:
        code, out, said = process(*arguments, EVOSAMPLE_ADDRESS=server.address)
        assert code == 0, said
        return out

    done("export", name, f"{tmp_path}/all.npz")
    done("export", name, f"{tmp_path}/all.parquet")
    with np.load(tmp_path / "all.npz") as found:
        assert found["epoch"] == NUM_EPOCHS
        assert set(found) == {"epoch", *columns}
        for field, values in columns.items():
            np.testing.assert_array_equal(found[field], values)
    table = parquet.read_table(tmp_path / "all.parquet")
    assert table.schema.metadata[b"evosample.epoch"] == str(NUM_EPOCHS).encode()
    assert table["sample_id"].to_pylist() == list(range(N))
    assert set(table.column_names) == {"sample_id", *columns}
    for field, values in columns.items():
        np.testing.assert_array_equal(table[field].to_numpy(), values)
    client.create_experiment(f"{name}-second", **settings)
    done("import", f"{name}-second", f"{tmp_path}/all.npz")
    again = client.get_experiment(f"{name}-second").export_scores()
    assert again.columns["variance"].tolist() == known.columns["variance"].tolist()
    code, _, said = process("export", name, f"{tmp_path}/no/x.parquet", EVOSAMPLE_ADDRESS=server.address)
    assert (code, said.count("\n")) == (1, 1), said

    shown = json.loads(done("inspect", name, "--top=3", "--json"))
    hardest = np.argsort(-known.scores, kind="stable")[:3]
    assert [sample["sample_id"] for sample in shown["hardest"]] == hardest.tolist()
    assert shown["hardest"][0]["scores"] == pytest.approx(known.scores.max())
    assert [sample["sample_id"] for sample in shown["never_visited"]] == [3, 5]
    assert shown["counts"]["never_visited"] == 2
    assert known.staleness is not None
    assert shown["most_stale"][0]["staleness"] == known.staleness[known.num_visits > 0].max()
    said = done("inspect", name)
    for expected in ("never visited: 2 without", "hardest: the highest scores", "most stale", str(hardest[0])):
        assert expected in said
