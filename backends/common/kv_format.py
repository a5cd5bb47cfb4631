"""How the KV pools store their numbers: as they are, or quantised."""

from __future__ import annotations

from collections.abc import Sequence

from cortexstream.backend import KVQuantization, LayerKV
from cortexstream.errors import ModelLoadError

KV_BITS = {"int8": 8, "int4": 4}
GROUPS = (64, 32)  # the first that divides every head dimension: larger groups store fewer scales and biases


def kv_quantization(kv_dtype: str, layers: Sequence[LayerKV]) -> KVQuantization | None:
    """What `BackendOptions.kv_dtype` means for a model with these layers; None for "auto", which quantises nothing.

    Raises ModelLoadError for an unknown kv_dtype and for head dimensions that no group divides.
    """
    if kv_dtype == "auto":
        return None
    if kv_dtype not in KV_BITS:
        raise ModelLoadError(f"kv_dtype {kv_dtype!r} is unknown; use 'auto', {', '.join(map(repr, KV_BITS))}")
    dims = sorted({dim for layer in layers for dim in (layer.key_dim, layer.value_dim)})
    for group in GROUPS:
        if all(dim % group == 0 for dim in dims):
            return KVQuantization(KV_BITS[kv_dtype], group)
    raise ModelLoadError(
        f"kv_dtype {kv_dtype!r} needs head dimensions that are multiples of {GROUPS[-1]}; this model has "
        f"{', '.join(map(str, dims))}; use kv_dtype 'auto'"
    )
