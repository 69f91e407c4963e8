"""Stage 2: group PCA of the training activity of all subjects, and the targets in its space.

With the training samples y (n_vertices,) of all subjects together, missing vertices zero:

    mean = average of y,  E = the pca_dim leading eigenvectors of G = sum (y - mean)(y - mean)'
    z* = E'(y - mean),    r* = |y - mean|² - |z*|²

so that the mean squared error of any prediction E z + mean is (|z - z*|² + r*) / n_vertices:
training needs z* and r*, no vertices. Written to DATA_DIR/pca.pt, which load() reads.

Block power iteration with a Nyström step at the end (Halko et al. 2011, Tropp et al. 2017):
every pass reads the activity once in chunks, so memory does not grow with the samples.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import prepare_data
from common import (
    Problem, check_disk, check_least, choose_device, constants, differences, fingerprint, load_torch, progress,
    run_script, sole_writer, versions, write_whole,
)  # fmt: skip
from scores import median_r2, r2_score

DATA_DIR = prepare_data.DATA_DIR  # prepared data; pca.pt is written there too
PCA_DIM = 2048  # components (report, Table 1)
PASSES = 4  # power iterations, two products each; as exact as scikit-learn's ten (benchmark.py)
SEED = prepare_data.SEED  # governs the starting block
DEVICE = "auto"  # auto, cpu, cuda or cuda:N
OVERWRITE = False  # fit again although pca.pt is there

chunk_rows = 1024  # samples in memory at a time: 0.16 GB in float32 at full size
decisive = ("PCA_DIM", "PASSES", "SEED")  # the constants that change the result


@dataclasses.dataclass
class PCA:
    """What fit_pca.py wrote."""

    components: torch.Tensor  # E (n_vertices, pca_dim) float32, orthonormal columns
    mean: torch.Tensor  # (n_vertices,) float32
    explained_variance: torch.Tensor  # (pca_dim,) float64, of the training samples
    total_variance: float
    latents: torch.Tensor  # z* (n_samples, pca_dim) float16, rows as in activity.npy
    residual: torch.Tensor  # r* (n_samples,) float32
    val_r2: float  # median R² of the reconstruction on the validation split
    fingerprint: str


class Activity:
    """Rows of the prepared activity as centred float32 chunks on a device.

    A GPU keeps the chunks from the first pass on (5 GB at full size), if they fit twice over.
    """

    def __init__(self, data, rows, device):
        self.data, self.rows, self.device = data, rows, device
        self.mean = torch.zeros(data.space.n_vertices, device=device)
        n_bytes = len(rows) * data.space.n_vertices * data.activity.itemsize
        self.kept = {} if device.type == "cuda" and 2 * n_bytes < torch.cuda.mem_get_info(device)[0] else None

    def __len__(self):
        return len(self.rows)

    def chunks(self, what):
        """Yields (start, y - mean (n, n_vertices)), the next chunk read meanwhile.

        Every chunk lies in the same memory: on a CPU new pages for each took longer than converting it.
        """
        starts = range(0, len(self), chunk_rows)
        memory = torch.empty(min(chunk_rows, len(self)), len(self.mean), device=self.device)
        with progress(total=len(self), desc=what, unit="row", unit_scale=True) as bar, ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.read, 0)
            for start in starts:
                chunk = coming.result()
                if start != starts[-1]:
                    coming = pool.submit(self.read, start + chunk_rows)
                yield start, memory[: len(chunk)].copy_(chunk).sub_(self.mean)
                bar.update(len(chunk))

    def read(self, start):
        if self.kept and start in self.kept:
            return self.kept[start]
        chunk = torch.from_numpy(self.data.read_activity(self.rows[start : start + chunk_rows]))
        if self.kept is not None:
            self.kept[start] = chunk = chunk.to(self.device)
        return chunk


def fit(activity, pca_dim, passes, seed):
    """Leading eigenvectors of the centred activity -> components (n_vertices, pca_dim) float32.

    activity: Activity, whose mean is set here. -> (components, total variance).
    """
    n, n_vertices = len(activity), len(activity.mean)
    total = torch.zeros(n_vertices, dtype=torch.float64, device=activity.device)
    for _, y in activity.chunks("mean"):
        total += y.sum(0)
    activity.mean = (total / n).float()

    # a tenth more than asked for costs 10 % and saves a whole pass at equal exactness
    block = min(pca_dim + max(16, pca_dim // 10), n_vertices)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n_vertices, block, generator=generator).to(activity.device)
    energy = 0.0
    for i in range(passes):
        b = torch.zeros_like(q)  # G q
        for _, y in activity.chunks(f"pass {i + 1} of {passes}"):
            b.addmm_(y.T, y @ q)
            if i == passes - 1:
                energy += float(squared_norms(y).sum())
        if i < passes - 1:
            q = None  # blocks are let go as soon as they can be
            # keeps the columns apart in float32; orthonormal for the last pass, whose t has to be exact
            q, b = (torch.linalg.qr(b)[0] if i == passes - 2 else lower_factor(b)), None
    # Nyström: G ~ b t^-1 b' = q (r t^-1 r') q' with t = q'b of the last pass, which needs no further
    # one; directions lost in float32 noise (fewer samples than components) come last in the full basis
    t = (q.T @ b).double()
    q = None
    (q, r), b = torch.linalg.qr(b), None
    values, vectors = torch.linalg.eigh((t + t.T) / 2)
    known = values > 1e-6 * values.max()
    root = r.double() @ (vectors[:, known] / values[known].sqrt())
    basis = torch.linalg.eigh(root @ root.T)[1].flip(1)[:, :pca_dim]
    components, q = q @ basis.float(), None
    least, most = torch.aminmax(components, dim=0)
    components *= torch.where(most >= -least, 1.0, -1.0)  # signs as scikit-learn settles them
    return components, energy / (n - 1)


def lower_factor(b):
    """A well-conditioned basis of b's columns (n_vertices, block): P L of b = P L U, at a quarter of the
    cost of orthonormal columns."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(b)  # an exactly singular b has a lower factor, too
    order = list(range(len(b)))
    for i, p in enumerate((pivots - 1).tolist()):
        order[i], order[p] = order[p], order[i]
    lu.tril_(-1).diagonal().fill_(1)
    basis = torch.empty_like(lu)
    basis[torch.tensor(order, device=b.device)] = lu
    return basis


def squared_norms(y):
    """|y|² of every row as float64, without a copy of y."""
    return torch.linalg.vector_norm(y, dim=1).double().square()


def project(activity, components):
    """z* (n, pca_dim) float32 and r* (n,) float32 of an Activity, on the CPU."""
    latents, residual = [], []
    for _, y in activity.chunks("targets"):
        z = y @ components
        latents.append(z.cpu())
        residual.append((squared_norms(y) - squared_norms(z)).cpu())
    return torch.cat(latents), torch.cat(residual).clamp(min=0).float()


def reconstruction_r2(data, pca, device):
    """Per subject R² (n_vertices of the subject,) of E z* + mean on the validation split."""
    scores = []
    for s in range(len(data.space.subjects)):
        rows = data.samples("val", s)
        z = pca["latents"][torch.from_numpy(rows)].to(device, torch.float32)
        prediction = torch.addmm(pca["mean"].to(device), z, pca["components"].to(device).T)
        activity = torch.from_numpy(data.read_activity(rows)).to(device)
        scores.append(r2_score(activity, prediction)[data.space.mask[s]])
    return median_r2(scores, data.space.subjects)["r2"]


def narrow(latents):
    """float16 where its error is below 1e-7 of the variance, which changes no score by 1e-4."""
    half = latents.half()
    error = (half.float() - latents).square().sum() / latents.square().sum()
    return half if error < 1e-7 else latents  # infinite on overflow: kept


def load(folder, data):
    """DATA_DIR/pca.pt -> PCA; refused if it was fitted to other data."""
    content = load_content(folder)
    if content["data_fingerprint"] != data.fingerprint:
        raise Problem(
            f"{Path(folder) / 'pca.pt'} was fitted to data {content['data_fingerprint']}, {folder} holds "
            f"{data.fingerprint}; run python fit_pca.py --data_dir {folder} --overwrite true"
        )
    return PCA(**{field.name: content[field.name] for field in dataclasses.fields(PCA)})


def load_content(folder):
    """The dict in pca.pt."""
    path, command = Path(folder) / "pca.pt", f"python fit_pca.py --data_dir {folder}"
    what = f"what fit_pca.py writes: run {command}" + " --overwrite true" * path.exists()
    return load_torch(path, "pca-2", what)


def is_fitted(data):
    """Whether pca.pt is what would be made; says so. Refuses another one, unless it is to be overwritten."""
    path = Path(DATA_DIR) / "pca.pt"
    if OVERWRITE or not path.exists():
        return False
    content = load_content(DATA_DIR)
    now = {name: globals()[name] for name in decisive} | {"data": data.fingerprint}
    changed = differences({k: content["made_with"][k] for k in decisive} | {"data": content["data_fingerprint"]}, now)
    if changed:
        raise Problem(f"{path} was fitted with {'; '.join(changed)}. --overwrite true fits it anew")
    print(f"{path} is there already for these data and constants; --overwrite true fits it anew")
    return True


def main():
    check_least(globals(), SEED=0, PASSES=1)
    device = choose_device(DEVICE)
    data = prepare_data.load(DATA_DIR)
    if is_fitted(data):
        return
    n_train = len(data.samples("train"))
    most = min(n_train, data.space.n_vertices)
    if not 1 <= PCA_DIM <= most:
        raise Problem(
            f"PCA_DIM is {PCA_DIM}, expected 1 to {most}, the smaller of {n_train} training samples and "
            f"{data.space.n_vertices} vertices; --pca_dim {max(1, most // 2)}, for example"
        )
    with sole_writer(DATA_DIR, "fit_pca.py"):
        if not is_fitted(data):  # by another process in the meantime
            fit_and_write(data, device)


def fit_and_write(data, device):
    path, rows = Path(DATA_DIR) / "pca.pt", data.samples("train")
    check_disk(DATA_DIR, 4 * PCA_DIM * (data.space.n_vertices + len(data.subject)))
    activity = Activity(data, rows, device)
    components, total_variance = fit(activity, PCA_DIM, PASSES, SEED)
    activity.kept = None
    all_samples = Activity(data, np.arange(len(data.subject)), device)
    all_samples.kept, all_samples.mean = None, activity.mean
    latents, residual = project(all_samples, components)
    variance = latents[torch.from_numpy(rows)].double().var(0)
    content = {
        "format": "pca-2",
        "made_with": constants(globals()),
        "versions": versions(),
        "data_fingerprint": data.fingerprint,
        "components": components.cpu(),
        "mean": activity.mean.cpu(),
        "explained_variance": variance,
        "total_variance": total_variance,
        "latents": narrow(latents),
        "residual": residual,
    }
    content["val_r2"] = reconstruction_r2(data, content, device)
    content["fingerprint"] = fingerprint(content["components"], content["mean"])
    with write_whole(path) as file:
        torch.save(content, file)
    print(f"{PCA_DIM} components of {len(rows)} samples explain {variance.sum() / total_variance:.1%} of the variance")
    print(f"reconstruction median R² on validation: {content['val_r2']:.4f}, what no prediction from them can pass")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main, globals())
