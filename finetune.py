"""Stage 4, phase 2: train the trunk's self-attention and the head together (report, Table 3).

Reads DATA_DIR and RUN_DIR/head.pt; writes RUN_DIR/finetuned.pt, finetune.jsonl and finetune.png, as train_head.py.
"""

from pathlib import Path

import train_head
from core import training
from core.checkpoint import load_checkpoint
from core.settings import constants, run
from model import UserError

DATA_DIR: str = "data"  # prepared data and PCA
RUN_DIR: str = "runs/base"  # input and output
CHECKPOINT: str = ""  # to start from; empty: head.pt in RUN_DIR

BATCH_SIZE: int = 192  # samples per optimiser step (report, Table 3)
MICRO_BATCH: int = 0  # samples at a time (gradient accumulation); 0: the whole batch; batch norm uses it, too
STEPS: int = 2000  # optimiser steps (report, Table 3)
WARMUP_STEPS: int = 100  # linear from MIN_LEARNING_RATE (report, Table 3)
LEARNING_RATE: float = 1e-5  # peak, then cosine decay (report, Table 3)
MIN_LEARNING_RATE: float = 0.0  # at the end (report, Table 3)
BETAS: tuple[float, ...] = (0.9, 0.99)  # AdamW (report, Table 3)
WEIGHT_DECAY: float = 0.8  # on everything trainable (report, Table 3)
FEATURE_DROPOUT: float = 0.9  # of single trunk features (report, Table 3)
CROP_SCALE: float = 0.8  # smallest area of the random square crop (report, Table 3)
TRAIN_EMBEDDING: bool = False  # true: train the PCA embedding too, with the loss over vertices (report: frozen)

VALIDATE_EVERY: int = 0  # steps; 0: once per epoch
SEED: int = 0  # of order, crops and dropout
PRECISION: str = "auto"  # auto, bfloat16, float16 (with loss scaling) or float32
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N
COMPILE: bool = False  # true: torch.compile the trunk
OVERWRITE: bool = False  # start over even if RUN_DIR contains results


def main():
    settings = constants(globals())
    training.check_settings(settings)
    data, pca, device, precision = train_head.load_inputs(settings)
    path = Path(CHECKPOINT or Path(RUN_DIR) / "head.pt")
    encoder, _, made = load_checkpoint(path)
    inputs = {"data_fingerprint": data.fingerprint, "pca_fingerprint": pca.fingerprint}
    if any(made["made_with"].get(name) != value for name, value in inputs.items()):
        raise UserError(f"{path} was not trained on {DATA_DIR}: run train_head.py on it first.")
    if made["added"] or not made["finished"]:
        raise UserError(f"{path} comes from an unfinished run, or has subjects added by tools.adapt.")
    for name in encoder.trunk.attention_parameters():
        encoder.trunk.get_parameter(name).requires_grad_(True)
    inputs["head_fingerprint"] = made["fingerprint"]
    learner = training.Learner(encoder, settings, "finetuned.pt", inputs, device, precision)
    training.Run("finetune", [learner], data, pca, settings).run()


if __name__ == "__main__":
    run(main, globals(), many=True)
