"""Lightning and TRL on factored models; each is skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import lowrank_layers as lr

from .models import KINDS, WORDS
from .training import flat, rows

pytestmark = pytest.mark.filterwarnings("default")  # of packages that the tests are not about


@pytest.fixture
def folder(tmp_path) -> Path:
    """A factored model, saved."""
    KINDS["llama"].factored().save_pretrained(tmp_path / "model")
    return tmp_path


def test_lightning_with_gradients_of_low_rank(folder):
    lightning = pytest.importorskip("lightning.pytorch")
    ids = torch.stack([row["input_ids"] for row in rows(4)])

    class Module(lightning.LightningModule):
        def __init__(self, model, compressed):
            super().__init__()
            self.model, self.compressed, self.ranks = model, compressed, []

        def training_step(self, batch, index):
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

        def on_train_start(self):
            if self.compressed:  # DDPStrategy(ddp_comm_hook=) registers hooks on GPUs only
                self.trainer.strategy.model.register_comm_hook(lr.LowRankCommState(rank=4), lr.low_rank_hook)

        def on_after_backward(self):
            grad = self.model.model.layers[0].mlp.down_proj.down.weight.grad
            self.ranks.append(int(torch.linalg.matrix_rank(grad)))

    def train(compressed: bool) -> Module:
        module = Module(KINDS["llama"].load(folder / "model"), compressed)
        strategy = lightning.strategies.DDPStrategy(process_group_backend="gloo")
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, strategy=strategy, use_distributed_sampler=False, max_steps=3,
            logger=False, default_root_dir=folder,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        try:
            trainer.fit(module, torch.utils.data.DataLoader(list(ids) * 3, batch_size=4))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return module

    plain, expected = train(False), KINDS["llama"].load(folder / "model").train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        expected(ids, labels=ids).loss.backward()
        optimizer.step()
    torch.testing.assert_close(flat(plain.model), flat(expected))
    compressed = train(True)
    assert max(compressed.ranks) <= 4 < max(plain.ranks)
    compressed.model.save_pretrained(folder / "trained")
    assert torch.equal(flat(KINDS["llama"].load(folder / "trained")), flat(compressed.model))


def test_trl_fine_tunes_factors_and_adapters_on_them(folder):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    plain = Tokenizer(models.WordLevel({f"w{k}": k for k in range(WORDS)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w96", pad_token="w0")
    table = datasets.table.InMemoryTable.from_pydict({"input_ids": [row["input_ids"].tolist() for row in rows()]})
    data = datasets.Dataset(table, fingerprint="rows")

    def train(adapters: object) -> trl.SFTTrainer:
        arguments = trl.SFTConfig(
            output_dir=str(folder / "run"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        model = KINDS["llama"].load(folder / "model")
        run = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=adapters)
        run.train()
        return run

    start = flat(KINDS["llama"].load(folder / "model"))
    run = train(None)
    assert (flat(run.model) - start).norm() > 1e-2
    run.save_model(str(folder / "trained"))
    assert torch.equal(flat(KINDS["llama"].load(folder / "trained")), flat(run.model))
    on_top = train(peft.LoraConfig(r=2, target_modules=r".*mlp\..*\.(down|up)")).model
    trained = [value for name, value in on_top.named_parameters() if ".lora_B." in name]
    assert trained
    assert all(bool(value.any()) for value in trained)
    assert torch.equal(flat(on_top.unload()), start)
