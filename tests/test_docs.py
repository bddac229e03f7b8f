"""What the documentation points to is there, and the Python that it shows runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pages import PAGES, ROOT, blocks

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")

# What a reader's program has before the first block of a page, in place of a real dataset and model.
TORCH = """
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

labels = torch.randint(0, 3, (1024,))
train_set = TensorDataset(F.one_hot(labels).float() + torch.randn(1024, 3) / 2, labels)
model = torch.nn.Linear(3, 3)
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
"""
CORE = """
import numpy as np

experiment = client.create_experiment(
    "mine", num_samples=1024, num_epochs=3, mini_batch_size=64
)
my_training_step = lambda sample_ids: np.ones(len(sample_ids))
"""
KAKURENBO = f"""
import evosample, evosample.torch
{TORCH}
num_epochs = 3
client = evosample.connect()
experiment = client.create_experiment(
    "mine", num_samples=1024, num_epochs=num_epochs, meta_batch_size=256, policy=evosample.Kakurenbo()
)
learning_rate = lambda progress: 0.01
"""
NUMPY = """
import numpy as np
from train import Net, spirals

class Net(Net):
    def train(self, points, sides):
        return super().train(points, sides, 0.01)

    def losses(self, points, sides):
        logits = self.forward(points)[2]
        return np.logaddexp(0, logits) - sides * logits

num_samples = 2_000
x, y = spirals(num_samples, np.random.default_rng(0))
net = Net(np.random.default_rng(0))
"""
JAX = """
import jax
import numpy as np
import train
from train import losses

num_samples, rng = 2_000, np.random.default_rng(0)
x, y = train.rings(num_samples, rng)
parameters = train.make_parameters(jax.random.key(0), (2, 8, 1))
batches = lambda rows, size: rows[: len(rows) // size * size].reshape(-1, size)
train_step = lambda parameters, xs, ys: train.train_step(parameters, xs, ys, 0.01)
"""
# Page -> its folder of examples, and what comes before each of its blocks; but those with `...` in the place of code.
RUN = {
    "README.md": ("mnist", {0: TORCH, 1: "", 2: CORE}),
    "index.md": ("mnist", {0: TORCH}),
    "pytorch.md": ("mnist", {0: TORCH, 1: "", 3: "", 4: "", 6: ""}),
    "policies.md": ("mnist", {1: KAKURENBO, 4: ""}),
    "numpy.md": ("numpy", {0: NUMPY, 1: "", 2: ""}),
    "jax.md": ("jax", {0: JAX, 1: "", 2: ""}),
}
# Pages whose code is part of what another test runs.
RUN_BY = {
    "accelerate.md": "tests/examples/test_examples.py",
    "distributed.md": "tests/examples/test_examples.py",
    "huggingface.md": "tests/examples/test_examples.py",
    "lightning.md": "tests/examples/test_examples.py",
    "security.md": "tests/server/test_tls.py",
    "webdataset.md": "tests/examples/test_webdataset.py",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def code_of(page: Path) -> list[str]:
    return [textwrap.dedent(block.text) for block in blocks(page) if block.language == "python"]


def is_whole(code: str) -> bool:
    """Whether nothing is left out of it."""
    return not any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.name)
def test_python_on_a_page_runs(page: Path, tmp_path: Path) -> None:
    code = code_of(page)
    whole = {number for number, each in enumerate(code) if is_whole(each)}
    if page.name in RUN_BY:
        test = (ROOT / RUN_BY[page.name]).read_text()
        for example in re.findall(r"\(\.\./examples/(\S+\.py)\)", page.read_text()):
            assert example in test
        return
    folder, before = RUN[page.name]
    assert whole == set(before)
    script = tmp_path / "script.py"
    script.write_text("\n".join(before[number] + code[number] for number in sorted(whole)))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples" / folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "StreamEpoch" in (tmp_path / "reference/protocol/index.html").read_text()
    assert "meta_batch_size" in (tmp_path / "reference/client/index.html").read_text()
    commands = (tmp_path / "reference/cli/index.html").read_text()
    for command in ("evosample export", "evosample token create", "evosample token list", "evosample token revoke"):
        assert f">{command}<" in commands
    assert "--expires-in" in commands
    assert "EVOSAMPLE_REDIS_URL" in (tmp_path / "reference/server/index.html").read_text()
