"""BabyAI: instructions in words, an egocentric view, an expert, and a policy that learns from it. Needs minigrid."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVEL = "BabyAI-GoToLocal-v0"
WORDS = ("red", "green", "blue", "purple", "yellow", "grey", "key", "ball", "box")
LENGTH = 2
"""Words of an instruction that the policy knows: "red ball" of "go to the red ball"."""
ACTIONS = 7
PAST = 4
"""Number of last actions that the policy is told; a room is wider than its view, so it has to remember."""
NO_ACTION = ACTIONS

Inputs = tuple[Tensor, Tensor, Tensor]
"""``(view, words, state)``, of shapes ``[N, 7, 7, 3]``, ``[N, 2]`` and ``[N, 1 + PAST]``: heading and last actions."""


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Returns the first tokens after the block, as many as there are queries; all by default."""
        y, x = self.norm1(x), x[:, :queries]
        q, k, v = self.q(y[:, :queries]), self.k(y), self.v(y)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.o((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Policy(nn.Module):
    """A vision-language-action policy: the robot's state, four patches of the view and the words as tokens.

    The cells of the view are scaled by the instruction before they become patches, as in FiLM (Perez et al., 2018).

    Args:
        width: width of the transformer.
        layers: number of blocks.
        heads: number of attention heads.
    """

    def __init__(self, width: int = 512, layers: int = 3, heads: int = 8) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.Embedding(kinds, 32) for kinds in (11, 6, 4))  # object, colour, state
        self.sought, self.film = nn.Embedding(len(WORDS), 32), nn.Linear(32, 32)
        self.patch = nn.Linear(16 * 32, width)
        self.words = nn.Embedding(len(WORDS), width)
        self.heading = nn.Embedding(4, width)
        self.past = nn.Embedding(PAST * (ACTIONS + 1), width)
        self.position = nn.Parameter(0.02 * torch.randn(4 + LENGTH, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, ACTIONS)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer; a wide transformer's matrices learn well at a lower rate than all around them.

        Args:
            lr: learning rate of the transformer's matrices.
        """
        matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
        others = [p for p in self.parameters() if not any(p is each for each in matrices)]
        return [{"params": matrices, "lr": lr}, {"params": others, "lr": 6 * lr}]

    def forward(self, view: Tensor, words: Tensor, state: Tensor) -> Tensor:
        view, words, state = view.long(), words.long(), state.long()
        cells = sum(embed(view[..., k]) for k, embed in enumerate(self.cells))
        cells = cells * (1 + self.film(self.sought(words).sum(1)))[:, None, None]
        padded = F.pad(cells, (0, 0, 0, 1, 0, 1))  # 8 x 8 cells
        patches = padded.unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(2, 3).flatten(3).flatten(1, 2)
        seen = torch.cat([self.patch(patches), self.words(words)], 1) + self.position
        slots = state[:, 1:] + torch.arange(PAST, device=state.device) * (ACTIONS + 1)
        own = self.heading(state[:, :1]) + self.past(slots).sum(1, keepdim=True)
        x = torch.cat([own, seen], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.head(self.norm(self.blocks[-1](x, queries=1)[:, 0]))


@dataclass
class Episode:
    """An episode in progress."""

    env: Any
    observation: dict[str, Any]
    past: list[int] = field(default_factory=lambda: [NO_ACTION] * PAST)
    success: bool | None = None

    def step(self, action: int) -> None:
        self.observation, reward, terminated, truncated, _ = self.env.step(action)
        self.past = [action, *self.past[:-1]]
        self.success = reward > 0 if terminated or truncated else None


def begin(seed: int, level: str = LEVEL) -> Episode:
    """Begins the episode of a seed."""
    import gymnasium
    import minigrid  # noqa: F401  (it registers the levels)

    env = gymnasium.make(level)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it rejects
        return Episode(env, env.reset(seed=seed)[0])


def inputs_of(episodes: Sequence[Episode]) -> Inputs:
    """What the policy is given in each of the episodes."""
    seen = [episode.observation for episode in episodes]
    words = [[WORDS.index(word) for word in each["mission"].split() if word in WORDS] for each in seen]
    state = [[each["direction"], *episode.past] for each, episode in zip(seen, episodes, strict=True)]
    view = torch.from_numpy(np.stack([each["image"] for each in seen]))
    return view, torch.tensor(words, dtype=torch.uint8), torch.tensor(state, dtype=torch.uint8)


def demonstrations(seeds: Sequence[int], level: str = LEVEL) -> list[Tensor]:
    """The expert's episodes: the inputs of the policy, and the expert's actions, state by state."""
    from minigrid.utils.baby_ai_bot import BabyAIBot

    found, actions = [], []
    for seed in seeds:
        episode, action = begin(seed, level), None
        expert = BabyAIBot(episode.env.unwrapped)
        while episode.success is None:
            action = expert.replan(action)
            found.append(inputs_of([episode]))
            actions.append(int(action))
            episode.step(action)
    return [*(torch.cat(parts) for parts in zip(*found, strict=True)), torch.tensor(actions)]


@torch.no_grad()
def success(policy: nn.Module, seeds: Sequence[int], level: str = LEVEL, at_once: int = 256) -> float:
    """The rate of successful episodes in %, of a policy that takes its likeliest action; they run side by side."""
    waiting, running, successes = list(seeds), [], 0
    while waiting or running:
        running += [begin(waiting.pop(), level) for _ in range(min(at_once - len(running), len(waiting)))]
        for episode, action in zip(running, policy(*inputs_of(running)).argmax(-1).tolist(), strict=True):
            episode.step(action)
        successes += sum(episode.success is True for episode in running)
        running = [episode for episode in running if episode.success is None]
    return 100 * successes / len(seeds)
