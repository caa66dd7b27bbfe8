"""The index of pre-training's entries, and the reading of JSON lists in pieces, against reading everything at once."""

import json
import multiprocessing
import os
import random
import time

import numpy as np
import pytest

from dataset import entries, index
from dataset.annotations import load_annotations
from dataset.cache import Numbering
from dataset.entries import Source, image_captions, strings
from utils import UserError


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two annotation files, and whatever the user's cache folder is, an own one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "INDEXED_FROM", 0)
    one = [{"image": f"{i % 7}.jpg", "caption": f"caption {i}"} for i in range(20)]
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
    """The same from the entries as every stage reads them."""
    return [(entry["image"], strings(entry["caption"])) for entry in load_annotations(source, "pretrain")]


def index_files(folder):
    return sorted(path for path in folder.rglob("*.index"))


@pytest.mark.parametrize("options", [{}, {"image_prefix_map": {"val/": "/data/val2014/"}}])
def test_reading_and_mapping_give_the_entries_of_the_files(files, options):
    source = Source(files, **options)
    first, second = index.load_pairs(source), index.load_pairs(source)
    assert listed(first) == listed(second) == listed(index.read_pairs(source)) == expected(source)
    paths = [path for path, _ in expected(source)]
    assert [second.paths[i] for i in range(len(second.paths))] == list(dict.fromkeys(paths))


def test_image_roots_decide_the_paths_and_have_indexes_of_their_own(files, tmp_path):
    for root in (None, tmp_path, tmp_path / "a"):
        source = Source(files, root)
        assert listed(index.load_pairs(source)) == expected(source)
    assert len(index_files(tmp_path)) == 3


def refuse(*_):
    raise AssertionError("the files were read again")


def test_a_later_run_reads_no_annotation_file(files, monkeypatch):
    made = listed(index.load_pairs(Source(files)))
    monkeypatch.setattr(index, "image_captions", refuse)
    assert listed(index.load_pairs(Source(files))) == made


def test_small_files_have_no_index(files, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "INDEXED_FROM", 10_000)
    index.load_pairs(Source(files))
    assert index_files(tmp_path) == []


def set_time(path, nanoseconds):
    os.utime(path, ns=(nanoseconds, nanoseconds))


@pytest.mark.parametrize("change", ["size", "time", "content", "version", "cut", "garbage"])
def test_an_index_of_something_else_is_made_anew(files, tmp_path, monkeypatch, change):
    source, file = Source(files), files[1]
    set_time(file, 10**18)
    index.load_pairs(source)
    (made,) = index_files(tmp_path)
    text = file.read_text()
    if change in ("size", "content", "time"):
        file.write_text(text.replace("another", "an other" if change == "size" else "one more"[:7]))
        set_time(file, 10**18 + (1 if change == "time" else 0))
    elif change == "version":
        monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    else:
        whole = made.read_bytes()
        made.write_bytes(whole[:-64] if change == "cut" else b"x" * len(whole))
    assert listed(index.load_pairs(source)) == expected(source)
    monkeypatch.setattr(index, "image_captions", refuse)
    assert listed(index.load_pairs(source)) == expected(source)
    assert index_files(tmp_path) == [made]


def test_where_the_folder_cannot_be_written_to_the_index_is_in_the_cache_folder(files, tmp_path, monkeypatch, caplog):
    source, write_arrays = Source(files), index.write_arrays
    writable = tmp_path / "cache"

    def write_in_some(path, *args):
        if writable not in path.parents:
            raise UserError(f"{path}: cannot be written")
        write_arrays(path, *args)

    monkeypatch.setattr(index, "write_arrays", write_in_some)
    assert listed(index.load_pairs(source)) == expected(source)
    assert [path.parent for path in index_files(tmp_path)] == [tmp_path / "cache" / "semmim"]
    monkeypatch.setattr(index, "image_captions", refuse)
    assert len(index.load_pairs(source).image_id) == 24
    monkeypatch.undo()
    monkeypatch.setattr(index, "INDEXED_FROM", 0)
    monkeypatch.setattr(index, "write_arrays", lambda path, *_: write_in_some(tmp_path / "no" / "where"))
    assert listed(index.load_pairs(Source(files, tmp_path))) == expected(Source(files, tmp_path))
    assert "every process reads the files" in caplog.text


def load_slowly(source, queue):
    read = index.image_captions

    def slowly(source):
        queue.put("read")
        time.sleep(0.3)
        return read(source)

    index.image_captions = slowly
    queue.put(listed(index.load_pairs(source)) == expected(source))


def test_of_the_processes_of_a_machine_one_reads_and_the_others_wait(files):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=load_slowly, args=(Source(files), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    told = [queue.get(timeout=30) for _ in range(4)]
    for process in processes:
        process.join()
    assert sorted(map(str, told)) == ["True", "True", "True", "read"] and queue.empty()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "a.jpg"}, "two.json: entry 1 has no 'caption'"),
        ({"image": "", "caption": "x"}, "two.json: entry 1: 'image' is empty"),
        ({"image": "a.jpg", "caption": 3}, "two.json: entry 1: 'caption' is int"),
        ({"image": "a.jpg", "caption": "\ud83d"}, "two.json: entry 1: 'caption' holds half"),
        (["a.jpg"], "two.json: entry 1 is list"),
    ],
)
def test_wrong_entries_are_named_and_leave_no_index(files, tmp_path, entry, message):
    write(files[1], [{"image": "a.jpg", "caption": "x"}, entry])
    with pytest.raises(UserError, match=message):
        index.load_pairs(Source(files))
    assert index_files(tmp_path) == []


def test_images_are_numbered_by_first_appearance_also_where_hashes_are_equal():
    class Same(str):
        __hash__ = lambda self: 7  # noqa: E731

    rng, number, known = random.Random(0), Numbering(), {}
    for _ in range(300):
        name = Same(f"{rng.randrange(40)}.jpg")
        assert number(name) == known.setdefault(str(name), len(known))
    assert [number.strings[i] for i in range(len(known))] == list(known)


def test_the_numbers_of_many_images_are_those_of_a_dictionary():
    rng, number, known = random.Random(1), Numbering(), {}
    for _ in range(20_000):
        name = f"{rng.randrange(6000)}.jpg"
        assert number(name) == known.setdefault(name, len(known))


# ------------------------------------------------------------------------------------------------- reading in pieces


def random_value(rng, depth=0):
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(["a", "é", '"', "],["]): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [rng.randrange(-(10**9), 10**9), rng.random(), None, True, rng.choice(["", '"\\', "], [", "ü🙂", "\n"])][
        kind
    ]


@pytest.mark.parametrize("piece", [1, 2, 5, 17, 100])
def test_lists_read_in_pieces_are_what_json_reads(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(entries, "PIECE", piece)
    rng = random.Random(piece)
    for _ in range(60):
        values = [random_value(rng) for _ in range(rng.randrange(1, 6))]
        text = json.dumps(values, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        path = write(tmp_path / "list.json", rng.choice(["", " \n", "\ufeff"]) + text + rng.choice(["", " \r\n"]))
        assert list(entries._stream_list(path)) == [value for _, value in entries._read_list(path)[2]] == values


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_damaged_lists_are_the_errors_of_reading_at_once(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(entries, "PIECE", piece)
    good = json.dumps([{"image": f"{i}.jpg", "caption": "x"} for i in range(5)])
    rng = random.Random(0)
    texts = [good[: rng.randrange(len(good))] for _ in range(20)] + [good + "]", good + " 1", "[]", "{}", "3", "[1,]"]
    texts += [good[:at] + "#" + good[at:] for at in rng.sample(range(len(good)), 20)] + ["[,1]", '{"images": []}']
    for text in texts:
        path = write(tmp_path / "list.json", text)
        with pytest.raises(UserError) as caught:
            whole = entries._whole_list(path)[1]
            raise UserError(f"readable: {whole}")
        if str(caught.value).startswith("readable"):  # '#' in a string
            assert [value for _, value in entries._read_list(path)[2]] == whole
        else:
            with pytest.raises(UserError) as again:
                [value for _, value in entries._read_list(path)[2]]
            assert str(again.value) == str(caught.value)


def test_an_entry_is_yielded_before_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "PIECE", 64)
    good = json.dumps([{"image": "a.jpg", "caption": "x"}] * 50)
    path = write(tmp_path / "list.json", good[:-5])
    assert next(image_captions(Source(path)))[0] == str(tmp_path / "a.jpg")


def test_the_arrays_of_a_file_are_those_written(tmp_path):
    arrays = {"a": np.arange(5, dtype=np.int32), "none": np.empty(0, np.int64), "b": np.arange(70, dtype=np.uint8)}
    index.write_arrays(tmp_path / "x.index", [[1, 2, "three"]], arrays)
    found = index.read_arrays(tmp_path / "x.index", [[1, 2, "three"]])
    assert list(found) == list(arrays)
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype and np.array_equal(found[name], values)
    assert index.read_arrays(tmp_path / "x.index", [[1, 2, "four"]]) is None
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1
