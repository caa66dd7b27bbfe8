"""docs/data.md and README's own images: every command is accepted, every key and ending is the readers' own."""

import argparse
import re
import shlex

import pytest

from dataset import annotations, files
from engine.config import STAGES, load_config
from tools import shards as make_shards
from tools.predict import __main__ as predict
from tools.prepare import __main__ as prepare
from tools.prepare import parquet
from utils import ROOT

DATA = (ROOT / "docs/data.md").read_text(encoding="utf-8")
OWN = re.search(r"\n## Your own images\n(.*?)\n## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
STAGE_OF_SCRIPT = {"Pretrain.py": "pretrain", "Retrieval.py": "retrieval", "Caption.py": "caption", "VQA.py": "vqa"}
TOOLS = {"tools.prepare": prepare, "tools.predict": predict, "tools.shards": make_shards}


class Accepted(Exception):
    """The arguments are such that the tool would begin its work."""


@pytest.fixture
def only_parsing(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, arguments=None):
        parse(parser, arguments)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def commands(text):
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith("python"))
    return [[word for word in words if word != "-m"] for words in lines]  # a module's name is the second word, too


@pytest.mark.parametrize("words", commands(DATA) + commands(OWN), ids=" ".join)
def test_commands_are_accepted(words, only_parsing):
    name, arguments = words[1], words[2:]
    if name in STAGE_OF_SCRIPT:
        given = arguments[arguments.index("--override") + 1 :] if "--override" in arguments else []
        load_config(ROOT / arguments[arguments.index("--config") + 1], given, STAGES[STAGE_OF_SCRIPT[name]])
    else:
        with pytest.raises(Accepted):
            TOOLS[name].main(arguments)


def test_five_commands_lead_from_a_folder_to_a_search_page():
    names = ["tools.prepare", "Pretrain.py", "Caption.py", "tools.predict", "tools.predict"]
    assert [words[1] for words in commands(OWN)] == names


def test_the_keys_are_those_of_the_readers():
    table = DATA.partition("\n## Keys\n")[2].partition("\n## ")[0]
    listed = set(
        re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    )
    known = {key for keys in (*annotations.KINDS.values(), *annotations.OPTIONAL.values()) for key in keys}
    assert known <= listed
    assert listed - known == {"split", "ocr"}


def test_the_columns_of_parquet_are_those_of_the_reader():
    section = DATA.partition("\nParquet files")[2].partition("\n## ")[0]
    for name in (*parquet.IMAGE_COLUMNS, *parquet.CAPTION_COLUMNS):
        assert f"`{name}`" in section


def test_the_endings_are_those_of_the_readers():
    table = DATA.partition("\n## Files\n")[2].partition("\n## ")[0]
    for ending in (*files.LINES, ".json", ".tar"):
        assert f"`{ending}`" in table
