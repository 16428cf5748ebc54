"""LoRA files as diffusers, kohya's scripts and ComfyUI write them, against the dense weights that they mean."""

import copy
import importlib.util
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.lora.adapter import Adapter
from lowrank_layers.lora.stable_diffusion import original_names

from .peer import known_warnings

if importlib.util.find_spec("torchvision"):
    import_torchvision()  # transformers imports it where it is installed
pytestmark = known_warnings


class Attention(nn.Module):
    """As diffusers names its layers."""

    def __init__(self, width=8, context=8):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(8, 8)
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention(), "attn2": Attention(8, 6)})])
        self.proj_out = nn.Conv2d(8, 8, 1)


class Resnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.time_emb_proj = nn.Linear(4, 8)


class UNet(nn.Module):
    """The layers of a U-Net in diffusers' naming: two blocks of two layers, one attends."""

    def __init__(self):
        super().__init__()

        def block(layers, attends, more):
            parts = {"resnets": nn.ModuleList([Resnet() for _ in range(layers)])}
            if attends:
                parts["attentions"] = nn.ModuleList([Transformer() for _ in range(layers)])
            if more:
                parts[more] = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3)})])
            return nn.ModuleDict(parts)

        self.conv_in, self.conv_out = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(4, 4), "linear_2": nn.Linear(4, 4)})
        self.down_blocks = nn.ModuleList([block(2, True, "downsamplers"), block(2, False, None)])
        self.mid_block = nn.ModuleDict(
            {"resnets": nn.ModuleList([Resnet(), Resnet()]), "attentions": nn.ModuleList([Transformer()])}
        )
        self.up_blocks = nn.ModuleList([block(3, False, "upsamplers"), block(3, True, None)])


class TextEncoder(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        layer = {"self_attn": nn.ModuleDict({f"{n}_proj": nn.Linear(width, width) for n in ("q", "k", "v", "out")})}
        layer["mlp"] = nn.ModuleDict({"fc1": nn.Linear(width, 12), "fc2": nn.Linear(12, width)})
        encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(layer)])})
        self.text_model = nn.ModuleDict({"encoder": encoder})


class FluxLike(nn.Module):
    """As Flux's original code and ComfyUI name the layers."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict({"img_attn": nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})})
        self.double_blocks = nn.ModuleList([block])


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def factors(module, rank=2):
    """``down`` and ``up`` as these files hold them: kernels for convolutions."""
    weight = module.weight
    if weight.ndim == 2:
        return torch.randn(rank, weight.shape[1]), torch.randn(len(weight), rank)
    return torch.randn(rank, *weight.shape[1:]), torch.randn(len(weight), rank, 1, 1)


def dense(module, down, up, scaling):
    return module.weight + scaling * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)


def kohya(name):
    return name.replace(".", "_")


FORMATS = {
    "kohya": ("lora_unet_{flat}", ".lora_down.weight", ".lora_up.weight", True),
    "kohya without alpha": ("lora_unet_{flat}", ".lora_down.weight", ".lora_up.weight", False),
    "kohya transformer": ("lora_transformer_{flat}", ".lora_down.weight", ".lora_up.weight", True),
    "lycoris": ("lycoris_{flat}", ".lora_down.weight", ".lora_up.weight", True),
    "diffusers": ("unet.{name}", ".lora_A.weight", ".lora_B.weight", False),
    "diffusers transformer": ("transformer.{name}", ".lora_A.weight", ".lora_B.weight", False),
    "diffusers with alpha": ("unet.{name}", ".lora_A.weight", ".lora_B.weight", True),
    "diffusers, adapter named": ("unet.{name}", ".lora_A.default.weight", ".lora_B.default.weight", False),
    "diffusers 2023": ("unet.{name}", ".lora.down.weight", ".lora.up.weight", False),
    "comfy": ("diffusion_model.{name}", ".lora_down.weight", ".lora_up.weight", True),
    "comfy with A and B": ("diffusion_model.{name}", ".lora_A.weight", ".lora_B.weight", True),
    "comfy model": ("model.diffusion_model.{name}", ".lora_A.weight", ".lora_B.weight", False),
    "no prefix": ("{name}", ".lora_A.weight", ".lora_B.weight", False),
}


def written(model, form, file, names=None, rename=None, **more):
    """A file in that form for those layers, and the dense weights that it means."""
    pattern, down_end, up_end, with_alpha = FORMATS[form]
    tensors, want = {}, {}
    for name, module in layers(model).items():
        if names is not None and name not in names:
            continue
        shown = rename(name) if rename else name
        key = pattern.format(name=shown, flat=kohya(shown))
        down, up = factors(module)
        tensors |= {key + down_end: down, key + up_end: up}
        if with_alpha:
            tensors[f"{key}.alpha"] = torch.tensor(3.0)
        want[name] = dense(module, down, up, 1.5 if with_alpha else 1.0)
    save_file(tensors, file, **more)
    return want


def check(model, want):
    adapted = {name.partition(".lora_")[0] for name, m in model.named_modules() if isinstance(m, Adapter)}
    assert adapted == set(want)
    for name, weight in want.items():
        assert torch.allclose(model.get_submodule(name).weight, weight, atol=1e-4), name


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("build", [UNet, FluxLike])
def test_every_form_means_the_dense_weights(build, form, tmp_path):
    model = build()
    want = written(model, form, tmp_path / "lora.safetensors")
    check(lr.load_lora(model, tmp_path / "lora.safetensors"), want)


def test_old_diffusers_attention_processors(tmp_path):
    model = UNet()
    tensors, want = {}, {}
    for name, module in layers(model).items():
        head, _, last = name.removesuffix(".0").rpartition(".")
        if not last.startswith("to_"):
            continue
        down, up = factors(module)
        key = f"{head}.processor.{last}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        want[name] = dense(module, down, up, 1.0)
    assert len(want) == 48
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    check(lr.load_lora(copy.deepcopy(model), tmp_path), want)  # the folder, as diffusers leaves it
    torch.save({f"unet.{key}": value for key, value in tensors.items()}, tmp_path / "pytorch_lora_weights.bin")
    check(lr.load_lora(model, tmp_path / "pytorch_lora_weights.bin"), want)


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [
        ("text_encoder.{head}.to_{part}_lora.{way}.weight", "text_encoder.{name}.lora_linear_layer.{way}.weight"),
        ("text_encoder.{name}.lora_linear_layer.{way}.weight", "text_encoder.{name}.lora_linear_layer.{way}.weight"),
        ("lora_te_{flat}.lora_{way}.weight", "lora_te_{flat}.lora_{way}.weight"),
        ("lora_te1_{flat}.lora_{way}.weight", "lora_te1_{flat}.lora_{way}.weight"),
        ("text_encoders.clip_l.transformer.{name}.lora_{way}.weight",) * 2,
    ],
)
def test_text_encoders(attention, mlp, tmp_path):
    model = TextEncoder()
    tensors, want = {}, {}
    for name, module in layers(model).items():
        head, _, last = name.rpartition(".")
        down, up = factors(module)
        form = attention if "self_attn" in name else mlp
        for way, value in (("down", down), ("up", up)):
            part = last.removesuffix("_proj")
            tensors[form.format(head=head, name=name, flat=kohya(name), part=part, way=way)] = value
        want[name] = dense(module, down, up, 1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    check(lr.load_lora(copy.deepcopy(model), tmp_path / "a.safetensors"), want)
    inner = {name.removeprefix("text_model."): weight for name, weight in want.items()}
    check(lr.load_lora(model.text_model, tmp_path / "a.safetensors"), inner)


def test_a_text_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 6}
    config = transformers.CLIPTextConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.CLIPTextModel(config)
    names = [name for name in layers(model) if "layers.0" in name]
    want = written(
        model, "kohya", tmp_path / "a.safetensors", names, lambda name: f"text_model.{name.removeprefix('text_model.')}"
    )
    assert len(want) == 6
    check(lr.load_lora(model, tmp_path / "a.safetensors"), want)


def original(name):
    """The naming of Stable Diffusion's original code, by hand for this U-Net of two layers a block."""
    fixed = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    fixed |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    fixed |= {"down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op"}
    fixed |= {"up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv"}
    if name in fixed:
        return fixed[name]
    heads = {"down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1"}
    heads |= {"down_blocks.0.resnets.1": "input_blocks.2.0", "down_blocks.0.attentions.1": "input_blocks.2.1"}
    heads |= {"down_blocks.1.resnets.0": "input_blocks.4.0", "down_blocks.1.resnets.1": "input_blocks.5.0"}
    heads |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    heads |= {"mid_block.resnets.1": "middle_block.2"}
    heads |= {f"up_blocks.0.resnets.{k}": f"output_blocks.{k}.0" for k in range(3)}
    heads |= {f"up_blocks.1.resnets.{k}": f"output_blocks.{3 + k}.0" for k in range(3)}
    heads |= {f"up_blocks.1.attentions.{k}": f"output_blocks.{3 + k}.1" for k in range(3)}
    head = next(head for head in heads if name.startswith(f"{head}."))
    tail = name.removeprefix(f"{head}.")
    inside = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    return f"{heads[head]}.{inside.get(tail, tail)}"


@pytest.mark.parametrize("form", ["kohya", "comfy"])
def test_the_naming_of_the_original_code(form, tmp_path):
    model = UNet()
    want = written(model, form, tmp_path / "a.safetensors", rename=original)
    check(lr.load_lora(model, tmp_path / "a.safetensors"), want)
    assert original_names(list(layers(TextEncoder()))) == {}


def test_the_alpha_of_the_metadata(tmp_path):
    model = UNet()
    own = {"r": 2, "lora_alpha": 5, "use_rslora": False, "alpha_pattern": {"to_k": 4}, "target_modules": ["to_q"]}
    text = json.dumps({f"unet.{key}": value for key, value in own.items()} | {"text_encoder.r": 7})
    names = [name for name in layers(model) if name.endswith(("to_q", "to_k"))]
    plain = written(model, "diffusers", tmp_path / "a.safetensors", names, metadata={"lora_adapter_metadata": text})
    want = {}
    for name, weight in plain.items():
        base = model.get_submodule(name).weight
        want[name] = base + (weight - base) * (2.0 if name.endswith("to_k") else 2.5)
    check(lr.load_lora(model, tmp_path / "a.safetensors"), want)


def test_given_alpha_and_rank(tmp_path):
    model = FluxLike()
    plain = written(model, "diffusers", tmp_path / "a.safetensors")
    want = {}
    for name, weight in plain.items():
        base = model.get_submodule(name).weight
        want[name] = base + (weight - base) * 3
    check(lr.load_lora(copy.deepcopy(model), tmp_path / "a.safetensors", rank=2, alpha=6), want)
    with pytest.raises(lr.CheckpointError, match=r"ranks \[2\], expected rank=4"):
        lr.load_lora(model, tmp_path / "a.safetensors", rank=4)
    written(model, "kohya", tmp_path / "b.safetensors")
    with pytest.raises(lr.CheckpointError, match="leave that out"):
        lr.load_lora(model, tmp_path / "b.safetensors", alpha=6)


def test_dora(tmp_path):
    model = FluxLike()
    written(model, "kohya", tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    want = {}
    for name, module in layers(model).items():
        key = f"lora_unet_{kohya(name)}"
        scale = torch.rand(len(module.weight), 1) + 0.5
        moved = dense(module, tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"], 1.5)
        want[name] = scale * moved / moved.norm(dim=1, keepdim=True)
        tensors[f"{key}.dora_scale"] = scale
    save_file(tensors, tmp_path / "b.safetensors")
    check(lr.load_lora(copy.deepcopy(model), tmp_path / "b.safetensors"), want)
    tensors[f"{key}.dora_scale"] = torch.ones(1, 8)  # of the inputs
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(lr.CheckpointError, match="one number for each of its 8 outputs"):
        lr.load_lora(model, tmp_path / "b.safetensors")


def test_pointwise_factors_lie_either_way(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Conv2d(8, 6, 1)})
    down, up = torch.randn(2, 8), torch.randn(6, 2)
    tensors = {"lora_unet_a.lora_down.weight": down[..., None, None], "lora_unet_a.lora_up.weight": up[..., None, None]}
    tensors |= {"lora_unet_b.lora_down.weight": down, "lora_unet_b.lora_up.weight": up}
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    want = {name: dense(module, down, up, 1.0) for name, module in layers(model).items()}
    check(lr.load_lora(model, tmp_path / "a.safetensors"), want)


def test_a_file_for_a_whole_pipeline(tmp_path):
    unet, first, second, same = UNet(), TextEncoder(8), TextEncoder(10), TextEncoder(8)
    tensors, want = {}, {}
    for prefix, model in (("unet", unet), ("te1", first), ("te2", second)):
        want[prefix] = {}
        for name, module in layers(model).items():
            down, up = factors(module)
            key = f"lora_{prefix}_{kohya(name)}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
            want[prefix][name] = dense(module, down, up, 1.0)
    file = tmp_path / "pipeline.safetensors"
    save_file(tensors, file)
    for prefix, model in (("unet", unet), ("te1", first), ("te2", second)):
        check(lr.load_lora(model, file), want[prefix])
    again = {}
    for name, module in layers(same).items():
        key = f"lora_te1_{kohya(name)}"
        again[name] = dense(module, tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"], 1.0)
    check(lr.load_lora(same, file, prefix="lora_te1_"), again)
    with pytest.raises(lr.CheckpointError, match=r"for 'lora_te1', 'lora_te2', 'lora_unet', none of which.*prefix="):
        lr.load_lora(FluxLike(), file)
    with pytest.raises(lr.CheckpointError, match="expected one of 'lora_te1', 'lora_te2', 'lora_unet'"):
        lr.load_lora(FluxLike(), file, prefix="te2")
    twins = {key: value for key, value in tensors.items() if "_te2_" not in key}
    twins |= {key.replace("te1", "te2"): value for key, value in twins.items() if "te1" in key}
    save_file({key: value.clone() for key, value in twins.items()}, file)
    with pytest.raises(lr.CheckpointError, match="several of which fit the model; give prefix="):
        lr.load_lora(TextEncoder(8), file)


def test_a_file_in_half_precision_changes_no_dtype(tmp_path):
    model = FluxLike()
    written(model, "kohya", tmp_path / "a.safetensors")
    halves = {key: value.half() for key, value in load_file(tmp_path / "a.safetensors").items()}
    save_file(halves, tmp_path / "a.safetensors")
    lr.load_lora(model, tmp_path / "a.safetensors", trainable=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())


DOWN, UP = (
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
    "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight",
)
HEAD = DOWN.partition(".")[0]
BAD = {
    "a core": (
        {f"{HEAD}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        r"lora_mid\.weight' is a convolution with a core \(LoCon",
    ),
    "LoHa": ({f"{HEAD}.hada_w1_a": torch.ones(8, 2)}, r"Hadamard product \(LoHa\)"),
    "LoKr": ({f"{HEAD}.lokr_w1": torch.ones(2, 2)}, r"Kronecker product \(LoKr\)"),
    "OFT": ({f"{HEAD}.oft_blocks": torch.ones(2, 2)}, r"orthogonal transformation \(OFT\)"),
    "a difference": ({f"{HEAD}.diff": torch.ones(8, 8)}, "difference of a whole parameter"),
    "something unknown": ({f"{HEAD}.weight": torch.ones(8, 8)}, "unknown"),
    "one factor": ({UP: None}, r"lacks its factor up \(B\)"),
    "an unknown layer": (
        {"lora_unet_head.lora_down.weight": torch.ones(2, 8), "lora_unet_head.lora_up.weight": torch.ones(8, 2)},
        "adapter of 'head', which the model has not",
    ),
    "the naming of another code": (
        {
            "lora_unet_single_transformer_blocks_0_proj.lora_down.weight": torch.ones(2, 8),
            "lora_unet_single_transformer_blocks_0_proj.lora_up.weight": torch.ones(8, 2),
        },
        r"\(the naming of diffusers\), which the model has not",
    ),
    "another width": ({DOWN: torch.ones(2, 9)}, r"down of .* has shape \(2, 9\), expected \(2, 8\)"),
    "another rank": ({DOWN: torch.ones(3, 8)}, r"up of .* has shape \(8, 2\), expected \(8, 3\)"),
    "NaN": ({DOWN: torch.full((2, 8), torch.nan)}, "finite"),
    "integers": ({DOWN: torch.ones(2, 8, dtype=torch.long)}, "finite floating point"),
    "an alpha for each": ({f"{HEAD}.alpha": torch.ones(2)}, r"alpha of .* has shape \(2,\)"),
    "two of one layer": (
        {
            "lora_unet_double_blocks.0.img_attn.proj.lora_down.weight": torch.ones(2, 8),
            "lora_unet_double_blocks.0.img_attn.proj.lora_up.weight": torch.ones(8, 2),
        },
        "two adapters of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_honoured_is_refused_by_name(case, tmp_path):
    change, word = BAD[case]
    model = FluxLike()
    written(model, "kohya", tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors") | change
    save_file({key: value for key, value in tensors.items() if value is not None}, tmp_path / "a.safetensors")
    with pytest.raises(lr.CheckpointError, match=word):
        lr.load_lora(model, tmp_path / "a.safetensors")
    assert [type(m) for m in model.modules()] == [type(m) for m in FluxLike().modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_the_original_naming_onto_another_model_is_named(tmp_path):
    tensors = {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 8)}
    tensors["lora_unet_input_blocks_4_1_proj_in.lora_up.weight"] = torch.ones(8, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(lr.CheckpointError, match="the naming of Stable Diffusion's original code"):
        lr.load_lora(FluxLike(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["double_blocks.0.processor.qkv_lora1.down.weight", "fc.ia3_l", "fc.weight"])
def test_another_format_is_refused_with_its_keys(key, tmp_path):
    save_file({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(lr.CheckpointError, match=f"no adapter in a form that is known .*like '{key}'"):
        lr.load_lora(FluxLike(), tmp_path / "a.safetensors")


# ----------------------------------------------------------------------------------- PEFT's files with adapters' names


def net():
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3))


@pytest.mark.parametrize("adapter", ["default", "my_adapter"])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_files_with_the_adapters_name_in_their_keys(adapter, dora, tmp_path):
    """As torch.save of a state dict, or a training framework, leaves them."""
    base, x = net(), torch.randint(9, (4, 5))
    target = ["1"] if dora else ["0", "1"]
    model = lr.add_lora_(copy.deepcopy(base), target, rank=2, dora=dora, modules_to_save=["2"])
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.add_(torch.rand_like(parameter))
    lr.save_lora(model, tmp_path)
    tensors = {}
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        named = re.sub(r"(lora_[AB])\.", rf"\1.{adapter}.", key)
        named = re.sub(r"(lora_embedding_[AB])$", rf"\1.{adapter}", named)
        named = re.sub(r"(lora_magnitude_vector)$", rf"\1.{adapter}.weight", named)
        tensors[re.sub(r"\.2\.(weight|bias)$", rf".2.modules_to_save.{adapter}.\1", named)] = value
    assert all(adapter in key for key in tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert torch.equal(lr.load_lora(base, tmp_path)(x), model(x))
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key.replace(adapter, "other")] = tensors[key].clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(lr.CheckpointError, match=r"several adapters .*other.*save each on its own"):
        lr.load_lora(net(), tmp_path)
