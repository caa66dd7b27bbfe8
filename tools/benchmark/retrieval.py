"""`tools.benchmark retrieval`: re-ranking as one batched job against the loop over queries of older codebases."""

import argparse

import torch
import torch.nn.functional as F

from evaluation import ranking
from evaluation.sharded import eval_batches
from models.semmim import build_backbone
from tools.benchmark.model import by_turns, random_config, tokenizer_of
from tools.benchmark.roofline import predict_call
from tools.demo import scenes
from utils import autocast, resolve_precision

CANDIDATES, TOGETHER = 64, 512  # of a query; pairs of one forward of ours
MAX_TOKENS = 30  # ALBEF pads every text of an evaluation to this length
QUERIES = 120  # that the loop is timed on
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}  # scores farther apart are not the same computation


@torch.no_grad()
def run_retrieval(args: argparse.Namespace, device: torch.device) -> dict:
    """Pairs per second of both by turns, on the same model, features and candidates; the loop over some queries only.
    The images are noise, the texts the captions of the demo's scenes.

    Raises RuntimeError if their scores differ: a ratio would then mean nothing.
    """
    cfg, count = random_config(args.config, args.override), args.images
    precision = resolve_precision(cfg.train.precision, device)
    torch.manual_seed(0)
    backbone = build_backbone(cfg, decoder=False, mlm_head=False)[0].to(device).eval()
    captions = [text for i in range(count) for text in scenes.captions(scenes.make_scene(0, i))]
    size, image_ids = backbone.image_encoder.image_size, torch.arange(count)
    batches = [(torch.randn(len(rows), 3, size, size), torch.tensor(rows)) for rows in eval_batches(count, 64)]
    encoded, on = tokenizer_of(cfg).encode(captions, MAX_TOKENS), {"device": device, "precision": precision}
    images, texts = ranking.extract_features(backbone, batches, count, *encoded, **on)
    image_of_text = image_ids.repeat_interleave(len(captions) // count)
    tr = ranking.topk_candidates(images.feats, texts.feats, image_ids, image_of_text, CANDIDATES)
    ir = ranking.topk_candidates(texts.feats, images.feats, image_of_text, image_ids, min(CANDIDATES, count))

    image_embeds = torch.cat([embeds for _, embeds in images.batches]).to(device)  # [N, S, D]
    embeds, mask = texts.padded(torch.arange(len(captions)))  # [T, L, D], [T, L]: once, not timed
    missing = MAX_TOKENS - mask.shape[1]
    embeds, mask = F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))
    step = -(-(count + len(captions)) // QUERIES)
    queries = [(torch.full_like(ids, i), ids) for i, ids in enumerate(tr.ids)][::step]  # (images [k], texts [k])
    queries += [(ids, torch.full_like(ids, i)) for i, ids in enumerate(ir.ids)][::step]
    scores: dict[str, torch.Tensor] = {}

    def ours() -> None:
        found = ranking.rerank(backbone, images, texts, tr, ir, batch_size=TOGETHER, precision=precision)
        scores["ours"] = torch.cat([part[::step].flatten() for part in found])

    def loop() -> None:
        """ALBEF's way: one forward of all layers a query, whose rows have their own copy of the image's tokens."""
        found = []
        for image, text in queries:
            image, text = image.to(device), text.to(device)
            with autocast(device, precision):
                memory = backbone.fusion_encoder.project_memory(image_embeds[image])
                hidden = backbone.fusion_encoder(embeds[text], mask[text], memory)
                found.append(backbone.itm_logits(hidden)[:, 1].float())
        scores["loop"] = torch.cat(found).cpu()

    times = by_turns({"ours": ours, "loop": loop}, args.repeats, device)
    difference = float((scores["ours"] - scores["loop"]).abs().max())
    if not difference <= TOLERANCE[precision]:
        raise RuntimeError(f"the scores of re-ranking and of the loop differ by {difference:.2g}: no fair comparison")
    pairs = {"ours": tr.ids.numel() + ir.ids.numel(), "loop": len(scores["loop"])}
    speed, cpu_speed = ({side: pairs[side] / times[side][clock] for side in pairs} for clock in (0, 1))
    return {
        "precision": precision,
        "pairs": pairs["ours"],
        "pairs_per_second": round(speed["ours"]),
        "pairs_per_second_by_query": round(speed["loop"]),
        "predicted": predict_call(ours, pairs["ours"], device),
        "ratio": round(speed["ours"] / speed["loop"], 2),
        "ratio_of_cpu_time": round(cpu_speed["ours"] / cpu_speed["loop"], 2),
        "largest_score_difference": float(f"{difference:.2g}"),
        "score_spread": round(float(scores["loop"].std()), 5),
    }
