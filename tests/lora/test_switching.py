"""Which adapters are in use: for good, inside a context, sample by sample; and that only those learn."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .test_adapters import FACTORED, MODELS, adapted, everything, make, models, run, scramble

dense = pytest.mark.parametrize("name", [name for name in MODELS if name not in FACTORED])


def two(**settings):
    """Adapters "a" and "b" on two layers, an input of four samples, and what each of them gives."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), torch.randn(4, 8)
    for name in "ab":
        lr.add_lora_(model, rank=2, name=name, **settings)
    scramble(model)
    outs = {name: lr.use_adapter(model, name)(x).detach() for name in ("a", "b", None)}
    lr.use_adapter(model, ["a", "b"])
    return model, x, outs


def expected_rows(names, outs):
    return torch.stack([outs[name][k] for k, name in enumerate(names)])


# ------------------------------------------------------------------------------------------------------ while merged


@dense
def test_a_disabled_merged_model_is_its_base_and_is_merged_again_afterwards(name):
    model, x, base = adapted(name)
    lr.merge_lora_(model)
    out = run(model, x)
    with lr.lora_disabled(model):
        assert torch.equal(run(model, x), base)
        with lr.lora_disabled(model):
            assert torch.equal(run(model, x), base)
        assert torch.equal(run(model, x), base)
    assert torch.equal(run(model, x), out)
    with pytest.raises(KeyError, match="out"), lr.lora_disabled(model):
        raise KeyError("out")
    assert torch.equal(run(model, x), out)
    assert torch.equal(run(lr.remove_lora_(model), x), base)


def test_a_bias_of_an_adapter_is_disabled_while_merged():
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    base = model(x)
    lr.add_lora_(model, rank=2, bias=True)
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.normal_()
    lr.merge_lora_(model)
    with lr.lora_disabled(model):
        assert torch.equal(model(x), base)


@pytest.mark.parametrize(
    "choose",
    [
        lambda m: lr.use_adapter(m, "a"),
        lambda m: lr.use_adapter(m, None),
        lambda m: lr.lora_rows(m, ["a", "b", None, "a"]).__enter__(),
        lambda m: lr.combine_lora_(m, {"a": 1.0}, "c"),
        lambda m: lr.add_lora_(m, rank=2, name="c"),
    ],
    ids=["use_adapter", "none", "lora_rows", "combine_lora_", "add_lora_"],
)
def test_choosing_while_merged_is_refused_and_changes_nothing(choose):
    model, x, _ = two()
    out = lr.merge_lora_(model)(x)
    with pytest.raises(lr.LowRankError, match="unmerge_lora_"):
        choose(model)
    assert torch.equal(model(x), out)
    assert model[0].lora_weight.names == ["a", "b"]


def test_merging_inside_a_context_is_refused():
    model, x, outs = two()
    with lr.lora_disabled(model), pytest.raises(lr.LowRankError, match="inside lora_disabled"):
        lr.merge_lora_(model)
    with lr.lora_rows(model, ["a"] * 4), pytest.raises(lr.LowRankError, match="inside lora_rows"):
        lr.merge_lora_(model)
    assert torch.equal(lr.use_adapter(model, "a")(x), outs["a"])


def test_loading_inside_lora_disabled_is_refused():
    model, x, outs = two()
    state = lr.use_adapter(model, "a").state_dict()
    with lr.lora_disabled(model):
        with pytest.raises(lr.LowRankError, match="disabled; leave the context"):
            model.load_state_dict(state)
        assert torch.equal(model(x), outs[None])


# ----------------------------------------------------------------------------------------------------------- contexts


def test_rows_inside_lora_disabled_are_the_base():
    model, x, outs = two()
    both = model(x)
    with lr.lora_disabled(model):
        with lr.lora_rows(model, ["a", "b", "a", None]):
            assert torch.equal(model(x), outs[None])
        assert torch.equal(model(x), outs[None])
    assert torch.equal(model(x), both)


def test_a_choice_inside_lora_disabled_counts_afterwards():
    model, x, outs = two()
    with lr.lora_disabled(model):
        lr.use_adapter(model, "b")
        assert torch.equal(model(x), outs[None])
    assert torch.equal(model(x), outs["b"])


def test_rows_nest():
    model, x, outs = two()
    both, outer, inner = model(x), ["a", "b", None, "a"], ["b", None, "b", "b"]
    with lr.lora_rows(model, outer):
        with lr.lora_rows(model, inner):
            assert torch.allclose(model(x), expected_rows(inner, outs), atol=1e-5)
        assert torch.allclose(model(x), expected_rows(outer, outs), atol=1e-5)
        with lr.lora_disabled(model):
            assert torch.equal(model(x), outs[None])
        assert torch.allclose(model(x), expected_rows(outer, outs), atol=1e-5)
        lr.use_adapter(model, "a")
        assert torch.allclose(model(x), expected_rows(outer, outs), atol=1e-5)
    assert torch.equal(model(x), outs["a"])
    lr.use_adapter(model, ["a", "b"])
    assert torch.equal(model(x), both)


ROWS = {
    "linear": (lambda: nn.Linear(8, 6), torch.randn(4, 8)),
    "linear, tokens": (lambda: nn.Linear(8, 6), torch.randn(4, 3, 8)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), torch.randn(4, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), torch.randn(4, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 6), torch.randint(9, (4, 5))),
    "bag": (lambda: nn.EmbeddingBag(9, 6), torch.randint(9, (4, 5))),
    "low-rank linear": (lambda: lr.LowRankLinear(8, 6, rank=3), torch.randn(4, 8)),
    "low-rank transposed convolution": (lambda: lr.LowRankConvTranspose1d(3, 4, 3, rank=2), torch.randn(4, 3, 9)),
}


@pytest.mark.parametrize("kind", ROWS)
def test_another_number_of_names_than_samples_is_refused(kind):
    build, x = ROWS[kind]
    model = lr.add_lora_(nn.Sequential(build()), everything, rank=2, name="a")
    scramble(model)
    out = model(x)
    with lr.lora_rows(model, ["a"] * 4):
        assert torch.allclose(model(x), out, atol=1e-5)
    for count in (1, 2, 3, 5, 8):
        with lr.lora_rows(model, ["a"] * count), pytest.raises(lr.LowRankError, match=f"got {count} names.* 4 samples"):
            model(x)
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_an_input_without_a_batch_has_no_rows(kind):
    build, x = ROWS[kind]
    model = lr.add_lora_(nn.Sequential(build()), everything, rank=2, name="a")
    names = ["a"] * x.shape[1]
    with lr.lora_rows(model, names), pytest.raises(lr.LowRankError, match="without a batch dimension"):
        model(x[0])


def test_names_that_are_one_string_are_refused():
    model, _, _ = two()
    with pytest.raises(lr.LowRankError, match="one name per sample"):
        lr.lora_rows(model, "ab").__enter__()


def test_copies_made_inside_a_context_leave_it():
    model, x, outs = two()
    with lr.lora_rows(model, ["a"] * 4):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with lr.lora_disabled(model):
        base = copy.deepcopy(model)
    for clone in copies:
        assert torch.equal(clone(x[:2]), model(x[:2]))
    assert torch.equal(base(x), outs[None])
    assert torch.equal(lr.use_adapter(base, "a")(x), outs["a"])


@models
def test_a_forward_pass_may_be_followed_by_one_of_the_base_before_its_backward(name):
    """As a penalty against the base does: what autograd has kept is not changed by disabling."""
    model, x, base = adapted(name)
    run(model, x).square().sum().backward()
    expected = [p.grad.clone() for p in lr.lora_parameters(model)]
    model.zero_grad()
    out = run(model, x)
    with lr.lora_disabled(model), torch.no_grad():
        assert torch.allclose(run(model, x), base, atol=1e-5)  # by torch's fast path
    out.square().sum().backward()
    for parameter, gradient in zip(lr.lora_parameters(model), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- learning


@models
def test_adapters_that_are_not_in_use_do_not_learn(name):
    """Their gradients are ``None``, so that the decay of AdamW does not move them."""
    model, x = make(name)
    for own in "ab":
        lr.add_lora_(model, everything, rank=1, name=own)
    scramble(model)
    every = lr.lora_parameters(model)
    optimizer = torch.optim.AdamW(every, lr=0.1, weight_decay=0.5)
    lr.use_adapter(model, "a")
    mine = {id(p) for p in lr.lora_parameters(model)}
    assert mine == {id(p) for p in lr.lora_parameters(model, "a")}
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    before = [p.detach().clone() for p in every]
    for _ in range(3):
        optimizer.zero_grad()
        run(model, x).square().sum().backward()
        optimizer.step()
    for parameter, old in zip(every, before, strict=True):
        assert (parameter.grad is None) == (id(parameter) not in mine)
        assert torch.equal(parameter, old) == (id(parameter) not in mine)
    lr.use_adapter(model, ["b", "a"])
    assert [id(p) for p in lr.lora_parameters(model)] == [id(p) for p in every]
    assert all(p.requires_grad for p in every)
    assert lr.lora_parameters(lr.use_adapter(model, None)) == []


def test_the_parameters_of_an_adapter_can_be_had_before_it_is_in_use():
    model, _, _ = two(freeze_a=True)
    own = [id(p) for p in lr.lora_parameters(model, "b")]
    lr.use_adapter(model, "a")
    assert [id(p) for p in lr.lora_parameters(model, "b")] == own
    assert len(own) == 2  # B of two layers: A is frozen
    lr.use_adapter(model, "b")
    assert [id(p) for p in model.parameters() if p.requires_grad] == own


def test_a_copy_remembers_what_learns():
    model, _, _ = two()
    clone = lr.use_adapter(pickle.loads(pickle.dumps(lr.use_adapter(model, "a"))), "b")
    assert len(lr.lora_parameters(clone)) == 4
    assert all(p.requires_grad for p in lr.lora_parameters(clone))


def test_rows_train_the_adapters_in_use_also_when_the_backward_pass_comes_later():
    model, x, _ = two()
    names = ["a", "b", None, "a"]
    gradients = []
    for later in (False, True):
        model.zero_grad()
        with lr.lora_rows(model, names):
            loss = model(x).square().sum()
            if not later:
                loss.backward()
        if later:
            loss.backward()
        gradients.append([p.grad.clone() for p in lr.lora_parameters(model)])
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(*gradients, strict=True))


# ------------------------------------------------------------------------------------------------ modules_to_save


def with_heads():
    """Two adapters, each with its own copy of the head, and what each of them gives."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), torch.randn(4, 8)
    for name in "ab":
        lr.add_lora_(model, ["0"], rank=2, name=name, modules_to_save=["2"])
        with torch.no_grad():
            for parameter in lr.lora_parameters(model, name):
                parameter.normal_()
    outs = {name: lr.use_adapter(model, name)(x).detach() for name in ("a", "b", None)}
    return lr.use_adapter(model, "a"), x, outs


def test_only_the_copy_in_use_learns():
    model, x, _ = with_heads()
    every = lr.lora_parameters(model, "a") + lr.lora_parameters(model, "b")
    assert len(every) == 8  # A, B, and weight and bias of the head
    for name in "ab":
        mine = {id(p) for p in lr.lora_parameters(lr.use_adapter(model, name))}
        assert mine == {id(p) for p in lr.lora_parameters(model, name)}
        assert mine == {id(p) for p in model.parameters() if p.requires_grad}
        model.zero_grad()
        model(x).square().sum().backward()
        assert {id(p) for p in every if p.grad is not None} == mine
    assert lr.lora_parameters(lr.use_adapter(model, None)) == []


def test_contexts_nest_with_copies():
    model, x, outs = with_heads()
    outer, inner = ["a", "b", None, "a"], ["b", None, "b", "b"]
    with lr.lora_rows(model, outer):
        with lr.lora_rows(model, inner):
            assert torch.allclose(model(x), expected_rows(inner, outs), atol=1e-5)
        with lr.lora_disabled(model):
            assert torch.equal(model(x), outs[None])
            base = copy.deepcopy(model)
        assert torch.allclose(model(x), expected_rows(outer, outs), atol=1e-5)
    with lr.lora_disabled(model):
        with lr.lora_rows(model, outer):
            assert torch.equal(model(x), outs[None])
        lr.use_adapter(model, "b")
        assert torch.equal(model(x), outs[None])
    assert torch.equal(model(x), outs["b"])
    assert torch.equal(base(x), outs[None])
    assert torch.equal(lr.use_adapter(base, "a")(x), outs["a"])


def test_merging_leaves_the_copies_and_disabling_does_not_use_them():
    model, x, outs = with_heads()
    lr.merge_lora_(model)
    assert torch.allclose(model(x), outs["a"], atol=1e-5)
    with lr.lora_disabled(model):
        assert torch.equal(model(x), outs[None])
    assert torch.allclose(model(x), outs["a"], atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_the_bias_of_an_adapter_counts_merged_and_row_by_row(dora):
    model, x = lr.add_lora_(nn.Sequential(nn.Linear(8, 6)), rank=2, bias=True, dora=dora), torch.randn(2, 8)
    base = copy.deepcopy(model[0]).bias
    with torch.no_grad():
        model[0].lora_weight.adapters["default"].bias.add_(1)
    out = run(model, x)
    assert torch.allclose(run(lr.merge_lora_(model), x), out, atol=1e-5)
    lr.unmerge_lora_(model)
    assert torch.allclose(out - nn.functional.linear(x, model[0].weight, base), torch.ones(2, 6), atol=1e-5)
    if not dora:
        with lr.lora_rows(model, ["default", None]):
            mixed = run(model, x)
        assert torch.allclose(mixed[0], out[0], atol=1e-6)
        with lr.lora_disabled(model):
            assert torch.allclose(mixed[1], run(model, x)[1], atol=1e-6)


def test_rows_of_a_batch_through_transformers_conv1d():
    from .peft.models import gpt2, tokens

    model, x = gpt2().eval(), tokens()
    for name in ("a", "b"):
        lr.add_lora_(model, ["c_attn"], rank=2, name=name)
        scramble(model)
    with torch.no_grad():
        outs = {name: lr.use_adapter(model, name)(x).logits for name in ("a", "b")}
        with lr.lora_rows(model, ["b", "a"]):
            mixed = model(x).logits
    assert torch.allclose(mixed, torch.stack([outs["b"][0], outs["a"][1]]), atol=1e-5)
