"""The fixture of test files that have cases for two processes."""

import pytest

from tests.processes import run_processes

from .cases import run_cases


@pytest.fixture(scope="module")
def everywhere(request, tmp_path_factory):
    """What each process has returned from each case of the test file."""
    folder = tmp_path_factory.mktemp("cases")
    return run_processes(run_cases, folder, request.module.__name__, seconds=240)


@pytest.fixture
def seen(everywhere, request):
    """What each process has returned from the case that the test is named after."""
    name = request.node.originalname.removeprefix("test_")
    results = [process[name] for process in everywhere]
    for result in results:
        assert not (isinstance(result, dict) and "trace" in result), result["trace"]
    return results
