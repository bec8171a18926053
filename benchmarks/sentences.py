"""Sentence embeddings for the benchmarks: MiniLM-L6 as a job without labels to learn from, and pairs of sentences to judge it on."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minilm
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import planish
from planish.metrics import get_metric

LENGTH = 32
"""Tokens of a sentence in training and judging; longer ones are cut."""
Pairs = tuple[list[str], list[str], NDArray[np.float64]]
Inputs = dict[str, torch.Tensor]


class Embedder(nn.Module):
    """Token ids and mask to one embedding per sentence, [n, width]: the mean over tokens that count."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        counted = attention_mask.unsqueeze(-1).float()
        return (self.encoder(input_ids, attention_mask) * counted).sum(1) / counted.sum(1).clamp(min=1.0)


def pairs(path: Path) -> Pairs:
    """Sentence pairs that have a score: tab-separated, the score first, or SICK's five columns."""
    first, second, scores = [], [], []
    for row in csv.reader(path.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE):
        sick = len(row) >= 5
        score, a, b = (row[3], row[1], row[2]) if sick else row[:3]
        if score and score != "relatedness_score":
            first.append(a)
            second.append(b)
            scores.append(float(score))
    return first, second, np.array(scores)


def chosen_by(folder: Path) -> Pairs:
    """The 600 labelled pairs that a net is chosen by."""
    first, second, scores = pairs(folder / "sts2012_2014_train.tsv")
    picked = np.random.default_rng(1).permutation(len(scores))[:600]
    return [first[i] for i in picked], [second[i] for i in picked], scores[picked]


def tested_on(folder: Path) -> dict[str, list[Pairs]]:
    """What nets are tested on: the three sets of STS 2015, and every other pair of SICK."""
    first, second, scores = pairs(folder / "sick_train.txt")
    sick = first[1::2], second[1::2], scores[1::2]
    return {"STS 2015": [pairs(path) for path in sorted(folder.glob("sts2015_*.tsv"))], "SICK": [sick]}


def text(folder: Path) -> list[str]:
    """Sentences to learn from, without labels: none of those that nets are chosen by or tested on."""
    found = []
    for path in (folder / "sts2012_2014_train.tsv", folder / "sick_train.txt"):
        first, second, _ = pairs(path)
        found += [*first, *second]
    found += [line.split("\t")[0] for line in (folder / "sst2_train.tsv").read_text(encoding="utf-8").splitlines()]
    for name in ("wikitext2_valid.txt", "wikitext2_test.txt"):
        prose = (folder / name).read_text(encoding="utf-8").replace("<unk>", "").replace(" @-@ ", "-")
        found += [part.strip() for part in re.split(r"(?<= \.)\s", prose) if 5 <= len(part.split()) <= 40]
    judged = [chosen_by(folder), *(one for sets in tested_on(folder).values() for one in sets)]
    held_back = {sentence for first, second, _ in judged for sentence in (*first, *second)}
    return [sentence for sentence in dict.fromkeys(found) if sentence not in held_back]


def tokenizer() -> Callable[[list[str]], Inputs]:
    """Sentences to `input_ids` and `attention_mask`, [n, LENGTH] each."""
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(minilm.folder())

    def tokens(sentences: list[str]) -> Inputs:
        found = known(sentences, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return tokens


def similarity(embed: Callable[[Inputs], Any], tokens: Callable[[list[str]], Inputs], judged: Pairs, batch: int = 250) -> list[Any]:
    """The embeddings of both sides of every pair, [pairs, width] each."""
    sides = []
    for side in judged[:2]:
        parts = [embed(tokens(side[start : start + batch])) for start in range(0, len(side), batch)]
        sides.append(np.concatenate([np.asarray(part) for part in parts]))
    return sides


def job(folder: Path, length: int) -> planish.Workload:
    """MiniLM-L6: distilled on sentences without labels, chosen by 600 labelled pairs of STS 2012 to 2014; latency at `length` tokens."""
    tokens = tokenizer()
    sentences = text(folder)
    order = np.random.default_rng(0).permutation(len(sentences))
    held, kept = order[:1000], order[1000:]
    ids, mask = minilm.tokens(length)
    judged = chosen_by(folder)
    encoded = [tokens(side) for side in judged[:2]]

    def spearman(predict: Callable[[Inputs], torch.Tensor]) -> float:
        sides = [
            np.concatenate([predict({name: value[start : start + 200] for name, value in side.items()}) for start in range(0, 600, 200)])
            for side in encoded
        ]
        return get_metric("spearman").score(sides, judged[2])

    return planish.Workload(
        model=Embedder(minilm.minilm()[0]),
        example_inputs={"input_ids": ids, "attention_mask": mask},
        train=[(tokens([sentences[i] for i in kept]), None)],
        validation=[(tokens([sentences[i] for i in held]), None)],
        metric="cosine",
        evaluate=spearman,
        name=f"minilm-{length}",
    )
