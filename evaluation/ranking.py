"""Image-text retrieval in two stages, as ALBEF does and the paper follows.

The unimodal encoders rank everything by the cosine of their [CLS] projections (`itc`), then the fusion encoder scores
the first k candidates of every query and re-ranks them (`itm`). The other candidates stay below these, in their first
order.

The score of an (image, text) pair does not depend on which of the two asked, so the pairs of all queries, of both
directions, are one set of work, each once, visited image by image: an image's cross-attention keys and values are
projected once, and texts of like length share a batch.

Processes share the work as `evaluation.sharded` says: the results are identical for any number of them. An image's
tokens, the only large tensors ([1+N, D] each), stay in the process that encoded it, which also scores all its pairs.

Memory at 5,000 images x 25,000 texts, k = 256 (ViT-B/16 at 384 px): similarities exist in blocks of 512 queries (51 MB
and some copies of that size); candidates, pairs and scores of both directions 0.5 GB; packed text tokens 0.5 GB (bf16);
image tokens 4.4 GB (bf16) divided by the number of processes, on the GPU if they fit into a quarter of its free memory.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import utils
from evaluation.sharded import Gathered, eval_batches, run_sharded

Ranks = dict[str, dict[str, Tensor]]  # {"itc": {"tr": [N], "ir": [T]}, "itm": the same}
Rankings = dict[str, tuple[Tensor, Tensor]]  # {"tr": (ids [N, k], scores [N, k]), "ir": (ids [T, k], scores [T, k])}
SCORES = ("itm", "itm+itc", "itm+itc/t")  # what `rerank` sorts by
BLOCK = 512  # queries of one matrix product of the first stage: their similarities are all that exists at a time
MISS = torch.iinfo(torch.int64).max  # the rank of a query that no candidate answers
IMAGES_TOGETHER = 8  # at least; the more images, the fewer texts of each are in a batch, and the closer their lengths


@dataclass
class ImageFeatures:
    """All images' features and this process's share of the tokens."""

    feats: torch.Tensor  # [N, E] float32, L2-normalized, in every process
    batches: list  # of (indices [n] int64 on the CPU, image_embeds [n, S, D]): this process's own images


@dataclass
class TextFeatures:
    """All texts' features and tokens, in every process. Tokens are packed: padding is not stored."""

    feats: torch.Tensor  # [T, E] float32, L2-normalized
    tokens: torch.Tensor  # [sum of lengths, D], text t is tokens[starts[t] : starts[t] + lengths[t]]
    starts: torch.Tensor  # [T] int64, on the device
    lengths: torch.Tensor  # [T] int64, on the CPU: batch widths are chosen without a device sync

    def padded(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """text_ids [R] on the CPU -> (text_embeds [R, L, D], attention_mask [R, L] int64), L the longest."""
        lengths = self.lengths[text_ids]
        column = torch.arange(int(lengths.max()), device=self.tokens.device)  # [L]
        mask = column < lengths.to(self.tokens.device)[:, None]  # [R, L]
        starts = self.starts[text_ids.to(self.tokens.device)][:, None]  # [R, 1]
        index = torch.where(mask, starts + column, starts)  # padding reads the row's first token: finite and masked
        return self.tokens[index], mask.long()


@dataclass
class Candidates:
    """The first stage's answer for one direction, on the CPU, in every process."""

    ids: torch.Tensor  # [Q, k] int64, best first
    scores: torch.Tensor  # [Q, k] float32 cosine similarities
    ranks: torch.Tensor  # [Q] int64 rank of the best candidate that answers the query, among all; MISS if none does


def two_stage(
    backbone: nn.Module,
    images: ImageFeatures,
    texts: TextFeatures,
    image_of_text: Sequence[int] | Tensor,
    *,
    k: int = 256,
    score: str = "itm",
    batch_size: int = 1024,
    precision: str = "fp32",
) -> tuple[Ranks, Rankings]:
    """Both stages on the features of N images and T texts (`extract_features`), the same in every process.

    image_of_text: [T] index of each text's image; k: candidates re-ranked for a query; score, batch_size: see `rerank`.
    -> (ranks of each query's best positive, of text retrieval (tr: images ask) and image retrieval (ir: texts ask), in
    both stages; the first k items of each query, best first).
    """
    image_of_text, image_ids = torch.as_tensor(image_of_text), torch.arange(len(images.feats))
    tr = topk_candidates(images.feats, texts.feats, image_ids, image_of_text, k)
    ir = topk_candidates(texts.feats, images.feats, image_of_text, image_ids, k)
    scores = rerank(backbone, images, texts, tr, ir, batch_size=batch_size, score=score, precision=precision)
    ranks: Ranks = {"itc": {"tr": tr.ranks, "ir": ir.ranks}, "itm": {}}
    rankings: Rankings = {}
    for name, first, new, asking, asked in (
        ("tr", tr, scores[0], image_ids, image_of_text),
        ("ir", ir, scores[1], image_of_text, image_ids),
    ):
        new, order = new.sort(dim=1, descending=True, stable=True)  # equal ones keep the order of the first stage
        ids = first.ids.gather(1, order)
        rankings[name] = ids, new
        ranks["itm"][name] = first_hit(asked[ids] == asking[:, None], first.ranks)  # the others stay in place
    return ranks, rankings


def fold(
    images: ImageFeatures, texts: TextFeatures, image_of_text: Tensor, first: int, last: int
) -> tuple[ImageFeatures, TextFeatures, Tensor]:
    """The images first..last-1 and their texts as a data set of its own (COCO 1K is five such folds of 1,000 images).

    image_of_text: [T]. Returns (images, texts, image_of_text) with indices that start at 0.
    """
    batches = []
    for indices, image_embeds in images.batches:
        inside = ((indices >= first) & (indices < last)).nonzero()[:, 0]
        if len(inside):
            batches.append((indices[inside] - first, image_embeds[inside.to(image_embeds.device)]))
    rows = ((image_of_text >= first) & (image_of_text < last)).nonzero()[:, 0]  # [t]
    on_device = rows.to(texts.feats.device)
    some = TextFeatures(texts.feats[on_device], texts.tokens, texts.starts[on_device], texts.lengths[rows])
    return ImageFeatures(images.feats[first:last], batches), some, image_of_text[rows] - first


# ------------------------------------------------------------------------------------------------------------- Features


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    image_batches: Iterable[tuple[Tensor, Tensor]],
    num_images: int | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    text_batch_size: int = 256,
    *,
    device: torch.device,
    precision: str = "fp32",
    tokens: bool = True,
) -> tuple[ImageFeatures, TextFeatures]:
    """Every image and text through its encoder once, shared among the processes.

    backbone: models.semmim.SemMIM on `device`, in eval mode; image_batches: (images [n, 3, S, S], indices [n]), this
    process's batches, cut by `eval_batches`; num_images: see `run_sharded`; input_ids, attention_mask: [T, L] int64,
    padded on the right, all texts in every process; text_batch_size: texts of one forward pass; tokens: whether to keep
    them, for re-ranking. Raises UserError for features that are not finite: a ranking of them would mean nothing.
    """
    lengths = attention_mask.sum(dim=1)  # [T]
    starts = lengths.cumsum(0) - lengths
    stored = torch.bfloat16 if precision == "bf16" else torch.float32  # of tokens, until they are fused
    text_tokens, kept = Gathered("text tokens", device), []  # kept: (indices, tokens) of this process's images

    def encode_texts(batch: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(batch)
        width = int(lengths[rows].max())
        mask = attention_mask[rows, :width]  # [b, L]
        with utils.autocast(device, precision):
            text_embeds, text_feat = backbone.encode_text(input_ids[rows, :width].to(device), mask.to(device))
        if tokens:
            index = starts[rows][:, None] + torch.arange(width)  # [b, L]
            text_tokens.put(index[mask.bool()], text_embeds[mask.bool().to(device)].to(stored))
        return rows, text_feat.float()

    def encode_images(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, indices = batch
        with utils.autocast(device, precision):
            image_embeds, image_feat = backbone.encode_image(images.to(device, non_blocking=True))
        if tokens:
            image_embeds = image_embeds.to(stored)
            total = image_embeds[0].nbytes * (num_images or math.inf) / utils.world_size()
            kept.append((indices.cpu(), image_embeds.to(kept[0][1].device if kept else _storage(total, device))))
        return indices, image_feat.float()

    batches = eval_batches(len(lengths), text_batch_size, lengths.argsort(stable=True).tolist())
    text_feats = run_sharded(batches, encode_texts, len(lengths), label="encoding texts", device=device)
    packed = text_tokens.collect(int(lengths.sum()))[0] if tokens else text_feats.new_zeros(0, 0)
    image_feats = run_sharded(image_batches, encode_images, num_images, label="encoding images", device=device)
    images = ImageFeatures(finite(image_feats, "image features"), kept)
    return images, TextFeatures(finite(text_feats, "text features"), packed, starts.to(device), lengths)


def finite(values: Tensor, what: str) -> Tensor:
    """The values; UserError if one is not finite."""
    if not values.isfinite().all():
        raise utils.UserError(
            f"{what} are NaN or infinite: training has diverged (lower train.lr) or the checkpoint is broken, or try "
            "--override train.precision=fp32"
        )
    return values


def _storage(size: float, device: torch.device) -> torch.device:
    """Where image tokens of `size` bytes wait: on the GPU if they take under a quarter of its free memory."""
    if device.type == "cuda" and size < 0.25 * torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- First stage


@torch.no_grad()
def topk_candidates(
    query_feats: Tensor, candidate_feats: Tensor, query_ids: Tensor, candidate_ids: Tensor, k: int
) -> Candidates:
    """First stage of one direction: cosine similarities by matrix products.

    query_feats: [Q, E], candidate_feats: [C, E], both float32 and L2-normalized; query_ids, candidate_ids: [Q], [C]
    image ids: a candidate answers a query if they are equal; k: candidates to keep (at most C).
    """
    device, k = query_feats.device, min(k, len(candidate_feats))
    query_ids, candidate_ids = query_ids.to(device), candidate_ids.to(device)
    found = Gathered("candidates", device)
    for batch in eval_batches(len(query_feats), BLOCK):
        rows = slice(batch[0], batch[-1] + 1)
        similarity = query_feats[rows] @ candidate_feats.T  # [b, C]
        scores, ids = similarity.sort(dim=1, descending=True, stable=True)  # equal ones by index
        ranks = first_hit(candidate_ids[ids] == query_ids[rows, None], MISS)
        found.put(batch, ids[:, :k], scores[:, :k], ranks)
    return Candidates(*(column.cpu() for column in found.collect(len(query_feats))))


def first_hit(hits: Tensor, otherwise: Tensor | int) -> Tensor:
    """The 0-based rank of each query, [Q]: the place of the first candidate that answers it, or `otherwise` ([Q] or one
    number). hits: [Q, n] bool, of the candidates, best first: does it answer the query?"""
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), otherwise)


# --------------------------------------------------------------------------------------------------------- Second stage


@torch.no_grad()
def rerank(
    backbone: nn.Module,
    images: ImageFeatures,
    texts: TextFeatures,
    tr: Candidates,
    ir: Candidates,
    *,
    batch_size: int = 1024,
    score: str = "itm",
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Second stage of both directions: the fusion encoder's matching score for every candidate.

    Why "itm+itc/t": matching learns to tell pairs from negatives that are drawn with the weights
    q = softmax(cosine/t), so the log-odds that it can reach at best are log p(text|image) - log q(text|image) and a
    number that is the same for all candidates of a query. They say what the contrast does *not* know, and order the
    candidates well only together with it: log-odds + cosine/t is log p. With nothing learned they are constant, and
    the order is the first stage's.

    tr, ir: candidates of text retrieval ([N, k] text ids) and image retrieval ([T, k'] image ids).
    batch_size: (image, text) pairs of one fusion forward, at most (but at least one for each of the few images that are
        visited together).
    score: "itm", the matching logit alone (ALBEF); "itm+itc", plus the cosine similarity (BLIP); "itm+itc/t", the
        match's log-odds plus the cosine over the contrast's temperature t, with which negatives are drawn.
    -> (tr_scores [N, k], ir_scores [T, k']) float32 on the CPU, in the order of the candidates, equal in all processes.
    Raises UserError for scores that are not finite.
    """
    odds, device, num_texts = score == "itm+itc/t", texts.tokens.device, len(texts.lengths)
    by_images = torch.arange(len(tr.ids))[:, None] * num_texts + tr.ids  # [N, k] pair (i, t) as i * T + t
    by_texts = ir.ids * num_texts + torch.arange(num_texts)[:, None]  # [T, k']
    # Each pair once, image by image; back: the place of each request's score.
    pairs, back = torch.cat([by_images.flatten(), by_texts.flatten()]).unique(return_inverse=True)
    first_pair = torch.searchsorted(pairs, torch.arange(len(tr.ids) + 1) * num_texts)  # [N + 1]

    def match(text_ids: Tensor, memory: list) -> Tensor:
        """[R] texts with the keys and values of B images, R / B of them each -> [R] logits or log-odds"""
        fused = backbone.fusion_encoder(*texts.padded(text_ids), memory, keep=1)  # matching reads [CLS] alone
        logits = backbone.itm_logits(fused).float()  # [R, 2]
        return logits[:, 1] - logits[:, 0] if odds else logits[:, 1]

    def score_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        indices, image_embeds = batch
        places = [torch.arange(first_pair[i], first_pair[i + 1]) for i in indices]  # n x [g]
        places = [part[texts.lengths[pairs[part] % num_texts].argsort(stable=True)] for part in places]
        text_ids = [pairs[part] % num_texts for part in places]  # shortest first
        with utils.autocast(device, precision):
            scores = score_pairs(backbone.fusion_encoder, match, image_embeds.to(device), text_ids, batch_size)
        return torch.cat(places), torch.cat(scores)

    scores = run_sharded(images.batches, score_batch, len(pairs), label="re-ranking", device=device)
    scores = finite(scores.cpu(), "re-ranking scores")
    tr_scores, ir_scores = scores[back].split([tr.ids.numel(), ir.ids.numel()])
    tr_scores, ir_scores = tr_scores.view(tr.ids.shape), ir_scores.view(ir.ids.shape)
    if score == "itm":
        return tr_scores, ir_scores
    scale = backbone.temperature().item() if odds else 1.0
    return tr_scores + tr.scores / scale, ir_scores + ir.scores / scale


def score_pairs(
    encoder: nn.Module, match: Callable, image_embeds: Tensor, text_ids: list[Tensor], batch_size: int
) -> list[Tensor]:
    """The scores of images [n, S, D] with the texts of n lists, shortest first -> n x [g] on the CPU.

    Images with like numbers of texts are taken together, in rectangles [images, texts].
    """
    scores = [torch.zeros(0)] * len(text_ids)
    order = sorted((i for i, ids in enumerate(text_ids) if len(ids)), key=lambda i: -len(text_ids[i]))
    while order:
        together = max(IMAGES_TOGETHER, batch_size // len(text_ids[order[0]]))
        group, order = order[:together], order[together:]
        lists = [text_ids[i] for i in group]  # longest first
        memory = encoder.project_memory(image_embeds[group])  # keys and values once per image and layer
        table = score_rectangle(match, memory, lists, batch_size).cpu()
        for image, ids, row in zip(group, lists, table, strict=True):
            scores[image] = row[: len(ids)]
    return scores


def score_rectangle(match: Callable, memory: list, text_ids: list[Tensor], batch_size: int) -> Tensor:
    """Keys and values of B images, B lists of texts, longest list first -> scores [B, G], G the longest's."""
    counts = [len(ids) for ids in text_ids]
    widest = max(1, batch_size // len(counts))
    width = -(-counts[0] // -(-counts[0] // widest))  # equal columns instead of a thin last one
    rectangle = pad_sequence(text_ids, batch_first=True)  # [B, G]
    scores = torch.zeros(rectangle.shape, device=memory[0][0].device)
    for start in range(0, counts[0], width):
        rows = sum(count > start for count in counts)  # images that still have texts
        part = rectangle[:rows, start : start + width]  # [rows, w]
        for row, count in enumerate(counts[:rows]):  # a shorter list is filled up with its longest text
            part[row, count - start :] = text_ids[row][-1]
        values = match(part.reshape(-1), [(keys[:rows], values[:rows]) for keys, values in memory])
        scores[:rows, start : start + width] = values.view(part.shape)
    return scores
