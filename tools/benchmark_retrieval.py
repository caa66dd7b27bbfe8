"""`tools/benchmark.py retrieval`: re-ranking as one batched job against the loop over queries of older codebases."""

import argparse
import time

import torch

import utils
from dataset import scenes
from dataset.text import Tokenizer
from models import ranking
from models.semmim import SemMIM, build_backbone, describe

MAX_TOKENS = 30  # ALBEF pads every text of an evaluation to this length
COCO = {
    "images": 5000,
    "texts": 25000,
    "k": 256,
    "tokens": 13,
    "image_size": 384,
}  # tokens: a caption's mean, with [CLS]
PEAK = {"A100": 312e12, "H100": 989e12}  # dense bf16 FLOP/s (NVIDIA's data sheets)
UTILISATION = 0.3  # assumed share of the peak


def add_retrieval(commands) -> None:
    parser = commands.add_parser("retrieval", help="query-image pairs per second of re-ranking")
    parser.add_argument(
        "--config", default="configs/demo/Pretrain.yaml", help="pre-training YAML (default: %(default)s)"
    )
    parser.add_argument("--override", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--images", type=int, default=600, help="pictures, with five captions each (default: %(default)s)"
    )
    parser.add_argument("--k", type=int, default=64, help="candidates of a query (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=512, help="pairs of one forward of ours (default: %(default)s)"
    )
    parser.add_argument(
        "--queries", type=int, default=120, help="queries that the loop is timed on (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each; the fastest counts (default: %(default)s)"
    )
    parser.set_defaults(run=run_retrieval)


@torch.random.fork_rng()
def run_retrieval(args: argparse.Namespace) -> dict:
    """Pairs per second of both on the same model, features and candidates, and how far their scores differ."""
    device = utils.init_distributed(args.device)
    overrides = [*args.override, "model.image_encoder.weights=random", "model.bert.weights=random"]
    cfg = utils.load_config(args.config, overrides, schema="configs/Pretrain.yaml", optional=("mim.inject_from",))
    tokenizer = Tokenizer(cfg.text.vocab, cfg.text.sep)
    precision = utils.resolve_precision("auto", device)
    torch.manual_seed(0)
    backbone = build_backbone(cfg, decoder=False, mlm_head=False)[0].to(device).eval()
    images, texts, tr, ir = make_case(backbone, tokenizer, args, device, precision)
    queries = [("tr", i) for i in spread(len(tr.ids), args.queries // 6)]
    queries += [("ir", i) for i in spread(len(ir.ids), args.queries - args.queries // 6)]

    seconds, scores = {}, {}
    for _ in range(args.repeats):  # in turns, so that both meet the same load of the machine
        for name, function, arguments in (
            ("ours", ranking.rerank, {"tr": tr, "ir": ir, "batch_size": args.batch_size, "precision": precision}),
            ("loop", rerank_by_query, {"tr": tr, "ir": ir, "queries": queries, "precision": precision}),
        ):
            start = time.perf_counter()
            scores[name] = function(backbone, images, texts, **arguments)
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    tr_scores, ir_scores = scores["ours"]
    mine = [(tr_scores if direction == "tr" else ir_scores)[i] for direction, i in queries]
    pairs = {"ours": tr.ids.numel() + ir.ids.numel(), "loop": len(queries) * tr.ids.shape[1]}
    speed = {name: pairs[name] / seconds[name] for name in seconds}
    return {
        "config": str(args.config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": precision,
        "images": args.images,
        "texts": len(ir.ids),
        "k": tr.ids.shape[1],
        "pairs_per_second": round(speed["ours"]),
        "pairs_per_second_by_query": round(speed["loop"]),
        "ratio": round(speed["ours"] / speed["loop"], 2),
        "largest_score_difference": round(float((torch.stack(mine) - scores["loop"]).abs().max()), 5),
        "score_spread": round(float(scores["loop"].std()), 5),
        "coco_5k": predict_coco(cfg, speed["ours"] if device.type == "cuda" else None),
    }


def make_case(backbone: SemMIM, tokenizer: Tokenizer, args: argparse.Namespace, device, precision: str):
    """(images, texts, tr, ir) of `ranking`: pictures of noise, captions of the demo scenes."""
    texts = [text for i in range(args.images) for text in scenes.captions(scenes.make_scene(0, i))]
    input_ids, attention_mask = tokenizer.encode(texts, MAX_TOKENS)
    size = backbone.image_encoder.image_size
    batches = [
        (torch.randn(len(rows), 3, size, size), torch.tensor(rows)) for rows in utils.eval_batches(args.images, 64)
    ]
    images, texts = ranking.extract_features(
        backbone, batches, args.images, input_ids, attention_mask, device=device, precision=precision
    )
    image_ids = torch.arange(args.images)
    image_of_text = image_ids.repeat_interleave(len(texts.lengths) // args.images)
    tr = ranking.topk_candidates(images.feats, texts.feats, image_ids, image_of_text, args.k)
    k = min(args.k, args.images)
    return images, texts, tr, ranking.topk_candidates(texts.feats, images.feats, image_of_text, image_ids, k)


@torch.no_grad()
def rerank_by_query(backbone: SemMIM, images, texts, tr, ir, queries: list, precision: str) -> torch.Tensor:
    """ALBEF's way: one forward a query, whose k rows carry their own copy of the image's tokens; texts of MAX_TOKENS.

    queries: ("tr" or "ir", number of the query). -> scores [queries, k]
    """
    device = texts.tokens.device
    image_embeds = torch.cat([embeds for _, embeds in images.batches]).to(device)  # [N, S, D]
    everything, mask = texts.padded(torch.arange(len(texts.lengths)))
    missing = MAX_TOKENS - mask.shape[1]
    everything = torch.nn.functional.pad(everything, (0, 0, 0, missing))  # [T, MAX_TOKENS, D]
    mask = torch.nn.functional.pad(mask, (0, missing))
    scores = []
    for direction, query in queries:
        if direction == "tr":
            rows = tr.ids[query].to(device)
            text_embeds, text_mask = everything[rows], mask[rows]
            image = image_embeds[query].expand(len(rows), -1, -1)
        else:
            candidates = ir.ids[query].to(device)
            text_embeds, text_mask = (x[query].expand(len(candidates), *x.shape[1:]) for x in (everything, mask))
            image = image_embeds[candidates]
        with utils.autocast(device, precision):
            memory = backbone.fusion_encoder.project_memory(image)  # keys and values of every row
            fused = backbone.fuse(text_embeds, text_mask, memory)
            scores.append(backbone.itm_logits(fused)[:, 1].float())
    return torch.stack(scores).cpu()


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` (at least 1, at most `count`) numbers spread over 0..count-1."""
    wanted = min(max(wanted, 1), count)
    return [i * count // wanted for i in range(wanted)]


def predict_coco(cfg, pairs_per_second: float | None) -> dict:
    """Minutes of re-ranking COCO 5K on one GPU: from the speed measured on this GPU, else from counted operations.

    The operations are those of the configuration's fusion encoder at 384 px, every layer over all tokens; a measured
    speed means something only where the configuration is of that size too.
    """
    pairs = COCO["k"] * (COCO["images"] + COCO["texts"])
    if pairs_per_second is not None:
        return {"pairs": pairs, "minutes_at_the_measured_speed": round(pairs / pairs_per_second / 60, 1)}
    model = describe(cfg)
    width, inner = model["bert"]["hidden_size"], model["bert"]["intermediate_size"]
    patch = model["image_encoder"]["args"].get("patch_size", 16)
    tokens, memory = COCO["tokens"], 1 + (COCO["image_size"] // patch) ** 2
    # a multiplication and an addition each; of self-attention 4 projections, of cross-attention 2 (the image's keys and
    # values are projected once an image), the feed-forward layers, and both attentions' two products
    pair = 2 * tokens * (6 * width**2 + 2 * width * inner) + 4 * tokens * (tokens + memory) * width
    flops = model["fusion_layers"] * (pairs * pair + COCO["images"] * 4 * memory * width**2)
    return {
        "pairs": pairs,
        "petaflop": round(flops / 1e15, 2),
        "utilisation_assumed": UTILISATION,
        "minutes_predicted": {gpu: round(flops / (UTILISATION * peak) / 60, 2) for gpu, peak in PEAK.items()},
    }
