"""Rows of data and Trainers for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 96, (count, 10), generator=generator)
    labels = ids.clone()
    labels[:, 0] = -100  # nothing predicts it; older versions of Trainer count it all the same where it is not masked
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def trainer(model: Any, folder: Path, data: Any = None, **settings: Any) -> transformers.Trainer:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=data or rows(),
        eval_dataset=rows(4),
    )


def flat(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
