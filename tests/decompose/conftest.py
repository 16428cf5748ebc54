"""tensorly computes with numpy in these tests."""

import pytest
import tensorly


@pytest.fixture(autouse=True)
def tensorly_on_numpy():
    """Importing tensorly-torch moves tensorly to torch for the whole process."""
    with tensorly.backend_context("numpy"):
        yield
