"""The model card (README.md) of an exported model, written from what its checkpoint and metrics.json say."""

import json

from semmim.files import Content

USE = {
    "match": """texts = ["a red bus"]
print(model.encode_image(images) @ model.encode_text(texts).T, model.match(images, texts))
""",
    "caption": "print(model.caption(images))\n",
    "answer": 'print(model.answer(images, "what is it?"))\n',
}
CARD = """---
library_name: semmim
---

# SemMIM

A vision-language model trained with semantics-enhanced cross-modal masked image modeling (stage: {stage}):
{encoder}, images of {size} x {size} pixels, {count:.1f}M parameters.

## Use

```python
from semmim import SemMIM

model = SemMIM.from_pretrained("FOLDER_OR_REPOSITORY", device="auto")
images = ["image.jpg"]
{use}```

## Results (metrics.json)

```json
{metrics}
```
"""


def card(content: Content, tasks: tuple[str, ...]) -> str:
    """Markdown with the hub's front matter. tasks: keys of USE, what the model has learned."""
    encoder = content.backbone.description["image_encoder"]
    splits = {name: value for name, value in content.metrics.items() if isinstance(value, dict) and name != "run"}
    return CARD.format(
        stage=content.stage,
        encoder=encoder["name"],
        size=encoder["image_size"],
        count=sum(parameter.numel() for parameter in content.backbone.parameters()) / 1e6,
        use="".join(USE[task] for task in tasks),
        metrics=json.dumps(splits, indent=2),  # within its quotation marks no name has a meaning for Markdown or HTML
    )
