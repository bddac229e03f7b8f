from __future__ import annotations

from collections.abc import Iterator

import pytest

from dashboards import GuardedDashboard, OpenDashboard


@pytest.fixture(scope="session")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenDashboard]:
    """One that tests share: they make experiments under names of their own, and never stop it."""
    found = OpenDashboard(tmp_path_factory.mktemp("dashboard") / "data")
    yield found
    assert found.stop() == 0


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedDashboard]:
    """One that asks for tokens. Of wrong ones it takes ten a minute, from all the tests that share it."""
    found = GuardedDashboard(tmp_path_factory.mktemp("guarded"))
    yield found
    assert found.stop() == 0
    assert "Traceback" not in found.server.log
