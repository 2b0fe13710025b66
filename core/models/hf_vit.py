"""Vision transformers saved by Hugging Face transformers, under the names of timm's `VisionTransformer`.

Both compute the same; transformers keeps query, key and value apart. Written against the key names in published files
and those of newer versions ('vit.encoder.layer.N.attention.attention.query', 'vit.layers.N.attention.q_proj').
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from core.errors import ModelError

__all__ = ["check_hf_config", "is_hf_vit", "to_timm"]

_PATCHES = "embeddings.patch_embeddings.projection.weight"
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}
_IN_A_LAYER = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
}
_LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)\.(weight|bias)")
_QKV = re.compile(r"attention\.(?:attention\.)?(query|key|value|[qkv]_proj)")


def is_hf_vit(weights: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a ViT of transformers."""
    return any(key.removeprefix("vit.") == _PATCHES for key in weights)


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, and concatenate query, key and value.

    A pooler is dropped (classification does not use it); names that are not known stay as they are, for the strict load
    to name them.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        name = key.removeprefix("vit.")
        if name.startswith("pooler."):
            continue
        layer = _LAYER.fullmatch(name)
        if layer is None:
            renamed[_OUTSIDE.get(name, key)] = value
            continue
        index, inner, kind = layer.groups()
        if found := _QKV.fullmatch(inner):
            parts.setdefault(f"blocks.{index}.attn.qkv.{kind}", {})[found[1][0]] = value
        else:
            renamed[f"blocks.{index}.{_IN_A_LAYER[inner]}.{kind}" if inner in _IN_A_LAYER else key] = value
    for name, part in parts.items():
        if part.keys() != set("qkv"):
            raise ModelError(f"the weights of transformers have only {sorted(part)} of q, k, v for {name}")
        renamed[name] = torch.cat([part[letter] for letter in "qkv"])
    return renamed


def check_hf_config(plain: Mapping[str, Any], num_heads: int, source: str) -> float:
    """The epsilon of the layer norms, after a check of what no shape shows.

    Raises:
        ModelError: for another number of heads or activation.
    """
    for key, expected in (("num_attention_heads", num_heads), ("hidden_act", "gelu")):
        if plain.get(key, expected) != expected:
            raise ModelError(
                f"{source}: {key} is {plain[key]!r}, the architecture has {expected!r}: name another one in 'arch'"
            )
    return float(plain.get("layer_norm_eps", 1e-12))
