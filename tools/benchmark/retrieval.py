"""`tools.benchmark retrieval`: re-ranking as one batched job against the loop over queries of older codebases."""

from __future__ import annotations

import argparse

import torch

import utils
from dataset.text import Tokenizer
from evaluation import ranking
from evaluation.sharded import eval_batches
from models.semmim import SemMIM, build_backbone
from tools.benchmark.model import by_turns, machine, random_config, tokenizer_of
from tools.benchmark.roofline import per_second
from tools.demo import scenes

MAX_TOKENS = 30  # ALBEF pads every text of an evaluation to this length
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}  # scores farther apart are not the same computation


@torch.random.fork_rng()
def run_retrieval(args: argparse.Namespace) -> dict:
    """Pairs per second of both by turns, on the same model, features and candidates; the loop over some queries only.

    Raises RuntimeError if their scores differ: a ratio would then mean nothing.
    """
    device = torch.device(utils.choose_device(args.device))
    cfg = random_config(args.config, args.override)
    precision = utils.resolve_precision(cfg.train.precision, device)
    torch.manual_seed(0)
    backbone = build_backbone(cfg, decoder=False, mlm_head=False)[0].to(device).eval()
    images, texts, tr, ir = make_case(backbone, tokenizer_of(cfg), args, device, precision)
    queries = [("tr", i) for i in spread(len(tr.ids), args.queries // 6)]
    queries += [("ir", i) for i in spread(len(ir.ids), args.queries - args.queries // 6)]
    image_embeds = torch.cat([embeds for _, embeds in images.batches]).to(device)  # [N, S, D]
    padded = pad_texts(texts, max(MAX_TOKENS, int(texts.lengths.max())))  # once for all queries: not timed with these
    scores: dict[str, torch.Tensor] = {}

    def ours() -> None:
        found = ranking.rerank(backbone, images, texts, tr=tr, ir=ir, batch_size=args.batch_size, precision=precision)
        scores["ours"] = torch.cat([found[direction == "ir"][i] for direction, i in queries])  # [pairs of the loop]

    def loop() -> None:
        scores["loop"] = rerank_by_query(backbone, image_embeds, *padded, tr, ir, queries, precision)

    times = by_turns({"ours": ours, "loop": loop}, args.repeats, device)
    difference = float((scores["ours"] - scores["loop"]).abs().max())
    if not difference <= TOLERANCE[precision]:
        raise RuntimeError(f"the scores of re-ranking and of the loop differ by {difference:.2g}: no fair comparison")
    pairs = {"ours": tr.ids.numel() + ir.ids.numel(), "loop": len(scores["loop"])}
    speed, cpu_speed = ({side: pairs[side] / times[side][clock] for side in pairs} for clock in (0, 1))
    return {
        "config": args.config,
        "machine": machine(device),
        "precision": precision,
        "images": args.images,
        "texts": len(ir.ids),
        "k": [tr.ids.shape[1], ir.ids.shape[1]],  # of text retrieval, of image retrieval
        "pairs": pairs["ours"],
        "pairs_per_second": round(speed["ours"]),
        "pairs_per_second_by_query": round(speed["loop"]),
        "predicted": per_second(ours, pairs["ours"], device),
        "ratio": round(speed["ours"] / speed["loop"], 2),
        "ratio_of_cpu_time": round(cpu_speed["ours"] / cpu_speed["loop"], 2) if device.type == "cpu" else None,
        "largest_score_difference": float(f"{difference:.2g}"),
        "score_spread": round(float(scores["loop"].std()), 5),
    }


def make_case(backbone: SemMIM, tokenizer: Tokenizer, args: argparse.Namespace, device, precision: str):
    """(images, texts, tr, ir) of `ranking`: images of noise, captions of the demo scenes."""
    texts = [text for i in range(args.images) for text in scenes.captions(scenes.make_scene(0, i))]
    input_ids, attention_mask = tokenizer.encode(texts, MAX_TOKENS)
    size = backbone.image_encoder.image_size
    batches = [(torch.randn(len(rows), 3, size, size), torch.tensor(rows)) for rows in eval_batches(args.images, 64)]
    images, texts = ranking.extract_features(
        backbone, batches, args.images, input_ids, attention_mask, device=device, precision=precision
    )
    image_ids = torch.arange(args.images)
    image_of_text = image_ids.repeat_interleave(len(texts.lengths) // args.images)
    tr = ranking.topk_candidates(images.feats, texts.feats, image_ids, image_of_text, args.k)
    k = min(args.k, args.images)
    return images, texts, tr, ranking.topk_candidates(texts.feats, images.feats, image_of_text, image_ids, k)


def pad_texts(texts: ranking.TextFeatures, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All texts as the loop keeps them: (text_embeds [T, length, D], attention_mask [T, length])."""
    embeds, mask = texts.padded(torch.arange(len(texts.lengths)))
    missing = length - mask.shape[1]
    pad = torch.nn.functional.pad
    return pad(embeds, (0, 0, 0, missing)), pad(mask, (0, missing))


@torch.no_grad()
def rerank_by_query(
    backbone: SemMIM, image_embeds, text_embeds, text_mask, tr, ir, queries: list, precision: str
) -> torch.Tensor:
    """ALBEF's way: one forward a query, whose k rows carry their own copy of the image's tokens, all layers in full.

    image_embeds: [N, S, D]; text_embeds, text_mask: [T, L, D], [T, L]; queries: ("tr" or "ir", number of the query).
    -> scores of all their candidates, query after query, float32 on the CPU
    """
    device, scores = image_embeds.device, []
    for direction, query in queries:
        candidates = (tr if direction == "tr" else ir).ids[query].to(device)
        if direction == "tr":
            embeds, mask = text_embeds[candidates], text_mask[candidates]
            image = image_embeds[query].expand(len(candidates), -1, -1)
        else:
            embeds, mask = (x[query].expand(len(candidates), *x.shape[1:]) for x in (text_embeds, text_mask))
            image = image_embeds[candidates]
        with utils.autocast(device, precision):
            memory = backbone.fusion_encoder.project_memory(image)  # keys and values of every row
            scores.append(backbone.itm_logits(backbone.fusion_encoder(embeds, mask, memory))[:, 1].float())
    return torch.cat(scores).cpu()


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` (at least 1, at most `count`) numbers spread over 0..count-1."""
    wanted = min(max(wanted, 1), count)
    return [i * count // wanted for i in range(wanted)]
