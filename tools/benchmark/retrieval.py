"""`tools/benchmark retrieval`: re-ranking as one batched job against the loop over queries of older codebases."""

import argparse
import time

import torch

import utils
from dataset.text import Tokenizer
from engine.distributed import init_distributed
from engine.window import PEAKS
from evaluation import ranking
from evaluation.sharded import eval_batches
from models.semmim import SemMIM, build_backbone, describe
from tools.benchmark.pretrain import model_arguments, random_config
from tools.demo import scenes

MAX_TOKENS = 30  # ALBEF pads every text of an evaluation to this length
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}  # scores farther apart are not the same computation
COCO = {"images": 5000, "texts": 25000, "k": 256, "tokens": 13}  # MSCOCO's 5K test; a caption's mean, with [CLS]
BASE = ("configs/Pretrain.yaml", ("model.image_encoder.image_size=384",))  # the model of COCO's figures: ViT-B/16
PEAK = {name: PEAKS[name][0] * 1e12 for name in ("A100", "H100")}  # FLOP/s in bf16
PATCH, IMAGE_LAYERS = 16, 12  # ViT-B/16
UTILISATION = (0.3, 0.4)  # assumed shares of the peak


def add_retrieval(commands) -> None:
    parser = commands.add_parser("retrieval", help="query-image pairs per second of re-ranking")
    model_arguments(parser, "configs/demo/Pretrain.yaml")
    parser.add_argument(
        "--images", type=int, default=600, help="images, with five captions each (default: %(default)s)"
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
    """Pairs per second of both on the same model, features and candidates, and how far their scores differ.

    Raises utils.UserError for counts below 1, RuntimeError where the scores differ: a ratio would then mean nothing.
    """
    for name in ("images", "k", "batch_size", "queries", "repeats"):
        if getattr(args, name) < 1:
            raise utils.UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    device = init_distributed(args.device)
    cfg = random_config(args.config, args.override)
    precision = utils.resolve_precision(cfg.train.precision, device)
    result = {
        "config": str(args.config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": precision,
    }
    result |= compare(cfg, args, device, precision)
    result["coco_5k"] = predict_coco()
    if device.type == "cuda":
        base = argparse.Namespace(**{**vars(args), "images": 200})
        speed = compare(random_config(*BASE), base, device, precision)["pairs_per_second"]
        minutes = round(result["coco_5k"]["pairs"] / speed / 60, 1)
        result["coco_5k"]["measured_here"] = {"pairs_per_second": speed, "minutes_of_reranking": minutes}
    return result


def compare(cfg, args: argparse.Namespace, device, precision: str) -> dict:
    """Our re-ranking of all queries and the loop over some of them, by turns, on a model of the config's size."""
    torch.manual_seed(0)
    backbone = build_backbone(cfg, decoder=False, mlm_head=False)[0].to(device).eval()
    images, texts, tr, ir = make_case(backbone, Tokenizer(cfg.text.vocab, cfg.text.sep), args, device, precision)
    queries = [("tr", i) for i in spread(len(tr.ids), args.queries // 6)]
    queries += [("ir", i) for i in spread(len(ir.ids), args.queries - args.queries // 6)]
    image_embeds = torch.cat([embeds for _, embeds in images.batches]).to(device)  # [N, S, D]
    longest = int(texts.lengths.max())

    def ours():
        found = ranking.rerank(backbone, images, texts, tr=tr, ir=ir, batch_size=args.batch_size, precision=precision)
        return torch.cat([found[direction == "ir"][i] for direction, i in queries])  # [pairs of the loop]

    def loop(length):
        padded = pad_texts(texts, length)  # once for all queries, so it is not timed with these few
        return lambda: rerank_by_query(backbone, image_embeds, *padded, tr, ir, queries, precision)

    sides = {"ours": ours, "loop": loop(max(MAX_TOKENS, longest)), "loop_longest": loop(longest)}
    seconds, cpu_seconds, scores = {name: [] for name in sides}, {name: [] for name in sides}, {}
    for _ in range(args.repeats):  # in turns, so that all meet the same load of the machine
        for name, function in sides.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            scores[name] = function()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
    difference = max(float((scores["ours"] - scores[name]).abs().max()) for name in ("loop", "loop_longest"))
    if not difference <= TOLERANCE[precision]:
        raise RuntimeError(f"the scores of re-ranking and of the loop differ by {difference:.2g}: no fair comparison")

    asked = tr.ids.numel() + ir.ids.numel()
    pairs = {name: asked if name == "ours" else len(scores["loop"]) for name in sides}
    speed = {name: pairs[name] / min(seconds[name]) for name in sides}
    cpu_speed = {name: pairs[name] / sum(cpu_seconds[name]) for name in sides}  # hardly moved by the machine's load
    rounds = [
        round(asked / mine / (len(scores["loop"]) / theirs), 2)
        for mine, theirs in zip(seconds["ours"], seconds["loop"], strict=True)
    ]
    return {
        "images": args.images,
        "texts": len(ir.ids),
        "tokens_mean_and_longest": [round(float(texts.lengths.float().mean()), 1), longest],
        "k": [tr.ids.shape[1], ir.ids.shape[1]],  # of text retrieval, of image retrieval
        "pairs": asked,
        "pairs_scored_once_for_both_directions": asked - distinct_pairs(tr, ir),
        "pairs_per_second": round(speed["ours"]),
        "pairs_per_second_by_query": round(speed["loop"]),  # texts padded to MAX_TOKENS
        "pairs_per_second_by_query_padded_to_longest": round(speed["loop_longest"]),
        "ratio": round(speed["ours"] / speed["loop"], 2),
        "ratio_of_each_round": rounds,
        "ratio_of_cpu_time": round(cpu_speed["ours"] / cpu_speed["loop"], 2) if device.type == "cpu" else None,
        "ratio_padded_to_longest": round(speed["ours"] / speed["loop_longest"], 2),
        "ratio_padded_to_longest_of_cpu_time": (
            round(cpu_speed["ours"] / cpu_speed["loop_longest"], 2) if device.type == "cpu" else None
        ),
        "largest_score_difference": float(f"{difference:.2g}"),
        "score_spread": round(float(scores["loop"].std()), 5),
    }


def distinct_pairs(tr: ranking.Candidates, ir: ranking.Candidates) -> int:
    """(image, text) pairs that either direction asks for, each counted once."""
    of_images = torch.arange(len(tr.ids))[:, None] * len(ir.ids) + tr.ids
    of_texts = ir.ids * len(ir.ids) + torch.arange(len(ir.ids))[:, None]
    return len(torch.cat([of_images.flatten(), of_texts.flatten()]).unique())


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
            scores.append(backbone.itm_logits(backbone.fuse(embeds, mask, memory))[:, 1].float())
    return torch.cat(scores).cpu()


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` (at least 1, at most `count`) numbers spread over 0..count-1."""
    wanted = min(max(wanted, 1), count)
    return [i * count // wanted for i in range(wanted)]


def predict_coco() -> dict:
    """Operations of MSCOCO's 5K test with the base model, and minutes on one GPU: a prediction, not a measurement."""
    flops = count_operations(**COCO)
    minutes = {
        f"{gpu} at {share:.0%}": {what: round(count / (share * peak) / 60, 2) for what, count in flops.items()}
        for gpu, peak in PEAK.items()
        for share in UTILISATION
    }
    return {
        **COCO,
        "model": " ".join((BASE[0], *BASE[1])),
        "pairs": COCO["k"] * (COCO["images"] + COCO["texts"]),
        "petaflop": {what: round(count / 1e15, 2) for what, count in flops.items()},
        "minutes_predicted_at_assumed_share_of_bf16_peak": minutes,
    }


def count_operations(images: int, texts: int, k: int, tokens: int) -> dict[str, int]:
    """Floating-point operations of the base model's matrix products, a multiplication and an addition each.

    tokens: of a text, where it is not padded. Ours is counted with every layer over all tokens of every pair asked for,
    which is a little too much: [CLS] alone goes through the last layer, and shared pairs are scored once.
    """
    model = describe(random_config(*BASE))
    width, inner = model["bert"]["hidden_size"], model["bert"]["intermediate_size"]
    patches = (model["image_encoder"]["image_size"] // PATCH) ** 2
    memory, pairs = 1 + patches, k * (images + texts)

    def layer(length: int) -> int:  # four projections and the feed-forward layers; the two products of attention
        return 2 * length * (4 * width**2 + 2 * width * inner) + 4 * length**2 * width

    def fusion(length: int) -> int:  # cross-attention has two projections of the text, and products with the image
        return model["fusion_layers"] * (layer(length) + 4 * length * width**2 + 4 * length * memory * width)

    project = model["fusion_layers"] * 4 * memory * width**2  # an image's keys and values
    return {
        "encoding": images * (IMAGE_LAYERS * layer(memory) + 6 * patches * PATCH**2 * width)
        + texts * model["text_layers"] * layer(tokens),
        "reranking": images * project + pairs * fusion(tokens),
        "reranking_by_query": pairs * (project + fusion(MAX_TOKENS)),
    }
