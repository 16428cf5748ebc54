"""What every test here needs: transformers, with torchvision where it is installed, and its progress bars off."""

import contextlib

import pytest

from benchmarks.vision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # transformers imports it where it is installed
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
