"""Draw docs/equal_time.png from equal_time.jsonl: python docs/study/equal_time.py"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

ARMS = {  # arm, order: (color, label)
    ("semmim", "itm+itc/t"): ("tab:blue", "SemMIM, re-ranked"),
    ("albef", "itm+itc/t"): ("tab:orange", "ALBEF, re-ranked"),
    ("semmim", "itc"): ("tab:blue", "SemMIM, ITC"),
    ("albef", "itc"): ("tab:orange", "ALBEF, ITC"),
    ("clip", "itc"): ("tab:green", "CLIP, ITC"),
}
HERE = Path(__file__).parent


def main() -> None:
    recalls = defaultdict(lambda: defaultdict(list))  # (arm, order): {minutes: a recall a seed}
    for line in (HERE / "equal_time.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        for arm, order in ARMS:
            if arm == run["arm"]:
                recalls[arm, order][run["minutes"]].append(run["metrics"]["test"][f"{order}_r_mean"])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="minutes of CPU time", ylabel="mean recall on test, %", xticks=(10, 20, 40))
    for number, (key, (color, label)) in enumerate(ARMS.items()):
        minutes, values = zip(*sorted(recalls[key].items()), strict=True)
        style = {"color": color, "label": label, "linestyle": "--" if key[1] == "itc" else "-", "capsize": 3}
        places = [minute + 0.25 * number - 0.5 for minute in minutes]  # side by side, so that no bar hides another
        axes.errorbar(places, list(map(fmean, values)), list(map(stdev, values)), marker="o", **style)
    axes.legend()
    figure.savefig(HERE.parent / "equal_time.png", dpi=120)


if __name__ == "__main__":
    main()
