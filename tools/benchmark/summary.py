"""What `tools.benchmark all` measured beside what was predicted, as the table of docs/speed.md."""

from __future__ import annotations

from tabulate import tabulate

# Measured on other machines: milliseconds of CPU a pair, seconds a gigabyte (docs/speed.md)
LOADER, CHECKPOINT = 3.4, 0.56


def summary(result: dict) -> str:
    """A Markdown table of all.json; a figure that failed shows its error, one without a prediction a dash."""
    rows: list[list] = []
    for name, found in result.items():
        if not isinstance(found, dict):
            continue
        if "error" in found:
            rows.append([name, found["error"], "-"])
            continue
        rows += [[f"{name.split('_')[0]}: {what}", *pair] for what, *pair in lines(name, found["figures"], result)]
    shown = [[str(cell) if cell is not None else "-" for cell in row] for row in rows]
    title = f"{result['device']}, torch {result['torch']}"
    return tabulate(shown, [title, "measured", "predicted"], "pipe", disable_numparse=True)


def lines(name: str, figures: dict, result: dict) -> list[tuple]:
    """(what, measured, predicted) of a command's figures."""
    if name.startswith("pretrain"):
        cases = [figures[side] for side in ("A", "B")] if "A" in figures else [figures]
        return [line for case in cases for line in training_lines(case, roofline_of(result, case["pairs_of_a_step"]))]
    if name == "loader":
        return [("ms of CPU a pair", figures["ms_of_cpu_per_pair"], LOADER)]
    if name == "checkpoint":
        expected = round(CHECKPOINT * figures["gigabytes"], 2)
        return [(f"seconds for {figures['gigabytes']} GB", figures["seconds"], expected)]
    if name == "retrieval":
        return [("pairs/s", figures["pairs_per_second"], figures["predicted"])]
    if name == "caption":
        return [("captions/s", figures["captions_per_second"], figures["predicted"])]
    return []


def training_lines(case: dict, roofline: dict) -> list[tuple]:
    compiled = "train.compile=true" in case["settings"]
    settings = case["settings"].replace("train.compile=false", "eager").replace("train.compile=true", "compiled")
    kind = f"{case['pairs_of_a_step']} pairs, {settings or 'eager'}"
    speed = roofline.get("pairs_per_second_compiled" if compiled else "pairs_per_second")
    return [
        (f"{kind}, pairs/s", case["pairs_per_second"], speed),
        (f"{kind}, MFU", case["mfu"], None if compiled else roofline.get("mfu")),
    ]


def roofline_of(result: dict, pairs: int) -> dict:
    """What `roofline` says of this device and batch; {} if nothing."""
    figures = result.get("roofline", {}).get("figures", {})
    found = next((value for name, value in figures.items() if name != "config" and name in result["device"]), {})
    return found.get(str(pairs), {})
