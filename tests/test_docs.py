"""What the documentation points to is there, and what it shows is Python."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_code_is_python(page: Path) -> None:
    text = page.read_text()
    for target, _ in LINK.findall(text):
        assert "://" in target or (page.parent / target).exists(), target
    for code in CODE.findall(text):
        ast.parse(textwrap.dedent(code))
