"""The checkpoint: save, load, and the authors' published weights read as one.

A checkpoint holds all that prediction needs: the head, what was trained of the trunk, the trunk's settings and
fingerprint, the vertex space, and what made it.
"""

import re
from pathlib import Path

import numpy as np
import torch

from common import Problem, check_format, fingerprint, is_subject_name, read_torch, versions, write_whole
from model import Encoder, Head, Space, Trunk

checkpoint_format = "encoder-2"
checkpoint_kind = "a checkpoint of train_head.py or finetune.py"


def save_checkpoint(
    path, encoder, *, space, made_with, scores, step, finished=False, trained_nsd_ids=None, added_nsd_ids=None
):
    """Write all that prediction needs. made_with: constants and fingerprints of what made it; finished: of the
    training that chose it, else it is the best so far. Of the trunk what was trained is stored, and position
    embeddings, which timm may have resampled; the rest, the pretrained file's own, is known by its fingerprint.
    trained_nsd_ids: pictures of the training; added_nsd_ids: {subject: those of its own that adapt.py fitted to}.
    """
    trunk_state = encoder.trunk_state()
    stored = encoder.trunk.stored | {name for name, p in encoder.trunk.named_parameters() if p.requires_grad}
    own = {name: v.detach().cpu() for name, v in trunk_state.items() if name in stored}
    head = {name: v.detach().cpu() for name, v in encoder.head.state_dict().items()}
    checkpoint = {
        "format": checkpoint_format,
        "fingerprint": fingerprint(*head.values(), *own.values()),
        "made_with": made_with,
        "versions": versions(),
        "trunk_settings": encoder.trunk_settings(),
        "trunk": own,
        "trunk_fingerprint": trunk_fingerprint(trunk_state, own),
        "head": head,
        "bias_count": encoder.head.bias_count,
        "space": vars(space),
        "scores": scores,
        "step": step,
        "finished": finished,
        "trained_nsd_ids": None if trained_nsd_ids is None else torch.as_tensor(np.unique(trained_nsd_ids)),
        "added_nsd_ids": {name: torch.as_tensor(ids) for name, ids in (added_nsd_ids or {}).items()},
    }
    with write_whole(path) as file:
        torch.save(checkpoint, file)


def read_checkpoint(path):
    """One of our checkpoints as it lies on the disk, its tensors mapped."""
    content = read_torch(path, checkpoint_kind)
    if content.get("format") == "encoder-1":
        raise Problem(
            f"{path} was written by the version before, whose fingerprints this one does not read: train it anew with "
            "python train_head.py and python finetune.py, --overwrite true"
        )
    return check_format(content, path, checkpoint_format, checkpoint_kind)


def is_published(content):
    """Whether a file, as it was read, is one of the authors'."""
    return set(content) >= {"trunk", "encoder"}


def mark_finished(path):
    """Say in a checkpoint that the training which chose it has come to its end."""
    checkpoint = read_checkpoint(path)
    if not checkpoint["finished"]:
        with write_whole(path) as file:
            torch.save(checkpoint | {"finished": True}, file)


def load_checkpoint(path, device="cpu", space=None):
    """-> (encoder on device in evaluation mode, space, checkpoint dict without the big tensors).

    space: vertex space of the prepared data, or a function that finds it; only the authors'
    published files need it, which hold none.
    """
    content = read_torch(path, checkpoint_kind)
    if is_published(content):
        checkpoint = convert_published(content, space() if callable(space) else space, path)
    else:
        checkpoint = read_checkpoint(path)
    space = Space(**checkpoint.pop("space"))
    if not all(map(is_subject_name, space.subjects)):
        raise Problem(f"{path}: subjects {space.subjects}, expected names such as subj01: not one of our checkpoints")
    trunk = Trunk(**checkpoint["trunk_settings"])
    stored, weights = checkpoint.pop("trunk"), checkpoint.pop("head")
    found = trunk_fingerprint(trunk.state_dict(), stored)
    if found != checkpoint.get("trunk_fingerprint", found):
        raise Problem(
            f"{path}: the trunk {trunk.settings['name']} built here has weights {found}, the checkpoint was "
            f"made with {checkpoint['trunk_fingerprint']} (timm {checkpoint['versions']['timm']}, torch "
            f"{checkpoint['versions']['torch']}). Use the same weights file and versions, or train anew"
        )
    n_subjects, pca_dim, latent_dim = weights["subject_weight"].shape
    with torch.device("meta"):
        head = Head(trunk.feature_shapes, latent_dim, pca_dim, n_subjects, len(weights["embed_bias"]))
    try:
        missing = set(trunk.load_state_dict(stored, strict=False).missing_keys)
        head.load_state_dict(weights, assign=True)  # the file's mapped memory, no second copy
    except RuntimeError as error:
        raise Problem(f"{path} does not fit {trunk.settings['name']}: {' '.join(str(error).split())[:300]}")
    if stored and is_published(content) and missing & dict(trunk.named_parameters()).keys():  # theirs are of phase 2
        lacking = ", ".join(sorted(missing)[:3])
        raise Problem(f"{path} holds a trunk without {lacking} …, expected a whole {trunk.settings['name']}")
    trunk.stored |= set(stored)
    head.bias_count = checkpoint.get("bias_count", 1)
    return Encoder(trunk, head).to(device, torch.float32).eval(), space, checkpoint


def convert_published(content, space, path):
    """A file of the authors (phase 1 or 2) -> a checkpoint dict like ours.

    Their forward pass embeds the shared and the subject term separately, so embed.bias counts
    twice in a subject's prediction and once in the group's: bias_count. Subjects are 01 to 08.
    """
    theirs, trunk = content["encoder"], content["trunk"] or {}
    needed = {"shared_proj.weight", "subj_proj.fc.weight", "subj_proj.fc.bias", "embed.weight", "embed.bias"}
    if needed - set(theirs):
        lacking = ", ".join(sorted(needed - set(theirs)))
        raise Problem(f"{path} lacks {lacking}, expected a phase 1 or 2 file of the authors")
    n_vertices, pca_dim = theirs["embed.weight"].shape
    if space is None or space.n_vertices != n_vertices:
        found = "no vertex space" if space is None else f"{space.n_vertices} vertices"
        raise Problem(
            f"{path} holds the authors' weights for {n_vertices} vertices, but the prepared data gives {found}: "
            "point DATA_DIR to challenge data prepared with subjects whose union has as many (subj01 has all)"
        )
    if not all(re.fullmatch(r"subj0[1-8]", name) for name in space.subjects):
        raise Problem(f"{path} holds the authors' weights of subj01 to subj08, but the prepared data {space.subjects}")
    chosen = [int(name.removeprefix("subj")) - 1 for name in space.subjects]
    head = {
        "shared": theirs["shared_proj.weight"],
        "subject_weight": theirs["subj_proj.fc.weight"].unflatten(0, (-1, pca_dim))[chosen],
        "subject_bias": theirs["subj_proj.fc.bias"].unflatten(0, (-1, pca_dim))[chosen],
        "embed_weight": theirs["embed.weight"],
        "embed_bias": theirs["embed.bias"],
    }
    for name, value in theirs.items():
        if name.startswith("feat_projs."):
            ours = name.replace("feat_projs", "projections").replace("proj.weight1", "spatial")
            head[ours.replace("proj.weight2", "channel")] = value
    return {
        "trunk_settings": {
            "name": "eva02_base_patch14_224.mim_in22k", "layers": "blocks.{0,2,4,6,8,10}", "image_size": 224,
            "pretrained": not trunk, "seed": 0,
        },
        "trunk": {f"vit.{name}": value for name, value in trunk.items()},
        "head": head,
        "bias_count": 2,
        "space": vars(space),
        "fingerprint": fingerprint(*theirs.values(), *trunk.values()),
        "made_with": {"published": Path(path).name},
        "scores": {},
        "step": content.get("epoch"),
        "finished": True,
    }  # fmt: skip


def check_made(path, checkpoint, mend, **expected):
    """Refuse a checkpoint whose recorded fingerprints differ from the expected ones. The authors'
    files record none; their vertex count is checked instead."""
    for name, now in expected.items():
        made = checkpoint["made_with"].get(name, now if "published" in checkpoint["made_with"] else None)
        if made != now:
            raise Problem(f"{path} was made with {name} {made}, found is {now}; {mend}")


def trained_pictures(checkpoint, subjects=()):
    """-> nsd ids (n,) of the pictures that its predictions for these subjects come from, and whether these are all:
    the authors' files, and checkpoints of earlier versions, know none. A person who was added has pictures of their
    own, which are in nobody else's predictions."""
    ids, added = checkpoint.get("trained_nsd_ids"), checkpoint.get("added_nsd_ids", {})
    known = [] if ids is None else [ids.numpy()]
    known += [added[name].numpy() for name in subjects if name in added]
    return np.unique(np.concatenate([np.array([], np.int64), *known])), ids is not None


def check_scorable(path, checkpoint, data, split):
    """Refuse to score the authors' published weights on splits that are not theirs: 85 % of these validation and
    private test samples were in their training. The challenge's own test pictures were in nobody's."""
    added = {each["inputs"]["SUBJECT"] for each in checkpoint["made_with"].get("adapted", ())}  # by adapt.py
    is_theirs = "published" in checkpoint["made_with"] and not added.issuperset(data.space.subjects)
    if split != "challenge" and is_theirs and data.splits != "authors":
        raise Problem(
            f"{path} holds the authors' weights, which were trained on most of these {split} pictures: a score on them "
            "means nothing. Prepare the data with their splits (python prepare_data.py --splits authors, into another "
            "DATA_DIR), or score on challenge"
        )


def trunk_fingerprint(state, stored=()):
    """Of the trunk's weights {name: tensor}, less those that a checkpoint stores, which are named in stored."""
    return fingerprint(*(v for name, v in state.items() if name not in stored))
