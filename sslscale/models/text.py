"""Text backbones: any transformers model by type and arguments, or a folder of transformers or sentence-transformers.

B texts, L tokens of the longest, D width. Tokens are int (B, L), PAD (-1) beyond a text's end.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslscale import storage
from sslscale.config import AugmentConfig, TextConfig
from sslscale.errors import UserError, did_you_mean
from sslscale.models.base import Encoder
from sslscale.models.drop_path import Keyed, draw_from, key_drops
from sslscale.models.huggingface import transformers_library, without_attention_dropout
from sslscale.rundir import hash_file, hash_json, read_json
from sslscale.shards.decode import DecodeError
from sslscale.shards.text import PAD, SPECIAL, TextReader, load_tokenizer, text_of, train_tokenizer
from sslscale.views.keyed import KeyedRandom, mix
from sslscale.views.text import subset

_LOAD = (
    "config = transformers.AutoConfig.for_model(meta['architecture'], **meta['arguments'])",
    "model = transformers.AutoModel.from_config(config)",
    "model.load_state_dict(safetensors.torch.load_file('backbone.safetensors'), strict=False)",
)
_TOKENIZER = "tokenizer.json"
_BUCKETS, _BUCKET_ROWS = 4, 32  # a batch is computed in up to so many parts of like lengths, of at least so many texts
_DELETED = 0.15  # of the words, in the views that evaluations compare
_LAYER = re.compile(r"layer:([1-9]\d*)")
_DROPOUTS = ("dropout", "dropout_rate", "activation_dropout", "hidden_dropout", "hidden_dropout_prob")
_POSITIONS = ("position_embeddings", "wpe", "embed_positions")  # the names of tables of positions in transformers
_FOLDER_FILES = ("config.json", "model.safetensors", _TOKENIZER)


class TextBackbone(Encoder, Keyed):
    """A transformers model with a pooling: tokens (B, L) -> features (B, D).

    A batch is sorted by length and computed in a few parts, so that little is spent on PAD; what comes out is in the
    order of what went in.
    """

    OFFERS: ClassVar[tuple[str, ...]] = ("tokens",)
    FILES: ClassVar[tuple[str, ...]] = (_TOKENIZER,)
    config: TextConfig

    def __init__(self, config: TextConfig, files: Path | None = None, model: nn.Module | None = None) -> None:
        super().__init__(config, files)
        self.model = model or _create(config)
        key_drops(self.model, nn.Dropout)
        self.feature_dim = int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.pad_id = int(self.model.config.pad_token_id or 0)  # type: ignore[union-attr, arg-type]
        self.mask_id, special = SPECIAL.index("[MASK]"), list(range(len(SPECIAL)))
        if files is not None:
            tokenizer = load_tokenizer(str(files / _TOKENIZER), config.max_length)
            special = [id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        self.special_ids = tuple(special)

    @classmethod
    def fit(cls, config: TextConfig, samples: Callable[[int], Iterable[dict[str, Any]]], folder: Path) -> None:
        train_tokenizer(
            _texts(samples(config.tokenizer_samples)), config.vocab_size, config.lowercase, folder / _TOKENIZER
        )

    @classmethod
    def load_lines(cls, meta: Mapping[str, Any]) -> list[str]:
        return list(_LOAD)

    def meta(self) -> dict[str, Any]:
        return {"arguments": _arguments(self.config)}

    def reader(self, channels: int | None, size: int | None) -> TextReader:
        assert self.files is not None
        return TextReader(str(self.files / _TOKENIZER), min(size or self.config.max_length, self.config.max_length))

    @property
    def embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()  # type: ignore[operator]

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        settings: Any = self.model.config
        return (
            bool(getattr(settings, "is_decoder", False)) or settings.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        )

    def augmented(self, inputs: Tensor, random: KeyedRandom, recipe: AugmentConfig) -> Tensor:
        """The text less some of its words; `recipe` is of images."""
        return subset(inputs, random, self.special_ids, (1.0, 1.0), _DELETED)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled = self._by_length(tokens, lambda states, mask: _POOL[self.config.pooling](states, mask))
        return F.normalize(pooled, dim=1) if self.config.normalize else pooled

    def tokens(self, tokens: Tensor) -> Tensor:
        """(B, L, D): the last layer's state at each token; zeros at PAD."""
        width = tokens.shape[1]
        return self._by_length(
            tokens, lambda states, mask: F.pad(states * mask[:, :, None], (0, 0, 0, width - mask.shape[1]))
        )

    def output_dim(self, output: str) -> int:
        """`cls`: the first token's state; `tokens_mean`: the mean over tokens; `layer:K`: the same of block K."""
        settings: Any = self.model.config
        layer, layers = _LAYER.fullmatch(output), int(settings.num_hidden_layers)
        if layer is not None and int(layer[1]) > layers:
            raise UserError("this backbone has no such layer", got=output, allowed=f"layer:1 to layer:{layers}")
        return self.feature_dim

    def take(self, inputs: Tensor, output: str) -> Tensor:
        layer = _LAYER.fullmatch(output)
        pool = _POOL["cls" if output == "cls" else "mean"]
        return self._by_length(inputs, pool, int(layer[1]) if layer else -1)

    def checkpoint_activations(self) -> None:
        dropping = [module for module in self.model.modules() if isinstance(module, nn.Dropout) and module.p]
        if dropping:
            raise UserError(
                "activation_checkpointing computes blocks twice, and a batch's parts would draw other dropout then",
                fix="set the dropout in pretrain.backbone.kwargs to 0",
            )
        self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def _by_length(self, tokens: Tensor, pool: Callable[[Tensor, Tensor], Tensor], layer: int = -1) -> Tensor:
        """`pool(states (n, l, D), mask (n, l))` of texts in parts of like lengths, in the order of `tokens`."""
        lengths = (tokens != PAD).sum(dim=1)
        order = lengths.argsort(stable=True)
        parts = []
        for rows in order.chunk(max(1, min(_BUCKETS, len(tokens) // _BUCKET_ROWS))):
            ids = tokens[rows, : int(lengths[rows[-1]])]
            mask = ids != PAD
            if self.training:
                draw_from(self.model, KeyedRandom(self._row_keys(len(tokens))[rows]))
            found = self.model(
                input_ids=ids.masked_fill(~mask, self.pad_id).long(),
                attention_mask=mask.long(),
                output_hidden_states=layer >= 0,
            )
            parts.append(pool(found.last_hidden_state if layer < 0 else found.hidden_states[layer], mask))
        return torch.cat(parts)[order.argsort()]

    def _row_keys(self, rows: int) -> Tensor:
        """int64 (rows,): a key for each view of each sample; rows are views of the batch, one view after another."""
        views = torch.arange(rows // len(self.random), device=self.random.keys.device)
        return mix(mix(views)[:, None] ^ self.random.keys).flatten()


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask[:, :, None].to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]


_POOL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": lambda states, _: states[:, 0],
    "last": _last,
}


def _arguments(config: TextConfig) -> dict[str, Any]:
    """The model's own arguments: the config's, the tokenizer's ids, and no dropout that would draw by rank."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    defaults = transformers_library("text").CONFIG_MAPPING[config.architecture]().to_dict()
    return {"vocab_size": config.vocab_size, **ids, **without_attention_dropout(defaults, config.kwargs)}


def _create(config: TextConfig) -> nn.Module:
    transformers = transformers_library("text")
    if config.architecture not in transformers.CONFIG_MAPPING:
        names = list(transformers.CONFIG_MAPPING)
        raise UserError(
            f"transformers has no model type {config.architecture!r}{did_you_mean(config.architecture, names)}",
            allowed="any model type of transformers.CONFIG_MAPPING",
        )
    try:
        settings = transformers.AutoConfig.for_model(config.architecture, **_arguments(config))
        model = transformers.AutoModel.from_config(settings)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"transformers' {config.architecture} refuses these arguments", got=f"{config.kwargs}: {error}"
        ) from None
    model.pooler = None  # of the next-sentence task: it would never be trained
    _check_dropout(model)
    if config.max_length > (room := _positions(model)):
        raise UserError(
            "texts may be longer than the model has positions",
            got=f"pretrain.backbone.max_length={config.max_length}",
            allowed=f"at most {room}",
            fix=f"lower max_length, or raise max_position_embeddings in kwargs by {config.max_length - room}",
        )
    return model


def _check_dropout(model: Any) -> None:
    """UserError for dropout that is no module of the model: nothing can make it draw by sample."""
    rates = {name: rate for name in _DROPOUTS if (rate := getattr(model.config, name, 0.0))}
    if rates and not any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        raise UserError(
            "this model's dropout would draw by rank, and not by sample",
            got=", ".join(f"{name}={rate}" for name, rate in rates.items()),
            fix=f"set {', '.join(f'pretrain.backbone.kwargs.{name}=0' for name in rates)}",
        )


def _positions(model: nn.Module) -> float:
    """The most tokens that a model with a table of positions takes; inf for one without."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            padding = -1 if module.padding_idx is None else module.padding_idx  # RoBERTa's begin after it
            return module.num_embeddings - int(getattr(module, "offset", padding + 1))
    return math.inf


def _texts(samples: Iterable[dict[str, Any]]) -> Iterator[str]:
    for sample in samples:
        with contextlib.suppress(DecodeError):  # counted where it is trained on or embedded
            yield text_of(sample)


# ------------------------------------------------------------------ a folder that others have trained


def hash_pretrained(folder: Path) -> tuple[str, int]:
    """Names what such a folder computes, and the most tokens of its texts. Raises UserError where a file is missing."""
    _bring(folder)
    config = _pretrained_config(folder)
    return hash_json([config.identity(), *(hash_file(folder / name) for name in _FOLDER_FILES)]), config.max_length


def load_pretrained(folder: Path) -> TextBackbone:
    """The model of such a folder, with the pooling that sentence-transformers' files say (none: the mean)."""
    _bring(folder)
    model = transformers_library("text").AutoModel.from_pretrained(str(folder), local_files_only=True)
    model.pooler = None
    return TextBackbone(_pretrained_config(folder), folder, model).eval()


def _bring(folder: Path) -> None:
    """Raises UserError where a file is missing."""
    for name in _FOLDER_FILES:
        if not storage.bring(folder / name).is_file():
            raise UserError(f"there is no {name} in the folder of the model", got=storage.shown(folder))


def _pretrained_config(folder: Path) -> TextConfig:
    settings = read_json(folder / "config.json")
    pooling, kinds, length = "mean", [], settings.get("max_position_embeddings", 512)
    if storage.bring(folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text())
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise UserError(
                "this sentence-transformers model has other modules",
                got=" ".join(kinds),
                allowed="Transformer Pooling [Normalize]",
            )
        pooling = _pooling(read_json(storage.bring(folder / modules[1]["path"] / "config.json")))
        own = read_json(storage.bring(folder / "sentence_bert_config.json"))
        length = own.get("max_seq_length") or min(length, _tokenizer_length(folder))
    return TextConfig(
        architecture=settings["model_type"],
        vocab_size=settings["vocab_size"],
        max_length=length,
        pooling=pooling,
        normalize="Normalize" in kinds,
    )


def _tokenizer_length(folder: Path) -> int:
    """The most tokens that the tokenizer's own config allows, where newer folders of sentence-transformers say it."""
    return int(read_json(storage.bring(folder / "tokenizer_config.json"))["model_max_length"])


def _pooling(settings: dict[str, Any]) -> str:
    """sentence-transformers' name of a pooling -> ours. One name, or, in older files, a switch for each."""
    names = {"mean": "mean", "cls": "cls", "lasttoken": "last", "mean_tokens": "mean", "cls_token": "cls"}
    switches = [name.removeprefix("pooling_mode_") for name, on in settings.items() if "pooling_mode_" in name and on]
    mode = settings.get("pooling_mode", "+".join(switches))
    if mode not in names:
        raise UserError("this sentence-transformers pooling is not known", got=mode, allowed="mean, cls, lasttoken")
    return names[mode]
