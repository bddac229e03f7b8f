"""evosample: train on the samples that still teach the model something.

with evosample.connect() as client:
    experiment = client.create_experiment("mnist", num_samples=60_000, num_epochs=10, meta_batch_size=256,
                                          mini_batch_size=64, policy=evosample.EvolvedSampling(prune_ratio=0.2))
    for epoch in experiment.epochs():
        for batch in epoch:
            losses = ...                      # one a sample of batch.sample_ids
            chosen = batch.select(losses)     # back-propagate chosen.positions
"""

from evosample.client import Client, Experiment, ExportedScores, connect
from evosample.epoch import Batch, Epoch
from evosample.errors import (
    AlreadyExistsError,
    DataLossError,
    EpochClosedError,
    EpochNotRetainedError,
    EvosampleError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StoreBehindError,
    SupersededError,
    UnavailableError,
    UnimplementedError,
    UsageError,
    WaitTimeoutError,
)
from evosample.run import Run
from evosample.sampling import (
    EvolvedSampling,
    ExperimentSpec,
    InvalidValue,
    MiniBatch,
    Policy,
    RandomSubset,
    Uniform,
)
from evosample.wire import ExperimentStatus, Position

__version__ = "0.1.0"

__all__ = [
    "AlreadyExistsError",
    "Batch",
    "Client",
    "DataLossError",
    "Epoch",
    "EpochClosedError",
    "EpochNotRetainedError",
    "EvolvedSampling",
    "EvosampleError",
    "Experiment",
    "ExperimentSpec",
    "ExperimentStatus",
    "ExportedScores",
    "FailedPreconditionError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidValue",
    "MiniBatch",
    "NotFoundError",
    "Policy",
    "Position",
    "RandomSubset",
    "ResourceExhaustedError",
    "Run",
    "StoreBehindError",
    "SupersededError",
    "UnavailableError",
    "Uniform",
    "UnimplementedError",
    "UsageError",
    "WaitTimeoutError",
    "connect",
]
