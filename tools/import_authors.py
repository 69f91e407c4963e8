"""The authors' published weights of phase 1 or 2 -> a checkpoint that predict.py, finetune.py and the tools read.

Their code embeds the shared and the subject term separately, each with the embedding's bias e:

    y = (E A h + e) + (E (B_s h + b_s) + e)          without a subject: E A h + e

One more component says the same: E' = [E, e] with mean e, b_s = 1 there, and zeros there in A and B_s.
"""

from pathlib import Path

import numpy as np
import torch

import prepare_data
from core.checkpoint import save_checkpoint
from core.files import lock
from core.settings import run
from model import Encoder, Head, Trunk, UserError

WEIGHTS: str = "authors.pt"  # file of the authors: phase 1 or 2
DATA_DIR: str = "data"  # prepared with --splits authors
CHECKPOINT: str = "runs/authors/head.pt"  # is written
OVERWRITE: bool = False  # replace CHECKPOINT

TRUNK = "eva02_base_patch14_224.mim_in22k"  # (report, Table 1)
LAYERS = "0,2,4,6,8,10"  # (report, Table 1)
SUBJECTS = [f"subj0{i}" for i in range(1, 9)]  # their order


def read_weights():
    """WEIGHTS -> the authors' dict {epoch, metric, trunk, encoder}; no code in the file is run."""
    scalar = [np.float64, np.dtype, np.dtypes.Float64DType, np._core.multiarray.scalar]  # type of "metric"
    with torch.serialization.safe_globals([*scalar, (scalar[-1], "numpy.core.multiarray.scalar")]):
        content = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
    if not {"trunk", "encoder"} <= set(content) or "embed.weight" not in content["encoder"]:
        raise UserError(f"{WEIGHTS} is not a phase 1 or phase 2 file of the authors.")
    return content


def convert_head(theirs, subjects):
    """Their encoder's tensors -> state of our Head for these subjects."""
    n_components = theirs["embed.weight"].shape[1]
    chosen = [SUBJECTS.index(name) for name in subjects]
    weight = theirs["subj_proj.fc.weight"].unflatten(0, (-1, n_components))[chosen]  # (n_subjects, pca_dim, latent_dim)
    bias = theirs["subj_proj.fc.bias"].unflatten(0, (-1, n_components))[chosen]  #     (n_subjects, pca_dim)
    mean = theirs["embed.bias"]
    head = {
        "shared": torch.nn.functional.pad(theirs["shared_proj.weight"], (0, 0, 0, 1)),
        "subject_weight": torch.nn.functional.pad(weight, (0, 0, 0, 1)),
        "subject_bias": torch.nn.functional.pad(bias, (0, 1), value=1.0),
        "embed_weight": torch.cat([theirs["embed.weight"], mean[:, None]], 1),
        "embed_bias": mean,
    }
    for name, value in theirs.items():
        if name.startswith("feat_projs."):
            name = name.replace("feat_projs", "projections").replace("proj.weight1", "spatial")
            head[name.replace("proj.weight2", "channel")] = value
    return head


def main():
    if Path(CHECKPOINT).exists() and not OVERWRITE:
        raise UserError(f"{CHECKPOINT} exists; choose another CHECKPOINT, or --overwrite.")
    data, content = prepare_data.load(DATA_DIR), read_weights()
    space = data.space
    if data.splits != "authors" or not set(space.subjects) <= set(SUBJECTS):  # their training pictures would be scored
        raise UserError(f"{DATA_DIR} lacks the authors' splits and subjects: prepare the data with --splits authors.")
    weights = convert_head(content["encoder"], space.subjects)
    n_subjects, pca_dim, latent_dim = weights["subject_weight"].shape
    n_vertices = len(weights["embed_bias"])
    if n_vertices != space.n_vertices:
        raise UserError(f"{WEIGHTS} predicts {n_vertices} vertices, {DATA_DIR} has {space.n_vertices}: prepare subj01.")
    whole = content["trunk"]  # phase 2 stores all of it, phase 1 None: then timm's pretrained weights are theirs
    trunk = Trunk(TRUNK, LAYERS, pretrained=not whole)
    if whole:
        missing = trunk.vit.load_state_dict(whole, strict=False).missing_keys
        if missing:
            raise UserError(f"{WEIGHTS} has a trunk without {missing[0]}, expected a whole {TRUNK}.")
        trunk.requires_grad_(True)  # the checkpoint stores all of it
    head = Head(trunk.feature_shapes, latent_dim, pca_dim, n_subjects, n_vertices)
    head.load_state_dict(weights)
    with lock(Path(CHECKPOINT).parent):
        save_checkpoint(
            CHECKPOINT, Encoder(trunk, head), space=space, scores={}, step=content.get("epoch"), finished=True,
            made_with={"published": Path(WEIGHTS).name, "data_fingerprint": data.fingerprint},
            train_nsd_ids=data.nsd_ids[data.image[data.samples("train")]],
        )  # fmt: skip
    print(f"wrote {CHECKPOINT}: {n_subjects} subjects, {n_vertices} vertices, phase {2 if whole else 1}")


if __name__ == "__main__":
    run(main, globals())
