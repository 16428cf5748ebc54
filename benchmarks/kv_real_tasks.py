"""Part of benchmarks.kv_real: a number hidden in a long prompt, and LAMBADA's last words after a long context."""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .common import markdown_table
from .data import ROOT
from .kv_driver import prefilled
from .kv_rows import Rows
from .kv_stores import Store
from .kv_subjects import Subject

LENGTHS = (2048, 4096, 8192)
SPARE = 16
"""Tokens that are left below the length for the answer."""
INTRODUCTION = "There is a pass key hidden in the text below. Find it and remember it.\n\n"
HIDDEN = "\n\nThe pass key is {key}. Remember it. The pass key is {key}.\n\n"
QUESTION = "\n\nThe text is over. What is the pass key? The pass key is"
CONTEXTS = 8


def passkey_prompt(subject: Subject, key: str, length: int, depth: float, offset: int) -> Tensor:
    """A key hidden at a depth (0 to 1) of other text, and the question; ``length`` tokens."""
    introduction, hidden, question = map(subject.encode, (INTRODUCTION, HIDDEN.format(key=key), QUESTION))
    filler = next(iter(subject.others.values()))[offset:].tolist()
    count = length - len(introduction) - len(hidden) - len(question)
    at = int(depth * count)
    return torch.tensor([*introduction, *filler[:at], *hidden, *filler[at:count], *question], device=subject.device)


@torch.no_grad()
def greedy(subject: Subject, stores: list[Store], token: int, start: int, count: int) -> list[int]:
    """The most probable tokens after ``token``, whose position is ``start``."""
    subject.driver.stores = stores
    found: list[int] = []
    for at in range(start, start + count):
        token = int(subject.driver.logits(torch.tensor([[token]], device=subject.device), at)[0, -1].argmax())
        found.append(token)
    return found


def passkey(subject: Subject, rows: Rows, args: argparse.Namespace) -> list[str]:
    lengths = (256,) if args.smoke else LENGTHS
    right: dict[str, list[int]] = {}
    for length in lengths:
        generator, began = random.Random(length), time.perf_counter()
        chosen = rows.brief(length, SPARE)
        for row in chosen:
            right.setdefault(row.label, []).append(0)
        for trial in range(args.trials):
            key = str(generator.randrange(10_000, 100_000))
            tokens = passkey_prompt(subject, key, length - SPARE, (trial + 0.5) / args.trials, 1000 * trial)
            # all but the last token are read exactly, as a prompt; the cache answers from there
            prompts = prefilled(subject.driver, tokens[None, :-1])
            count = len(subject.encode(f" {key}"))
            for row in chosen:
                answer = greedy(subject, row.fill(prompts), int(tokens[-1]), len(tokens) - 1, count)
                right[row.label][-1] += subject.decode(answer).strip() == key
        print(f"{subject.name}: pass keys at {length} tokens, {time.perf_counter() - began:.0f} s", flush=True)
    return [
        f"## {subject.name}: pass keys",
        f'"{HIDDEN.format(key=12345).strip()}" is hidden in WikiText, at {args.trials} evenly spaced depths; the prompt'
        f' begins with "{INTRODUCTION.strip()}" and ends in "{QUESTION.strip()}". It is read exactly, as in generation,'
        " but for its last token; that one and the answer are read through the cache. Right is an answer with all five"
        f" digits, greedily decoded: how many of {args.trials}, by the number of tokens. SnapKV sees the question.",
        markdown_table(["cache", *map(str, lengths)], [[label, *counts] for label, counts in right.items()]),
    ]


def passages(args: argparse.Namespace) -> list[str]:
    if args.smoke:
        return [f"word {k} and word {k + 1}" for k in range(60)]
    lines = (ROOT / "text" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@torch.no_grad()
def last_words(
    subject: Subject, stores: list[Store], texts: Sequence[str], start: int, args: argparse.Namespace
) -> list[tuple[bool, list[int]]]:
    """Whether each passage's last word is the most probable, and the most probable tokens in its place."""
    found = []
    for text in texts:
        before, word = text.rsplit(" ", 1)
        target = subject.encode(f" {word}")
        tokens = torch.tensor([subject.encode(f"\n\n{before}") + target], device=subject.device)
        subject.driver.stores = copy.deepcopy(stores)
        steps = range(0, tokens.shape[1] - 1, args.step)
        stop = tokens.shape[1] - 1
        logits = [
            subject.driver.logits(tokens[:, at : min(at + args.step, stop)], start + at, keep=len(target))[0]
            for at in steps
        ]
        own = torch.cat(logits)[-len(target) :].argmax(-1).tolist()
        found.append((own == target, own))
    return found


def lambada(subject: Subject, rows: Rows, args: argparse.Namespace) -> list[str]:
    length = 128 if args.smoke else 2048
    texts = passages(args)
    each = -(-args.passages // CONTEXTS)
    chosen = rows.brief(length, 80)
    right, same = [0] * len(chosen), [0] * len(chosen)
    # context from the end of the file, passages from its start
    context = subject.encode("\n\n".join(texts[len(texts) // 2 :]))
    began = time.perf_counter()
    for group in range(0, args.passages, each):
        own = texts[group : min(group + each, args.passages)]
        prompts = prefilled(subject.driver, torch.tensor([context[group * 50 :][:length]], device=subject.device))
        exact: list[tuple[bool, list[int]]] = []
        for index, row in enumerate(chosen):
            found = last_words(subject, row.fill(prompts), own, length, args)
            exact = exact or found
            right[index] += sum(correct for correct, _ in found)
            same[index] += sum(a[1] == b[1] for a, b in zip(found, exact, strict=True))
        print(f"{subject.name}: LAMBADA, {group + len(own)} passages, {time.perf_counter() - began:.0f} s", flush=True)
    table = [
        [row.label, f"{100 * a / args.passages:.1f}", f"{100 * b / args.passages:.1f}"]
        for row, a, b in zip(chosen, right, same, strict=True)
    ]
    return [
        f"## {subject.name}: LAMBADA",
        f"The last word of {args.passages} passages, each after {length} tokens of other passages, which are the"
        f" prompt; a passage is read {args.step} tokens per step. Right is a word whose tokens are all the most"
        " probable. The standard error of an accuracy is about 3 %. As exact: the share of words in whose place the"
        " exact cache has the same tokens.",
        markdown_table(["cache", "right, %", "as exact, %"], table),
    ]
