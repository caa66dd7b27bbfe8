"""Convert a released ALBEF checkpoint into this project's layout, so that Retrieval.py can evaluate it.

    python -m tools.convert mscoco.pth output/albef/mscoco.pth
    python Retrieval.py --config configs/Retrieval_coco.yaml --output_dir output/albef/coco \
        --checkpoint output/albef/mscoco.pth --evaluate

For ALBEF.pth (4M or 14M images; 256 px) and its fine-tuned retrieval models mscoco.pth and flickr30k.pth (384 px):
a ViT-B/16 and a BERT-base whose layers 0 to 5 encode the text and 6 to 11 fuse it with the image. Momentum weights and
queues are left out. ALBEF has no decoder: captioning and question answering cannot start from it.

Compare with published numbers at the file's own resolution, which the last line names: for another one this project
resizes the positions with antialiasing, ALBEF without, and the two differ by some percent even from 256 to 384 px.
"""

import argparse
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from models.bert import BertConfig
from models.semmim import PREFIX, SemMIM
from models.weights import check_weights, read_weights
from semmim.files import CONVERTED
from utils import UserError, make_folder, new_file, run_main, save_checkpoint

TEXT_LAYERS = FUSION_LAYERS = 6  # of ALBEF's BERT; the latter have cross-attention
HEAD_WIDTH = 64  # of ViT-B and BERT-base, which no tensor's shape says
DROPPED = re.compile(  # what a converted checkpoint leaves out; the last is the tied output layer
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\.|(image|text|idx)_queue$|queue_ptr$|ptr_queue$|"
    r".*embeddings\.position_ids$|text_encoder\.cls\.predictions\.decoder\."
)
KNOWN = "known are ALBEF.pth, mscoco.pth and flickr30k.pth"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="ALBEF's file")
    parser.add_argument("target", help="file to write")
    args = parser.parse_args(argv)
    new_file(args.target, "target")
    weights = read_weights(args.source)
    make_folder(Path(args.target).parent)
    checkpoint = convert(weights, args.source)
    save_checkpoint(args.target, checkpoint)
    size, count = checkpoint["description"]["image_encoder"]["image_size"], len(checkpoint["model"])
    print(f"{args.target}: {count} tensors, {size} px; momentum weights and queues are left out")


def convert(weights: dict[str, Tensor], source: str) -> dict:
    """ALBEF's state dict -> the checkpoint that `load_backbone` reads. Raises UserError naming a weight that has no
    place, is missing or has an unexpected shape."""
    is_pretraining = any(key.startswith("text_encoder.bert.") for key in weights)
    prefixes = renamed("text_encoder.bert." if is_pretraining else "text_encoder.")
    state = {}
    for key, value in weights.items():
        if DROPPED.match(key):
            continue
        old = next((old for old in prefixes if key.startswith(old)), None)
        if old is None:
            raise UserError(f"{source}: unknown weight {key}; {KNOWN}")
        state[prefixes[old] + key.removeprefix(old)] = value.float()
    try:
        description = describe(state)
    except KeyError as error:
        raise UserError(f"{source}: {error.args[0]} is missing; {KNOWN}") from None
    # ALBEF masks no patches; the model has the token, evaluation never reads it
    state["image_encoder.mask_token"] = torch.zeros(description["image_encoder"]["args"]["embed_dim"])
    with torch.device("meta"):  # shapes alone
        own = SemMIM(description, decoder=False, mlm_head=is_pretraining).state_dict()
    check_weights(own, state, source, KNOWN)
    state["log_temperature"] = state["log_temperature"].log()
    model = {PREFIX + name: value for name, value in state.items()}
    return {"model": model, "description": description, "stage": CONVERTED}


def renamed(bert: str) -> dict[str, str]:
    """{how ALBEF's names begin: how this project's do}; bert: of its BERT, which fine-tuned models call otherwise."""
    names = {
        "visual_encoder.": "image_encoder.vit.",
        "text_encoder.cls.predictions.": "mlm_head.",
        f"{bert}embeddings.": "text_encoder.embeddings.",
        "vision_proj.": "vision_proj.",
        "text_proj.": "text_proj.",
        "itm_head.": "itm_head.",
        "temp": "log_temperature",
    }
    for i in range(TEXT_LAYERS):
        names[f"{bert}encoder.layer.{i}."] = f"text_encoder.encoder.layer.{i}."
    for i in range(FUSION_LAYERS):
        names[f"{bert}encoder.layer.{TEXT_LAYERS + i}."] = f"fusion_encoder.encoder.layer.{i}."
    return names


def describe(state: dict[str, Tensor]) -> dict:
    """The architecture, read off the shapes of the renamed weights (and the temperature, not yet a logarithm). Raises
    KeyError for one that is missing."""
    width, _, patch, _ = state["image_encoder.vit.patch_embed.proj.weight"].shape
    grid = round((state["image_encoder.vit.pos_embed"].shape[1] - 1) ** 0.5)
    blocks = [re.match(r"image_encoder\.vit\.blocks\.(\d+)\.", name) for name in state]
    vocab_size, hidden_size = state["text_encoder.embeddings.word_embeddings.weight"].shape
    bert = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // HEAD_WIDTH,
        intermediate_size=len(state["text_encoder.encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(state["text_encoder.embeddings.position_embeddings.weight"]),
        type_vocab_size=len(state["text_encoder.embeddings.token_type_embeddings.weight"]),
    )
    return {
        "image_encoder": {
            "name": "vit_base_patch16_224",  # patch bias, no norm before the layers, exact GELU, epsilon 1e-6
            "image_size": grid * patch,
            "args": {
                "embed_dim": width,
                "mlp_ratio": len(state["image_encoder.vit.blocks.0.mlp.fc1.weight"]) / width,
                "depth": len({found[1] for found in blocks if found}),
                "num_heads": width // HEAD_WIDTH,
                "patch_size": patch,
            },
        },
        "bert": asdict(bert),
        "text_layers": TEXT_LAYERS,
        "fusion_layers": FUSION_LAYERS,
        "decoder_layers": 0,
        "embed_dim": len(state["vision_proj.weight"]),
        "temperature": float(state["log_temperature"]),
        "sep": False,  # ALBEF's tokenizer ends no text with [SEP]
    }


if __name__ == "__main__":
    run_main(main)
