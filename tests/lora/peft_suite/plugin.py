"""Puts our functions where PEFT's tests look for PEFT's, before they are imported, and deselects what is not LoRA."""

import dataclasses
import inspect
import re
import sys
import types
from pathlib import Path

import pytest

from benchmarks.vision import import_torchvision

import_torchvision()


def _stub(name, **attributes):
    """A library that PEFT's tests import and do not use here."""
    if name not in sys.modules:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update(attributes)


def _no_hub(*_, **__):
    raise OSError("no data sets here")


_stub("datasets", load_dataset=_no_hub)
_stub("attr", dataclass=dataclasses.dataclass)
import peft  # noqa: E402
import peft.utils.hotswap  # noqa: E402

_stub("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))

from . import layers, model  # noqa: E402

layers.install()
for function in model.FUNCTIONS:
    setattr(peft, function.__name__, function)
peft.utils.TrainableTokensWrapper = layers.TrainableTokensWrapper
peft.utils.hotswap.hotswap_adapter = model.hotswap_adapter

TUNERS = """
    adalora adamss beft boft c3a cartridge cpt deft delora fourierft frod glora gralora hira hra ia3 kasa lily lntuning
    loha lokr mica miss monteclora oft osf peanut poly prefix prompt psoft pvera randlora road shadow shira supertuning
    tinylora unilora vblora velora vera waveft xlora bdlora
"""
OTHER = tuple(TUNERS.split())
ELSE = "peft_types|set_requires_grad_trainable_tokens"
"""Tests that make a config of another tuner in their body."""
COUNTS = pytest.StashKey()
HUB = re.compile(r"""["'][A-Za-z0-9_-]+/[A-Za-z0-9_.-]+["']|bert-base-uncased|snapshot_download|pretrained\("gpt2"\)""")


def by_design():
    """Patterns of tests with the reason why they fail; the patterns above an indented line share it."""
    found, waiting = [], []
    for line in (Path(__file__).parent / "by_design.txt").read_text().splitlines():
        if line.startswith(" "):
            found += [(pattern, line.strip()) for pattern in waiting]
            waiting = []
        elif line and not line.startswith("#"):
            waiting.append(line)
    return found


def _is_lora(item):
    configs = list(getattr(item, "callspec", types.SimpleNamespace(params={})).params.values())
    classes = [value if inspect.isclass(value) else type(value) for value in configs]
    return all(cls is peft.LoraConfig for cls in classes if issubclass(cls, peft.PeftConfig))


VARIANTS = {"velora_config", "use_bdlora", "monteclora_config", "kasa_config", "use_qalora", "alora_invocation_tokens"}
"""Settings of ``LoraConfig`` that make it another method."""


def _is_variant(item):
    given = getattr(item, "callspec", types.SimpleNamespace(params={})).params.values()
    settings = [value for value in given if isinstance(value, dict)]
    settings += [value.to_dict() for value in given if isinstance(value, peft.LoraConfig)]
    return any(any(each.get(key) for key in VARIANTS) or each.get("init_lora_weights") == "mica" for each in settings)


def _asks_for_the_hub(item):
    sources = [inspect.getsource(item.function)]
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        own = [each.func for each in definitions if each.func.__module__ == item.module.__name__]
        sources += map(inspect.getsource, own)
    sources += [repr(value) for key, value in vars(item.cls or object).items() if f"self.{key}" in sources[0]]
    return any(HUB.search(source) for source in sources)


def pytest_collection_modifyitems(config, items):
    kept, tuners, variants, hub = [], [], [], []
    for item in items:
        words = re.sub(r"\[.*", "", item.nodeid).rpartition("::")[2].lower().split("_")
        owner = item.cls.__name__.removeprefix("Test").lower() if item.cls else ""
        if (
            not _is_lora(item)
            or any(word in OTHER for word in words)
            or owner.startswith(OTHER)
            or re.search(ELSE, item.name)
        ):
            tuners.append(item)
        elif _is_variant(item):
            variants.append(item)
        elif _asks_for_the_hub(item):
            hub.append(item)
        else:
            kept.append(item)
    for item in kept:
        for reason in [reason for pattern, reason in by_design() if re.search(pattern, item.nodeid)][:1]:
            item.add_marker(pytest.mark.xfail(reason=f"by design: {reason}"), append=False)
    config.hook.pytest_deselected(items=tuners + variants + hub)
    config.stash[COUNTS] = len(tuners), len(variants), len(hub)
    items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    tuners, variants, hub = config.stash.get(COUNTS, (0, 0, 0))
    terminalreporter.write_line(
        f"deselected: {tuners} of other tuners, {variants} of variants of LoRA, {hub} that ask for the hub"
    )
