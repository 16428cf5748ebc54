"""The library on real architectures: torchvision's classifiers and transformers' models, with random weights.

One row per model. Every row is planned, factorized, densified, saved, loaded, and factorized at full rank; every weight
that stays dense has a reason in the plan. Inputs are small where the model permits it. Blocks that only repeat, and
layers so large that their SVDs take minutes, are left out: they prove nothing more.
"""

import copy
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

# CP's offers are decompositions of their own: half a minute for a kernel of 512 x 512 x 3 x 3
ALL = tuple(lr.METHODS.values())
QUICK = tuple(method for method in ALL if method.name != "cp")
TUCKER_FIRST = (lr.TuckerMethod(), lr.SVDMethod())


BATCH = 16  # enough for the statistics of a batch norm whose input is 1 x 1
VOCABULARY = 96
IMAGE = VOCABULARY - 1
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One architecture.

    Args:
        name: name of the row.
        package: package that has the model.
        build: builds the model.
        inputs: keyword arguments of its forward.
        methods: methods that the budget chooses from.
        floor: why half the parameters cannot be reached; the plan is then made for the least that can.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    methods: tuple[Any, ...] = QUICK
    floor: str = ""

    def fresh(self) -> nn.Module:
        """A new dense model with other weights every time."""
        return self.build().eval()


def vision(name, make=None, size=64, methods=QUICK, **kwargs: Any) -> Row:
    """A classifier of torchvision for ten classes, with random weights.

    Args:
        name: name of the row, and of torchvision's builder unless ``make`` is given.
        make: builds the model from ``torchvision.models`` instead.
        size: height and width of the inputs.
        methods: methods that the budget chooses from.
        kwargs: arguments of torchvision's builder.
    """

    def build():
        models = import_torchvision().models
        return make(models) if make is not None else getattr(models, name)(num_classes=10, **kwargs)

    return Row(name, "torchvision", build, lambda: {"x": pictures(size)}, methods)


def language(name, inputs=None, methods=QUICK, floor="", **kwargs: Any) -> Row:
    """A model of transformers from its configuration."""

    def build():
        os.environ["HF_HUB_OFFLINE"] = "1"
        if importlib.util.find_spec("torchvision"):
            import_torchvision()  # transformers imports it where it is installed
        transformers = importlib.import_module("transformers")
        stem = name.partition("For")[0].removesuffix("LMHeadModel")
        return getattr(transformers, name)(getattr(transformers, f"{stem}Config")(**kwargs))

    return Row(name, "transformers", build, inputs or tokens, methods, floor)


def short_resnet50(models):
    return models.ResNet(models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=10)


def narrow_vgg(models):
    """With few channels, and 64 hidden units in place of 4,096."""
    features = models.vgg.make_layers([32, "M", 64, "M", 128, 128, "M", 512, "M"], batch_norm=True)
    model = models.VGG(features, num_classes=10, init_weights=False)
    model.classifier[0], model.classifier[3] = nn.Linear(512 * 7 * 7, 64), nn.Linear(64, 64)
    model.classifier[6] = nn.Linear(64, 10)
    return model


def short_googlenet(models):
    model = models.googlenet(num_classes=10, init_weights=False)
    model.inception4b = model.inception4c = model.inception5a = nn.Identity()
    return model


def short_inception(models):
    model = models.inception_v3(num_classes=10, init_weights=False)
    model.Mixed_5d = model.Mixed_6c = model.Mixed_6d = model.Mixed_6e = model.Mixed_7c = nn.Identity()
    return model


def short_convnext(models):
    block = models.convnext.CNBlockConfig
    # a layer scale of 1e-6, the default, would hide the blocks from the outputs
    return models.ConvNeXt([block(96, 192, 2), block(192, 384, 1), block(384, None, 1)], 0.1, 1.0, num_classes=10)


def short_swin(models):
    return models.SwinTransformer([4, 4], 96, [2, 2, 2], [3, 6, 12], [7, 7], num_classes=10)


def short_vit(models):
    return models.VisionTransformer(64, 16, 2, 6, 384, 1536, num_classes=10)


def pictures(size: int) -> Tensor:
    """Noise around a different colour per image: noise alone looks the same to a network that averages positions."""
    return torch.randn(BATCH, 3, size, size) + torch.randn(BATCH, 3, 1, 1)


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (BATCH, 12))}


def translation() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(0, VOCABULARY, (BATCH, 7))}


def image() -> dict[str, Tensor]:
    return {"pixel_values": pictures(32)}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 20, 40), "decoder_input_ids": torch.randint(0, VOCABULARY, (BATCH, 7))}


def question() -> dict[str, Tensor]:
    """An image and words about it: four patches stand in front of the words."""
    patches = torch.full((BATCH, 4), IMAGE)
    words = torch.randint(0, IMAGE, (BATCH, 9))
    return {"input_ids": torch.cat([patches, words], 1), "pixel_values": pictures(16)}


# a standard deviation of 0.1 rather than 0.02: a block of width 64 then adds as much as it is given
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}

ROWS = [
    vision("resnet18"),
    vision("resnet50", short_resnet50),
    vision("vgg11_bn", narrow_vgg),
    vision("mobilenet_v2", width_mult=0.5),
    vision("mobilenet_v3_small"),
    vision("shufflenet_v2_x0_5", methods=ALL),
    vision("densenet121"),
    vision("googlenet", short_googlenet),
    vision("inception_v3", short_inception, size=96),
    vision("efficientnet_b0"),
    vision("convnext_tiny", short_convnext),
    vision("swin_t", short_swin),
    vision("vit_b_16", short_vit),
    vision("squeezenet1_1"),
    vision("regnet_y_400mf"),
    vision("mnasnet0_5"),
    language("LlamaForCausalLM", num_key_value_heads=2, **SMALL),
    language(
        "GPT2LMHeadModel", vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1
    ),
    language("BertForSequenceClassification", max_position_embeddings=32, **SMALL),
    language(
        "T5ForConditionalGeneration",
        translation,
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=160,
        num_layers=2,
        num_heads=4,
    ),
    language("ViTForImageClassification", image, ALL, image_size=32, patch_size=8, **SMALL),
    language(
        "WhisperForConditionalGeneration",
        speech,
        vocab_size=VOCABULARY,
        num_mel_bins=20,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=160,
        decoder_ffn_dim=160,
        max_source_positions=20,
        max_target_positions=16,
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    language(
        "LlavaForConditionalGeneration",
        question,
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 48,
            "intermediate_size": 120,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 32,
            "initializer_factor": 3.0,
        },
        text_config={"model_type": "llama", "num_key_value_heads": 2, **SMALL},
        image_token_index=IMAGE,
        initializer_range=0.1,
    ),
    language(
        "MixtralForCausalLM",
        num_key_value_heads=2,
        num_local_experts=4,
        floor="all the experts of a layer are two 3-d parameters of one module",
        **SMALL,
    ),
]


class Case:
    """A row's model and what several tests need of it."""

    def __init__(self, row: Row) -> None:
        self.row = row
        torch.manual_seed(0)
        self.model = row.fresh()
        inputs = row.inputs()
        wake(self.model, inputs)
        self.inputs = {name: tensor[:4] for name, tensor in inputs.items()}
        self.reference = output(self.model, self.inputs)

    @cached_property
    def plan(self) -> lr.Plan:
        """A plan for half the parameters, or for the least that can be reached where the row says why that is more."""
        settings = {"methods": self.row.methods}
        half = lr.Budget(params=0.5)
        if not self.row.floor:
            return lr.make_plan(self.model, half, **settings)
        with pytest.raises(lr.BudgetError, match="smallest this model can become") as refused:
            lr.make_plan(self.model, half, **settings)
        least = int(re.search(r"can become is ([\d,]+)", str(refused.value))[1].replace(",", ""))
        return lr.make_plan(self.model, lr.Budget(params=least), **settings)


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def case(request):
    row = request.param
    if importlib.util.find_spec(row.package) is None:
        pytest.skip(f"needs {row.package}; make test installs it")
    return Case(row)


def wake(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Makes a new model as demanding as a trained one.

    New biases are zero, new scales one, a new head may be zero altogether, and running statistics have seen no data:
    errors in any of them would not show.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif not parameter.any():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    norms = [(m, m.momentum) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm, _ in norms:
        norm.train().momentum = 1.0
    output(model, inputs)
    for norm, momentum in norms:
        norm.eval().momentum = momentum


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def distance(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||`` in the Frobenius norm."""
    return float(torch.dist(a, b) / b.norm())


def owners_of_weights(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with a parameter of their own that is more than a vector."""
    return [(n, m) for n, m in model.named_modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]


def test_the_reference_means_something(case):
    """The output has neither vanished nor exploded, and it depends on the input."""
    out = case.reference
    assert torch.isfinite(out).all()
    assert 1e-3 < out.std() < 1e3
    assert (out - out.mean(0)).norm() > 0.05 * out.norm()


def test_the_plan_meets_the_budget_and_explains_every_weight_that_stays(case):
    plan, total = case.plan, sum(p.numel() for p in case.model.parameters())
    assert plan.total.params == total
    assert plan.after.params <= 0.5 * total or case.row.floor
    assert any(entry.method != "dense" for entry in plan)
    assert all(reason.strip() for reason in plan.skipped.values())
    named = {entry.name for entry in plan} | set(plan.skipped)
    for name, module in owners_of_weights(case.model):
        # the projections of an attention are planned one by one, under the attention's name
        inside = isinstance(module, nn.MultiheadAttention) and any(other.startswith(f"{name}.") for other in named)
        # what a module holds itself (a class token, stacked experts) is listed parameter by parameter
        prefix = f"{name}." if name else ""
        own = {f"{prefix}{key}" for key, p in module.named_parameters(recurse=False) if p.ndim > 1}
        assert name in named or inside or own <= named, f"{name!r} ({type(module).__name__}) stays without a reason"


def test_factored_equals_densified_and_its_checkpoint_is_exact(case, tmp_path):
    small = lr.factorize_(copy.deepcopy(case.model), case.plan)
    assert sum(p.numel() for p in small.parameters()) == case.plan.after.params
    out = output(small, case.inputs)
    change = distance(out, case.reference)
    assert change > 1e-3, "the factors took no part in the output"
    dense = lr.densify_(copy.deepcopy(small))
    assert sum(p.numel() for p in dense.parameters()) == case.plan.total.params
    error = distance(output(dense, case.inputs), out)
    assert error < TOLERANCE

    path = tmp_path / "small.safetensors"
    lr.save(small, path)
    loaded = lr.load(path, into=case.row.fresh())
    path.unlink()  # hundreds of megabytes in all, and pytest keeps them
    ours, theirs = small.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.equal(output(loaded, case.inputs), out)


def test_full_rank_is_the_dense_model(case):
    plan = lr.make_plan(case.model, rank=10**6, methods=TUCKER_FIRST)
    full = lr.factorize_(copy.deepcopy(case.model), plan)
    assert all(isinstance(full.get_submodule(entry.name), lr.FactoredModule) for entry in plan)
    error = distance(output(full, case.inputs), case.reference)
    assert error < TOLERANCE


def test_stages_give_the_statistics_and_the_plan_of_the_whole(case, tmp_path):
    """Stage by stage, with moments in files, and in one piece; then in sequence, pausing and from the start."""
    batches = [{name: tensor[half] for name, tensor in case.inputs.items()} for half in (slice(2), slice(2, 4))]
    target = [lambda _, module: sum(p.numel() for p in module.parameters(recurse=False)) < 3e5]  # gigabytes otherwise
    whole = lr.calibrate(case.model, batches, lr.SampledCrossEntropy(), target=target)
    staged = lr.calibrate(case.model, batches, lr.SampledCrossEntropy(), target=target, folder=tmp_path)
    assert list(staged) == list(whole)
    for name, stats in whole.items():
        for own, other in (
            (staged[name].inputs.second, stats.inputs.second),
            (staged[name].gradients, stats.gradients),
        ):
            assert (own is None) == (other is None)
            assert own is None or distance(own, other) < 1e-4, name
    settings = {"rank": lr.ParameterFraction(0.5), "skip": [lambda name, _: name not in whole]}
    plans = [lr.make_plan(case.model, stats=stats, **settings) for stats in (whole, staged)]
    assert [(entry.name, entry.method, entry.rank) for entry in plans[0]] == [
        (entry.name, entry.method, entry.rank) for entry in plans[1]
    ]
