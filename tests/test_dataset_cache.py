"""Pre-training's entries in memory and in their Arrow file, against reading all entries one by one."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dataset import cache
from dataset.annotations import Source, load_annotations, strings
from dataset.cache import StringTable


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two annotation files, large enough to be kept, and a cache folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "CACHED_FROM", 0)
    one = [{"image": f"{i % 7}.jpg", "caption": f"caption {i}"} for i in range(5000)]  # several chunks
    one += [{"image": "/else/where.jpg", "caption": ["one", "zwei Wörter", ""]}, {"image": "ü.jpg", "caption": "ü 🙂"}]
    (tmp_path / "a").mkdir()
    two = [{"image": "val/3.jpg", "caption": "in another folder", "more": 1}, {"image": "3.jpg", "caption": "x"}]
    return [write(tmp_path / "one.json", one), write(tmp_path / "a" / "two.json", two)]


def listed(pairs):
    """[(path, captions), ...]"""
    bounds = [range(first, end) for first, end in zip(pairs.caption_start, pairs.caption_start[1:], strict=False)]
    texts = [[pairs.captions[i] for i in bound] for bound in bounds]
    return list(zip([pairs.paths[i] for i in pairs.image_id], texts, strict=True))


def expected(source):
    return [(entry["image"], strings(entry["caption"])) for entry in load_annotations(source, "pretrain")]


def kept(folder):
    return sorted(folder.rglob("*.arrow*"))


def test_a_table_of_strings_gives_them_back():
    texts = ["", "a", "zwei Wörter 🙂", "", os.fsdecode(b"no UTF-8: \xff"), "end"]
    table = StringTable(texts)
    assert [table[i] for i in range(len(table))] == texts and list(StringTable()) == []
    with pytest.raises(IndexError):
        table[len(texts)]


@pytest.mark.parametrize("options", [{}, {"image_prefix_map": {"val/": "/data/val2014/"}}])
def test_reading_and_mapping_give_the_entries_of_the_files(files, options, monkeypatch):
    source = Source(files, **options)
    first = cache.load_pairs(source)
    monkeypatch.delattr(cache, "read_pairs")
    second = cache.load_pairs(source)
    assert listed(first) == listed(second) == expected(source)
    paths = [path for path, _ in expected(source)]
    assert [second.paths[i] for i in range(len(second.paths))] == list(dict.fromkeys(paths))


@pytest.mark.parametrize("change", ["time", "version"])
def test_of_files_that_changed_another_file_is_made(files, tmp_path, monkeypatch, change):
    source, file = Source(files), files[1]
    cache.load_pairs(source)
    if change == "time":
        file.write_text(file.read_text().replace("another", "one mor"))
        os.utime(file, ns=(10**18, 10**18))
    else:
        monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert listed(cache.load_pairs(source)) == expected(source)
    assert len(kept(tmp_path)) == 1


def test_of_those_that_load_a_list_at_once_one_reads_and_the_others_wait(files, monkeypatch):
    read, reads = cache.read_pairs, []

    def slowly(source):
        reads.append(source)
        time.sleep(0.3)
        return read(source)

    monkeypatch.setattr(cache, "read_pairs", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = [listed(pairs) for pairs in pool.map(cache.load_pairs, [Source(files)] * 3)]
    assert len(reads) == 1 and found == [expected(Source(files))] * 3
