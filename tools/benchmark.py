"""What the model costs, as JSON on standard output.

    python tools/benchmark.py params --config configs/Pretrain.yaml
    python tools/benchmark.py pretrain --compare train.compile=false train.compile=true
    python tools/benchmark.py memory
    python tools/benchmark.py all --folder output/benchmark
    python tools/benchmark.py caption --config configs/Pretrain.yaml --override model.image_encoder.image_size=384
    python tools/benchmark.py retrieval
    python tools/benchmark.py sharing
    python tools/benchmark.py entries
    python tools/benchmark.py loader

params: trainable parameters of the pre-training model per module and in total. The model is built without
memory for its weights (torch's meta device): it takes seconds, fits any machine and downloads no weights.

pretrain: pairs per second of whole pre-training steps on noise with captions of real lengths, operations per pair, the
share of the peak that is reached (MFU), peak memory; `--compare A B` alternates two settings in one process. And what
follows for 1, 8 and 64 GPUs at an assumed share of their peak; `--rounds 0` tells that alone.

memory: GiB of states and activations at the configuration's batch size, with and without checkpointing, counted without
any memory or time; on a GPU the measured peak beside it.

all: every benchmark at base size, each in a process of its own, into one JSON file: what to run once on a new machine.

caption: captions per second of beam search (the decoder's part, given the image's tokens) beside transformers'
`generate` on equal weights; steps per second of self-critical training and the share of the reward. Random weights.

retrieval: (image, text) pairs per second of re-ranking, as one batched job, beside the loop over queries (ALBEF's way,
every text padded to 30 tokens) on equal weights and candidates, whose scores must agree; the time predicted for
MSCOCO's 5K test with ViT-B/16 at 384 px on one GPU (and measured where there is one).

sharing: seconds of a pre-training step's forward and backward pass beside the same step whose fusion rows each project
keys and values of their own copy of the image; loss and gradients must agree. Random weights, no dropout.

entries: memory and CPU time of a process that loads 5.1M captions made for the purpose (0.6 GB, on disk), without and
with the index that the first one makes of them.

loader: milliseconds of CPU time per pair of the pre-training loader on JPEG images made for the purpose, beside the
same with Pillow's resize, and with views that are normalised and stacked as float32 in the worker, too.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from dataset.text import Tokenizer  # noqa: E402
from models.pretrain import build_pretrain_model  # noqa: E402
from tools.benchmark_all import add_all  # noqa: E402
from tools.benchmark_caption import add_caption  # noqa: E402
from tools.benchmark_entries import add_entries  # noqa: E402
from tools.benchmark_loader import add_loader  # noqa: E402
from tools.benchmark_memory import add_memory  # noqa: E402
from tools.benchmark_pretrain import add_pretrain, random_config  # noqa: E402
from tools.benchmark_retrieval import add_retrieval  # noqa: E402
from tools.benchmark_sharing import add_sharing  # noqa: E402


def parse(argv=None) -> argparse.Namespace:
    """The arguments, with the function `run` of their benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    params = commands.add_parser("params", help="trainable parameters per module and in total")
    params.add_argument("--config", default="configs/Pretrain.yaml", help="pre-training YAML (default: %(default)s)")
    params.add_argument("--override", nargs="*", action="extend", default=[], metavar="KEY.SUB=VALUE")
    params.set_defaults(run=run_params)
    add_pretrain(commands)
    add_memory(commands)
    add_caption(commands)
    add_retrieval(commands)
    add_sharing(commands)
    add_entries(commands)
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
