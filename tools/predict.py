"""Try a checkpoint on images of one's own.

    python tools/predict.py caption IMAGE... --checkpoint output/caption/checkpoint_best.pth
    python tools/predict.py vqa IMAGE "what is it catching?" --checkpoint output/vqa/checkpoint_best.pth \
        --objects "dog&&frisbee" --ocr "stop"
    python tools/predict.py retrieve FOLDER --text "a red bus" --output sheet.html \
        --checkpoint output/retrieval/checkpoint_best.pth
    python tools/predict.py retrieve IMAGE --texts sentences.txt --checkpoint output/retrieval/checkpoint_best.pth
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.annotations import check_question, split_labels  # noqa: E402
from dataset.caption import prompt_text  # noqa: E402
from dataset.text import checkpoint_tokenizer  # noqa: E402
from dataset.transforms import ImageError, open_image, test_transform  # noqa: E402
from dataset.vqa import encode_questions, question_limits, question_parts  # noqa: E402
from engine.config import CAPTION, VQA, checkpoint_config  # noqa: E402
from models.caption import CaptionModel  # noqa: E402
from models.generation import MODES  # noqa: E402
from models.semmim import load_backbone  # noqa: E402
from models.vqa import VQAModel  # noqa: E402
from tools.predict_retrieve import add_retrieve  # noqa: E402
from utils import UserError, run_main  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_caption(commands)
    add_vqa(commands)
    add_retrieve(commands)
    args = parser.parse_args(argv)
    args.run(args)


def add_caption(commands) -> None:
    parser = commands.add_parser("caption", help="caption images")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--checkpoint", required=True, help="of Caption.py, or of Pretrain.py (zero-shot)")
    parser.add_argument("--prompt", help="what the text encoder reads before (default: the checkpoint's)")
    parser.add_argument("--objects", default="", help='object labels, such as "dog&&frisbee"')
    options = parser.add_argument_group("generation; the default is the checkpoint's own setting, else the paper's")
    options.add_argument("--mode", choices=MODES)
    options.add_argument("--beams", type=int)
    options.add_argument("--min_tokens", type=int)
    options.add_argument("--max_tokens", type=int)
    options.add_argument("--length_penalty", type=float)
    options.add_argument("--top_k", type=int)
    options.add_argument("--top_p", type=float)
    options.add_argument("--temperature", type=float)
    options.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.set_defaults(run=caption)


def caption(args: argparse.Namespace) -> None:
    """Print a line an image: its path and its caption."""
    backbone, rest, _ = load_backbone(args.checkpoint, decoder=True)
    cfg = checkpoint_config(rest, CAPTION)
    given = {key: getattr(args, key) for key in cfg.generation if getattr(args, key) is not None}
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, rest["description"])
    prompt = prompt_text(cfg.text.prompt if args.prompt is None else args.prompt, split_labels(args.objects))
    ids, mask = tokenizer.encode([prompt], cfg.text.max_prompt_tokens)
    model = CaptionModel(backbone, tokenizer).eval()
    torch.manual_seed(args.seed)
    for path in args.images:
        image = read_picture(path, backbone.image_encoder.image_size)
        sequences, _ = model.generate(image, ids, mask, **{**cfg.generation, **given})
        print(f"{path}\t{tokenizer.decode_caption(sequences[0])}")


def add_vqa(commands) -> None:
    parser = commands.add_parser("vqa", help="answer a question about an image")
    parser.add_argument("image", help="image file")
    parser.add_argument("question")
    parser.add_argument("--objects", default="", help='object labels, such as "dog&&frisbee"')
    parser.add_argument("--ocr", default="", help='words that are written in the image, such as "stop"')
    parser.add_argument("--checkpoint", required=True, help="of VQA.py, or of Pretrain.py (zero-shot)")
    parser.set_defaults(run=vqa)


def vqa(args: argparse.Namespace) -> None:
    """Print the answer that the checkpoint generates; its own settings where VQA.py wrote it, else the paper's."""
    backbone, rest, _ = load_backbone(args.checkpoint, decoder=True)
    trained = rest.get("stage") == "vqa"
    cfg = checkpoint_config(rest, VQA)
    for given, option, used in ((args.objects, "--objects", cfg.data.labels), (args.ocr, "--ocr", cfg.data.ocr)):
        if given and trained and not used:
            print(f"note: {option}: this checkpoint was trained without", file=sys.stderr)
    tokenizer = checkpoint_tokenizer(cfg.text.vocab, rest["description"])
    entry = {"question": args.question, "object_label": args.objects, "ocr": [[[], word] for word in args.ocr.split()]}
    if problem := check_question(entry):
        raise UserError(problem)
    limits = question_limits(cfg)
    ids, mask = encode_questions(tokenizer, [question_parts(entry, True, True, cfg.text.max_ocr_words)], limits)
    image = read_picture(args.image, backbone.image_encoder.image_size)
    options = {key: cfg.answer[key] for key in ("beams", "min_tokens", "max_tokens", "length_penalty")}
    model = VQAModel(backbone, tokenizer).eval()
    answer = model.answer({"image": image, "input_ids": ids, "attention_mask": mask}, **options)
    print(tokenizer.decode_answer(answer[0]))


def read_picture(path: str, image_size: int) -> torch.Tensor:
    """[1, 3, S, S]"""
    try:
        return test_transform(image_size)(open_image(path))[None]
    except ImageError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run_main(main)
