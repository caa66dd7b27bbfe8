"""BERT's Transformer stack: text encoder, fusion encoder (cross-attention to the image) and text decoder.

One layer class serves all three. Parameter names are BERT's (`encoder.layer.0.attention.self.query.weight`,
`crossattention.*` for the cross-attention as in ALBEF and mPLUG, `cls.predictions.*` for the language-model head), so
that any BERT-layout checkpoint loads without renaming.

Shapes: B images, R rows of text (any number per image), L text tokens, S memory tokens, H heads of width d, D = H*d.

Cross-attention takes keys and values that were projected once per image and layer (`project_memory`) and an index
row -> image (`rows`). Every fusion row of a step attends to the same B images, so the k texts of one image in
re-ranking, the matched and unmatched texts of a pre-training step and the beams of one image never pay for the image's
projections again.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.tensors import Linear, fp32, linear
from models.weights import (
    architecture_beside,
    check_value,
    check_vocabulary,
    find_weights,
    load_exactly,
    read_architecture,
    read_weights,
)
from utils import UserError, reason, shown

Memory = list[tuple[Tensor, Tensor]]  # one (keys, values) pair per layer, each [B, H, S, d]


class SpecialTokens(Protocol):
    """Ids that the models need, and the number of word pieces, as dataset.text.Tokenizer has them."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    vocab_size: int
    digest: str  # of the vocabulary


@dataclass
class BertConfig:
    """The part of BERT's `config.json` that decides what is computed."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.hidden_act != "gelu":
            raise UserError(f"bert config: hidden_act is {shown(self.hidden_act)}; only 'gelu' (BERT's) is supported")
        for field in dataclasses.fields(self):
            name, value = f"bert config: {field.name}", getattr(self, field.name)
            if field.type == "int":
                check_value(name, value, int, low=0 if field.name == "pad_token_id" else 1)
            elif field.type == "float":
                check_value(name, value, float, low=0, high=1)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"bert config: hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; change one of them in model.bert.args"
            )

    @classmethod
    def from_file(cls, path: str | PathLike, overrides: dict | None = None) -> BertConfig:
        """Read a published `config.json` and replace the keys in `overrides`; what else it holds changes nothing here.

        Raises UserError for an unknown key in `overrides` and one that is missing.
        """
        fields, overrides = {f.name: f for f in dataclasses.fields(cls)}, overrides or {}
        values = {key: value for key, value in read_architecture(path).items() if key in fields}
        try:
            return cls(**values | overrides)
        except TypeError as error:
            raise UserError(f"{path} and model.bert.args: {reason(error)}; known keys: {', '.join(fields)}") from None


# -------------------------------------------------------------------------------------------------- attention


def fused_attention_pays(x: Tensor) -> bool:
    """Whether scaled_dot_product_attention is the faster choice for the device and type of `x`.

    On GPUs always. On CPUs only in fp32: in bf16 its backward pass takes 4 to 18 times as long as matrix products (AMD
    Zen with avx512_bf16, one core, forward + backward of [128, 3, 65, 64]: 73 against 14 ms; [64, 6, 42, 32] with a
    mask: 43 against 6 ms).
    """
    return x.is_cuda or compute_dtype(x) == torch.float32


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which a linear layer computes on `x`: autocast's if it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v.

    q: [B, H, L, d]; k, v: [B, H, S, d]; mask: additive, broadcastable to [B, H, L, S], in the type of q; drop: the
    probability with which an attention weight is dropped (0 when evaluating); causal: query i sees the keys 0..i alone
    (then mask is None and S = L). -> [B, H, L, d].
    The softmax accumulates in fp32 inside its kernel whatever the type of its input is. A GPU's flash kernel takes no
    mask: padding_mask gives None if nothing is padded, `causal` needs none.
    """
    if q.is_cuda or (drop == 0.0 and fused_attention_pays(q)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, is_causal=causal)
    if causal:
        dtype = compute_dtype(q)
        mask = torch.full((q.shape[2],) * 2, torch.finfo(dtype).min, dtype=dtype, device=q.device).triu_(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, L, S]
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1)
    return F.dropout(weights, drop).to(v.dtype) @ v


def padding_mask(attention_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """[B, S], 1 = attend, 0 = padding -> additive [B, 1, 1, S] in `like`'s compute type; None stays None."""
    if attention_mask is None:
        return None
    dtype = compute_dtype(like)
    # The lowest finite number, not -inf: a row without any legal key must not give NaN.
    mask = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return mask.masked_fill_(attention_mask == 0, torch.finfo(dtype).min)[:, None, None, :]


def attend(
    q: Tensor,
    memory: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    drop: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Attention of R text rows to the keys and values of B memories, their own (B = R) or images'.

    q: [R, H, L, d]; memory: keys and values, each [B, H, S, d]; mask: additive [B, 1, 1, S] or None; drop, causal: see
    `attention`. -> [R, H, L, d].
    rows: [R] int64, the memory of each row, which is then gathered. None: row r belongs to memory r // (R / B); the
    queries of one memory stand side by side and nothing is copied.
    """
    (k, v), batch = memory, q.shape[0]
    if rows is not None:
        k, v = k.index_select(0, rows), v.index_select(0, rows)
        mask = None if mask is None else mask.index_select(0, rows)
    images = k.shape[0]
    if batch == images:
        return attention(q, k, v, mask, drop, causal)
    group = batch // images
    heads, length, width = q.shape[1:]
    q = q.view(images, group, heads, length, width).transpose(1, 2)
    q = q.reshape(images, heads, group * length, width)
    out = attention(q, k, v, mask, drop)
    return out.view(images, heads, group, length, width).transpose(1, 2).reshape(batch, heads, length, width)


# ----------------------------------------------------------------------------------------------------- layers


class SelfAttention(nn.Module):
    """Query, key and value projections (BERT's `attention.self`) and the split into heads."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads, self.drop_share = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, H, L, d]"""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def drop(self) -> float:
        """The probability with which an attention weight is dropped now."""
        return self.drop_share if self.training else 0.0


class AttentionOutput(nn.Module):
    """Output projection, dropout, residual and post-LayerNorm (BERT's `attention.output` and `output`)."""

    def __init__(self, config: BertConfig, inner: int | None = None):
        super().__init__()
        self.dense = Linear(inner or config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x: [R, L, inner or D]; residual: [R, L, D] -> [R, L, D]"""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """BERT's attention block: to the text itself or to an image, whichever keys and values it is given."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = AttentionOutput(config)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] -> keys and values, each [B, H, S, d]"""
        return self.self.split(self.self.key(memory)), self.self.split(self.self.value(memory))

    def forward(
        self,
        x: Tensor,
        memory: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """x: [R, L, D]; memory: keys and values of `project`; the others: see `attend` -> [R, L, D]"""
        q = self.self.split(self.self.query(x))
        out = attend(q, memory, mask, rows, self.self.drop(), causal)
        return self.output(out.transpose(1, 2).flatten(2), x)


class BertLayer(nn.Module):
    """Self-attention, cross-attention if the stack has one, feed-forward; LayerNorm after each."""

    def __init__(self, config: BertConfig, cross: bool):
        super().__init__()
        self.attention = Attention(config)
        if cross:
            self.crossattention = Attention(config)
        self.intermediate = nn.ModuleDict({"dense": Linear(config.hidden_size, config.intermediate_size)})
        self.output = AttentionOutput(config, inner=config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        memory_mask: Tensor | None = None,
        rows: Tensor | None = None,
        cache: KVCache | None = None,
        index: int = 0,
        keep: int | None = None,
        causal: bool = False,
    ) -> Tensor:
        """x: [R, L, D]; mask: additive, broadcastable to [R, H, L, past + L]; memory: this layer's (keys, values);
        memory_mask: additive [B, 1, 1, S]; cache: whose layer `index` this is; keep: the number of leading tokens whose
        result is needed (None: all). -> [R, L or keep, D]
        """
        own = self.attention.project(x)
        if cache is not None:
            own = cache.append(index, *own)
        x = self.attention(x[:, :keep], own, mask, causal=causal)
        if memory is not None:
            x = self.crossattention(x, memory, memory_mask, rows)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Layers(nn.Module):
    """The layers under BERT's name `encoder.layer.*`.

    checkpointing: recompute each layer in the backward pass instead of keeping its activations; false until it is set.
    """

    def __init__(self, config: BertConfig, num_layers: int, cross: bool):
        super().__init__()
        self.checkpointing = False
        self.layer = nn.ModuleList(BertLayer(config, cross) for _ in range(num_layers))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        memory: Memory | None = None,
        memory_mask: Tensor | None = None,
        rows: Tensor | None = None,
        cache: KVCache | None = None,
        keep: int | None = None,
        causal: bool = False,
    ) -> Tensor:
        """x: [R, L, D]; mask: additive; memory: `project_memory` of B memories; memory_mask: [B, S], 1 = attend; keep:
        how many leading tokens are needed of the last layer; causal: see `attention`. -> [R, L or keep, D]
        """
        memory_mask = padding_mask(memory_mask, x)
        for i, layer in enumerate(self.layer):
            needed = keep if i == len(self.layer) - 1 else None
            arguments = (x, mask, memory and memory[i], memory_mask, rows, cache, i, needed, causal)
            if self.checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x


class KVCache:
    """Self-attention keys and values of the tokens generated so far, one pair [R, H, T, d] per layer."""

    def __init__(self):
        self.pairs: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """Tokens stored so far."""
        return self.pairs[0][0].shape[2] if self.pairs else 0

    def append(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values [R, H, T, d] to layer `index`; -> all of that layer's so far."""
        if index == len(self.pairs):
            self.pairs.append((k, v))
        else:
            old_k, old_v = self.pairs[index]
            self.pairs[index] = (torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2))
        return self.pairs[index]

    def reorder(self, index: Tensor) -> None:
        """Keep the rows `index` [R'] int64, in that order (beam search)."""
        self.pairs = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.pairs]


# ------------------------------------------------------------------------- text encoder, fusion encoder, decoder


class Embeddings(nn.Module):
    """Word + position + token type 0, LayerNorm, dropout."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """input_ids: [R, L], the first at position `start` -> [R, L, D]"""
        end, most = start + input_ids.shape[1], self.position_embeddings.num_embeddings
        if end > most:
            raise UserError(
                f"a text of {end} tokens does not fit the {most} positions of the text model; lower text.max_tokens or "
                "raise model.bert.args.max_position_embeddings"
            )
        words = self.word_embeddings(input_ids)  # [R, L, D]
        x = words + self.token_type_embeddings.weight[0] + self.position_embeddings.weight[start:end]
        return self.dropout(self.LayerNorm(x))


class LMHead(nn.Module):
    """BERT's `cls.predictions`: dense, GELU, LayerNorm, then the word embeddings (tied, passed in) and a bias."""

    def __init__(self, config: BertConfig):
        super().__init__()
        dense = Linear(config.hidden_size, config.hidden_size)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_weights(self, config.initializer_range)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """hidden: [..., D]; word_embeddings: [V, D], the weight that the head is tied to -> [..., V]"""
        x = self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden)))
        return linear(x, word_embeddings, self.bias)


class TextEncoder(nn.Module):
    """BERT's embeddings and first layers: text tokens -> [B, L, D]."""

    def __init__(self, config: BertConfig, num_layers: int):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config, num_layers, cross=False)
        init_weights(self, config.initializer_range)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids: [B, L]; attention_mask: [B, L], 1 = token, 0 = padding (None: no padding)."""
        x = self.embeddings(input_ids)
        return self.encoder(x, padding_mask(attention_mask, x))


class FusionEncoder(nn.Module):
    """Layers over the text encoder's output that attend to the image; no embeddings of its own."""

    def __init__(self, config: BertConfig, num_layers: int):
        super().__init__()
        self.config = config
        self.encoder = Layers(config, num_layers, cross=True)
        init_weights(self, config.initializer_range)

    def project_memory(self, memory: Tensor) -> Memory:
        """memory [B, S, D], the image tokens -> keys and values of every layer, each [B, H, S, d]"""
        return [layer.crossattention.project(memory) for layer in self.encoder.layer]

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        memory: Memory,
        rows: Tensor | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """hidden: [R, L, D], the text encoder's output; attention_mask: [R, L] or None; memory: `project_memory` of B
        images; rows: [R] int64, the image of each row; None means that R is a multiple g * B and row r belongs to image
        r // g; keep: how many leading tokens are needed of the result, the last layer computes no others (1: [CLS]
        alone, for ITM; None: all). -> [R, L or keep, D]
        """
        return self.encoder(hidden, padding_mask(attention_mask, hidden), memory, rows=rows, keep=keep)


class TextDecoder(nn.Module):
    """Causal layers with cross-attention and a language-model head tied to the decoder's own embeddings."""

    def __init__(self, config: BertConfig, num_layers: int):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config, num_layers, cross=True)
        self.cls = nn.ModuleDict({"predictions": LMHead(config)})
        init_weights(self, config.initializer_range)

    project_memory = FusionEncoder.project_memory

    def forward(
        self,
        input_ids: Tensor,
        memory: Memory,
        memory_mask: Tensor | None = None,
        rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """input_ids: [R, T], padded on the right, which no token before it sees; memory: `project_memory` of B
        memories; memory_mask: [B, S]; rows: as in `FusionEncoder.forward`; cache: for step-wise generation: T is 1 once
        it holds tokens, which the new one follows, and it grows by T.
        -> hidden states [R, T, D]; `lm_logits` turns them into scores.
        """
        x = self.embeddings(input_ids, cache.length if cache is not None else 0)
        causal = input_ids.shape[1] > 1  # a single new token sees everything before it
        return self.encoder(x, None, memory, memory_mask, rows, cache, causal=causal)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> scores of the next token [..., V]"""
        return self.cls["predictions"](hidden, self.embeddings.word_embeddings.weight)

    def written_logits(
        self, input_ids: Tensor, written: Tensor, memory: Memory, memory_mask: Tensor | None, rows: Tensor | None = None
    ) -> Tensor:
        """Scores of the next token at the N positions where `written` [R, T] is True, in order: [N, V] float32.

        Nothing is computed over the vocabulary for padding. The other arguments are `forward`'s.
        """
        hidden = self(input_ids, memory=memory, memory_mask=memory_mask, rows=rows)
        return fp32(self.lm_logits(hidden[written]))


def init_weights(module: nn.Module, std: float) -> None:
    """BERT's initialization: N(0, std) for matrices and embeddings, zero biases, LayerNorm at identity."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


# ------------------------------------------------------------------------------------------ published weights

# Entries of published BERT files that none of our modules has: the pooler, next-sentence prediction, a buffer, and the
# output matrix that is tied to the word embeddings. Anything else that is left over, or missing, is an error.
IGNORED = r"pooler\.|cls\.seq_relationship\.|embeddings\.position_ids$|cls\.predictions\.decoder\."
ADVICE = "give a checkpoint in BertModel's layout, and set model.bert.args to its architecture"


def load_bert_weights(
    source: str,
    text_encoder: TextEncoder,
    fusion_encoder: FusionEncoder | None = None,
    decoder: TextDecoder | None = None,
    mlm_head: LMHead | None = None,
    vocab: str | None = None,
) -> list[str]:
    """Fill the given modules from a BERT checkpoint; -> one line for the log on each.

    source: see `find_weights`; in BertModel's or BertForMaskedLM's layout, also with the old `gamma`/`beta` names.
    vocab: see `check_vocabulary`.
    The text encoder takes the first layers, the fusion encoder the last ones if the file has enough for both (else it
    starts at random), the decoder the first ones; cross-attention and what the file lacks stay at their initial values.
    Another architecture, or an unknown entry, is a UserError.
    """
    path, lines = find_weights(source), []
    check_architecture(path, text_encoder.config)
    if vocab is not None:
        lines.append(f"text encoder, fusion encoder, decoder: weights of {path}; {check_vocabulary(path, vocab)}")
    embeddings, layers, head = split_bert(read_weights(path), path)
    above = len(fusion_encoder.encoder.layer) if fusion_encoder is not None else 0
    first = len(layers) - above  # of the fusion encoder's
    first = first if first >= len(text_encoder.encoder.layer) else len(layers)
    for name, module, start in (
        ("text encoder", text_encoder, 0),
        ("fusion encoder", fusion_encoder, first),
        ("decoder", decoder, 0),
    ):
        if module is None:
            continue
        if module is not fusion_encoder:
            load_embeddings(module, embeddings, path)
        own, taken = module.encoder.layer, layers[start:]
        for layer, weights in zip(own, taken, strict=False):
            load_exactly(layer, weights, path, ADVICE, lacking="crossattention.")  # which no BERT file has
        count = min(len(own), len(taken))
        which = f"layers {start + 1} to {start + count} of {len(layers)} from {path}, " if count else ""
        lines.append(f"{name}: {which}{len(own) - count} of its {len(own)} layers are random")
    for name, module in (("LM head", decoder and decoder.cls["predictions"]), ("MLM head", mlm_head)):
        if module is not None:
            if head:
                load_exactly(module, head, path, ADVICE)
            lines.append(f"{name}: from {path}" if head else f"{name}: random ({path} has no cls.predictions)")
    return lines


def load_embeddings(module: nn.Module, embeddings: dict, path: Path) -> None:
    """Fill `module.embeddings`; a model with fewer positions or token types than the file takes the first ones."""
    own = module.embeddings.state_dict()
    for key in ("position_embeddings.weight", "token_type_embeddings.weight"):
        if key in embeddings and len(embeddings[key]) > len(own[key]):
            embeddings = {**embeddings, key: embeddings[key][: len(own[key])]}
    load_exactly(module.embeddings, embeddings, path, f"{ADVICE}, and text.vocab to its vocabulary")


def split_bert(weights: dict, path: Path) -> tuple[dict, list[dict], dict]:
    """(embeddings, list of layers, head) of a BERT state dict: state dicts in fp32, without their prefixes."""
    embeddings, layers, head = {}, {}, {}
    for key, value in weights.items():
        key = key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        key = key.replace("LayerNorm.beta", "LayerNorm.bias")
        if re.match(IGNORED, key):
            continue
        if layer := re.match(r"encoder\.layer\.(\d+)\.(.+)", key):
            layers.setdefault(int(layer[1]), {})[layer[2]] = value.float()
        elif key.startswith("embeddings."):
            embeddings[key.removeprefix("embeddings.")] = value.float()
        elif key.startswith("cls.predictions."):
            head[key.removeprefix("cls.predictions.")] = value.float()
        else:
            raise UserError(f"{path}: unknown entry {shown(key)}; {ADVICE}")
    if not embeddings or sorted(layers) != list(range(len(layers))):
        raise UserError(f"{path}: not a BERT checkpoint (no embeddings, or layers missing); {ADVICE}")
    return embeddings, [layers[i] for i in range(len(layers))], head


def check_architecture(path: Path, config: BertConfig) -> None:
    """A UserError if the config.json beside a weight file is of another computation than the model's.

    Sizes may fit all the same: RoBERTa counts positions from 2, and heads and activations have no weights.
    """
    values = architecture_beside(path)
    computed = {key: (getattr(config, key),) for key in ("num_attention_heads", "layer_norm_eps")}
    computed |= {"model_type": ("bert",), "position_embedding_type": ("absolute",)}
    computed |= {"hidden_act": ("gelu", "gelu_python")}  # one GELU, two names
    for key, names in computed.items():
        if (found := values.get(key, names[0])) not in names:
            raise UserError(
                f"{path}: its config.json has {key} {shown(found)}, the model's is {names[0]}; take weights made with "
                "that, set model.bert.args, or model.bert.weights: random"
            )
