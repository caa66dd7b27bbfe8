"""Convert a released ALBEF checkpoint into this project's layout, so that Retrieval.py can evaluate it.

    python tools/convert_checkpoint.py mscoco.pth output/albef/mscoco.pth
    python Retrieval.py --config configs/Retrieval_coco.yaml --output_dir output/albef/coco \
        --checkpoint output/albef/mscoco.pth --evaluate

For ALBEF.pth (4M or 14M pictures; 256 px) and its fine-tuned retrieval models mscoco.pth and flickr30k.pth (384 px):
a ViT-B/16 and a BERT-base whose layers 0 to 5 encode the text and 6 to 11 fuse it with the image. Momentum weights and
queues are left out. ALBEF has no decoder: captioning and question answering cannot start from it.
"""

import argparse
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.bert import BertConfig  # noqa: E402
from models.semmim import PREFIX, SemMIM, load_weights  # noqa: E402
from models.weights import read_weights  # noqa: E402
from utils import UserError, run_main, save_checkpoint  # noqa: E402

TEXT_LAYERS = 6  # of ALBEF's BERT; the others, with cross-attention, fuse
HEAD_WIDTH = 64  # of ViT-B and BERT-base, which no tensor's shape tells
DROPPED = {  # what a converted checkpoint leaves out: pattern -> its name in the message
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\.": "momentum weights",
    r"(image|text|idx)_queue$|queue_ptr$|ptr_queue$": "queues",
    r".*embeddings\.position_ids$": "position ids",
    r"text_encoder\.cls\.predictions\.decoder\.": "the tied output layer",
}
RENAMED = [  # tried in order; the first pattern that matches names the weight
    (r"visual_encoder\.", "image_encoder.vit."),
    (r"text_encoder\.(bert\.)?embeddings\.", "text_encoder.embeddings."),
    (r"text_encoder\.cls\.predictions\.", "mlm_head."),
    (r"(vision_proj|text_proj|itm_head)\.", r"\1."),
]
LAYER = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.(.*)")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="ALBEF's file")
    parser.add_argument("target", help="file to write")
    args = parser.parse_args(argv)
    checkpoint, dropped = convert(read_weights(args.source), args.source)
    Path(args.target).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(args.target, checkpoint)
    size = checkpoint["description"]["image_encoder"]["image_size"]
    left_out = ", ".join(f"{name} ({count})" for name, count in dropped.items()) or "nothing"
    print(f"{args.target}: {len(checkpoint['model'])} tensors, {size} px; left out: {left_out}")


def convert(weights: dict[str, Tensor], source: str) -> tuple[dict, dict[str, int]]:
    """ALBEF's state dict -> (checkpoint that `load_backbone` reads, {what was left out: number of tensors}).

    Raises UserError naming a weight that has no place, is missing or has an unexpected shape.
    """
    state, dropped = {}, {}
    for key, value in weights.items():
        kind = next((name for pattern, name in DROPPED.items() if re.match(pattern, key)), None)
        if kind is None:
            state[new_name(key, source)] = value.float()
        else:
            dropped[kind] = dropped.get(kind, 0) + 1
    if "temp" not in weights or "image_encoder.vit.pos_embed" not in state:
        raise UserError(
            f"{source}: no ALBEF checkpoint (no temp or visual_encoder.pos_embed); give ALBEF.pth or the like"
        )
    state["log_temperature"] = state["log_temperature"].log()
    # ALBEF masks no patches; the model has the token, evaluation never reads it
    state["image_encoder.mask_token"] = torch.zeros(state["image_encoder.vit.cls_token"].shape[-1])
    description = describe(state)
    backbone = SemMIM(description, decoder=False, mlm_head="mlm_head.bias" in state)
    if unknown := load_weights(backbone, state, source):
        left = next(key for key in state if key.split(".")[0] in unknown and key not in backbone.state_dict())
        raise UserError(f"{source}: {left} has no place in the model; this is no ALBEF checkpoint of a known kind")
    model = {PREFIX + key: value for key, value in state.items()}
    return {"model": model, "description": description, "stage": "converted from ALBEF"}, dropped


def new_name(key: str, source: str) -> str:
    """The name of ALBEF's weight `key` in this project's backbone."""
    if key == "temp":
        return "log_temperature"
    if found := LAYER.match(key):
        number = int(found[1])
        if number < TEXT_LAYERS:
            return f"text_encoder.encoder.layer.{number}.{found[2]}"
        return f"fusion_encoder.encoder.layer.{number - TEXT_LAYERS}.{found[2]}"
    for pattern, name in RENAMED:
        if re.match(pattern, key):
            return re.sub(pattern, name, key, count=1)
    raise UserError(f"{source}: unknown weight {key}; known are ALBEF.pth, mscoco.pth and flickr30k.pth")


def describe(state: dict[str, Tensor]) -> dict:
    """The architecture, read off the shapes of the renamed weights."""

    def depth(prefix: str) -> int:
        return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))

    width, _, patch, _ = state["image_encoder.vit.patch_embed.proj.weight"].shape
    grid = round((state["image_encoder.vit.pos_embed"].shape[1] - 1) ** 0.5)
    vocab_size, hidden_size = state["text_encoder.embeddings.word_embeddings.weight"].shape
    bert = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // HEAD_WIDTH,
        intermediate_size=state["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=len(state["text_encoder.embeddings.position_embeddings.weight"]),
        type_vocab_size=len(state["text_encoder.embeddings.token_type_embeddings.weight"]),
    )
    return {
        "image_encoder": {
            "name": "vit_base_patch16_224",  # patch bias, no norm before the layers, exact GELU, epsilon 1e-6
            "image_size": grid * patch,
            "args": {
                "embed_dim": width,
                "depth": depth("image_encoder.vit.blocks."),
                "num_heads": width // HEAD_WIDTH,
                "patch_size": patch,
                "mlp_ratio": state["image_encoder.vit.blocks.0.mlp.fc1.weight"].shape[0] / width,
            },
        },
        "bert": asdict(bert),
        "text_layers": TEXT_LAYERS,
        "fusion_layers": depth("fusion_encoder.encoder.layer."),
        "decoder_layers": 0,
        "embed_dim": len(state["vision_proj.weight"]),
        "temperature": float(state["log_temperature"].exp()),
        "sep": False,  # ALBEF's tokenizer ends no text with [SEP]
    }


if __name__ == "__main__":
    run_main(main)
