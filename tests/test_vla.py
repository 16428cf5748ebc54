"""The robot of ``benchmarks/babyai.py``: what it sees, how it is scored, and its policy under a budget."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F

import lowrank_layers as lr
from benchmarks.babyai import ACTIONS, NO_ACTION, WORDS, Policy, begin, demonstrations, inputs_of, success

pytestmark = pytest.mark.skipif(importlib.util.find_spec("minigrid") is None, reason="needs minigrid")
SEEDS = range(900, 960)


@pytest.fixture(scope="module")
def demonstrated():
    return demonstrations(SEEDS)


class Recorded(torch.nn.Module):
    """Acts as the expert did in the states that it was shown."""

    def __init__(self, data):
        super().__init__()
        *inputs, actions = data
        self.actions = {key(row): int(a) for *row, a in zip(*inputs, actions, strict=True)}

    def forward(self, view, words, state):
        chosen = [self.actions[key(row)] for row in zip(view, words, state, strict=True)]
        return F.one_hot(torch.tensor(chosen), ACTIONS).float()


def key(row):
    return tuple(bytes(part.to(torch.uint8).flatten().tolist()) for part in row)


def test_the_expert_succeeds_and_its_demonstrations_are_all_that_it_saw(demonstrated):
    """A policy that looks the states up plays the same episodes, alone and side by side."""
    # one episode at a time: two rooms may look the same where the expert knows more than the policy is told
    for seed in SEEDS[:10]:
        assert success(Recorded(demonstrations([seed])), [seed]) == 100
    apart = [demonstrations([seed]) for seed in SEEDS]
    for part, together in zip(zip(*apart, strict=True), demonstrated, strict=True):
        assert torch.equal(torch.cat(part), together)
    view, words, state, actions = demonstrated
    starts = (state[:, 1:] == NO_ACTION).all(1)
    assert starts.sum() == len(SEEDS)
    # the newest of the last actions is the one before
    assert torch.equal(state[1:, 1][~starts[1:]].long(), actions[:-1][~starts[1:]])
    assert {WORDS[int(word)] for word in words[:, 1]} == {"key", "ball", "box"}
    assert view.amax((0, 1, 2)).tolist() <= [10, 5, 3]


def test_success_is_the_rate_of_episodes_played_one_by_one():
    policy = Policy(width=16, layers=1, heads=2).eval()
    # a policy that mostly walks succeeds now and then
    policy.head.bias.data[2] = 4.0
    reached = 0
    for seed in SEEDS[:12]:
        episode = begin(seed)
        while episode.success is None:
            episode.step(int(policy(*inputs_of([episode])).argmax()))
        reached += episode.success
    assert success(policy, SEEDS[:12], at_once=5) == pytest.approx(100 * reached / 12)


def test_the_policy_sees_every_cell_and_every_word(demonstrated):
    policy = Policy(width=32, layers=2, heads=4).eval()
    inputs = [part[:1] for part in demonstrated[:3]]
    before = policy(*inputs)
    kinds = ((11, 6, 4), (len(WORDS),), (4,) + (ACTIONS + 1,) * 4)
    for k, part in enumerate(inputs):
        for place in range(part[0].numel()):
            changed = [each.clone() for each in inputs]
            value = changed[k].view(-1)
            value[place] = (value[place] + 1) % kinds[k][place % len(kinds[k])]
            assert not torch.equal(policy(*changed), before), (k, place)


def test_a_policy_under_a_budget(demonstrated):
    """In short: cloning, compression to a sixth, and recovery by the teacher."""
    data = torch.utils.data.TensorDataset(*demonstrated)
    batches = torch.utils.data.DataLoader(data, 64, shuffle=True, generator=torch.Generator())
    dense = Policy(width=64, layers=2, heads=4)
    chance = success(dense, SEEDS)
    lr.recover_(dense, batches, steps=150, lr=2e-3)
    learned = success(dense.eval(), SEEDS)
    assert learned > chance + 30
    stats = lr.calibrate(dense, list(batches), loss=lr.SampledCrossEntropy())
    small = lr.factorize_(copy.deepcopy(dense), lr.make_plan(dense, lr.Budget(params=0.16), stats=stats), stats=stats)
    assert sum(p.numel() for p in small.parameters()) <= 0.16 * sum(p.numel() for p in dense.parameters())

    @torch.no_grad()
    def divergence():
        ours, theirs = (policy.eval()(*demonstrated[:3]).log_softmax(-1) for policy in (small, dense))
        return float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))

    before = divergence()
    lr.recover_(small, batches, steps=60, lr=1e-3, teacher=dense)
    assert divergence() < before / 2
    assert success(small, SEEDS) >= learned - 10
