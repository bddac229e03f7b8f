"""evosample: train on the samples that still teach the model something.

with evosample.connect() as client:
    experiment = client.create_experiment("mnist", num_samples=60_000, num_epochs=40, mini_batch_size=64)
    for epoch in experiment.epochs():  # each a quarter of the samples
        for batch in epoch:
            losses = ...  # of a training step on batch.sample_ids, one a sample
            batch.report(losses)
"""

import os

# Read when gRPC is imported. Its fork handlers now and then crash or hang a forked DataLoader worker, which has no use
# for gRPC anyway; without them a forked process leaves it alone. Who needs gRPC in forked processes sets this to 1.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from evosample.client import Client, Experiment, ExportedScores, connect
from evosample.credentials import Tls
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
    PermissionDeniedError,
    ResourceExhaustedError,
    StoreBehindError,
    SupersededError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    UsageError,
    WaitTimeoutError,
)
from evosample.run import Run
from evosample.sampling import (
    UCB,
    DoReMi,
    EpochSummary,
    EvolvedSampling,
    ExperimentSpec,
    GroupSummary,
    InfoBatch,
    InvalidValue,
    Kakurenbo,
    MiniBatch,
    Mixture,
    OrderedSGD,
    Policy,
    RandomSubset,
    SelectiveBackprop,
    Uniform,
)
from evosample.wire import ExperimentStatus, PastEpoch, Position, RankProgress, ServerStatus, Token, Watched

__version__ = "0.1.0"

__all__ = [
    "UCB",
    "AlreadyExistsError",
    "Batch",
    "Client",
    "DataLossError",
    "DoReMi",
    "Epoch",
    "EpochClosedError",
    "EpochNotRetainedError",
    "EpochSummary",
    "EvolvedSampling",
    "EvosampleError",
    "Experiment",
    "ExperimentSpec",
    "ExperimentStatus",
    "ExportedScores",
    "FailedPreconditionError",
    "GroupSummary",
    "InfoBatch",
    "InternalError",
    "InvalidArgumentError",
    "InvalidValue",
    "Kakurenbo",
    "MiniBatch",
    "Mixture",
    "NotFoundError",
    "OrderedSGD",
    "PastEpoch",
    "PermissionDeniedError",
    "Policy",
    "Position",
    "RandomSubset",
    "RankProgress",
    "ResourceExhaustedError",
    "Run",
    "SelectiveBackprop",
    "ServerStatus",
    "StoreBehindError",
    "SupersededError",
    "Tls",
    "Token",
    "UnauthenticatedError",
    "UnavailableError",
    "Uniform",
    "UnimplementedError",
    "UsageError",
    "WaitTimeoutError",
    "Watched",
    "connect",
]
