import pytest


@pytest.fixture(autouse=True)
def _headless(headless):
    pass
