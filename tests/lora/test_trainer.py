"""Adapters under transformers' Trainer: ranks that are allocated while it trains, and adapters in its checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # transformers imports it where it is installed
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

IDS = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[:, 0] = -100  # nothing predicts it; older versions of Trainer count it all the same where it is not masked
SCHEDULE: dict[str, Any] = {"rank": 2, "start": 1, "stop": 5}


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted() -> Any:
    model = base()
    torch.manual_seed(1)
    return lr.add_lora_(model, target="all-linear", rank=4)


def train(model: Any, folder: Path, callbacks: list[Any], resume: str | None = None, **settings: Any) -> Any:
    """Six steps, each on all of the rows."""
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0, "save_steps": 3, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, **settings,
    }  # fmt: skip
    rows = [{"input_ids": row, "labels": label} for row, label in zip(IDS, LABELS, strict=True)]
    arguments = transformers.TrainingArguments(output_dir=str(folder), **settings)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_ranks_and_weights_are_those_of_a_loop(tmp_path):
    model, expected = adapted(), adapted().train()
    ours, theirs = lr.LoraRankAllocator(model, **SCHEDULE), lr.LoraRankAllocator(expected, **SCHEDULE)
    train(model, tmp_path, [ours.to_hf_callback()], save_strategy="no")
    optimizer = torch.optim.SGD(list(lr.lora_parameters(expected)), lr=0.1)
    for _ in range(6):
        expected(IDS, labels=LABELS).loss.backward()
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
    assert ours.ranks() == theirs.ranks()
    assert sum(ours.ranks().values()) == 2 * len(ours.ranks())
    assert len(set(ours.ranks().values())) > 1
    torch.testing.assert_close(logits(model), logits(expected))
    before = logits(model)
    ours.finish()
    torch.testing.assert_close(logits(model), before)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, resumed = adapted(), adapted()
    allocator = lr.LoraRankAllocator(whole, **SCHEDULE)
    train(whole, tmp_path, [allocator.to_hf_callback()])
    again = lr.LoraRankAllocator(resumed, **SCHEDULE)
    train(resumed, tmp_path, [again.to_hf_callback()], resume=str(tmp_path / "checkpoint-3"))
    assert again.ranks() == allocator.ranks()
    for name, tensor in allocator.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    train(adapted(), tmp_path, [])
    model = adapted()
    callback = lr.LoraRankAllocator(model, **SCHEDULE).to_hf_callback()
    with pytest.raises(lr.CheckpointError, match=r"checkpoint-3.lora_rank_allocator\.safetensors"):
        train(model, tmp_path, [callback], resume=str(tmp_path / "checkpoint-3"))


def test_the_state_of_the_best_model_comes_with_it(tmp_path):
    model = adapted()
    allocator = lr.LoraRankAllocator(model, **SCHEDULE)
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    settings["greater_is_better"] = True  # the greatest loss, which is not that of the last step
    trainer = train(model, tmp_path, [allocator.to_hf_callback()], **settings)
    assert int(allocator.state_dict()["step"]) == trainer.state.best_global_step < 6


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT calls it
def test_checkpoints_hold_adapters_that_load_onto_the_base(tmp_path):
    model = adapted()
    train(model, tmp_path, [lr.lora_checkpoints(model)])
    ours = lr.load_lora(base(), tmp_path / "checkpoint-6" / "adapter")
    torch.testing.assert_close(logits(ours), logits(model))
    earlier = lr.load_lora(base(), tmp_path / "checkpoint-3" / "adapter")
    assert not torch.allclose(logits(earlier), logits(model))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-6" / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model))
    resumed = adapted()
    train(resumed, tmp_path, [lr.lora_checkpoints(resumed)], resume=str(tmp_path / "checkpoint-3"))
    assert torch.equal(logits(resumed), logits(model))


def test_what_save_lora_refuses_is_refused_before_the_training():
    model = base()
    lr.factorize_(model, lr.make_plan(model, rank=4))
    lr.add_lora_(model, target="all-linear", rank=2)
    with pytest.raises(lr.UnsupportedLayerError, match="save_lora"):
        lr.lora_checkpoints(model)
