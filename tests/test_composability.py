"""The rest of torch takes factored layers as it takes dense ones: quantizers, transforms, wrappers, optimizers.

Two models stand for all (``whole_models.MODELS``): a classifier that :func:`lr.factorize_` made, and one with every row
of LAYERS, so that a new row is copied, sharded, trained... without a change here. What one layer promises by itself is
checked in ``contracts/test_layers_as_modules.py``.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import lowrank_layers as lr

from . import distributed_worker
from .composability import TIGHT, assert_close, factored, gradients, models, pure_layers, state_bytes
from .contracts.tables import LAYERS, relative
from .processes import run_processes
from .whole_models import (
    MODELS,
    EveryLayer,
    batch_of,
    dense_classifier,
    factored_classifier,
    loss_of,
    outputs_of,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def test_the_models_hold_every_layer():
    model, dense = factored_classifier(), dense_classifier()
    assert {type(layer) for layer in factored(MODELS["every layer"]())} == {row.cls for row in LAYERS}
    assert {type(layer) for layer in factored(model)} >= {
        lr.LowRankLinear,
        lr.LowRankConv2d,
        lr.TuckerConv2d,
        lr.CPConv2d,
        lr.LowRankEmbedding,
    }
    assert state_bytes(model) < 0.6 * state_bytes(dense)
    x = batch_of(model, 4)
    assert 1e-3 < relative(model(*x), dense(*x)) < 1


def by_torch(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def by_torchao(model: nn.Module) -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


quantization_is_deprecated = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning",
)
"""torch's own dynamic quantization still works, and is what many users have."""


def holds_int8(module: nn.Module) -> bool:
    weight = module.weight() if callable(module.weight) else module.weight
    return weight.dtype == torch.qint8 or getattr(weight, "qdata", weight).dtype == torch.int8


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("quantize", [by_torch, by_torchao])
@quantization_is_deprecated
def test_int8_linears_inside_a_factored_model(quantize):
    model = factored_classifier().eval()
    x = batch_of(model, 16)
    names = linears(model)
    assert names == ["words.up", "hidden.down", "hidden.up", "head.down", "head.up"]
    small = quantize(model)
    assert all(holds_int8(small.get_submodule(name)) for name in names)
    assert not any(holds_int8(model.get_submodule(name)) for name in names)
    assert 0 < relative(small(*x), model(*x)) < 0.03


QUANTIZABLE = [row for row in LAYERS if linears(row.fresh())]


@pytest.mark.parametrize("row", QUANTIZABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("quantize", [by_torch, by_torchao])
@quantization_is_deprecated
def test_int8_takes_a_quarter_of_the_bytes(row, quantize):
    settings, rank = row.wide
    if row.cls is lr.TensorizedLinear:
        settings = {**settings, "bias": False}  # its last child is not called where it holds the bias of all outputs
    layer = row.cls(**settings, rank=rank).eval()
    x = row.input(layer.to_dense(), 8)
    names = linears(layer)
    shrinks = sum(layer.get_submodule(name).weight.numel() for name in names)
    overhead = 4_000  # scales, zero points and the names of a file's parts
    small = quantize(layer)
    assert all(holds_int8(small.get_submodule(name)) for name in names)
    assert 0 < relative(small(x), layer(x)) < 0.03
    assert state_bytes(small) < state_bytes(layer) - 3 * shrinks + overhead


@models
def test_autocast_to_bfloat16(build):
    model = build()
    x = batch_of(model, 8)
    expected, exact = outputs_of(model, x), gradients(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = outputs_of(model, x)
        loss = loss_of(model, x)
    loss.backward()
    assert {y.dtype for y in out} == {torch.bfloat16}
    assert {p.grad.dtype for p in model.parameters()} == {p.dtype for p in model.parameters()} == {torch.float32}
    assert_close(out, expected, 0.03)
    short = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert 0 < relative(short, torch.cat([g.flatten() for g in exact])) < 0.03


def test_channels_last_stays_channels_last():
    model = factored_classifier()
    images, words = batch_of(model, 4)
    expected, exact = model(images, words), gradients(model, (images, words))
    formats = []

    def note(module, inputs, output):
        last = output.is_contiguous(memory_format=torch.channels_last)
        formats.append((type(module).__name__, last, output.is_contiguous()))

    convs = [layer for layer in factored(model) if layer.dense_type is nn.Conv2d]
    model.to(memory_format=torch.channels_last)
    for layer in convs:
        layer.register_forward_hook(note)
    got = model(images.to(memory_format=torch.channels_last), words)
    assert formats == [(type(layer).__name__, True, False) for layer in convs]
    assert_close((got,), (expected,))
    assert_close(gradients(model, (images.to(memory_format=torch.channels_last), words)), exact)


def test_an_ensemble_of_factored_models_under_vmap():
    ensemble = [factored_classifier(seed) for seed in range(3)]
    x = batch_of(ensemble[0], 4)
    parameters, buffers = stack_module_state(ensemble)
    got = vmap(lambda p, b: functional_call(ensemble[0], (p, b), x))(parameters, buffers)
    expected = torch.stack([model(*x) for model in ensemble])
    assert_close((got,), (expected,))
    assert relative(expected[1], expected[0]) > 0.1


no_batching_rule = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")
"""torch says so of its own embedding bags."""


@pure_layers
@no_batching_rule
def test_ensembles_of_every_layer_under_vmap(row, variant):
    x = row.input(row.dense(variant), 4)

    layer = row.fresh(variant)
    ensemble = [copy.deepcopy(layer) for _ in range(3)]
    with torch.no_grad():
        for k, model in enumerate(ensemble):
            for p in model.parameters():
                p.mul_(1 + k)
    got = vmap(lambda p, b: functional_call(layer, (p, b), x))(*stack_module_state(ensemble))
    assert_close((got,), (torch.stack([model(x) for model in ensemble]),))


def check_sample_gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, *sample):
        out = functional_call(model, weights, tuple(x.unsqueeze(0) for x in sample))
        return (out - 0.3).square().mean()

    got = vmap(grad(loss), in_dims=(None, *(0 for _ in inputs)))(parameters, *inputs)
    for k in range(len(inputs[0])):
        expected = gradients(model, tuple(x[k : k + 1] for x in inputs))
        assert_close(tuple(got[name][k] for name in parameters), expected)


def test_sample_gradients_of_a_factored_model():
    model = factored_classifier()
    check_sample_gradients(model, batch_of(model, 4))


@pure_layers
@no_batching_rule
def test_sample_gradients_of_every_layer(row, variant):
    x = row.input(row.dense(variant), 4)
    check_sample_gradients(row.fresh(variant), (x,))


def by_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": by_file}


@models
@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES)
def test_copies_of_a_whole_model_are_bit_equal(build, clone):
    model = build().eval()
    x = batch_of(model, 3)
    loss_of(model, x).backward()  # a layer that has been used keeps nothing that cannot be copied
    other = clone(model)
    assert [type(layer) for layer in factored(other)] == [type(layer) for layer in factored(model)]
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(other, x), outputs_of(model, x), strict=True))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert not any(torch.equal(a, b) for a, b in zip(outputs_of(other, x), outputs_of(model, x), strict=True))


@models
def test_a_model_without_values_is_filled(build):
    model = build()
    x = batch_of(model, 3)
    empty = copy.deepcopy(model).to("meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert all(out.is_meta for out in outputs_of(empty, [t.to("meta") for t in x]))
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(filled, x), outputs_of(model, x), strict=True))


def test_a_checkpoint_is_loaded_into_a_model_built_on_meta(tmp_path):
    model = factored_classifier()
    lr.save(model, tmp_path / "small.safetensors")
    with torch.device("meta"):
        empty = type(model)()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    loaded = lr.load(tmp_path / "small.safetensors", into=empty)
    x = batch_of(model, 3)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    assert torch.equal(loaded(*x), model(*x))
    assert train(loaded, [x] * 3) == train(model, [x] * 3)


@pytest.mark.parametrize("wrap", distributed_worker.WRAPS)
def test_two_processes_train_as_one_does(wrap, tmp_path):
    results = run_processes(distributed_worker.run, tmp_path, wrap, world=distributed_worker.WORLD)
    for name, build in MODELS.items():
        alone = build()
        start = copy.deepcopy(alone.state_dict())
        losses = train(alone, distributed_worker.joint(alone))
        mine = [result[name] for result in results]
        means = [sum(pair) / len(pair) for pair in zip(*(own["losses"] for own in mine), strict=True)]
        assert means == pytest.approx(losses, rel=TIGHT)
        for own in mine:
            assert own["state"].keys() == start.keys()
        for key, tensor in alone.state_dict().items():
            assert torch.equal(mine[0]["state"][key], mine[1]["state"][key]), key
            assert relative(mine[0]["state"][key], tensor) < TIGHT, key
        assert all(not torch.equal(p, start[key]) for key, p in alone.named_parameters())
        if wrap == "fsdp":
            total = sum(p.numel() for p in alone.parameters())
            assert sum(own["held"] for own in mine) == total
            assert all(own["held"] < 0.6 * total for own in mine)


def test_activation_checkpointing_of_a_whole_model():
    model = factored_classifier()
    x = batch_of(model, 4)
    exact = gradients(model, x)
    runs = []
    model.stem.register_forward_hook(lambda *_: runs.append(1))
    got = torch.autograd.grad(
        (checkpoint(model, *x, use_reentrant=False) - 0.3).square().mean(), list(model.parameters())
    )
    assert len(runs) == 2  # once more in backward
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


def test_activation_checkpointing_of_every_layer():
    model = EveryLayer(lambda row, variant: True)
    x = batch_of(model, 4)
    exact = gradients(model, x)
    outputs = [checkpoint(column, t, use_reentrant=False) for column, t in zip(model.columns, x, strict=True)]
    loss = torch.stack([(out - 0.3).square().mean() for out in outputs]).sum()
    assert_close(torch.autograd.grad(loss, list(model.parameters())), exact, 1e-6)


@pure_layers
def test_weight_norm_of_the_last_child(row, variant):
    layer = row.fresh(variant)
    x = row.input(row.dense(variant), 4)
    before = layer(x)
    last = next(name for name, child in layer.named_children() if child is layer.last)
    parametrizations.weight_norm(layer.get_submodule(last))
    assert layer.rank == row.fresh(variant).rank
    assert_close((layer(x),), (before,))
    names = {name for name, _ in layer.named_parameters()}
    assert {f"{last}.parametrizations.weight.original{k}" for k in (0, 1)} <= names
    start = copy.deepcopy(layer.state_dict())
    losses = train(layer, [(x,)] * 4, rate=1e-3)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in layer.named_parameters())
    other = row.fresh(variant)
    parametrizations.weight_norm(other.get_submodule(last))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    trained = layer(x)
    parametrize.remove_parametrizations(layer.get_submodule(last), "weight")
    assert_close((layer(x), layer.to_dense()(x)), (trained, trained))


def adamw(model: nn.Module, foreach: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=foreach)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, batch_of(model, 4, seed)).backward()
        optimizer.step()


@models
def test_the_state_of_an_optimizer_has_the_factors_shapes_and_resumes(build):
    one, many = build(), build()
    single, foreach = adamw(one, foreach=False), adamw(many, foreach=True)
    steps(one, single, range(4))
    steps(many, foreach, range(2))
    for p in many.parameters():
        assert foreach.state[p]["exp_avg"].shape == foreach.state[p]["exp_avg_sq"].shape == p.shape
        assert bool(foreach.state[p]["exp_avg_sq"].any())
    resumed = build()
    resumed.load_state_dict(many.state_dict())
    optimizer = adamw(resumed, foreach=True)
    optimizer.load_state_dict(copy.deepcopy(foreach.state_dict()))
    steps(resumed, optimizer, range(2, 4))
    steps(many, foreach, range(2, 4))
    for (name, a), b, c in zip(many.named_parameters(), one.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, c), name
        assert relative(a, b) < TIGHT, name


@models
def test_gradient_clipping(build):
    model = build()
    loss_of(model, batch_of(model, 4)).backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in before]).double().norm()
    limit = float(norm) / 3
    reported = nn.utils.clip_grad_norm_(model.parameters(), limit)
    assert float(reported) == pytest.approx(float(norm), rel=TIGHT)
    assert_close(tuple(p.grad for p in model.parameters()), tuple(g / 3 for g in before))
