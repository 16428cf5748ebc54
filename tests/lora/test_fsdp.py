"""``FullyShardedDataParallel``, which sets views of what it gathered in the place of parameters; one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import lowrank_layers as lr
from lowrank_layers.lora.adapter import Adapter

pytestmark = pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # one process


@pytest.fixture
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear, self.conv = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, indices):
        x = self.conv(self.linear(self.table(indices)).mT).mT
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def adapted(**settings):
    model = Kinds()
    lr.add_lora_(model, ["table", "linear", "conv", "attention"], rank=2, modules_to_save=["head"], **settings)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Adapter):
                module.A.normal_()
                module.B.normal_()
    return model


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_outputs_and_gradients_are_those_of_the_model(use_orig_params, dora):
    model, indices = adapted(dora=dora), torch.randint(9, (2, 5))
    if not use_orig_params:
        model.requires_grad_(True)  # what is flattened together has to learn together
    sharded = FullyShardedDataParallel(
        copy.deepcopy(model), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    for _ in range(2):
        out, expected = sharded(indices), model(indices)
        assert torch.allclose(out, expected, atol=1e-5)
        out.square().sum().backward()
        expected.square().sum().backward()
    if use_orig_params:
        got = {name: p.grad for name, p in sharded.module.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert torch.allclose(got[name], parameter.grad, atol=1e-4), name


def test_a_parameter_that_is_there_cannot_be_set_to_a_tensor():
    model = adapted()
    with pytest.raises(TypeError, match="cannot assign"):
        model.linear.weight = torch.zeros(8, 8)
    with pytest.raises(lr.LowRankError, match="shape"):
        model.linear.weight = nn.Parameter(torch.zeros(8, 9))
