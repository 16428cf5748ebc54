import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_layers as lr
from lowrank_layers.layers.patches import input_rows


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.LazyLinear(5),
    )


@pytest.fixture
def model():
    net = small_cnn()
    net(torch.randn(4, 2, 6, 6))
    return net


def test_input_moments_are_those_of_the_patches(model):
    x = torch.randn(40, 2, 6, 6)
    stats = lr.calibrate(model, list(x.split(16)))
    seen = []
    model[3].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.eval()(x)
    conv = model[3]
    patches = F.unfold(seen[0], conv.kernel_size, conv.dilation, conv.padding, conv.stride).double()
    rows = patches.mT.reshape(-1, patches.shape[1])
    assert torch.allclose(stats["3"].inputs.second, rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-7)
    assert torch.allclose(stats["3"].inputs.mean, rows.mean(0), rtol=1e-5, atol=1e-7)
    assert stats["3"].positions == len(rows) / 40
    assert stats["0"].gradients is None


def test_patches_reproduce_the_convolution_with_every_kind_of_padding():
    for padding, mode in (
        (1, "reflect"),
        ("same", "zeros"),
        ((0, 2), "circular"),
        ("valid", "zeros"),
        (1, "replicate"),
    ):
        conv = nn.Conv2d(3, 4, (2, 3), padding=padding, padding_mode=mode, dilation=(2, 1))
        x = torch.randn(5, 3, 8, 8)
        (rows,) = input_rows(conv, x)
        out = rows @ conv.weight.flatten(1).mT + conv.bias
        expected = conv(x).movedim(1, -1).reshape(-1, 4)
        assert torch.allclose(out, expected, atol=1e-5), (padding, mode)


def test_gradients_are_those_of_one_samples_loss_despite_inplace_relu(model):
    x, y = torch.randn(24, 2, 6, 6), torch.randint(0, 5, (24,))
    stats = lr.calibrate(model, [(x, y)], loss=F.cross_entropy)
    model.eval()
    outputs = {}
    clean = copy.deepcopy(model)
    clean[2].inplace = clean[4].inplace = False
    for name in ("0", "3", "7"):
        clean.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out))
    per_sample = F.cross_entropy(clean(x), y, reduction="none")
    for name in outputs:
        (g,) = torch.autograd.grad(per_sample.sum(), outputs[name], retain_graph=True)
        rows = (g.movedim(1, -1) if g.ndim == 4 else g).reshape(-1, g.shape[1]).double()
        expected = rows.mT @ rows / len(rows)
        assert torch.allclose(stats[name].gradients, expected, rtol=1e-4, atol=1e-9), name


def test_the_model_is_left_as_it_was(model):
    model.train()
    model[1].eval()
    model[7].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    flags = [m.training for m in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    lr.calibrate(model, [torch.randn(8, 2, 6, 6, generator=torch.Generator())], loss=lr.SampledCrossEntropy())
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_when_a_batch_fails(model):
    flags = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):
        lr.calibrate(model, [torch.randn(8, 3, 6, 6)], loss=lr.SampledCrossEntropy())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [m.training for m in model.modules()] == flags


def test_streaming_equals_one_batch(model):
    x = torch.randn(40, 2, 6, 6)
    one, many = lr.calibrate(model, [x]), lr.calibrate(model, list(x.split(7)))
    for name in one:
        assert torch.allclose(one[name].inputs.second, many[name].inputs.second, rtol=1e-5, atol=1e-8)
    assert one.samples == many.samples == 40


def test_a_dict_batch_and_a_shared_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.layer = nn.Linear(6, 6)

        def forward(self, ids, labels=None):
            return self.layer(self.layer(self.embed(ids)))

    model = Twice()
    ids = torch.randint(0, 10, (8, 3))
    stats = lr.calibrate(model, [{"ids": ids, "labels": ids}], loss=lambda out, labels: out.square().mean())
    assert stats["embed"].inputs.second.tolist() == pytest.approx(
        (torch.bincount(ids.flatten(), minlength=10) / 24).tolist()
    )
    assert stats["layer"].positions == 6
    assert stats["layer"].repeats == 2
    assert stats["layer"].gradients is not None


@pytest.mark.parametrize(
    ("target", "names"),
    [(["3"], ["3"]), ([nn.Linear], ["7"]), ([lambda name, module: name < "4", "7"], ["0", "3", "7"])],
)
def test_moments_of_chosen_layers_are_those_of_all(model, target, names):
    batches = [(torch.randn(8, 2, 6, 6), torch.randint(5, (8,))) for _ in range(2)]
    everything = lr.calibrate(model, batches, F.cross_entropy)
    chosen = lr.calibrate(model, batches, F.cross_entropy, target=target)
    assert list(chosen) == names
    for name, stats in chosen.items():
        torch.testing.assert_close(stats.inputs.second, everything[name].inputs.second)
        torch.testing.assert_close(stats.gradients, everything[name].gradients)
    # what is not calibrated is still counted
    sizes = {name: everything[name].input_shape for name in everything if name not in names}
    assert chosen.other_macs == sum(lr.layer_cost(model[int(name)], shape).macs for name, shape in sizes.items())


def test_a_target_of_an_attention_takes_its_projections_and_an_unknown_one_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stats = lr.calibrate(model, [torch.randn(2, 5, 8)], target=["self_attn"])
    assert sorted(stats) == [f"self_attn.{side}_proj" for side in ("k", "out", "q", "v")]
    with pytest.raises(lr.LowRankError, match="matches no module"):
        lr.calibrate(model, [torch.randn(2, 5, 8)], target=["linear3"])
    with pytest.raises(lr.LowRankError, match="expected a list"):
        lr.calibrate(model, [torch.randn(2, 5, 8)], target="linear1")
    with pytest.raises(lr.LowRankError, match="no layer saw any data"):
        lr.calibrate(model, [torch.randn(2, 5, 8)], target=["norm1"])


def test_layers_with_computed_weights_are_passed_over_but_counted():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 4))
    stats = lr.calibrate(model, [torch.randn(8, 6)], loss=lr.SampledCrossEntropy())
    assert set(stats) == {"1"}
    assert stats.other_macs == 30


def test_every_convolution_is_counted():
    """2 * MACs is what torch's own counter says, grouped and 1-d convolutions included."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 3, padding="same"), nn.Flatten(2), nn.Conv1d(6, 3, 5)
    )
    x = torch.randn(5, 4, 9, 9)
    stats = lr.calibrate(model, [x])
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert 2 * 5 * lr.make_plan(model, rank=2, stats=stats).total.macs == counter.get_total_flops()


def test_sampled_cross_entropy_gives_the_fisher_matrix():
    """For one linear layer: ``G = diag(p) - p p^T`` in expectation, at temperature 1."""
    model = nn.Linear(4, 3)
    x = torch.randn(1, 4).expand(60_000, 4)
    with lr.Calibration(model) as stats:
        lr.SampledCrossEntropy(temperature=1.0)(model(x), None).backward()
    p = model(x[:1]).softmax(-1)[0].double().detach()
    assert torch.allclose(stats[""].gradients, p.diag() - torch.outer(p, p), atol=6e-3)


def test_a_model_that_is_never_called_as_a_whole_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(lr.LowRankError, match="call it as a whole"), lr.Calibration(model):
        model[0](torch.randn(2, 4))
