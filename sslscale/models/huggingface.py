"""What the models of transformers have in common here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sslscale.errors import UserError, missing_package


def transformers_library(extra: str) -> Any:
    """The package, quiet; `extra` is ours that brings it."""
    try:
        import transformers
    except ImportError:
        raise missing_package("transformers", extra) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def without_attention_dropout(defaults: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs`, with every dropout of attention at 0: it is drawn within the kernels, by rank and not by sample.

    Raises UserError where one is asked for.
    """
    drops = [name for name in defaults if "drop" in name and ("attention" in name or "attn" in name)]
    asked = [name for name in drops if kwargs.get(name)]
    if asked:
        raise UserError(
            "dropout of attention would draw by rank, and not by sample",
            got=f"pretrain.backbone.kwargs.{asked[0]}={kwargs[asked[0]]}",
            fix=f"set {asked[0]}=0; the other dropouts are drawn by sample",
        )
    return {**dict.fromkeys(drops, 0.0), **kwargs}
