"""Stage 2: group PCA of the training activity of all subjects, and the targets in its space.

With the training samples y (n_vertices,) of all subjects together, missing vertices zero:

    mean = average of y,  E = the pca_dim leading principal axes, orthonormal columns
    z* = E'(y - mean),    r* = |y - mean|² - |z*|²

so that the mean squared error of any prediction E z + mean is (|z - z*|² + r*) / n_vertices: training never decodes.
Written to DATA_DIR/pca.pt, which load() reads. Subspace iteration: Halko et al. 2011.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

import prepare_data
from core.files import fingerprint, load_torch, lock, save_torch
from core.settings import choose_device, is_finished, progress, run, versions
from model import UserError

DATA_DIR: str = "data"  # prepared data; pca.pt is written there too
PCA_DIM: int = 2048  # components (report, Table 1)
PASSES: int = 4  # of the subspace iteration
SEED: int = 0  # of its starting block
DEVICE: str = "auto"  # auto, cpu, cuda or cuda:N; a GPU needs 16 GB at full size
OVERWRITE: bool = False  # fit again even if pca.pt exists

FORMAT = "pca-4"
CHUNK = 1024  # samples


@dataclasses.dataclass
class PCA:
    """What fit_pca.py wrote."""

    components: torch.Tensor  # E (n_vertices, pca_dim) float32, orthonormal columns
    mean: torch.Tensor  # (n_vertices,) float32
    explained_variance: torch.Tensor  # (pca_dim,) float64, of the training samples
    total_variance: float
    latents: torch.Tensor  # z* (n_samples, pca_dim) float32, rows as in activity.npy
    residual: torch.Tensor  # r* (n_samples,) float32
    fingerprint: str


def fit(y, pca_dim, passes, seed):
    """Leading principal axes of centred rows y (n, n_vertices) -> (n_vertices, pca_dim), orthonormal columns: subspace
    iteration on y'y with a tenth more axes than asked for, then Rayleigh-Ritz; faster than torch.svd_lowrank."""
    block = min(pca_dim + max(16, pca_dim // 10), *y.shape)
    axes = torch.randn(y.shape[1], block, generator=torch.Generator().manual_seed(seed)).to(y.device)
    for _ in range(passes):
        axes = torch.linalg.qr(y.T @ (y @ axes))[0]
    scores = y @ axes
    rotation = torch.linalg.eigh((scores.T @ scores).double())[1].flip(1)[:, :pca_dim]
    return axes @ rotation.float()


def project(data, components, mean):
    """z* (n_samples, pca_dim) and r* (n_samples,) float32 of all samples, on the CPU."""
    latents, residual = [], []
    for start in progress(range(0, len(data.subject), CHUNK), desc="projecting"):
        activity = torch.from_numpy(np.array(data.activity[start : start + CHUNK]))
        y = activity.to(components.device, torch.float32) - mean
        z = y @ components
        latents.append(z.cpu())
        residual.append((squared_norm(y) - squared_norm(z)).clamp(min=0).float().cpu())
    return torch.cat(latents), torch.cat(residual)


def squared_norm(y):
    return torch.linalg.vector_norm(y, dim=1).double().square()


def load(folder, data):
    """DATA_DIR/pca.pt -> PCA; UserError if it was fitted to other data."""
    content = load_torch(Path(folder) / "pca.pt", FORMAT, "fit_pca.py")
    if content["made_with"]["data"] != data.fingerprint:
        raise UserError(f"{folder}/pca.pt was fitted to other data: run fit_pca.py --overwrite true.")
    return PCA(**{field.name: content[field.name] for field in dataclasses.fields(PCA)})


def main():
    device, data = choose_device(DEVICE), prepare_data.load(DATA_DIR)
    made_with = {"PCA_DIM": PCA_DIM, "PASSES": PASSES, "SEED": SEED, "data": data.fingerprint}
    path, rows = Path(DATA_DIR) / "pca.pt", data.samples("train")
    if is_finished(path, FORMAT, made_with, OVERWRITE):
        return
    if not 1 <= PCA_DIM <= min(len(rows), data.space.n_vertices):
        raise UserError(f"PCA_DIM is {PCA_DIM}, but there are {len(rows)} samples of {data.space.n_vertices} vertices.")
    with lock(DATA_DIR):
        y = torch.from_numpy(data.activity[rows]).to(device, torch.float32)  # 10 GB at full size
        mean = y.mean(0, dtype=torch.float64).float()
        y -= mean
        components = fit(y, PCA_DIM, PASSES, SEED)
        total_variance = float(squared_norm(y).sum()) / (len(rows) - 1)
        del y
        latents, residual = project(data, components, mean)
        variance = latents[rows].double().var(0)
        content = {
            "made_with": made_with, "versions": versions(), "fingerprint": fingerprint(components, mean),
            "components": components.cpu(), "mean": mean.cpu(), "latents": latents, "residual": residual,
            "explained_variance": variance, "total_variance": total_variance,
        }  # fmt: skip
        save_torch(path, content, FORMAT)
    print(f"wrote {path}: {PCA_DIM} components of {len(rows)} samples explain {variance.sum() / total_variance:.1%}")


if __name__ == "__main__":
    run(main, globals())
