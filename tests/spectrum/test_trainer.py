"""The monitor as a callback of transformers' Trainer."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # transformers imports it where it is installed
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def test_it_measures_at_the_trainer_s_steps_also_after_a_resumption(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(20, (16, 6))]
    before = len(torch_optimizer._global_optimizer_post_hooks)

    def run(max_steps, **settings):
        # two micro batches per step, so that forward passes are not steps
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=max_steps, per_device_train_batch_size=2, report_to=[], save_steps=3,
            gradient_accumulation_steps=2, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        monitor = lr.SpectrumMonitor(model, every=2, k=4, target=["lm_head", "mlp"])
        callback = monitor.to_hf_callback()
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train(**settings)
        assert len(torch_optimizer._global_optimizer_post_hooks) == before
        return monitor.records

    records = run(3)
    assert [record.step for record in records] == [2]
    names = {"lm_head.weight", *(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))}
    assert records[0].weights.keys() == records[0].gradients.keys() == names
    last = run(6, resume_from_checkpoint=True)
    assert [record.step for record in last] == [4, 6]
    exact = torch.linalg.svdvals(model.lm_head.weight.detach())[:4].tolist()
    assert last[-1].weights["lm_head.weight"].singular_values == pytest.approx(exact, rel=0.01)
