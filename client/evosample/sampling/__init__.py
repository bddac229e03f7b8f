"""The algorithm: pure functions on numpy arrays. No clock, no I/O, no state; randomness is an argument or a seed."""

from evosample.sampling.checks import InvalidValue, check_int, check_name, check_seconds, shown
from evosample.sampling.epoch import (
    FoldCounts,
    Table,
    count_new,
    fold_epoch,
    keep_samples,
    permutation,
    plan_epoch,
    shuffle_by_shard,
)
from evosample.sampling.layout import (
    checksum,
    loss_bits,
    losses_of_bits,
    part,
    recorded_losses,
    sample_id_dtype,
    table_checksum,
)
from evosample.sampling.philox import Purpose, exponentials, random_bits
from evosample.sampling.policies import EvolvedSampling, Policy, RandomSubset, Uniform
from evosample.sampling.race import Draw, race
from evosample.sampling.scores import (
    Scores,
    check_losses,
    check_scores,
    initial_scores,
    updated_sampling_weights,
    updated_scores,
)
from evosample.sampling.selection import MiniBatch, select_mini_batch
from evosample.sampling.spec import EpochShape, ExperimentSpec, ImportanceWeight

__all__ = [
    "Draw",
    "EpochShape",
    "EvolvedSampling",
    "ExperimentSpec",
    "FoldCounts",
    "ImportanceWeight",
    "InvalidValue",
    "MiniBatch",
    "Policy",
    "Purpose",
    "RandomSubset",
    "Scores",
    "Table",
    "Uniform",
    "check_int",
    "check_losses",
    "check_name",
    "check_scores",
    "check_seconds",
    "checksum",
    "count_new",
    "exponentials",
    "fold_epoch",
    "initial_scores",
    "keep_samples",
    "loss_bits",
    "losses_of_bits",
    "part",
    "permutation",
    "plan_epoch",
    "race",
    "random_bits",
    "recorded_losses",
    "sample_id_dtype",
    "select_mini_batch",
    "shown",
    "shuffle_by_shard",
    "table_checksum",
    "updated_sampling_weights",
    "updated_scores",
]
