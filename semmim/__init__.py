"""A checkpoint of any stage, or a folder or hub repository that `save_pretrained` wrote, as one object for use.

README.md has an example. `pip install -e .` in the repository's folder makes this importable from anywhere (editable
alone: defaults of settings are the repository's configs/).
"""

from semmim.model import SemMIM

__all__ = ["SemMIM"]
