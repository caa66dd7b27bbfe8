"""What the model costs, as JSON on standard output.

    python -m tools.benchmark params --config configs/Pretrain.yaml
    python -m tools.benchmark pretrain --compare train.compile=false train.compile=true
    python -m tools.benchmark all --folder output/benchmark
    python -m tools.benchmark caption --config configs/Pretrain.yaml --override model.image_encoder.image_size=384
    python -m tools.benchmark retrieval
    python -m tools.benchmark loader

params: trainable parameters of the pre-training model per module and in total. The model is built without
memory for its weights (torch's meta device): it takes seconds, fits any machine and downloads no weights.

pretrain: pairs per second of whole pre-training steps on noise with captions of real lengths, operations per pair, the
share of the peak that is reached (MFU), peak memory; `--compare A B` alternates two settings in one process. And what
follows for 1, 8 and 64 GPUs at an assumed share of their peak; `--rounds 0` tells that alone.

all: every benchmark at base size, each in a process of its own, into one JSON file: what to run once on a new machine.

caption: captions per second of beam search (the decoder's part, given the image's tokens) beside transformers'
`generate` on equal weights; steps per second of self-critical training and the share of the reward. Random weights.

retrieval: (image, text) pairs per second of re-ranking, as one batched job, beside the loop over queries (ALBEF's way,
every text padded to 30 tokens) on equal weights and candidates, whose scores must agree; the time predicted for
MSCOCO's 5K test with ViT-B/16 at 384 px on one GPU (and measured where there is one).

loader: milliseconds of CPU time per pair of the pre-training loader on JPEG images made for the purpose, beside the
same with Pillow's resize, and with views that are normalised and stacked as float32 in the worker, too.
"""

import argparse
import json
import logging
import sys

import torch

import utils
from dataset.text import Tokenizer
from models.pretrain import build_pretrain_model
from tools.benchmark.all import add_all
from tools.benchmark.caption import add_caption
from tools.benchmark.loader import add_loader
from tools.benchmark.pretrain import add_pretrain, random_config
from tools.benchmark.retrieval import add_retrieval


def parse(argv=None) -> argparse.Namespace:
    """The arguments, with the function `run` of their benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    params = commands.add_parser("params", help="trainable parameters per module and in total")
    params.add_argument("--config", default="configs/Pretrain.yaml", help="pre-training YAML (default: %(default)s)")
    params.add_argument("--override", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE")
    params.set_defaults(run=run_params)
    add_pretrain(commands)
    add_caption(commands)
    add_retrieval(commands)
    add_loader(commands)
    add_all(commands)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    logging.basicConfig(stream=sys.stderr)  # standard output holds nothing but the JSON
    print(json.dumps(args.run(args), indent=2))


def run_params(args: argparse.Namespace) -> dict:
    cfg = random_config(args.config, args.override)
    tokenizer = Tokenizer(utils.find_file(cfg.text.vocab, "text.vocab"), cfg.text.sep)
    with torch.device("meta"):
        model, _ = build_pretrain_model(cfg, tokenizer)
    return {"config": str(args.config), "trainable_parameters": count_parameters(model)}


# The backbone's parts that are counted by themselves; its other parameters are the heads of ITC, ITM and MLM.
ENCODERS = ("image_encoder", "text_encoder", "fusion_encoder", "decoder")


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Trainable parameters of a PretrainModel by module; a tied tensor counts once, where it is first."""
    counts = dict.fromkeys((*ENCODERS, "heads", "encoding_head"), 0)
    for name, parameter in model.named_parameters():  # yields a shared tensor once
        if parameter.requires_grad:
            owner, _, rest = name.partition(".")
            part = rest.partition(".")[0] if owner == "backbone" else "encoding_head"
            counts[part if part in counts else "heads"] += parameter.numel()
    counts["total"] = sum(counts.values())
    return counts


if __name__ == "__main__":
    utils.run_main(main)
