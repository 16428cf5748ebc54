"""One of PEFT's configurations as a call of ``add_lora_``."""

import json
import math

import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapted import Adapted
from lowrank_layers.lora.adapted_weight import banks_of, base_weight
from lowrank_layers.lora.peft.config import config_of
from lowrank_layers.lora.peft.target_modules import find_weights
from lowrank_layers.lora.trainable_tokens import TokenRows

from .layers import is_embedding

INITS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa"}
INITS |= {"olora": "olora", "eva": "eva", "corda": "corda", "loftq": "loftq", "lora_ga": "lora-ga"}


def add_lora(model, name, config, dtype=None):
    """One of PEFT's configs as a call of :func:`lowrank_layers.add_lora_`."""
    settings, problems = config_of(json.loads(json.dumps(config.to_dict(), default=list)))
    problems = [each for each in problems if not each.startswith(("init_lora_weights", "target_modules is missing"))]
    found, _, more = find_weights(model, settings)
    if problems + more:
        raise ValueError("; ".join(problems + more))
    # PEFT takes any rank; where a layer is narrower ours is told the layer's own, at PEFT's scaling
    limits = {each.weight.owner: each.weight.layout.limit(each.weight.base) for each in found}
    ranks = {each.weight.owner: min(settings.rank(each.label), limits[each.weight.owner]) for each in found}
    alphas = {each.weight.owner: settings.scaling(each.label) * ranks[each.weight.owner] for each in found}
    places = [each.weight.name for each in found]
    chosen = {id(each.weight.module) for each in found}
    everything = "all-linear" if settings.target_modules == "all-linear" else None
    lr.add_lora_(
        model,
        everything or (places if settings.target_parameters else lambda _, module: id(module) in chosen),
        rank=settings.r,
        alpha=settings.lora_alpha,
        name=name,
        exclude=settings.exclude_modules,
        modules_to_save=settings.modules_to_save,
        trainable_tokens=settings.trainable_token_indices,
        dropout=settings.lora_dropout,
        init=init_of(settings.init_lora_weights),
        rank_pattern={**settings.rank_pattern, **ranks},
        alpha_pattern={**settings.alpha_pattern, **alphas},
        dora=settings.use_dora,
        bias=settings.lora_bias,
        **({} if dtype is None else {"dtype": next(model.parameters()).dtype}),
    )
    for owner, module in model.named_modules() if settings.bias != "none" else ():
        if isinstance(module._parameters.get("bias"), nn.Parameter) and ".lora_" not in f".{owner}.":
            module._parameters["bias"].requires_grad_(settings.bias == "all" or isinstance(module, Adapted))
    if settings.init_lora_weights is False:
        _scatter(model, name)
    return model


def init_of(name):
    name = name.lower() if isinstance(name, str) else name
    return "pissa" if str(name).startswith("pissa_niter") else INITS.get(name, name)


@torch.no_grad()
def _scatter(model, name):
    """``init_lora_weights=False``: ``B`` as torch's own layers start, in place of zero."""
    for module in model.modules():
        for bank in banks_of(module).values():
            for adapter in bank.named(name):
                if isinstance(adapter, TokenRows):
                    continue
                if is_embedding(module):
                    adapter.A.normal_(), adapter.B.normal_()
                else:
                    nn.init.kaiming_uniform_(adapter.B.flatten(1), a=math.sqrt(5))
                if adapter.magnitude is not None:
                    weight = base_weight(module, "weight")
                    adapter.magnitude.copy_(bank.layout.lengths(weight + adapter.delta(bank.layout)))
