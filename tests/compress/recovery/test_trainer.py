"""Distillation as a term of the loss of transformers' Trainer."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # transformers imports it where it is installed
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("by_callback", [False, True], ids=["with", "callback"])
def test_the_trainer_s_loss_is_that_of_the_objective(tmp_path, by_callback):
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    teacher = transformers.LlamaForCausalLM(config).eval()
    model = lr.factorize_(copy.deepcopy(teacher), lr.make_plan(teacher, rank=4, skip=["lm_head", nn.Embedding]))
    ids = torch.randint(20, (4, 6))
    labels = ids.clone()
    labels[:, 0] = -100  # predicted by no token: the Trainer of transformers 5.2 to 5.9 counts it unless it is masked
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    with torch.no_grad():
        ours, theirs = model(ids, labels=labels), teacher(ids)
        p, q = theirs.logits.log_softmax(-1), ours.logits.log_softmax(-1)
        expected = ours.loss + 0.5 * (p.exp() * (p - q)).sum(-1).mean()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], logging_steps=1,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    distillation = lr.Distillation(model, teacher, distillation_weight=0.5)

    def loss(outputs: object, labels: torch.Tensor, num_items_in_batch: object = None) -> torch.Tensor:
        own = model.loss_function(outputs.logits, labels, 20, num_items_in_batch=num_items_in_batch)
        return own + distillation(outputs, labels)

    callbacks = [distillation.to_hf_callback()] if by_callback else []
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss, callbacks=callbacks)
    before = hooks(model)
    with contextlib.nullcontext() if by_callback else distillation:
        trainer.train()
    assert hooks(model) == before
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-3)
    recovery = lr.recover_(
        lr.factorize_(copy.deepcopy(teacher), lr.make_plan(teacher, rank=4, skip=["lm_head", nn.Embedding])),
        [{"input_ids": ids, "labels": labels}],
        steps=1,
        loss=lambda output, target: output.loss,
        teacher=teacher,
        distillation_weight=0.5,
    )
    assert recovery.losses[0] == pytest.approx(expected.item(), rel=1e-5)
