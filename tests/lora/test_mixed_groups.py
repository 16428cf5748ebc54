"""Grouped convolutions in PEFT's files: its ``A`` reads the channels of all groups; DoRA; both ways."""

import copy
import itertools

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .peer import peft, wrapped

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
"""What PEFT says of every such adapter."""

CONVOLUTIONS = {
    "1d": lambda: (nn.Conv1d(4, 6, 3, padding=1, groups=2), torch.randn(2, 4, 9)),
    "2d": lambda: (nn.Conv2d(8, 8, 3, stride=2, groups=4, bias=False), torch.randn(2, 8, 7, 7)),
    "depthwise": lambda: (nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.randn(2, 4, 5, 5)),
    "pointwise": lambda: (nn.Conv2d(4, 8, 1, groups=2), torch.randn(2, 4, 5, 5)),
    "3d": lambda: (nn.Conv3d(4, 4, 2, groups=2), torch.randn(2, 4, 3, 4, 4)),
}


@torch.no_grad()
def scramble(model):
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.add_(torch.rand_like(parameter) * 0.3)


def run(model, x):
    with torch.no_grad():
        return model.eval()(x)


def theirs_of(base, groups, **settings):
    theirs = wrapped(copy.deepcopy(base), ["0"], r=2 * groups, lora_alpha=3, scrambled=False, **settings)
    scramble(theirs)
    return theirs


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_peft_writes_and_we_read_train_and_write(kind, dora, tmp_path):
    conv, x = CONVOLUTIONS[kind]()
    base = nn.Sequential(conv)
    theirs = theirs_of(base, conv.groups, use_dora=dora)
    theirs.save_pretrained(tmp_path)
    expected, plain = run(theirs, x), run(base, x)
    model = lr.load_lora(copy.deepcopy(base), tmp_path)
    assert torch.allclose(run(model, x), expected, atol=1e-5)
    with lr.lora_disabled(model), torch.no_grad():
        assert torch.equal(model(x), plain)
    assert torch.equal(run(copy.deepcopy(model), x), run(model, x))

    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lr.lora_parameters(model))
    scramble(model)
    out = run(model, x)
    assert not torch.allclose(out, expected, atol=1e-3)
    lr.save_lora(model, tmp_path / "again")
    again = peft().PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert torch.allclose(run(again, x), out, atol=1e-5)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_ours_with_dora_is_the_same_model_at_peft(kind, tmp_path):
    conv, x = CONVOLUTIONS[kind]()
    base = nn.Sequential(conv)
    model = lr.add_lora_(copy.deepcopy(base), ["0"], rank=1, alpha=3, dora=True)
    scramble(model)
    out = run(model, x)
    lr.save_lora(model, tmp_path)
    assert torch.allclose(run(peft().PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), x), out, atol=1e-5)
    ours = lr.load_lora(copy.deepcopy(base), tmp_path)
    assert torch.allclose(run(ours, x), out, atol=1e-5)
    assert torch.allclose(run(lr.merge_lora_(ours), x), out, atol=1e-5)  # it stays inside the groups


def dense_of(conv, parts):
    """The convolution without groups that has the deltas of all adapters in its weight, by definition."""
    dense = type(conv)(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    groups, width, height = conv.groups, conv.weight.shape[1], conv.weight.shape[0] // conv.groups
    with torch.no_grad():
        dense.weight.zero_()
        for g in range(groups):
            rows, columns = slice(g * height, (g + 1) * height), slice(g * width, (g + 1) * width)
            dense.weight[rows, columns] = conv.weight[rows]
            for a, b, scaling in parts:
                rank = len(a) // groups
                part = torch.einsum("or,ri...->oi...", b[rows].flatten(1), a[g * rank : (g + 1) * rank])
                dense.weight[rows, columns if a.shape[1] == width else slice(None)] += scaling * part
        dense.bias.copy_(conv.bias if conv.bias is not None else torch.zeros_like(dense.bias))
    return dense


def test_beside_an_adapter_of_ours_and_renormalised_it_is_the_dense_convolution(tmp_path):
    conv, x = CONVOLUTIONS["1d"]()
    base = nn.Sequential(conv)
    theirs_of(base, conv.groups, use_dora=True).save_pretrained(tmp_path)
    model = lr.load_lora(copy.deepcopy(base), tmp_path, "theirs")
    lr.add_lora_(model, ["0"], rank=1, name="ours")
    scramble(model)
    adapters = model[0].lora_weight.adapters
    dense = dense_of(conv, [(a.A, a.B, a.scaling) for a in adapters.values()])
    with torch.no_grad():
        lengths = dense.weight.flatten(1).norm(dim=1)
        dense.weight.mul_((adapters["theirs"].magnitude / lengths).view(-1, 1, 1))
    assert torch.allclose(run(model, x), run(dense, x), atol=1e-5)
    lr.use_adapter(model, "ours")
    only = dense_of(conv, [(adapters["ours"].A, adapters["ours"].B, adapters["ours"].scaling)])
    assert torch.allclose(run(model, x), run(only, x), atol=1e-5)


def test_what_no_weight_can_hold_is_refused_and_changes_nothing(tmp_path):
    conv, x = CONVOLUTIONS["2d"]()
    base = nn.Sequential(conv)
    theirs_of(base, conv.groups).save_pretrained(tmp_path)
    model = lr.load_lora(lr.load_lora(copy.deepcopy(base), tmp_path, "a"), tmp_path, "b")
    out, keys = run(model, x), list(model.state_dict())
    calls = [lambda: lr.merge_lora_(model), lambda: lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "c")]
    calls += [lambda: model[0].weight]
    for call in calls:
        with pytest.raises(lr.LowRankError, match="all groups"):
            call()
    with pytest.raises(lr.LowRankError, match="lora_rows"), lr.lora_rows(model, ["a", None]):
        model(x)
    assert torch.equal(run(model, x), out)
    assert list(model.state_dict()) == keys
    small = nn.Sequential(lr.LowRankConv2d.from_dense(conv, rank=2))
    with pytest.raises(lr.CheckpointError, match="torch's own convolutions"):
        lr.load_lora(small, tmp_path)
    lr.remove_lora_(model)
    assert torch.equal(run(model, x), run(base, x))


def test_dropout_is_on_the_input_of_a(tmp_path):
    conv, x = CONVOLUTIONS["depthwise"]()
    base = nn.Sequential(conv)
    theirs_of(base, conv.groups, lora_dropout=0.5).save_pretrained(tmp_path)
    model = lr.load_lora(base, tmp_path).train()
    outs = [model(x) for _ in range(3)]
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(outs, 2))
    assert torch.equal(run(model, x), run(model, x))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision_outputs_have_the_dtype_of_the_base(autocast, dora, tmp_path):
    conv, x = CONVOLUTIONS["1d"]()
    base = nn.Sequential(conv)
    theirs_of(base, conv.groups, use_dora=dora).save_pretrained(tmp_path)
    expected = run(lr.load_lora(copy.deepcopy(base), tmp_path), x)
    model = lr.load_lora(base if autocast else base.bfloat16(), tmp_path)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(model, x if autocast else x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected, atol=0.05 * float(expected.abs().max()))
    assert all(p.dtype == torch.float32 for p in lr.lora_parameters(model))
