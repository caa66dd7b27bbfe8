#!/usr/bin/env bash
# Draws README's images anew from a finished ./demo.sh: docs/masking.png, docs/patterns.png, docs/search.png; and those
# of the ablations from docs/study. The search is a screenshot of the page, by Chromium (Debian, Ubuntu: apt install
# chromium). PYTHON names another interpreter, DEMO another folder of runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
demo=${DEMO:-output/demo}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp "$(ls "$demo"/pretrain/images/masking_*.png | tail -1)" "$work/masking.png"
$python -m tools.visualize --checkpoint "$demo/pretrain/checkpoint_last.pth" --output "$work/figures"
cp "$work/figures/figure2_encoding_head.png" "$work/patterns.png"
$python -m tools.predict retrieve "$demo/data/images/test" --checkpoint "$demo/retrieval" --output "$work/sheet.html" \
    --top 6 --text "a large blue ring below a red sign that says open" --text "the green circle is above the small yellow cross"
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$work/profile" \
    --window-size=1200,1060 --screenshot="$work/search.png" "file://$work/sheet.html" 2>"$work/chromium" ||
    { cat "$work/chromium"; exit 1; }

colors() {  # source, target: the same with 256 colors, which a third of the bytes hold
    $python -c "from PIL import Image; import sys
Image.open(sys.argv[1]).convert('RGB').quantize(256).save(sys.argv[2], optimize=True)" "$1" "$2"
}
colors "$work/patterns.png" docs/patterns.png
colors "$work/search.png" docs/search.png
for name in ablation ablation_short ablation_emoji; do
    $python -m tools.report "docs/study/$name.jsonl" --format chart --output "$work/$name.png"
    colors "$work/$name.png" "docs/$name.png"
done
# the legend's colors must stay those of the patches
$python -c "from PIL import Image; import sys; Image.open(sys.argv[1]).save(sys.argv[2], optimize=True)" \
    "$work/masking.png" docs/masking.png
ls -l docs/*.png
