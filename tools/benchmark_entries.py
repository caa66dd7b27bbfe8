"""`tools/benchmark.py entries`: memory and CPU time of loading the entries of pre-training, made for the purpose."""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import utils

WORDS = "a the of in on with and man woman dog cat street beach red old two small standing near water photo sky".split()
CAPTIONS_AN_IMAGE = 5.1 / 4  # 4M images, 5.1M captions

# What a process of training does with its entries, in a process of its own. argv: file, image_root, batch, world.
PROCESS = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[5])
def memory():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 2**20 for name in ("VmHWM", "VmRSS", "RssAnon")}
from dataset import index
from dataset.entries import Source
from dataset.loader import BatchIndices
from dataset.pretrain import PretrainDataset
index.INDEXED_FROM = 0
modules, cpu = memory(), time.process_time()
data = PretrainDataset(Source(sys.argv[1], sys.argv[2]), views=None)
loading, loaded = time.process_time() - cpu, memory()
cpu = time.process_time()
plain = next(iter(BatchIndices(data, int(sys.argv[3]), world_size=int(sys.argv[4]))))
first_plain, cpu = time.process_time() - cpu, time.process_time()
sorted_by_length = next(iter(BatchIndices(data, int(sys.argv[3]), world_size=int(sys.argv[4]), bucket_batches=8)))
print(json.dumps({
    "entries": len(data), "images": len(data.paths),
    "cpu_seconds_of_loading": round(loading, 2),
    "cpu_seconds_to_the_first_batch": round(first_plain, 3),
    "cpu_seconds_to_the_first_batch_by_length": round(time.process_time() - cpu, 3),
    "peak_gib": round(loaded["VmHWM"], 3), "modules_gib": round(modules["VmRSS"], 3),
    "kept_gib": round(loaded["VmRSS"], 3), "kept_not_shared_gib": round(loaded["RssAnon"], 3),
}))
"""


def add_entries(commands) -> None:
    parser = commands.add_parser("entries", help="memory and CPU time of loading millions of captions")
    parser.add_argument("--entries", type=int, default=5_100_000, help="captions (default: %(default)s, the paper's)")
    parser.add_argument("--batch_size", type=int, default=128, help="of a process (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="of the training (default: %(default)s)")
    parser.add_argument("--folder", help="where the file is made and removed (default: the system's temporary one)")
    parser.set_defaults(run=run_entries)


def run_entries(args: argparse.Namespace) -> dict:
    """Loads the same entries by two processes one after the other: the first finds no index of them, the second one.

    Memory is what Linux tells of a process; CPU time hardly depends on what else the machine does.
    """
    if args.entries < args.batch_size * args.processes or args.batch_size < 1:
        raise utils.UserError(f"--entries {args.entries}: fewer than a batch of {args.batch_size} on each process")
    where = args.folder and utils.make_folder(Path(args.folder).expanduser())
    with tempfile.TemporaryDirectory(dir=where) as folder:
        path = Path(folder, "captions.json")
        write_entries(path, args.entries)
        result = {"megabytes": round(path.stat().st_size / 1e6, 1)}
        for name in ("first_process", "later_process"):
            command = [sys.executable, "-c", PROCESS, str(path), folder, str(args.batch_size), str(args.processes)]
            command.append(str(Path(__file__).resolve().parents[1]))
            # the cache folder of the user stays as it is, also where `folder` cannot be written to
            environment = {**os.environ, "XDG_CACHE_HOME": folder}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise utils.UserError(f"a process that loads the entries failed: {done.stderr.strip()[-300:]}")
            result[name] = json.loads(done.stdout)
    return result


def write_entries(path: Path, count: int) -> None:
    """A JSON list of `count` entries with captions and paths as long as those of Conceptual Captions; about every
    fifth image has a second caption somewhere else in the list, and every fiftieth caption an accent."""
    rng = random.Random(0)
    images = max(1, round(count / CAPTIONS_AN_IMAGE))
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            image = i if i < images else rng.randrange(images)
            caption = " ".join(rng.choices(WORDS, k=11)) + (" café" if i % 50 == 0 else "")
            entry = {"image": f"cc3m/images/{image // 10_000:05d}/{image:09d}.jpg", "caption": caption}
            file.write(("[" if i == 0 else ",\n") + json.dumps(entry))
        file.write("]\n")
