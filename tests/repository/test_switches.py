"""The switch with which tests that would be skipped fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys, pytest
sys.modules[sys.argv[1]] = None  # as if it were not installed
sys.exit(pytest.main([*sys.argv[2:], "-q", "-p", "no:cacheprovider"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "lacking", "told"),
    [
        # Others may be lacking, too: the first of them is told, or all.
        ("tests/browser/test_updates.py", "playwright", "(playwright|jupyterlab) is not installed"),
        ("tests/notebooks", "nbclient", "nbclient.* not installed"),
    ],
)
def test_what_is_skipped_where_something_is_missing_fails_where_it_must_be_there(
    folder: str, lacking: str, told: str
) -> None:
    command = [sys.executable, "-c", WITHOUT, lacking, folder]
    environment = {name: it for name, it in os.environ.items() if name != "PIPEINFER_BROWSER"}
    for asked, code in ({}, 0), ({"PIPEINFER_BROWSER": "1"}, None):
        ran = subprocess.run(
            command, cwd=ROOT, env=environment | asked, capture_output=True, text=True, check=False
        )
        said = ran.stdout + ran.stderr
        assert re.search(told, said)
        assert ran.returncode == code if code is not None else ran.returncode != 0
        assert ("skipped" in said) is (code == 0)
