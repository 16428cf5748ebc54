"""The same pipeline on an accelerator gives the same plan and nearly the same model."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_the_pipeline_on_cuda_agrees_with_the_cpu():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 36, 10)
    )
    data = [torch.randn(64, 3, 8, 8) for _ in range(3)]
    results = {}
    for device in ("cpu", "cuda"):
        net = copy.deepcopy(model).to(device)
        batches = [x.to(device) for x in data]
        stats = lr.calibrate(net, batches, loss=lr.SampledCrossEntropy())
        plan = lr.make_plan(net, lr.Budget(params=0.4), stats=stats, methods=[lr.SVDMethod(), lr.TuckerMethod()])
        lr.factorize_(net, plan, stats=stats, data=batches)
        assert {p.device.type for p in net.parameters()} == {device}
        results[device] = plan, net(batches[0]).cpu()
    assert results["cuda"][0].after.params == pytest.approx(results["cpu"][0].after.params, rel=0.05)
    assert torch.dist(results["cuda"][1], results["cpu"][1]) < 0.05 * results["cpu"][1].norm()


@pytest.mark.parametrize("method", ["exact", "gram", "randomized", "krylov"])
def test_decompositions_stay_on_their_device(method):
    matrix = torch.randn(80, 60, device="cuda")
    f = lr.svd(matrix, 60, method=method)
    assert f.u.device == matrix.device
    assert f.relative_error(matrix) < 1e-5
    kernel = torch.randn(8, 6, 3, 3, device="cuda")
    assert lr.tucker(kernel, (8, 6, None, None)).relative_error(kernel) < 1e-5
    assert lr.cp(kernel, 54).relative_error(kernel) < 1e-5
