#!/usr/bin/env bash
# SemMIM from nothing to numbers on the built-in demo scenes, on two CPU cores, without a download but pip's.
# A second run continues an interrupted one and repeats only the evaluation; remove output/demo to start afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/setup_venv.sh
setup_venv requirements.txt
python=.venv/bin/python
demo=output/demo

train() {  # script, its configuration, the run's folder, the checkpoint to start from if there is one
    local from=()
    [ -n "${4-}" ] && from=(--checkpoint "$demo/$4")
    [ -f "$demo/$3/checkpoint_last.pth" ] && from=(--resume)
    $python "$1" --config "configs/demo/$2" --output_dir "$demo/$3" ${from[@]+"${from[@]}"}
}

echo "== 1. Data: pictures of simple scenes, captions, questions, boxes"
$python tools/make_demo_data.py --output $demo/data --train 8000 --val 300 --test 600 --size 72

echo "== 2. Pre-training: all six losses (configs/demo/Pretrain.yaml)"
train Pretrain.py Pretrain.yaml pretrain

echo "== 3. Zero-shot retrieval: contrastive ranking, then re-ranking by the fusion encoder"
$python Retrieval.py --config configs/demo/Retrieval.yaml --output_dir $demo/zeroshot \
    --checkpoint $demo/pretrain/checkpoint_last.pth --evaluate

echo "== 4. Retrieval, fine-tuned (configs/demo/Retrieval.yaml)"
train Retrieval.py Retrieval.yaml retrieval pretrain/checkpoint_last.pth

echo "== 5. Visual question answering, generated answers (configs/demo/VQA.yaml)"
train VQA.py VQA.yaml vqa pretrain/checkpoint_last.pth

echo "== 6. Captioning: cross-entropy, then CIDEr (configs/demo/Caption.yaml, Caption_scst.yaml)"
train Caption.py Caption.yaml caption pretrain/checkpoint_last.pth
train Caption.py Caption_scst.yaml caption_scst caption/checkpoint_best.pth

$python tools/report.py $demo
