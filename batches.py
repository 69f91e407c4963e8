"""Training batches: which samples a step takes, read from RAM while the step before computes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import processes
from model import random_boxes


def sample_order(step, batch_size, n_samples, seed):
    """Positions (batch_size,) of the step's samples: every epoch a new permutation of all, batches
    run across its end. Depends on seed and step only, so that a run can continue anywhere."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n_samples
    order = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        shuffled = np.random.default_rng([seed, 1, epoch]).permutation(n_samples)
        order[epochs == epoch] = shuffled[positions[epochs == epoch] % n_samples]
    return order


def own_rows(batch_size, micro_batch):
    """Rows of the batch whose pictures this process takes: its share of every micro-batch of all processes."""
    at_once = micro_batch * processes.world_size() or batch_size
    rows = np.arange(batch_size).reshape(-1, processes.world_size(), at_once // processes.world_size())
    return rows[:, processes.rank()].ravel()


class Batches:
    """Training batches from RAM on the device, the next one prepared while the current one computes.

    Each is a dict of this process's images (n_own, 256, 256, 3) uint8 and boxes (top, left, size), and of the
    whole batch's subject (n,) and targets: latents z*, residual r* or, for the loss in vertex space,
    activity (n, n_vertices).
    """

    def __init__(self, data, pca, images, settings, device, vertex_space):
        self.data, self.settings, self.device = data, settings, device
        self.images = torch.from_numpy(images)
        self.rows = data.samples("train")
        self.vertex_space = vertex_space
        self.latents, self.residual = pca.latents, pca.residual
        self.own = own_rows(settings.BATCH_SIZE, settings.MICRO_BATCH)
        pinned = device.type == "cuda"
        shape = (len(self.own), *images.shape[1:])
        self.buffer = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self.stream = torch.cuda.Stream(device) if pinned else None

    def prepare(self, step):
        s = self.settings
        rows = self.rows[sample_order(step, s.BATCH_SIZE, len(self.rows), s.SEED)]
        image, subject = (torch.from_numpy(v[rows]) for v in (self.data.image, self.data.subject))
        boxes = random_boxes(len(rows), s.CROP_SCALE, np.random.default_rng([s.SEED, 2, step]))
        batch = {"subject": subject, **{k: v[self.own] for k, v in zip(("top", "left", "size"), boxes)}}
        image = image[self.own]
        if self.vertex_space:
            batch["activity"] = torch.from_numpy(self.data.read_activity(rows))
        else:
            batch |= {"latents": self.latents[rows], "residual": self.residual[rows]}
        if self.stream is None:
            return batch | {"images": self.images[image]}
        torch.index_select(self.images, 0, image, out=self.buffer)
        with torch.cuda.stream(self.stream):
            batch = {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}
            batch["images"] = self.buffer.to(self.device, non_blocking=True)
            self.stream.synchronize()  # waits in the loader's thread only; the buffer is free again
        return batch

    def __call__(self, first, last):
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.prepare, first)
            for step in range(first, last):
                batch = coming.result()
                if step + 1 < last:
                    coming = pool.submit(self.prepare, step + 1)
                if self.stream is not None:
                    for tensor in batch.values():
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield step, batch


def read_pictures(data):
    """Training pictures (n_training_images, 256, 256, 3) uint8, once in a machine's memory: in RAM for one
    process, for several mapped, so that all share the file's pages, which the machine's first one reads in."""
    if processes.world_size() == 1:
        return data.read_training_images()
    images = np.load(data.images.filename, mmap_mode="c")[: data.n_training_images]  # "c": torch wants it writable
    if processes.is_first_of_machine():
        for start in range(0, len(images), 1024):
            images[start : start + 1024, ::16].sum()  # touches every page
    return images
