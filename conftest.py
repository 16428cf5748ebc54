"""Names that every docstring example may use."""

import pytest
import torch

import lowrank_layers


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, nn=torch.nn, lr=lowrank_layers)
