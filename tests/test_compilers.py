"""Compilers and exporters take factored layers as they take dense ones.

Two models stand for all (``whole_models.MODELS``): a classifier that :func:`lr.factorize_` made, and one with every row
of LAYERS, so that a new row is compiled and exported without a change here. What one layer promises itself is checked
in ``contracts/test_layers_as_modules.py``.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing

from .composability import assert_close, gradients, models
from .whole_models import (
    EveryLayer,
    batch_of,
    factored_classifier,
    is_pure,
    outputs_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
TREESPEC = ("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",)  # by torch's exporters themselves


def test_inductor_compiles_every_layer_into_one_graph_for_all_batch_sizes():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # the other variants cost half a minute of g++ and are compiled with aot_eager, layer by layer, in the contracts
    eager = EveryLayer(lambda row, variant: variant == row.smoke[0] or not is_pure(row, variant))
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)
    for size, stance in ((3, "default"), (5, "fail_on_recompile")):
        inputs = batch_of(eager, size, seed=size)
        expected, eager_gradients = outputs_of(eager, inputs), gradients(eager, inputs)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance(stance):
            got = outputs_of(compiled, inputs)
            weights = list(model.parameters())
            loss = torch.stack([(out - 0.3).square().mean() for out in got]).sum()
            assert_close(got, expected)
            assert_close(torch.autograd.grad(loss, weights), eager_gradients)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_close(tuple(weights), tuple(eager.parameters()))  # both renormalized the same rows


@models
def test_export_with_a_dynamic_batch_survives_a_file(build, tmp_path):
    model = build().eval()
    inputs = batch_of(model, 3)
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(model, inputs, dynamic_shapes=shapes if build is factored_classifier else (shapes,))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in (1, 2, 8):
        x = batch_of(model, size, seed=size)
        assert_close(outputs_of(program.module(), x), outputs_of(model, x))
        assert_close(outputs_of(loaded, x), outputs_of(model, x))
    assert {name: p.shape for name, p in loaded.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


@models
@pytest.mark.filterwarnings("ignore:# The axis name", *TREESPEC)  # torch names one of the axes that are all the batch
def test_onnxruntime_computes_the_same(build):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = build().eval()
    inputs = batch_of(model, 3)
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    shapes = shapes if build is factored_classifier else (shapes,)
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = batch_of(model, 5, seed=1)
    feed = {slot.name: each.numpy() for slot, each in zip(session.get_inputs(), x, strict=True)}
    got = tuple(torch.from_numpy(out) for out in session.run(None, feed))
    assert_close(got, outputs_of(model, x), 1e-4)


@pytest.mark.filterwarnings(*TREESPEC)
def test_aotinductor_compiles_a_package_for_all_batch_sizes(tmp_path):
    model = factored_classifier().eval()
    inputs = batch_of(model, 3)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    quickly = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=quickly)
    compiled = torch._inductor.aoti_load_package(path)
    for size in (1, 2, 8):
        x = batch_of(model, size, seed=size)
        assert_close((compiled(*x),), outputs_of(model, x))


@models
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(build):
    model = build().eval()
    traced = torch.jit.trace(model, batch_of(model, 3))
    x = batch_of(model, 5, seed=1)
    assert_close(outputs_of(traced, x), outputs_of(model, x))
