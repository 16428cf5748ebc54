"""``recover_`` minimizes what it says by the steps that it says, and leaves the best state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank_layers as lr

from .digits import accuracy, batches, cnn, factorized, mlp, trained


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(lr.LowRankLinear(6, 8, rank=2), nn.Tanh(), nn.Linear(8, 3))


def some(count: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, size, 6, generator=generator)
    return [(inputs, torch.randint(3, (size,), generator=generator)) for inputs in x]


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize(("build", "kept"), [(mlp, 0.15), (cnn, 0.5)])
@pytest.mark.parametrize("by", ["labels", "teacher", "both"])
def test_accuracy_on_unseen_digits_comes_back(build, kept, by):
    dense = trained(build())
    model = factorized(dense, kept)
    told = {"loss": F.cross_entropy} if by != "teacher" else {}
    told |= {"teacher": dense} if by != "labels" else {}
    held_out = batches(1200, 1797)
    recovery = lr.recover_(model, batches(0, 1200), steps=40, lr=3e-3, validation=held_out, metric=accuracy, **told)
    first = recovery.scores[0][1]
    assert recovery.score == max(score for _, score in recovery.scores)
    assert recovery.score > first + 0.5 * (1 - first)  # at least half of the errors are gone
    with torch.no_grad():
        right = sum(len(y) * accuracy(model(x), y) for x, y in held_out)
    assert recovery.score == pytest.approx(right / 597, abs=1e-9)
    assert not any(module.training for module in model.modules())


def test_the_steps_are_those_of_adamw_with_warm_up_and_cosine():
    data, expected = some(6), small()
    model = copy.deepcopy(expected)
    recovery = lr.recover_(model, data, steps=6, lr=0.05, warmup=0.3, weight_decay=0.1, clip=0.5)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.05, weight_decay=0.1)
    factors = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4))]
    losses = []
    for (x, y), factor in zip(data, factors, strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(expected(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        optimizer.step()
        losses.append(float(loss.detach()))
    assert torch.equal(weights(model), weights(expected))
    assert recovery.losses == pytest.approx(losses)
    assert recovery.best_step == 6
    assert recovery.score is None


def test_accumulated_gradients_are_those_of_the_large_batch():
    parts = some(12)
    whole = [tuple(map(torch.cat, zip(*parts[k : k + 3], strict=True))) for k in range(0, 12, 3)]
    model, other = small().double(), small().double()
    a = lr.recover_(model, [(x.double(), y) for x, y in parts], steps=4, accumulate=3)
    b = lr.recover_(other, [(x.double(), y) for x, y in whole], steps=4)
    assert torch.allclose(weights(model), weights(other), rtol=0, atol=1e-12)
    assert a.losses == pytest.approx(b.losses, rel=1e-12)


def test_the_best_state_is_kept_with_its_buffers():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    seen = []

    def score(scored):
        seen.append({name: tensor.clone() for name, tensor in scored.state_dict().items()})
        assert not any(module.training for module in scored.modules())
        return -abs(len(seen) - 3)  # the third is best

    recovery = lr.recover_(model, some(4), steps=12, validate_every=2, score=score)
    assert recovery.best_step == 4
    assert len(seen) == 7
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, seen[2][name])
    assert not torch.equal(seen[2]["0.weight"], seen[-1]["0.weight"])


def test_a_model_that_only_gets_worse_stays_as_it_was_and_training_stops():
    model = small()
    before = weights(model)
    scores = iter(range(0, -100, -1))
    recovery = lr.recover_(model, some(4), steps=50, validate_every=1, patience=3, score=lambda _: next(scores))
    assert torch.equal(weights(model), before)
    assert recovery.best_step == 0
    assert len(recovery.losses) == 3


def test_only_the_factors_are_trained():
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lr.recover_(model, some(4), steps=2, trainable="factors")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.down.weight", "0.up.weight", "0.up.bias"}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_frozen_parameters_gradients_modes_and_generators_are_left_alone():
    model = small()
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.clone()
    model[2].bias.grad = torch.ones(3)
    model[1].eval()
    state = torch.get_rng_state()
    lr.recover_(model, torch.utils.data.DataLoader(some(4), batch_size=None, shuffle=True), steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[2].weight, frozen)
    assert not model[2].weight.requires_grad
    assert torch.equal(model[2].bias.grad, torch.ones(3))
    assert [module.training for module in model] == [True, False, True]


def test_frozen_batch_norms_keep_their_statistics_and_train_as_affine_maps():
    torch.manual_seed(0)
    model = nn.Sequential(lr.LowRankLinear(6, 8, rank=2), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    norm = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    reference, data = copy.deepcopy(model), some(4)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    scale = (norm.running_var + norm.eps).rsqrt()
    for step, (x, y) in enumerate(data):
        hidden = (reference[0](x) - norm.running_mean) * scale * reference[1].weight + reference[1].bias
        optimizer.zero_grad()
        F.cross_entropy(reference[2](hidden), y).backward()
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 4))
        optimizer.step()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    lr.recover_(model, data, steps=4, warmup=0.0, clip=None, freeze_batch_norm=True, optimizer=own)
    torch.testing.assert_close(weights(model), weights(reference))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.train()
    lr.recover_(model, data, steps=1)
    assert norm.training
    assert not torch.equal(norm.running_mean, before["1.running_mean"])
    lr.recover_(model, data, steps=1, freeze_batch_norm=True)
    assert norm.training


def test_validation_without_a_metric_is_minus_the_objective_over_samples():
    model = small()
    validation = [*some(1, size=4), *some(1, size=1)]
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), y) * len(y) for x, y in validation]
    recovery = lr.recover_(model, some(2), steps=1, validation=validation)
    assert recovery.scores[0][1] == pytest.approx(-float(sum(losses)) / 5, rel=1e-6)


def test_an_own_optimizer_keeps_its_groups_and_its_moments():
    model = small()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}], momentum=0.9)
    head = model[2].weight.clone()
    lr.recover_(model, some(4), steps=4, optimizer=optimizer, warmup=0.0)
    assert torch.equal(model[2].weight, head)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all("momentum_buffer" in optimizer.state[p] for p in model[0].parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_keeps_parameters_in_fp32(dtype):
    model, seen = small(), []

    def loss(output, target):
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), target)

    exact = lr.recover_(small(), some(4), steps=8)
    recovery = lr.recover_(model, some(4), steps=8, loss=loss, dtype=dtype)
    assert set(seen) == {dtype}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert recovery.losses == pytest.approx(exact.losses, abs=8 * 2.0**-8)


def test_two_runs_with_one_seed_agree_and_with_another_do_not():
    def run(seed):
        model = nn.Sequential(small(), nn.Dropout(0.5))
        loader = torch.utils.data.DataLoader(some(8), batch_size=None, shuffle=True)
        return lr.recover_(model, loader, steps=20, seed=seed)

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_every_epoch_has_an_order_of_its_own():
    seen = []

    def loss(output, target):
        seen.append(int(target[0, 0]))
        return output.square().mean()

    data = [(torch.randn(2, 6), torch.full((2, 1), k)) for k in range(8)]
    for generator in (None, torch.Generator()):
        seen.clear()
        loader = torch.utils.data.DataLoader(data, batch_size=None, shuffle=True, generator=generator)
        lr.recover_(small(), loader, steps=16, loss=loss)
        assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
        assert seen[:8] != seen[8:]


def test_a_history_prints_what_it_holds():
    recovery = lr.recover_(small(), some(4), steps=40, validation=some(2))
    lines = str(recovery).splitlines()
    assert len(lines) == 1 + len(recovery.scores) == 22
    assert [int(line.split()[0]) for line in lines[1:]] == [step for step, _ in recovery.scores]
    (kept,) = [line for line in lines if line.endswith("kept")]
    assert int(kept.split()[0]) == recovery.best_step
    assert float(lines[2].split()[1]) == pytest.approx(sum(recovery.losses[:2]) / 2, rel=1e-3)


def test_a_second_recovery_goes_on_in_the_data_where_the_first_one_stopped():
    rows = torch.utils.data.TensorDataset(torch.randn(14, 6), torch.arange(14))
    data = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True, generator=torch.Generator())
    seen = []

    def loss(output, target):
        seen.extend(target.tolist())
        return output.square().sum()

    first = lr.recover_(small(), data, steps=2, accumulate=2, loss=loss)
    assert first.position == (0, 4)
    second = lr.recover_(small(), data, steps=4, loss=loss, start=first.position)
    assert second.position == (1, 1)
    whole = list(seen)
    seen.clear()
    lr.recover_(small(), data, steps=8, loss=loss)
    assert whole == seen
    assert sorted(whole[:14]) == list(range(14))


BAD = {
    "got start=3, expected \\(epoch, batches\\)": lambda m: lr.recover_(m, some(2), start=3),
    "got start\\[1\\]=-1, expected an integer": lambda m: lr.recover_(m, some(2), start=(0, -1)),
    "got one Tensor, expected a list of batches": lambda m: lr.recover_(m, torch.ones(4, 6)),
    "of type generator, which can be read only once": lambda m: lr.recover_(m, (b for b in some(2))),
    "data has no batches": lambda m: lr.recover_(m, []),
    "validation has no batches": lambda m: lr.recover_(m, some(2), validation=[]),
    "got step=, which is no option; did you mean steps=": lambda m: lr.recover_(m, some(2), step=3),
    "got steps=0, expected an integer of at least 1": lambda m: lr.recover_(m, some(2), steps=0),
    "got lr=nan, expected a number above 0": lambda m: lr.recover_(m, some(2), lr=math.nan),
    "got warmup=2, expected a fraction": lambda m: lr.recover_(m, some(2), warmup=2),
    "got trainable='some', expected 'all'": lambda m: lr.recover_(m, some(2), trainable="some"),
    "got freeze_batch_norm=1, expected True or False": lambda m: lr.recover_(m, some(2), freeze_batch_norm=1),
    "got hidden='0', expected a list": lambda m: lr.recover_(m, some(2), hidden="0"),
    "got dtype=torch.int8, expected None": lambda m: lr.recover_(m, some(2), dtype=torch.int8),
    "metric= without validation=": lambda m: lr.recover_(m, some(2), metric=accuracy),
    "score= beside validation=": lambda m: lr.recover_(m, some(2), validation=some(1), score=float),
    "patience= and nothing to score": lambda m: lr.recover_(m, some(2), patience=2),
    "got loss of type str, expected a function": lambda m: lr.recover_(m, some(2), loss="ce"),
    "got teacher of type int": lambda m: lr.recover_(m, some(2), teacher=3),
    "the teacher shares '0.down.weight'": lambda m: lr.recover_(m, some(2), teacher=m),
    "hidden='5', but the model has no such module": lambda m: lr.recover_(m, some(2), teacher=small(), hidden=["5"]),
    "parameters that are not the model's": lambda m: lr.recover_(
        m, some(2), optimizer=torch.optim.SGD(small().parameters(), lr=1.0)
    ),
    "no parameter to train.*needs a factored model": lambda m: lr.recover_(m[2:], some(2), trainable="factors"),
    "expected logits and labels": lambda m: lr.recover_(m, [torch.randn(2, 6)]),
    "the loss returned shape \\(4, 3\\)": lambda m: lr.recover_(m, some(2), loss=lambda output, target: output),
    "expected outputs of one shape": lambda m: lr.recover_(m, some(2), teacher=nn.Linear(6, 4)),
    "wrapped in DataParallel": lambda m: lr.recover_(nn.DataParallel(m), some(2)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_and_the_model_is_as_it_was(message):
    model = small()
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(lr.LowRankError, match=message):
        BAD[message](model)
    assert torch.equal(weights(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_objective_that_is_not_finite_ends_in_the_best_state():
    model, calls = small(), []

    def loss(output, target):
        calls.append(0)
        return output.sum() * (math.inf if len(calls) > 4 else 1)

    states = []
    with pytest.raises(lr.LowRankError, match=r"objective of step 5 is -?inf.*lower lr"):
        lr.recover_(
            model,
            some(4),
            steps=10,
            loss=loss,
            validate_every=2,
            score=lambda m: states.append(weights(m)) or len(states),
        )
    assert len(states) == 3
    assert torch.equal(weights(model), states[2])
