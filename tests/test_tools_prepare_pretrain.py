"""tools.prepare on small files in the official layouts: Visual Genome, CC3M, SBU; and images that must not leak."""

import json
import pickle
import re
import tarfile

import numpy as np
import official_files as official
import pyarrow.parquet
import pytest
from conftest import refused
from PIL import Image, ImageEnhance

from tools.prepare.held_out import flickr_photo, read_refs
from tools.prepare.image_hash import KnownImages, fingerprint, group_images

source, run, read = official.source, official.run, official.read


def test_visual_genomes_filters_are_albefs_and_each_is_counted(run, source, tmp_path):
    run("coco")
    run("flickr30k")
    # 1: not COCO's; 2: COCO's test; 3: COCO's train; 4: Flickr30K's test; 5: RefCOCO+'s testA; 6: COCO's val
    coco_ids = {1: None, 2: 391895, 3: 57870, 4: None, 5: 222016, 6: 184613}
    official.visual_genome(source, coco_ids, {4: 1007129816})
    assert "refs(unc).p of RefCOCO+ is not there" in run("vg")
    refs = [{"image_id": 57870, "split": "train", "ref_id": 0}, {"image_id": 222016, "split": "testA", "ref_id": 1}]
    (source / "refcoco+").mkdir()
    (source / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    out = run("vg", "--captions", "4")
    pairs = read(tmp_path / "data/pretrain/vg.json")
    assert pairs == [
        {"image": f"../visual_genome/VG_100K_2/{number}.jpg", "caption": caption}
        for number in (1, 3)
        for caption in ("the clock is green in colour", "a man & a bicycle")
    ]
    assert "region descriptions: 36\n" in out
    assert re.findall(r"  filter: .*: (\d+)\n", out) == ["24", "2", "2", "2"]
    assert "VG_100K_2/5.jpg = RefCOCO+ evaluation" in out and "VG_100K/4.jpg = flickr30k test" in out
    assert "left out: 4 x image of a validation or test set (by id)" in out
    assert "left out: 2 x region without a word; first: region 105, region 305" in out
    assert "region below 0.1600 of the image" in out  # the smaller of the four
    assert "region below 0.6400 of the image" in run("vg", "--captions", "2")  # the larger one of a repeated sentence


def test_flickrs_photo_numbers():
    urls = ("http://farm9.staticflickr.com/8186/81_4e_z.jpg", "https://live.staticflickr.com/65535/81_a.jpg")
    assert [flickr_photo(url) for url in (*urls, "http://x.org/1/2_3.jpg", None)] == [81, 81, None, None]


def test_references_are_read_without_running_what_is_in_them(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "hacked").encode() + b"'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match="holds os.system, which is not plain data"):
        read_refs(path)
    assert not (tmp_path / "hacked").exists()


CC3M = [
    ("a very typical bus station", "http://lh6.ggpht.com/a.jpg"),
    ("the cat &amp; the dog", "https://live.staticflickr.com/65535/777_ab12.jpg"),
    (" ", "http://x.org/blank.jpg"),
    ("a very typical bus station", "http://lh6.ggpht.com/a.jpg"),
    ("woman of the test set", "http://static.flickr.com/1/1007129816_deadbeef.jpg"),
]


def cc3m_downloads(folder, tar):
    samples = {}
    for i, (caption, url) in enumerate(CC3M):
        samples |= official.img2dataset_sample(f"{i:09d}", caption, url, official.jpeg(i))
    official.img2dataset_shard(folder, 0, samples, tar)
    odd = official.img2dataset_sample("000010000", "not listed", "http://x.org/other.jpg", official.jpeg(50))
    odd |= {"000010001.json": b"{", "000010002.json": b'{"status": "success", "caption": "no image", "url": "u"}'}
    official.img2dataset_shard(folder, 1, odd | ({"../../escaped.jpg": b"x"} if tar else {}), tar)


@pytest.mark.parametrize("tar", [False, True])
def test_cc3m_as_img2dataset_left_it(run, tmp_path, tar):
    run("flickr30k")
    cc3m_downloads(tmp_path / "data/cc3m/images", tar)
    out = run("cc3m")
    assert read(tmp_path / "data/pretrain/cc3m.json") == [
        {"image": "../cc3m/images/00000/000000000.jpg", "caption": "a very typical bus station"},
        {"image": "../cc3m/images/00000/000000001.jpg", "caption": "the cat & the dog"},
        {"image": "../cc3m/images/00001/000010000.jpg", "caption": "not listed"},
    ]
    for line in (
        "pairs downloaded: 6\n",
        "left out: 1 x caption without a word; first: 00000/000000002.jpg",
        "left out: 1 x pair that is listed again; first: 00000/000000003.jpg",
        "00000/000000004.jpg = flickr30k test",
        "left out: 2 x sample that img2dataset left incomplete; first: 00001/000010001.json, 00001/000010002.json",
    ):
        assert line in out
    assert not list(tmp_path.rglob("escaped.jpg"))
    assert official.open_set("pretrain", f"data.train=[{tmp_path}/data/pretrain/cc3m.json]")[0]["bad"] == []


def test_cc3ms_addresses_can_be_downloaded(run, source, tmp_path):
    captions = ['"a quotation mark that nothing closes', 'and a "pair" of them', "an apostrophe's", 'tail"']
    rows = [f"{caption}\thttp://x.org/{i}.jpg\n" for i, caption in enumerate(captions)]
    (source / "Train_GCC-training.tsv").write_text("".join(rows))
    refused(lambda: run("cc3m"), "cc3m/images: holds no shard", "--addresses")
    out = run("cc3m", "--addresses")
    table = pyarrow.parquet.read_table(tmp_path / "data/cc3m/addresses.parquet").to_pydict()
    assert table == {"url": [f"http://x.org/{i}.jpg" for i in range(4)], "caption": captions}
    assert "warning: pairs listed: 4, 3,318,329 fewer than the published 3,318,333" in out


def test_a_shard_cannot_unpack_to_more_than_its_own_size_and_only_into_a_folder_of_the_tool(run, tmp_path):
    folder = tmp_path / "data/cc3m/images"
    cc3m_downloads(folder, tar=False)
    with tarfile.open(folder / "00002.tar", "w:gz") as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = 100_000_000
        tar.addfile(member, open("/dev/zero", "rb"))
    assert "rest of a damaged tar shard; first: 00002.tar (" in run("cc3m")
    assert not list((folder / "00002").iterdir())
    official.save(folder / "00005.partial/mine.jpg", 1)
    official.img2dataset_shard(folder, 5, {}, tar=True)
    refused(lambda: run("cc3m"), "00005.partial: holds files that semmim did not write")


@pytest.mark.parametrize("layout", ["json", "lines"])
def test_sbus_addresses_in_both_published_layouts(run, source, tmp_path, layout):
    captions = ["A wooden chair in the living room", "The main door of Tiffany &amp;amp; Co."]
    urls = [f"http://static.flickr.com/2723/{photo}_b0f291553e.jpg" for photo in (4385058960, 2113)]
    if layout == "json":
        content = {"image_urls": urls, "user_ids": ["1"], "captions": captions}
        official.write_json(source / "sbu-captions-all.json", content)
    else:
        (source / "SBU_captioned_photo_dataset_urls.txt").write_text("\n".join(urls) + "\n")
        (source / "SBU_captioned_photo_dataset_captions.txt").write_text("\r\n".join(captions) + "\n")
    run("sbu", "--addresses")
    table = pyarrow.parquet.read_table(tmp_path / "data/sbu/addresses.parquet").to_pydict()
    assert table == {"url": urls, "caption": captions}


def test_planted_copies_of_test_images_are_found_and_left_out(run, source, tmp_path):
    coco, genome = tmp_path / "data/coco/images", tmp_path / "data/visual_genome"
    official.save(coco / "val2014/COCO_val2014_000000391895.jpg", 1, (640, 480), 95)  # test
    official.save(coco / "val2014/COCO_val2014_000000184613.jpg", 2, (640, 480), 95)  # val
    official.save(coco / "train2014/COCO_train2014_000000057870.jpg", 3)
    leaked = official.save(coco / "train2014/COCO_train2014_000000222016.jpg", 1, (640, 480), 95)
    out = run("coco", "--check_leaks")
    images = {pair["image"] for pair in read(tmp_path / "data/pretrain/coco.json")}
    assert not any(image.endswith(leaked.name) for image in images) and len(images) == 2
    assert "left out: 1 x image of a validation or test set (by content)" in out
    assert "222016.jpg = a copy of coco test COCO_val2014_000000391895.jpg" in out
    assert "2 of 4 held-out images are not on disk" in out

    official.visual_genome(source, {1: None, 3: 57870, 5: None})  # 1 and 5: no COCO id, so that ids find nothing
    official.save(genome / "VG_100K_2/1.jpg", 2, (500, 375), 70)
    official.save(genome / "VG_100K_2/3.jpg", 9, (500, 375), 70)
    (genome / "VG_100K_2/5.jpg").write_bytes(b"no image")
    run("vg")
    assert len(read(tmp_path / "data/pretrain/vg.json")) == 9  # without --check_leaks
    out = run("vg", "--check_leaks")
    assert {p["image"][-5] for p in read(tmp_path / "data/pretrain/vg.json")} == {"3", "5"}
    assert "VG_100K_2/1.jpg = a look-alike of coco val COCO_val2014_000000184613.jpg" in out
    assert "1 x comparison of an image that is unreadable" in out


def test_downloads_are_compared_by_the_sum_of_the_original_too(run, tmp_path):
    original = official.save(tmp_path / "data/flickr30k/flickr30k-images/1007129816.jpg", 5, (500, 375), 95)
    run("flickr30k")
    samples = {}
    for i in range(2):
        samples |= official.img2dataset_sample(f"{i:09d}", f"thing {i}", f"u{i}", official.jpeg(7 + i))
    meta = json.loads(samples["000000001.json"])
    samples["000000001.json"] = json.dumps({**meta, "sha256": fingerprint(original).sha256}).encode()
    official.img2dataset_shard(tmp_path / "data/cc3m/images", 0, samples, tar=True)
    assert "left out: 1 x image of a validation or test set (by content)" in run("cc3m", "--check_leaks")
    assert [pair["caption"] for pair in read(tmp_path / "data/pretrain/cc3m.json")] == ["thing 0"]


def xray(number: int, size: int = 256) -> Image.Image:
    """Two dark lungs in a bright chest: smooth, and nearly the same for every number."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[0:size, 0:size] / size
    pixels = 200 - 60 * (np.hypot(x - 0.5, y - 0.5) > 0.55)
    for side in (0.32, 0.68):
        left, top = np.array([side, 0.5]) + random.normal(0, 0.012, 2)
        pixels = pixels - 120 * np.exp(-(((x - left) / 0.12) ** 2) - ((y - top) / 0.25) ** 2)
    noise = Image.fromarray(random.normal(0, 6, (8, 8)).astype(np.float32)).resize((size, size), Image.BICUBIC)
    return Image.fromarray(np.clip(pixels + np.asarray(noise), 0, 255).astype(np.uint8))


def photo(number: int) -> Image.Image:
    return official.picture(number, (640, 480))


CHANGES = {
    "smaller": lambda image: image.resize((200, 150), Image.Resampling.LANCZOS),
    "larger": lambda image: image.resize((1000, 700), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.05),
    "gray": lambda image: image.convert("L").convert("RGB"),
}


def marked(path, image: Image.Image, quality: int = 95):
    image.save(path, quality=quality)
    return fingerprint(path)


@pytest.mark.parametrize("picture", [photo, xray])
def test_copies_are_recognized_after_resizing_and_compression_and_others_are_not(tmp_path, picture):
    path = tmp_path / "image.jpg"
    known = KnownImages({str(number): marked(path, picture(number)) for number in range(40)})
    assert not any(known.find(marked(path, picture(number))) for number in range(100, 200))
    for change in CHANGES.values():
        for number in range(40):
            found = known.find(marked(path, change(picture(number)), 60))
            assert found == (str(number), "a look-alike")


def test_look_alikes_are_one_group_unless_they_are_too_many(tmp_path):
    path = tmp_path / "image.jpg"
    marks = [marked(path, xray(number)) for number in range(30)]
    marks += [marked(path, CHANGES["smaller"](xray(number)), 60) for number in range(5)]
    group, crowd = group_images(marks, most=3)
    assert len(set(group[:30])) == 30 and group[30:].tolist() == group[:5].tolist() and crowd == 0
    again = [marked(path, xray(0), quality) for quality in range(60, 90)]
    group, crowd = group_images(marks[:30] + again + again[:2], most=10)
    assert crowd == 33 and len(set(group)) == 60 and group[60:].tolist() == group[30:32].tolist()


def test_even_images_are_compared_by_their_bytes_alone(tmp_path):
    marks = [marked(tmp_path / "x.png", Image.new("RGB", (side, side), "white")) for side in (64, 64, 65)]
    assert list(map(KnownImages({"white": marks[0]}).find, marks[1:])) == [("white", "a copy"), None]
    assert group_images(marks, 3)[0].tolist() in ([0, 0, 1], [1, 1, 0])
