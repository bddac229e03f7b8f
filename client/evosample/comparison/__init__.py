"""Compare selection methods on your own training, and with random subsets that train as long. Needs evosample[compare].

def train(trial: Trial) -> float:
    experiment = trial.create_experiment(num_samples=60_000, mini_batch_size=64, meta_batch_size=256)
    torch.manual_seed(trial.seed)
    ...                                   # model, data
    with trial.training():                # what is timed
        ...                               # all epochs of the experiment, schedules by loader.progress
    return accuracy                       # of a test set

compare(train, num_epochs=10, output="comparison")
"""

from evosample.comparison.figures import Comparison, Difference, Estimate, MethodFigures
from evosample.comparison.trials import METHODS, RESULTS_FILE, Clock, Outcome, Trial, compare

__all__ = [
    "METHODS",
    "RESULTS_FILE",
    "Clock",
    "Comparison",
    "Difference",
    "Estimate",
    "MethodFigures",
    "Outcome",
    "Trial",
    "compare",
]
