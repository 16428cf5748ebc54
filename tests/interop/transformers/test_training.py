"""transformers' Trainer on factored models: the steps of plain torch, checkpoints that resume, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_layers as lr

from .models import KINDS, output, tokens
from .training import flat, rows, trainer

pytest.importorskip("accelerate")


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A factored model, saved."""
    KINDS["llama"].factored().save_pretrained(tmp_path / "model")
    return tmp_path


def load(folder: Path, **options: Any) -> Any:
    return KINDS["llama"].load(folder, **options)


def test_the_steps_are_those_of_a_loop_of_one_s_own(folder):
    model, expected = load(folder / "model"), KINDS["llama"].factored().train()
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "no"}
    trainer(model, folder / "run", **settings, data=rows(4)).train()  # one batch, in any order
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    optimizer = torch.optim.SGD(expected.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        expected(ids, labels=ids).loss.backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not same(model, KINDS["llama"].factored())


def test_a_checkpoint_is_a_folder_that_from_pretrained_reads_and_training_resumes(folder):
    whole = load(folder / "model")
    trainer(whole, folder / "run").train()
    assert same(load(folder / "run" / "checkpoint-4"), whole)
    resumed = load(folder / "model")
    trainer(resumed, folder / "run").train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    assert same(resumed, whole)


def test_the_best_model_is_loaded_at_the_end(folder):
    model = load(folder / "model")
    run = trainer(
        model,
        folder / "run",
        learning_rate=0.3,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    run.train()
    losses = {each["step"]: each["eval_loss"] for each in run.state.log_history if "eval_loss" in each}
    best = min(losses, key=losses.get)
    assert run.state.best_global_step == best
    assert same(load(folder / "run" / f"checkpoint-{best}"), model)


def test_gradient_checkpointing_takes_the_same_steps(folder):
    model, plain = load(folder / "model"), load(folder / "model")
    trainer(plain, folder / "plain").train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name since 5.21
    trainer(model, folder / "run").train()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bf16_keeps_parameters_in_fp32_and_takes_nearly_the_same_steps(folder):
    model, plain, start = (load(folder / "model") for _ in range(3))
    trainer(plain, folder / "plain", optim="sgd").train()
    trainer(model, folder / "run", optim="sgd", bf16=True).train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ours, theirs = (flat(each) - flat(start) for each in (model, plain))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_a_model_that_was_factorized_here_is_trained_and_saved(tmp_path):
    model = KINDS["llama"].factored()
    run = trainer(model, tmp_path / "run", max_steps=1)
    run.train()
    run.save_model(tmp_path / "end")
    config = json.loads((tmp_path / "end" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "lowrank"
    assert torch.equal(output(load(tmp_path / "end"), tokens()), output(model.eval(), tokens()))


def test_lora_of_ours_on_top(folder):
    model = load(folder / "model")
    before = output(model, tokens())
    lr.add_lora_(model, target="all-linear", rank=2)
    trainer(model, folder / "run", max_steps=2, save_strategy="no").train()
    after = output(model.eval(), tokens())
    assert not torch.equal(before, after)
    lr.remove_lora_(model)
    assert torch.equal(output(model, tokens()), before)
