"""Stage 4, phase 2: fine-tune the trunk's self-attention together with the head (report, Table 3).

Reads DATA_DIR and RUN_DIR/head.pt, the best of phase 1; writes RUN_DIR/finetuned.pt,
finetune.jsonl and finetune.png. Trainable are the q, k, v and output projections of the trunk
blocks in use and the head; norms, MLPs and embeddings of the trunk stay frozen. Trunk, layers
and sizes come from head.pt; the loop is training.py's.
"""

from pathlib import Path

import fit_pca
import prepare_data
import train_head
import training
from checkpoint import check_made, check_scorable, load_checkpoint
from common import Problem, choose_device, choose_precision, constants, run_script

DATA_DIR = prepare_data.DATA_DIR  # prepared data and PCA
RUN_DIR = train_head.RUN_DIR  # holds head.pt; finetuned.pt, log and curves are written there
CHECKPOINT = ""  # what to start from, also the authors' weights; empty: RUN_DIR/head.pt

BATCH_SIZE = 192  # samples per optimiser step (report, Table 3)
MICRO_BATCH = 0  # samples at a time; 0: the whole batch. Less needs less GPU memory; batch norm sees it
STEPS = 2000  # optimiser steps (report, Table 3)
WARMUP_STEPS = 100  # linear from MIN_LEARNING_RATE (report, Table 3)
LEARNING_RATE = 1e-5  # peak, then cosine decay (report, Table 3)
MIN_LEARNING_RATE = 0.0  # at the end (report, Table 3)
BETAS = (0.9, 0.99)  # AdamW (report, Table 3)
WEIGHT_DECAY = 0.8  # on everything trainable (report, Table 3)
FEATURE_DROPOUT = 0.9  # of single trunk features (report, Table 3)
CROP_SCALE = 0.8  # smallest area of the random square crop (report, Table 3)
TRAIN_EMBEDDING = False  # true: train the PCA embedding too, loss in vertex space (report: frozen)

VALIDATE_EVERY = 0  # steps; 0: once per epoch-equivalent
SEED = prepare_data.SEED  # governs order, crops and dropout
PRECISION = "auto"  # auto, bfloat16, float16 (with loss scaling) or float32
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
COMPILE = False  # true: torch.compile the trunk; takes minutes first, and a compiler (docs/performance.md)
ALLOW_UNFINISHED = False  # true: start from a head.pt whose training has not come to its end
OVERWRITE = False  # start anew although RUN_DIR holds this stage's results


def main():
    settings = constants(globals())
    training.check_settings(settings)
    data = prepare_data.load(DATA_DIR)
    pca = fit_pca.load(DATA_DIR, data)
    device = choose_device(DEVICE)
    precision = choose_precision(PRECISION, device)
    path = Path(CHECKPOINT or Path(RUN_DIR) / "head.pt")
    encoder, _, made = load_checkpoint(path, space=data.space)
    made_from = {"data_fingerprint": data.fingerprint, "pca_fingerprint": pca.fingerprint}
    remedy = f"python train_head.py --data_dir {DATA_DIR} --run_dir {RUN_DIR} --overwrite true trains a new one"
    if "adapted" in made["made_with"]:
        added = ", ".join(each["inputs"]["SUBJECT"] for each in made["made_with"]["adapted"])
        raise Problem(
            f"{path} has people added by adapt.py ({added}), expected a checkpoint as trained: to train on them too, "
            "prepare everybody's data together and run fit_pca.py and train_head.py on these"
        )
    check_made(path, made, remedy, **made_from)
    check_scorable(path, made, data, "val")  # validation chooses the checkpoint
    if not made["finished"] and not ALLOW_UNFINISHED:
        raise Problem(
            f"{path} is the best so far of a training that has not ended (step {made['step']} of "
            f"{made['made_with'].get('STEPS')}): the same train_head.py command continues it; --allow_unfinished true "
            "starts from what is there"
        )
    for name in encoder.trunk.attention_parameters():
        encoder.trunk.get_parameter(name).requires_grad_(True)
    made_from["head_fingerprint"] = made["fingerprint"]
    learner = training.Learner(encoder, settings, "finetuned.pt", made_from, device, precision)
    training.Training("finetune", [learner], data, pca, settings).run()


if __name__ == "__main__":
    run_script(main, globals(), many_processes=True)
