"""The model card (README.md) of an exported model, written from what its checkpoint and metrics.json say."""

import re
from collections.abc import Iterator

import utils
from semmim.files import Content

PIPELINES = {"caption": "image-to-text", "vqa": "visual-question-answering"}  # the hub's names for tasks
LEARNED = {
    "pretrain": "pre-trained on image-text pairs; captions, answers and rankings are zero-shot",
    "retrieval": "fine-tuned for image-text retrieval",
    "caption": "fine-tuned for captioning",
    "vqa": "fine-tuned for visual question answering",
}
# Numbers of a training's last log line that tell of its machine and its schedule, not of the model
INTERNAL = re.compile(
    r"lr_\w+|itm/temperature|itm/rows_left_out|grad_norm|data_wait|tflops|mfu|memory_gib|(eta_|pairs_per_)?seconds?|done|minutes"
)
USE = {
    "retrieval": ["image_features = model.encode_image(images)", "text_features = model.encode_text(texts)"]
    + ["print(image_features @ text_features.T, model.match(images, texts))"],
    "caption": ["print(model.caption(images))"],
    "vqa": ['print(model.answer(images, ["what is it?"] * len(images)))'],
}


def card(content: Content) -> str:
    """Markdown with the hub's front matter."""
    image = content.backbone.description["image_encoder"]
    count = sum(parameter.numel() for parameter in content.backbone.parameters())
    step = f", weights of step {content.step:,}" if content.step is not None else ""
    lines = [
        *(
            "---",
            "library_name: semmim",
            f"pipeline_tag: {PIPELINES.get(content.stage, 'zero-shot-image-classification')}",
        ),
        *("tags:", "- semmim", "- vision-language", f"- {content.stage}", "---", ""),
        *("# SemMIM", ""),
        "A vision-language model trained with semantics-enhanced cross-modal masked image modeling (SemMIM), "
        f"{LEARNED.get(content.stage, content.stage)}{step}.",
        "",
        f"- image encoder: {image['name']}, images resized to {image['image_size']} x {image['image_size']} pixels",
        f"- text encoder, fusion encoder, decoder: {content.backbone.description['text_layers']}, "
        f"{content.backbone.description['fusion_layers']}, {decoder_layers(content)} layers",
        f"- {count / 1e6:.1f}M parameters, features of {content.backbone.description['embed_dim']} numbers",
        "",
        *("## Use", "", "```python", "from semmim import SemMIM", ""),
        'model = SemMIM.from_pretrained("FOLDER_OR_REPOSITORY", device="auto")',
        'images = ["image.jpg"]',
        *use_lines(content),
        *("```", ""),
        *results(content.metrics),
    ]
    return "\n".join(lines) + "\n"


def decoder_layers(content: Content) -> int:
    return 0 if content.backbone.decoder is None else content.backbone.description["decoder_layers"]


def use_lines(content: Content) -> list[str]:
    """The calls of what the model has learned; of a pre-trained one all that it can do."""
    names = [content.stage] if content.stage in USE else list(content.settings)
    return [
        *(['texts = ["a red bus"]'] if "retrieval" in names else []),
        *(line for name in names for line in USE[name]),
    ]


def results(metrics: dict) -> list[str]:
    """A table of the numbers in metrics.json, but for what tells of the machine and the schedule."""
    rows = [
        f"| {name} | {value:,{'.2f' if isinstance(value, float) else ''}} |"
        for name, value in numbers(metrics)
        if not INTERNAL.fullmatch(name)
    ]
    if not rows:
        return ["No evaluation was recorded beside the checkpoint."]
    return ["## Results", "", "As the run's metrics.json has them.", "", "| | |", "|---|---|", *rows]


def numbers(metrics: dict, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """(name with its path, number) of everything in nested maps."""
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key} / ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def what_is_new(content: Content, stage: str) -> str | None:
    """A line where a model never learned what `stage` ("caption", "vqa") does; UserError where it cannot do it."""
    if stage not in content.settings:
        raise utils.UserError(
            f"{content.name}: has no decoder, which writing text needs; give a checkpoint of Pretrain.py, Caption.py "
            "or VQA.py"
        )
    if content.stage == stage or (stage, content.stage) == ("caption", "pretrain"):
        return None
    doing = {"caption": "to write captions", "vqa": "to answer questions"}[stage]
    return f"{content.name}: this model never learned {doing} (stage: {content.stage}); do not expect much"
