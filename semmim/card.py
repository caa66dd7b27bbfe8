"""The model card (README.md) of an exported model, written from what its checkpoint and metrics.json say."""

import re
from collections.abc import Iterator

import utils
from semmim.files import CONVERTED, Content

PIPELINES = {"caption": "image-to-text", "vqa": "visual-question-answering"}  # the hub's names for tasks
LEARNED = {
    "pretrain": "pre-trained on image-text pairs; captions and rankings are zero-shot",
    "retrieval": "fine-tuned for image-text retrieval",
    "caption": "fine-tuned for captioning",
    "vqa": "fine-tuned for visual question answering",
    CONVERTED: "of ALBEF's released weights",
}
MARKUP = re.compile(r"[\\`*{}\[\]()#+!|<>~&$@]")
USE = {
    "match": """texts = ["a red bus"]
image_features = model.encode_image(images)
text_features = model.encode_text(texts)
print(image_features @ text_features.T, model.match(images, texts))
""",
    "caption": "print(model.caption(images))\n",
    "answer": 'print(model.answer(images, "what is it?"))\n',
}
CARD = """---
library_name: semmim
pipeline_tag: {pipeline}
tags:
- semmim
- vision-language
---

# SemMIM

A vision-language model trained with semantics-enhanced cross-modal masked image modeling (SemMIM),
{learned}{step}.

- image encoder: {encoder}, images resized to {size} x {size} pixels
- text encoder, fusion encoder, decoder: {layers} layers
- {count:.1f}M parameters, features of {width} numbers

## Use

```python
from semmim import SemMIM

model = SemMIM.from_pretrained("FOLDER_OR_REPOSITORY", device="auto")
images = ["image.jpg"]
{use}```

{results}
"""


def card(content: Content, tasks: tuple[str, ...]) -> str:
    """Markdown with the hub's front matter. tasks: keys of USE, what the model has learned."""
    described, decoder = content.backbone.description, content.backbone.decoder
    layers = (described["text_layers"], described["fusion_layers"], described["decoder_layers"] if decoder else 0)
    return CARD.format(
        pipeline=PIPELINES.get(content.stage, "zero-shot-image-classification"),
        learned=LEARNED[content.stage],
        step="" if content.step is None else f", weights of step {content.step:,}",
        encoder=plain(described["image_encoder"]["name"]),
        size=described["image_encoder"]["image_size"],
        layers=", ".join(map(str, layers)),
        count=sum(parameter.numel() for parameter in content.backbone.parameters()) / 1e6,
        width=described["embed_dim"],
        use="".join(USE[task] for task in tasks),
        results=results(content.metrics),
    )


def results(metrics: dict) -> str:
    """A table of the splits' numbers in metrics.json without times; what stands beside the splits is of the training's
    last step.
    """
    splits = {name: value for name, value in metrics.items() if isinstance(value, dict) and name != "run"}
    rows = [
        f"| {plain(name)} | {value:,{'.2f' if isinstance(value, float) else ''}} |"
        for name, value in numbers(splits)
        if not name.endswith(("second", "seconds"))
    ]
    if not rows:
        return "No evaluation was recorded beside the checkpoint."
    return "\n".join(["## Results", "", "As the run's metrics.json has them.", "", "| | |", "|---|---|", *rows])


def numbers(metrics: dict, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """(name with its path, number) of everything in nested maps."""
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key} / ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def plain(name: str) -> str:
    """A name from a file as text of one line, without meaning for Markdown or HTML."""
    return MARKUP.sub(lambda found: f"\\{found[0]}", utils.one_line(name))
