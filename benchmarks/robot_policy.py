"""A policy for the recorded robot: the last states and a camera image to a chunk of actions, as in ACT.

Zhao, Kumar, Levine and Finn, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", 2023. The
instruction is one sentence in all episodes, so that it tells the policy nothing and is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.robot_data import HISTORY, HORIZON


class ActionChunkPolicy(nn.Module):
    """A transformer over the last states, one token of the camera and one that asks for the actions.

    Args:
        joints: number of joints.
        width: width of the tokens, a multiple of 64.
        depth: number of blocks.
        image: height and width of an image, multiples of 32.

    Shape:
        states ``[N, len(HISTORY), joints]``, images ``[N, 3, H, W]`` or none, which a learned token stands for; actions
        ``[N, HORIZON, joints]``.
    """

    def __init__(self, joints: int, width: int, depth: int, image: tuple[int, int]) -> None:
        super().__init__()
        channels, cells = width // 4, (image[0] // 32) * (image[1] // 32)
        self.camera = nn.Sequential(
            nn.Conv2d(3, channels, 16, 16),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(channels * cells, width),
        )
        self.state = nn.Linear(joints, width)
        self.no_image = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, len(HISTORY) + 2, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, HORIZON * joints)
        nn.init.zeros_(self.head.bias)

    def forward(self, states: Tensor, images: Tensor | None = None) -> Tensor:
        """Actions as a change of the present state, which costs nothing where the robot stands still."""
        seen = self.no_image.expand(len(states), -1, -1) if images is None else self.camera(images)[:, None]
        asked = torch.zeros_like(seen)
        tokens = self.blocks(torch.cat((self.state(states), seen, asked), 1) + self.place)
        return states[:, -1:] + self.head(tokens[:, -1]).unflatten(1, (HORIZON, -1))
