"""The recorded robot: episodes of states and actions, camera images of some, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import ROOT

HISTORY = (15, 10, 5, 0)
"""The states that the policy sees, in frames of 1/30 s before the present one."""
HORIZON = 30
"""The actions that it predicts, from the present one on: one second."""


@dataclass(frozen=True)
class Recording:
    """Episodes of states and actions at 30 Hz in the units of the actions, and camera frames of some, once a second.

    Args:
        states: one row per frame, ``[F, 26]``.
        actions: likewise.
        first: first frame of each frame's episode, ``[F]``.
        last: last frame of it, ``[F]``.
        images: camera frames, ``[I, 3, H, W]``.
        image: row of the latest camera frame at each frame, -1 where there is none, ``[F]``.
        episode: episode of each frame, ``[F]``.
    """

    states: Tensor
    actions: Tensor
    first: Tensor
    last: Tensor
    images: Tensor
    image: Tensor
    episode: Tensor

    def frames(self, episodes: Sequence[int], every: int = 1) -> Tensor:
        """The frames of these episodes, or one of so many.

        Args:
            episodes: numbers of episodes.
            every: takes one frame of so many.
        """
        return torch.isin(self.episode, torch.tensor(episodes)).nonzero().flatten()[::every]

    def chunk(self, frames: Tensor) -> Tensor:
        """The actions from each frame on, ``[N, HORIZON, joints]``; after an episode the robot stands still.

        Args:
            frames: numbers of frames.
        """
        return self.actions[(frames[:, None] + torch.arange(HORIZON)).minimum(self.last[frames, None])]

    def batch(self, frames: Tensor, camera: bool) -> tuple[Tensor, ...]:
        """``(states, images, actions)``, or ``(states, actions)`` without a camera.

        Args:
            frames: numbers of frames.
            camera: with the images, which the frames must have then.
        """
        past = (frames[:, None] - torch.tensor(HISTORY)).maximum(self.first[frames, None])
        images = (self.images[self.image[frames]],) if camera else ()
        return (self.states[past], *images, self.chunk(frames))

    def batches(self, frames: Tensor, size: int) -> list[tuple[Tensor, ...]]:
        """All these frames in batches, first those with images.

        Args:
            frames: numbers of frames.
            size: frames per batch, at most.
        """
        seen = self.image[frames] >= 0
        parts = ((frames[seen], True), (frames[~seen], False))
        return [self.batch(piece, camera) for part, camera in parts if len(part) for piece in part.split(size)]


def recording() -> Recording:
    """The 100 teleoperated episodes of a Unitree G1 that picks up a bottle."""
    raw = np.load(ROOT / "robot_g1" / "g1_state_action.npz")
    camera = np.load(ROOT / "robot_g1" / "g1_frames_1fps_96x128.npz")
    states, actions, episode = (torch.from_numpy(raw[key]) for key in ("state", "action", "episode"))
    images = torch.from_numpy(camera["frames"]).permute(0, 3, 1, 2).float() / 255 - 0.5
    seen = [torch.from_numpy(camera[key].astype(np.int64)) for key in ("episode", "frame")]
    return assembled(states, actions, episode.long(), images, torch.stack(seen, 1))


def synthetic_recording() -> Recording:
    """Twelve short episodes of three joints on smooth paths, six of them with noise for images."""
    generator = torch.Generator().manual_seed(0)
    paths = torch.randn(12, 60, 3, generator=generator).cumsum(1).flatten(0, 1)
    images = torch.randn(12, 3, 32, 32, generator=generator)
    seen = torch.tensor([(episode, frame) for episode in range(6) for frame in (0, 30)])
    return assembled(paths, paths.roll(-1, 0), torch.arange(12).repeat_interleave(60), images, seen)


def assembled(states: Tensor, actions: Tensor, episode: Tensor, images: Tensor, seen: Tensor) -> Recording:
    """A recording in units of the actions' standard deviation.

    Args:
        states: ``[F, joints]``.
        actions: ``[F, joints]``.
        episode: the episode of each frame, ``[F]``.
        images: camera images, ``[I, 3, H, W]``.
        seen: episode and frame in it of each image, in the order of time, ``[I, 2]``.
    """
    mean, std = actions.mean(0), actions.std(0)
    lengths = episode.bincount()
    ends = lengths.cumsum(0)
    image = torch.full_like(episode, -1)
    for row, (number, frame) in enumerate(seen.tolist()):
        start = int(ends[number] - lengths[number]) + frame
        image[start : int(ends[number])] = row  # up to the episode's next image, which comes later in this loop
    first, last = (ends - lengths)[episode], ends[episode] - 1
    return Recording((states - mean) / std, (actions - mean) / std, first, last, images, image, episode)


class Batches:
    """Batches of random frames, a share of them with images; the others leave out what images there are.

    Args:
        data: the recording.
        frames: numbers of frames to draw from.
        size: frames per batch.
        count: batches per pass.
        camera: share of the batches with images.
    """

    def __init__(self, data: Recording, frames: Tensor, size: int, count: int, camera: float = 0.2) -> None:
        self.data, self.size, self.count, self.camera = data, size, count, camera
        self.parts = (frames, frames[data.image[frames] >= 0])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(self.count):
            camera = float(torch.rand(())) < self.camera
            part = self.parts[camera]
            yield self.data.batch(part[torch.randint(len(part), (self.size,))], camera)
