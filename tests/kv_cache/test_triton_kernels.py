"""The Triton functions give the products of definition, and operations of torch serve where they cannot.

They run on a GPU or, where ``TRITON_INTERPRET`` is set before Triton is imported, in its interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers.kv_cache import decode_kernel, triton_decode
from lowrank_layers.kv_cache.coefficients import FloatCoefficients

from .packed import (
    OFFSET,
    ROTATIONS,
    SHAPES,
    SIZE,
    exact_scores,
    group_of,
    mixed_bound,
    mixed_terms,
    score_bound,
    score_terms,
)

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get(triton_decode.INTERPRETED) == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HALF = [torch.bfloat16, torch.float16]
in_triton = pytest.mark.skipif(
    not (INSTALLED and (INTERPRETED or DEVICE == "cuda")), reason="needs Triton, and a GPU or TRITON_INTERPRET=1"
)
# Triton 3.9 says at its first compilation what a later one will do otherwise
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


@pytest.fixture(autouse=True)
def _without_the_compiled_functions(monkeypatch):
    monkeypatch.setattr(decode_kernel, "compiled_functions", lambda: None)


@pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs Triton")
def test_in_the_interpreter():
    environment = os.environ | {triton_decode.INTERPRETED: "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    subprocess.run(command, env=environment, check=True, timeout=300)


@pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs Triton")
@pytest.mark.parametrize("dtype", triton_decode.PRECISIONS)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_they_compile_for_a_gpu_that_is_not_here(rotation, dtype, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = dict(
        zip([torch.uint8, torch.int8, torch.float32, *HALF], ["u8", "i8", "fp32", "bf16", "fp16"], strict=True)
    )
    found = []

    def compiled(name, grid, tensors, sizes, *, num_warps=4, **constants):
        function = getattr(triton_decode.kernels(), name)
        kinds = ["*" + names[t.dtype] for t in tensors] + ["i32" for _ in sizes] + ["constexpr" for _ in constants]
        source = ASTSource(function, dict(zip(function.arg_names, kinds, strict=True)), constants)
        found.append(compile(source, target=GPUTarget("cuda", 80, 32)).name)
        return True

    monkeypatch.setattr(triton_decode, "applies", lambda *args: True)
    monkeypatch.setattr(triton_decode, "_launch", compiled)
    rotation = ROTATIONS[rotation]
    group = group_of(1, 1, 1, 2, 40, (2, 4, 8, 8, 8), rotation)
    group.tile_scores(torch.randn(1, 2, 3, SIZE, dtype=dtype), rotation.tile_waves(OFFSET, 40))
    group.mixed(torch.rand(1, 2, 3, 40, dtype=dtype))
    assert found == ["tile_scores", "mixed"]


@in_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_scores_are_products_with_the_rotated_keys(rotation, shape):
    batch, groups, bases, heads, count, tokens, widths = SHAPES[shape]
    rotation = ROTATIONS[rotation].to(torch.device(DEVICE))
    group = group_of(batch, groups, bases, heads, tokens, widths, rotation, DEVICE)
    rows = torch.randn(batch, groups * heads, count, SIZE, device=DEVICE)
    assert triton_decode.applies(rows, group.subspace, group.coefficients)
    found = group.tile_scores(rows, rotation.tile_waves(OFFSET, tokens))
    assert ((found - exact_scores(group, rows, rotation)).abs() <= score_bound(group, rows)).all()


@in_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_are_weighted_sums_of_the_values(shape):
    batch, groups, bases, heads, count, tokens, widths = SHAPES[shape]
    group = group_of(batch, groups, bases, heads, tokens, widths, None, DEVICE)
    # the weights of the tokens of one segment of several
    weights = torch.rand(batch, groups * heads, count, tokens + 7, device=DEVICE)[..., 3 : 3 + tokens]
    assert triton_decode.applies(weights, group.subspace, group.coefficients)
    found = group.mixed(weights)
    exact = weights.double() @ group.rebuilt(0, tokens, torch.float64)
    assert ((found - exact).abs() <= mixed_bound(group, weights)).all()


@in_triton
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_rounds_its_result_and_no_sum(dtype, shape):
    batch, groups, bases, heads, count, tokens, widths = SHAPES[shape]
    rotation = ROTATIONS["halves"].to(torch.device(DEVICE))
    group = group_of(batch, groups, bases, heads, tokens, widths, rotation, DEVICE)
    rows = torch.randn(batch, groups * heads, count, SIZE, dtype=dtype, device=DEVICE)
    found, exact = group.tile_scores(rows, rotation.tile_waves(OFFSET, tokens)), exact_scores(group, rows, rotation)
    # factors of products are cut to the 11 bits of tf32: turned rows, waves, and rows by directions
    cut, eps = 3 * 2.0**-10, torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert ((found - exact).abs() <= eps * exact.abs() + cut * score_terms(group, rows)).all()
    group = group_of(batch, groups, bases, heads, tokens, widths, None, DEVICE)
    weights = torch.rand(batch, groups * heads, count, tokens, dtype=dtype, device=DEVICE)
    found, exact = group.mixed(weights), weights.double() @ group.rebuilt(0, tokens, torch.float64)
    assert found.dtype == dtype
    assert ((found - exact).abs() <= eps * exact.abs() + cut * mixed_terms(group, weights)).all()


@in_triton
def test_a_step_of_a_cache_is_that_of_operations_of_torch(monkeypatch):
    cache = lr.LowRankKV(lr.KVSettings(bits=3), rotation=lr.Rotation.of(SIZE).to(torch.device(DEVICE)))
    keys, values = torch.randn(2, 2, 3, 200, SIZE, device=DEVICE).cumsum(3) / 10
    cache.append(keys, values)
    query, calls = torch.randn(2, 6, 1, SIZE, device=DEVICE), []
    cache.compress()
    launch = triton_decode._launch

    def counted(name, *args, **sizes):
        calls.append(name)
        return launch(name, *args, **sizes)

    monkeypatch.setattr(triton_decode, "_launch", counted)
    found = cache.attend(query)
    assert calls == ["tile_scores", "mixed"]
    monkeypatch.setattr(triton_decode, "kernels", lambda: None)
    torch.testing.assert_close(found, cache.attend(query), rtol=1e-4, atol=1e-4)


def test_where_they_do_not_serve(monkeypatch):
    group = group_of(1, 1, 1, 2, 40, (2, 4, 8, 8, 8), None)
    rows = torch.randn(1, 2, 1, SIZE)

    def serve(rows, coefficients=group.coefficients):
        return triton_decode.applies(rows, group.subspace, coefficients)

    monkeypatch.setattr(triton_decode, "kernels", SimpleNamespace)
    monkeypatch.delenv(triton_decode.INTERPRETED, raising=False)
    assert not serve(rows)
    monkeypatch.setenv(triton_decode.INTERPRETED, "1")
    assert serve(rows)
    assert serve(rows.half())
    assert not serve(rows.double())
    assert not serve(rows.expand(1, 2, decode_kernel.MOST_ROWS + 1, SIZE))
    assert not serve(rows, FloatCoefficients(torch.float32))
    assert not serve(torch.randn(1, 2, 1, SIZE, requires_grad=True))
    monkeypatch.setattr(triton_decode, "kernels", lambda: None)
    assert not serve(rows)


def test_where_triton_fails_operations_of_torch_serve(monkeypatch):
    rotation = ROTATIONS["halves"]
    group = group_of(1, 1, 1, 2, 40, (2, 4, 8, 8, 8), rotation)
    rows, weights = torch.randn(1, 2, 1, SIZE).half(), torch.rand(1, 2, 1, 40).half()
    waves = rotation.tile_waves(OFFSET, 40)
    monkeypatch.delenv(triton_decode.INTERPRETED, raising=False)
    expected = group.tile_scores(rows, waves), group.mixed(weights)
    # a function that cannot be compiled
    monkeypatch.setattr(triton_decode, "kernels", SimpleNamespace)
    monkeypatch.setattr(triton_decode, "_FAILED", set())
    monkeypatch.setenv(triton_decode.INTERPRETED, "1")
    with pytest.warns(UserWarning, match="Triton failed on cpu, operations of torch serve instead"):
        assert torch.equal(group.tile_scores(rows, waves), expected[0])
    assert torch.equal(group.mixed(weights), expected[1])
    assert not triton_decode.applies(rows, group.subspace, group.coefficients)
