"""A checkpoint of any stage, or a folder or hub repository that `save_pretrained` wrote, as one object for use:

    from semmim import SemMIM

    model = SemMIM.from_pretrained("output/retrieval/checkpoint_best.pth", device="auto")
    image_features = model.encode_image(["dog.jpg", "bus.jpg"])  # [2, E], normalized
    similarity = image_features @ model.encode_text(["a red bus"]).T  # [2, 1] cosines
    print(model.match(["dog.jpg"], ["a red bus"]))  # [1, 1] probability that the fusion encoder gives
    model.save_pretrained("exported")

`pip install -e .` in the repository's folder makes this importable from anywhere (editable alone: defaults of settings
are the repository's configs/). From within the repository nothing has to be installed.
"""

from semmim.model import SemMIM

__all__ = ["SemMIM"]
