"""Image-text retrieval in two stages, as ALBEF does and the paper follows.

The unimodal encoders rank everything by the cosine of their [CLS] projections (`itc`), then the fusion
encoder scores the first k candidates of every query and re-ranks them (`itm`). Un-reranked candidates stay
below all re-ranked ones, in their first order.

The score of an (image, text) pair does not depend on which of the two asked, so the pairs of all queries,
of both directions, are one set of work, visited image by image: an image's cross-attention keys and values
are projected once, pairs that both directions want are scored once, and texts of like length share a batch.

Many processes share the work as `evaluation.sharded` says: the results are identical for any number of
processes. An image's tokens, the only large tensors ([1+N, D] each), stay with the rank that encoded it, which
also scores all pairs of this image.

Memory at 5,000 images x 25,000 texts, k = 256 (ViT-B/16 at 384 px): similarities exist in blocks of 512
queries (51 MB and some copies of that size); candidates, scores and rankings of both directions 0.3 GB;
packed text tokens 0.5 GB (bf16); image tokens 4.4 GB (bf16) divided by the number of processes, on the GPU
if they fit into a quarter of its free memory.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import utils
from evaluation.sharded import Gathered, ProgressLine, eval_batches, run_sharded

Ranks = dict[str, dict[str, Tensor]]  # {"itc": {"tr": [N], "ir": [T]}, "itm": the same}
Rankings = dict[str, tuple[Tensor, Tensor]]  # {"tr": (ids [N, k], scores [N, k]), "ir": (ids [T, k], scores [T, k])}
SCORES = ("itm", "itm+itc", "itm+itc/t")  # what `rerank` sorts by
MISS = torch.iinfo(torch.int64).max  # the rank of a query that no candidate answers


@dataclass
class ImageFeatures:
    """All images' features and this rank's share of the tokens."""

    feats: torch.Tensor  # [N, E] float32, L2-normalised, on every rank
    batches: list  # of (indices [n] int64 on the CPU, image_embeds [n, S, D]): this rank's own images


@dataclass
class TextFeatures:
    """All texts' features and tokens, on every rank. Tokens are packed: padding is not stored."""

    feats: torch.Tensor  # [T, E] float32, L2-normalised
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
    """The first stage's answer for one direction, on the CPU, on every rank."""

    ids: torch.Tensor  # [Q, k] int64, best first
    scores: torch.Tensor  # [Q, k] float32 cosine similarities
    ranks: torch.Tensor  # [Q] int64 rank of the best positive among all candidates, see positive_ranks


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
    log: Callable | None = None,
) -> tuple[Ranks, Rankings]:
    """Both stages on the features of a data set.

    Args:
        backbone: models.semmim.SemMIM in eval mode, on the features' device.
        images, texts: from extract_features (N images, T texts).
        image_of_text: [T] index of each text's image.
        k: candidates re-ranked for a query (at most all).
        score, batch_size: see `rerank`.
        log: called with a line of progress now and then.

    Returns:
        (Ranks, Rankings), the same on every rank: ranks of each query's best positive, of text retrieval (tr: images
        ask) and image retrieval (ir: texts ask), in both stages; the first k items of each query, best first.
    """
    image_of_text, image_ids = torch.as_tensor(image_of_text), torch.arange(len(images.feats))
    tr = topk_candidates(images.feats, texts.feats, image_ids, image_of_text, k)
    ir = topk_candidates(texts.feats, images.feats, image_of_text, image_ids, k)
    tr_scores, ir_scores = rerank(
        backbone, images, texts, tr, ir, batch_size=batch_size, score=score, precision=precision, log=log
    )
    rankings = {"tr": sort_candidates(tr.ids, tr_scores), "ir": sort_candidates(ir.ids, ir_scores)}
    tr_hits = image_of_text[rankings["tr"][0]] == image_ids[:, None]  # [N, k]
    ir_hits = rankings["ir"][0] == image_of_text[:, None]  # [T, k]
    ranks = {
        "itc": {"tr": tr.ranks, "ir": ir.ranks},
        "itm": {
            "tr": reranked_positive_ranks(tr_hits, tr.ranks),
            "ir": reranked_positive_ranks(ir_hits, ir.ranks),
        },
    }
    return ranks, rankings


def fold(
    images: ImageFeatures, texts: TextFeatures, image_of_text: Tensor, first: int, last: int
) -> tuple[ImageFeatures, TextFeatures, Tensor]:
    """The images first..last-1 and their texts as a data set of its own (COCO 1K is five such folds of 1,000 images).

    image_of_text: [T]. Returns (images, texts, image_of_text) with indices that start at 0; tokens are not copied,
    except those of a batch of images that the border of a fold cuts.
    """
    batches = []
    for indices, image_embeds in images.batches:
        inside = (indices >= first) & (indices < last)
        if inside.all():
            batches.append((indices - first, image_embeds))
        elif inside.any():
            batches.append((indices[inside] - first, image_embeds[inside.to(image_embeds.device)]))
    rows = ((image_of_text >= first) & (image_of_text < last)).nonzero()[:, 0]  # [t]
    on_device = rows.to(texts.feats.device)
    some = TextFeatures(texts.feats[on_device], texts.tokens, texts.starts[on_device], texts.lengths[rows])
    return ImageFeatures(images.feats[first:last], batches), some, image_of_text[rows] - first


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    image_batches: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
    input_ids: Tensor,
    attention_mask: Tensor,
    text_batch_size: int = 256,
    *,
    device: torch.device,
    precision: str = "fp32",
    log: Callable | None = None,
    exact: bool = True,
) -> tuple[ImageFeatures, TextFeatures]:
    """Every image and text through its encoder once, shared among the ranks.

    Args:
        backbone: models.semmim.SemMIM on `device`; it is put into eval mode and left there.
        image_batches: (images [n, 3, S, S], indices [n]): this rank's batches, cut by `eval_batches`.
        num_images: N.
        input_ids, attention_mask: [T, L] int64, padded on the right: all texts, on every rank.
        text_batch_size: texts of one forward pass.
        log: called with a line of progress now and then.
        exact: False where fewer images than `num_images` may come, numbered without gaps; N is then their number.

    Returns:
        (ImageFeatures, TextFeatures)

    Raises:
        RuntimeError: an image is missing or comes twice.
        utils.UserError: features that are not finite (any ranking of them would be meaningless).
    """
    backbone.eval()
    texts = _encode_texts(backbone, input_ids, attention_mask, text_batch_size, device, precision, log)
    images = _encode_images(backbone, image_batches, num_images, device, precision, log, exact)
    for name, feats in (("image", images.feats), ("text", texts.feats)):
        broken = int((~feats.isfinite()).any(dim=1).sum())
        if broken:
            raise utils.UserError(
                f"{broken} of {len(feats)} {name} features are NaN or infinite: the checkpoint is broken, "
                "or try --override train.precision=fp32"
            )
    return images, texts


@torch.no_grad()
def topk_candidates(
    query_feats: Tensor,
    candidate_feats: Tensor,
    query_ids: Tensor,
    candidate_ids: Tensor,
    k: int,
    block: int = 512,
) -> Candidates:
    """First stage of one direction: cosine similarities by matrix products, `block` queries at a time.

    Args:
        query_feats: [Q, E] float32 L2-normalised. candidate_feats: [C, E], the same.
        query_ids, candidate_ids: [Q], [C] image ids: a candidate answers a query when they are equal.
        k: candidates to keep (at most C).
        block: queries of one matrix product; a block's similarities are all that exists at a time.

    Returns:
        Candidates, the same on every rank.
    """
    device, k = query_feats.device, min(k, len(candidate_feats))
    query_ids, candidate_ids = query_ids.to(device), candidate_ids.to(device)
    found = Gathered("candidates", device)
    for batch in eval_batches(len(query_feats), block):
        rows = slice(batch[0], batch[-1] + 1)
        similarity = query_feats[rows] @ candidate_feats.T  # [b, C]
        positive = query_ids[rows, None] == candidate_ids[None, :]  # [b, C]
        scores, ids = _topk_by_index(similarity, k)
        found.put(batch, ids, scores, positive_ranks(similarity, positive))
    ids, scores, ranks = (column.cpu() for column in found.collect(len(query_feats)))
    return Candidates(ids, scores, ranks)


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
    log: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """Second stage of both directions: the fusion encoder's matching score for every candidate.

    Why "itm+itc/t": matching learns to tell pairs from negatives that are drawn with the weights
    q = softmax(cosine/t), so the log-odds that it can reach at best are log p(text|image) - log q(text|image) and a
    number that is the same for all candidates of a query. They say what the contrast does *not* know, and order the
    candidates well only together with it: log-odds + cosine/t is log p. With nothing learned they are constant, and
    the order is the first stage's.

    Args:
        backbone: models.semmim.SemMIM in eval mode.
        images, texts: from extract_features.
        tr, ir: Candidates of text retrieval ([N, k] text ids) and image retrieval ([T, k'] image ids).
        batch_size: (image, text) pairs of one fusion forward, at most (but at least one for each of the few
            images that are visited together).
        score: "itm", the matching logit alone (ALBEF); "itm+itc", plus the cosine similarity (BLIP); "itm+itc/t",
            the match's log-odds plus the cosine over the contrast's temperature t, with which negatives are drawn.

    Returns:
        (tr_scores [N, k], ir_scores [T, k']) float32 on the CPU, in the order of the candidates, equal on all
        ranks.
    Raises:
        utils.UserError: unknown `score`; scores that are not finite.
    """
    if score not in SCORES:
        raise utils.UserError(f"rerank.score is {score!r}: it must be one of {', '.join(SCORES)}")
    odds = score == "itm+itc/t"
    device = texts.tokens.device
    of_images, of_slots = Gathered("re-ranked texts", device), Gathered("re-ranked images", device)
    slots = ir.ids.flatten().argsort(stable=True)  # places in the [T, k'] table, grouped by the image they name
    asked = ir.ids.flatten().bincount(minlength=len(tr.ids))  # [N] texts that want each image
    slot_ends = asked.cumsum(0)
    own = torch.cat([indices for indices, _ in images.batches] or [asked.new_zeros(0)])
    progress = ProgressLine("re-ranking", "pairs", int(asked[own].sum()) + len(own) * tr.ids.shape[1], log)
    for indices, image_embeds in images.batches:
        if utils.stop_requested():
            break
        places = [slots[slot_ends[i] - asked[i] : slot_ends[i]] for i in indices]  # n x [asked]
        plans = [_plan(tr.ids[i], place // ir.ids.shape[1], texts) for i, place in zip(indices, places, strict=True)]
        with utils.autocast(device, precision):
            pair_scores = _score_pairs(backbone, image_embeds.to(device), plans, texts, batch_size, odds, progress)
        # a pair that both directions want was scored once
        values = [scores[back] for scores, (_, back) in zip(pair_scores, plans, strict=True)]  # n x [k + asked]
        of_images.put(indices, torch.stack([row[: tr.ids.shape[1]] for row in values]))
        of_slots.put(torch.cat(places), torch.cat([row[tr.ids.shape[1] :] for row in values]))
    progress.close()
    tr_scores = of_images.collect(len(tr.ids))[0].cpu()
    ir_scores = of_slots.collect(ir.ids.numel())[0].cpu().view(ir.ids.shape)
    if not (tr_scores.isfinite().all() and ir_scores.isfinite().all()):
        raise utils.UserError(
            "re-ranking scores are NaN or infinite: the checkpoint is broken, or try --override train.precision=fp32"
        )
    if score == "itm":
        return tr_scores, ir_scores
    scale = backbone.temperature().item() if odds else 1.0
    return tr_scores + tr.scores / scale, ir_scores + ir.scores / scale


def sort_candidates(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """ids, scores [Q, k] -> the same, best first; equal scores keep their order, that of the first stage."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), scores


def positive_ranks(scores: Tensor, positive: Tensor) -> Tensor:
    """Ranks of queries from their full score rows: 0-based places of the best positive candidate.

    Equal scores are ranked by index: a constant score gives no query a gift, and a run always gives the same.

    Args:
        scores: [Q, C] scores, not NaN.
        positive: [Q, C] bool, True where the candidate answers the query.

    Returns:
        [Q] int64: candidates with a greater score than the best positive, plus those with an equal score and
        a smaller index; MISS where a query has no positive.
    """
    if scores.isnan().any():
        raise ValueError("positive_ranks: scores contain NaN")  # NaN compares false: every query would rank first
    num_candidates = scores.shape[1]
    index = torch.arange(num_candidates, dtype=torch.int32, device=scores.device)  # [C]
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)  # [Q, 1]
    ties = scores == best  # [Q, C]
    first = torch.where(ties & positive, index, num_candidates).amin(dim=1, keepdim=True)  # [Q, 1]
    before = (scores > best) | (ties & (index < first))
    ranks = before.sum(dim=1)
    return torch.where(positive.any(dim=1), ranks, MISS)


def reranked_positive_ranks(positive: Tensor, fast_ranks: Tensor) -> Tensor:
    """Ranks of queries after re-ranking the first k candidates of a fast ranking; the others stay in place.

    Args:
        positive: [Q, k] bool, for the re-ranked candidates in their new order: does it answer the query?
        fast_ranks: [Q] ranks by the fast ranking, which hold for queries with no positive among the k.

    Returns:
        [Q] int64.
    """
    index = torch.arange(positive.shape[1], device=positive.device)
    first = torch.where(positive, index, positive.shape[1]).amin(dim=1)
    return torch.where(positive.any(dim=1), first, fast_ranks)


# ------------------------------------------------------------------------------------------------------------
# Features


def _encode_texts(
    backbone: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    batch_size: int,
    device: torch.device,
    precision: str,
    log: Callable | None,
) -> TextFeatures:
    lengths = attention_mask.sum(dim=1)  # [T]
    starts = lengths.cumsum(0) - lengths
    tokens = Gathered("text tokens", device)

    def encode(batch: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(batch)
        width = int(lengths[rows].max())
        mask = attention_mask[rows, :width]  # [b, L]
        with utils.autocast(device, precision):
            text_embeds, text_feat = backbone.encode_text(input_ids[rows, :width].to(device), mask.to(device))
        index = starts[rows][:, None] + torch.arange(width)  # [b, L]
        tokens.put(index[mask.bool()], text_embeds[mask.bool().to(device)].to(_stored(precision)))
        return rows, text_feat.float()

    batches = eval_batches(len(lengths), batch_size, lengths.argsort(stable=True).tolist())
    shown = {"label": "encoding texts", "unit": "texts", "log": log}
    feats = run_sharded(batches, encode, len(lengths), device=device, **shown)
    return TextFeatures(feats, tokens.collect(int(lengths.sum()))[0], starts.to(device), lengths)


def _encode_images(
    backbone: nn.Module,
    batches: Iterable,
    num_images: int,
    device: torch.device,
    precision: str,
    log: Callable | None,
    exact: bool,
) -> ImageFeatures:
    kept: list[tuple[Tensor, Tensor]] = []  # this rank's indices and tokens, batch by batch

    def encode(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, indices = batch
        with utils.autocast(device, precision):
            image_embeds, image_feat = backbone.encode_image(images.to(device, non_blocking=True))
        image_embeds = image_embeds.to(_stored(precision))
        if kept:
            storage = kept[0][1].device
        else:
            storage = _storage(image_embeds, num_images / len(images) / utils.world_size(), device)
        kept.append((indices.cpu(), image_embeds.to(storage)))
        return indices, image_feat.float()

    shown = {"label": "encoding images", "unit": "images", "log": log}
    feats = run_sharded(batches, encode, num_images, device=device, exact=exact, **shown)
    return ImageFeatures(feats, kept)


def _stored(precision: str) -> torch.dtype:
    """What tokens are kept in until they are fused."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _storage(image_embeds: Tensor, batches: float, device: torch.device) -> torch.device:
    """Where image tokens wait for re-ranking: on the GPU if they take under a quarter of its free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if image_embeds.nbytes * batches < 0.25 * free:
            return device
    return torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------
# Ranking


def _topk_by_index(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """scores [b, C] -> (values [b, k], ids [b, k]), best first, equal ones by index (unlike topk)."""
    values, ids = scores.topk(k, dim=1)
    last = values[:, -1:]
    crowded = (scores == last).sum(dim=1) > (values == last).sum(dim=1)  # a tie across the border: who is in?
    if crowded.any():
        full, order = scores[crowded].sort(dim=1, descending=True, stable=True)
        values[crowded], ids[crowded] = full[:, :k], order[:, :k]
    ids, order = ids.sort(dim=1)
    values, by_value = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


# At least so many images are visited together: the more images, the fewer texts of each are in a batch, and
# the closer these are in length.
_IMAGES_TOGETHER = 8


def _plan(wanted_by_image: Tensor, wanting_image: Tensor, texts: TextFeatures) -> tuple[Tensor, Tensor]:
    """The texts to fuse with one image, each once, in order of length; where each request finds its score.

    Args:
        wanted_by_image: [k] the image's candidates. wanting_image: [a] the texts that have it among theirs.

    Returns:
        (text_ids [g], back [k + a]): text_ids[back] are the requests.
    """
    text_ids, back = torch.cat([wanted_by_image, wanting_image]).unique(return_inverse=True)
    order = texts.lengths[text_ids].argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return text_ids[order], place[back]


def _score_pairs(
    backbone: nn.Module,
    image_embeds: Tensor,
    plans: list[tuple[Tensor, Tensor]],
    texts: TextFeatures,
    batch_size: int,
    odds: bool,
    progress: ProgressLine,
) -> list[Tensor]:
    """ITM logits of n images [n, S, D] with the texts of their n plans -> n x [g] scores on the CPU.

    odds: their log-odds instead, match against no match.
    Images with like numbers of texts are taken together, so that a batch is a full [images, texts] rectangle.
    """
    text_ids = [ids for ids, _ in plans]
    order = sorted((i for i, ids in enumerate(text_ids) if len(ids)), key=lambda i: -len(text_ids[i]))
    scores, start = [torch.zeros(0)] * len(text_ids), 0  # of an image that nobody asked for
    while start < len(order):
        together = max(_IMAGES_TOGETHER, batch_size // len(text_ids[order[start]]))
        group = order[start : start + together]
        table = _score_rectangle(backbone, image_embeds[group], [text_ids[i] for i in group], texts, batch_size, odds)
        for row, i in zip(table.cpu(), group, strict=True):
            scores[i] = row[: len(text_ids[i])]
            progress.advance(len(plans[i][1]))
        start += together
    return scores


def _score_rectangle(
    backbone: nn.Module,
    image_embeds: Tensor,
    text_ids: list[Tensor],
    texts: TextFeatures,
    batch_size: int,
    odds: bool,
) -> Tensor:
    """image_embeds [B, S, D], B lists of texts, longest list first -> scores [B, G], G the longest's."""
    memory = backbone.fusion_encoder.project_memory(image_embeds)  # keys and values once per image and layer
    counts = [len(ids) for ids in text_ids]
    widest = max(1, batch_size // len(counts))
    width = -(-counts[0] // -(-counts[0] // widest))  # equal columns instead of a thin last one
    rectangle = pad_sequence(text_ids, batch_first=True)  # [B, G]
    scores = torch.zeros(rectangle.shape, device=image_embeds.device)
    for start in range(0, counts[0], width):
        rows = sum(count > start for count in counts)  # images that still have texts
        part = rectangle[:rows, start : start + width]  # [rows, w]
        for row, count in enumerate(counts[:rows]):  # a shorter list is filled up with its longest text
            part[row, count - start :] = text_ids[row][-1]
        text_embeds, mask = texts.padded(part.reshape(-1))  # row r of the batch belongs to image r // w
        some = [(keys[:rows], values[:rows]) for keys, values in memory]
        fused = backbone.fuse(text_embeds, mask, some, keep=1)  # matching reads [CLS] alone
        logits = backbone.itm_logits(fused).float()  # [rows * w, 2]
        values = logits[:, 1] - logits[:, 0] if odds else logits[:, 1]
        scores[:rows, start : start + width] = values.view(part.shape)
    return scores
