"""PEFT's own tests, where a checkout of its repository is at hand: see ``peft_suite/__init__.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "peft_suite"


@pytest.mark.skipif("PEFT_TESTS" not in os.environ, reason="PEFT_TESTS does not name the tests of a checkout of PEFT")
def test_no_test_of_peft_fails_but_by_design():
    finished = subprocess.run([sys.executable, SUITE, "-q"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-5_000:]


def test_without_a_checkout_it_says_what_to_do():
    environment = {key: value for key, value in os.environ.items() if key != "PEFT_TESTS"}
    finished = subprocess.run([sys.executable, SUITE], capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 1
    assert "PEFT_TESTS is not set" in finished.stderr
