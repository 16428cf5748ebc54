"""Teach a robot to follow instructions, compress its policy to a budget, and let it act.

python examples/vla_policy.py [--budget 0.1] [--demonstrations 5000] [--width 256] [--steps 1000] [--recovery 300]

The robot stands in a room of BabyAI, sees what lies before it and is told where to go, as in "go to the red ball". The
policy, a transformer over patches of the view, words and its last actions, is trained by behaviour cloning: it imitates
the actions of an expert. The dense policy then teaches the compressed one. Needs the extra robot.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowrank_layers as lr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.babyai import Policy, begin, demonstrations, inputs_of, success

WORDS_OF_ACTIONS = ("left", "right", "forward", "pick up", "drop", "toggle", "done")


def compress(dense: nn.Module, batches: DataLoader, held_out: list, budget: float, steps: int) -> nn.Module:
    """A copy of the policy that meets the budget, after recovery by its teacher, the dense policy."""
    stats = lr.calibrate(dense, list(itertools.islice(batches, 32)), loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(dense, lr.Budget(params=budget), stats=stats)
    print(plan)
    small = lr.factorize_(copy.deepcopy(dense), plan, stats=stats)
    # the best state on held-out demonstrations is kept, so that by them it never gets worse
    print(lr.recover_(small, batches, steps, teacher=dense, lr=1e-4, validation=held_out))
    return small


@torch.no_grad()
def act(policy: nn.Module, seed: int) -> str:
    """The instruction of an episode, and what the policy did."""
    episode, actions = begin(seed), []
    instruction = episode.observation["mission"]
    while episode.success is None:
        actions.append(int(policy(*inputs_of([episode])).argmax()))
        episode.step(actions[-1])
    told = ", ".join(WORDS_OF_ACTIONS[action] for action in actions)
    return f"{instruction!r}: {told}: {'there' if episode.success else 'lost'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.1, help="fraction of the parameters that is kept")
    parser.add_argument("--demonstrations", type=int, default=5_000, help="episodes of the expert")
    parser.add_argument("--width", type=int, default=256, help="width of the policy; 512 has ten million parameters")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1_000, help="steps of training")
    parser.add_argument("--recovery", type=int, default=300, help="steps of recovery")
    parser.add_argument("--held-out", type=int, default=1_024, help="states that are not trained on")
    parser.add_argument("--episodes", type=int, default=200, help="episodes that are scored")
    parser.add_argument("--out", type=Path, default=Path("vla_policy_out"))
    args = parser.parse_args()
    torch.manual_seed(0)
    data = demonstrations(range(args.episodes, args.episodes + args.demonstrations))
    print(f"{args.demonstrations:,} demonstrations of {len(data[0]):,} actions")
    held_out = [tuple(part[-args.held_out :] for part in data)]
    batches = DataLoader(
        TensorDataset(*(part[: -args.held_out] for part in data)), args.batch, shuffle=True, drop_last=True
    )
    dense = Policy(args.width)
    # a training like any other: the loss is the cross-entropy between the policy's actions and the expert's
    optimizer = torch.optim.AdamW(dense.groups(5e-4))
    lr.recover_(dense, batches, args.steps, optimizer=optimizer, progress=True)
    small = compress(dense.eval(), batches, held_out, args.budget, args.recovery)
    score = {"success, %": lambda policy: success(policy, range(args.episodes))}
    print(lr.compare(dense, small, [tuple(part[:1] for part in data)], score=score))
    for seed in range(3):
        print(act(small.eval(), seed))
    args.out.mkdir(parents=True, exist_ok=True)
    lr.save(small, args.out / "policy.safetensors")
    print(f"written to {args.out / 'policy.safetensors'}")


if __name__ == "__main__":
    main()
