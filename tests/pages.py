"""The pages of the documentation, and the commands that stand in them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docker/kubernetes/README.md"]

_PART = re.compile(r"^#+ (?P<heading>[^\n]+)$|^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code, and the heading that it stands under."""

    heading: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of code of a page."""
    found, heading = [], ""
    for part in _PART.finditer(page.read_text()):
        if part["heading"]:
            heading = part["heading"]
        else:
            found.append(Block(heading, part["language"], part["text"]))
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block for a shell, as bash tells them apart."""
    found, so_far = [], ""
    for line in block.text.splitlines():
        so_far += line
        if not so_far.strip() or so_far.lstrip().startswith("#"):
            so_far = ""
        elif not line.endswith("\\") and subprocess.run(["bash", "-nc", so_far], capture_output=True).returncode == 0:
            found.append(so_far)
            so_far = ""
        else:
            so_far += "\n"
    assert not so_far, f"bash can't read {so_far!r}"
    return found


def commands_under(page: Path, heading: str) -> list[str]:
    """The commands for a shell under a heading of a page."""
    found = [command for block in blocks(page) if block.heading == heading for command in commands(block)]
    assert found, f"{page.name} has no commands under {heading!r}"
    return found
