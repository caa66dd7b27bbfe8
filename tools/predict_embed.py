"""`tools/predict.py embed`: the features of images and sentences as one file."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

import utils
from dataset.reading import find_images
from tools.predict_files import add_common, check_output, image_batches, load, printable, read_lines

FILES = (".npz", ".safetensors")


def add_embed(commands) -> None:
    parser = commands.add_parser("embed", help="write features of images and sentences")
    parser.add_argument("images", nargs="*", help="image files and folders")
    add_common(
        parser,
        "of any stage (those of Retrieval.py and Pretrain.py have learned features)",
        "file to write, .npz (arrays image_features, images, text_features, texts) or .safetensors (the names are in "
        "its metadata, as JSON)",
    )
    parser.add_argument("--text", action="append", default=[], help="a sentence; may be given several times")
    parser.add_argument("--texts", help="file with a sentence a line")
    parser.set_defaults(run=embed)


def embed(args: argparse.Namespace) -> None:
    """Write [N, E] float32 features, L2-normalized: products are cosines."""
    output = check_output(args.output, FILES)
    if output is None:
        raise utils.UserError("--output is missing: name a file that ends in .npz or .safetensors")
    texts, paths = [*args.text, *read_lines("--texts", args.texts)], find_images(args.images)
    if not texts and not paths:
        raise utils.UserError("nothing to embed: give images, --text SENTENCE or --texts FILE")
    model = load(args)
    features, names = {}, {}
    if paths:
        found, names["images"] = [], []
        for images, usable in image_batches(model, paths, "encoding"):
            found.append(model.encode_image(images))
            names["images"] += map(printable, usable)
        features["image_features"] = torch.cat(found).numpy()
    if texts:
        features["text_features"], names["texts"] = model.encode_text(texts).numpy(), texts
    write_features(output, features, names)
    print(f"wrote {output}: " + ", ".join(f"{key} {list(value.shape)}" for key, value in features.items()))


def write_features(path: Path, features: dict[str, np.ndarray], names: dict[str, list[str]]) -> None:
    """Arrays and what their rows are; no pickle, so that any program may read them."""
    with utils.replacing(path) as temporary:
        if path.suffix.lower() == ".safetensors":
            save_file(features, temporary, metadata={key: json.dumps(value) for key, value in names.items()})
        else:
            with open(temporary, "wb") as file:  # given a name, NumPy would add an extension
                np.savez(file, **features, **{key: np.array(value, dtype=str) for key, value in names.items()})
