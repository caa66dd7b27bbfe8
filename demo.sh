#!/usr/bin/env bash
# SemMIM from nothing to numbers on the built-in demo scenes, on two CPU cores, without a download but pip's.
# A second run continues an interrupted one and repeats only the evaluation; remove output/demo to start afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/setup_venv.sh
setup_venv requirements.txt tools/requirements.txt
python=.venv/bin/python
demo=output/demo
export OMP_NUM_THREADS=1  # of the stages after pre-training two run side by side

# For `run` and `start`: script, its configuration, the run's folder, the checkpoint to start from.
# --resume resumes if the run's folder holds a checkpoint, otherwise it starts.
train() {
    exec $python "$1" --config "configs/demo/$2" --output_dir "$demo/$3" --checkpoint "$demo/$4" --resume
}

echo "== 1. Data: images of simple scenes, captions, questions, boxes"
run $python -m tools.demo --output $demo/data --train 8000 --val 300 --test 600 --size 72

echo "== 2. Pre-training: all six losses (configs/demo/Pretrain.yaml)"
OMP_NUM_THREADS=2 run $python Pretrain.py --config configs/demo/Pretrain.yaml --output_dir $demo/pretrain --resume

echo "== 3. Zero-shot retrieval: contrastive ranking, then re-ranking by the fusion encoder"
run $python Retrieval.py --config configs/demo/Retrieval.yaml --output_dir $demo/zeroshot \
    --checkpoint $demo/pretrain/checkpoint_last.pth --evaluate

echo "== 4. Side by side: visual question answering, generated answers (configs/demo/VQA.yaml; its lines go to $demo/vqa.out)"
start train VQA.py VQA.yaml vqa pretrain/checkpoint_last.pth >$demo/vqa.out 2>&1
vqa=$!

echo "== 5. and retrieval, fine-tuned (configs/demo/Retrieval.yaml)"
run train Retrieval.py Retrieval.yaml retrieval pretrain/checkpoint_last.pth

echo "== 6. and captioning: cross-entropy, then CIDEr (configs/demo/Caption.yaml, Caption_scst.yaml)"
run train Caption.py Caption.yaml caption pretrain/checkpoint_last.pth
run train Caption.py Caption_scst.yaml caption_scst caption/checkpoint_best.pth

wait $vqa || { cat $demo/vqa.out; exit 1; }
run $python -m tools.report $demo
