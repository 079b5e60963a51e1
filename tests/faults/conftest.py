"""The pair of models that the tests of faults share."""

from __future__ import annotations

import pytest

from tests.engine.pairs import Pair, make_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("faults"), "llama", "partly right")
