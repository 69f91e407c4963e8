"""The checkpoint: everything that prediction needs, and what made it."""

from pathlib import Path

import numpy as np
import torch

import model
from core.files import fingerprint, load_torch, save_torch
from core.settings import versions
from core.space import Space
from model import Encoder, Head, Trunk, UserError

FORMAT = "encoder-3"
SOURCE = fingerprint(Path(model.__file__).read_text(encoding="utf-8"))  # a changed model.py is another model


def trunk_state(trunk, layers):
    """{name: weight} of a trunk, without blocks after the last of these layers."""
    later = tuple(f"vit.blocks.{i}." for i in range(max(layers) + 1, len(trunk.vit.blocks)))
    return {name: value for name, value in trunk.state_dict().items() if not later or not name.startswith(later)}


def save_checkpoint(path, encoder, *, space, made_with, scores, step, finished, train_nsd_ids, added=None):
    """Write a checkpoint: the head and the trunk's trained weights, the rest of the trunk as a fingerprint.

    made_with: settings and fingerprints; finished: whether the training that chose it ended; train_nsd_ids: pictures
    trained on; added: {name: nsd ids that tools/adapt.py fitted that person to}."""
    state = trunk_state(encoder.trunk, encoder.layers)
    stored = [name for name in encoder.trunk.stored_names() if name in state]
    content = {
        "made_with": made_with, "versions": versions(), "scores": scores, "step": step, "finished": finished,
        "trunk_settings": encoder.trunk.settings | {"layers": ",".join(map(str, encoder.layers))},
        "trunk": {name: state[name].detach().cpu() for name in stored},
        "trunk_fingerprint": fingerprint(*(value for name, value in state.items() if name not in stored)),
        "head": {name: value.detach().cpu() for name, value in encoder.head.state_dict().items()},
        "space": vars(space), "source": SOURCE,
        "train_nsd_ids": torch.as_tensor(np.unique(train_nsd_ids)),
        "added": {name: torch.as_tensor(ids) for name, ids in (added or {}).items()},
    }  # fmt: skip
    content["fingerprint"] = fingerprint(*content["head"].values(), *content["trunk"].values())
    save_torch(path, content, FORMAT)


def read_checkpoint(path):
    """The dict in a checkpoint file; UserError if it is damaged or of another version."""
    return load_torch(path, FORMAT, "train_head.py or finetune.py")


def mark_finished(path):
    """Mark the training run of this checkpoint as finished."""
    content = read_checkpoint(path)
    if not content["finished"]:
        save_torch(path, content | {"finished": True}, FORMAT)


def load_weights(path, head, weights):
    try:
        head.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the head in model.py: {' '.join(str(error).split())[:300]}")


def load_checkpoint(path, device="cpu"):
    """-> (Encoder on device in eval mode, Space, the rest of the checkpoint as a dict)."""
    content = read_checkpoint(path)
    if content["source"] != SOURCE:
        print(f"note: {path} was written with a different model.py")
    trunk = Trunk(**content["trunk_settings"])
    stored, weights = content.pop("trunk"), content.pop("head")
    loaded = fingerprint(*(value for name, value in trunk.state_dict().items() if name not in stored))
    if loaded != content["trunk_fingerprint"]:
        raise UserError(f"{path} was trained with other {trunk.settings['name']} weights than those loaded here.")
    n_subjects, pca_dim, latent_dim = weights["subject_weight"].shape
    with torch.device("meta"):
        head = Head(trunk.feature_shapes, latent_dim, pca_dim, n_subjects, len(weights["embed_bias"]))
    trunk.load_state_dict(stored, strict=False)
    trunk.trained = set(stored)
    load_weights(path, head, weights)
    space = Space(**content.pop("space"))
    return Encoder(trunk, head).to(device, torch.float32).eval(), space, content
