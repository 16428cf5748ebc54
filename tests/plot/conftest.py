import pytest


@pytest.fixture(autouse=True)
def _headless():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")
