"""The model: a multi-subject linear fMRI encoding head on a pretrained vision trunk.

Lane & Kiar 2023, "A Parameter-efficient Multi-subject Model for Predicting fMRI Activity" ("the report",
Figure 1). For layer l with features x_l (n_tokens x n_channels), latent unit d and subject s:

    p_l[d] = sum_n S_l[d,n] sum_c W_l[d,c] dropout(x_l)[n,c]     feature projection
    h      = mean_l BatchNorm_l(p_l)                             (latent_dim,)
    z      = A h + B_s h + b_s                                   (pca_dim,)
    y      = E z + mean                                          (n_vertices,)

Without a subject z = A h: the subject-agnostic group prediction.
"""

import copy
import math
import re
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

PICTURE_SIZE = 256  # px, side of prepared pictures
WEIGHTS_DIR = Path("weights")  # local pretrained weights, NAME.safetensors, used before the hub


class UserError(Exception):
    """Something the user can fix: printed as one message without a traceback, exit code 1."""


class Trunk(nn.Module):
    """A frozen timm ViT that returns the raw tokens of some of its blocks (prefix tokens included, no final norm).

    name: timm model; layers: block numbers, "0,2,4,6,8,10"; image_size: px, position embeddings are resampled to it;
    seed: of random weights. Blocks after the last one in use are dropped. Raises UserError for models that are not
    ViTs and for weights that cannot be loaded.
    """

    def __init__(self, name, layers, image_size=224, pretrained=True, seed=0):
        super().__init__()
        self.settings = dict(name=name, layers=layers, image_size=image_size, pretrained=pretrained, seed=seed)
        self.vit = create_vit(name, image_size, pretrained, seed)
        self.layers = parse_layers(layers)
        if self.layers[-1] >= len(self.vit.blocks):
            raise UserError(f"LAYERS is {layers}, but trunk {name} has blocks 0 to {len(self.vit.blocks) - 1}.")
        self.vit.prune_intermediate_layers([self.layers[-1]], prune_norm=True, prune_head=True)
        self.image_size = image_size
        self.mean, self.std = (self.vit.pretrained_cfg[key] for key in ("mean", "std"))
        self.grid = tuple(self.vit.patch_embed.grid_size)  # (rows, columns) of patches
        self.n_prefix = self.vit.num_prefix_tokens  # class and register tokens, ahead of the patches
        self.feature_shapes = [(self.n_prefix + math.prod(self.grid), self.vit.embed_dim)] * len(self.layers)
        self.trained = set()  # names of fine-tuned weights, from a checkpoint
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # the trunk stays in inference mode in both phases

    def forward(self, images):
        """images (n, 3, image_size, image_size), normalised -> per layer (n, n_tokens, n_channels)."""
        features = self.vit.forward_intermediates(
            images, indices=self.layers, return_prefix_tokens=self.n_prefix > 0, norm=False, output_fmt="NLC",
            intermediates_only=True,
        )  # fmt: skip
        return [torch.cat([x[1], x[0]], 1) if self.n_prefix else x for x in features]

    def attention_parameters(self):
        """Names of the q, k, v and output projections, weights and biases, of all blocks kept: phase 2 trains them."""
        names = []
        for i, block in enumerate(self.vit.blocks):
            attention = dict(getattr(block, "attn", nn.Module()).named_parameters())
            kept = [n for n in attention if re.fullmatch(r"(qkv|[qkv]_proj|proj)\.(weight|bias)|[qkv]_bias", n)]
            weights = {n.split(".")[0] for n in kept if n.endswith(".weight")}
            if weights not in ({"qkv", "proj"}, {"q_proj", "k_proj", "v_proj", "proj"}):
                raise UserError(f"{self.settings['name']}: block {i} has no self-attention that phase 2 can train.")
            names += [f"vit.blocks.{i}.attn.{name}" for name in kept]
        return names

    def stored_names(self):
        """Names of weights that a checkpoint must hold: trained ones, and position embeddings, which timm resamples."""
        trained = self.trained | {name for name, p in self.named_parameters() if p.requires_grad}
        return [n for n, _ in self.named_parameters() if n in trained or "pos_embed" in n or "rel_pos" in n]


def parse_layers(layers):
    """ "0,2,4", or the report's "blocks.{0,2,4}" -> [0, 2, 4]."""
    match = re.fullmatch(r"(?:blocks\.)?\{?(\d+(?:\s*,\s*\d+)*)\}?", layers.strip())
    if not match:
        raise UserError(f'LAYERS is "{layers}", expected block numbers such as "0,2,4,6,8,10".')
    return sorted({int(number) for number in match[1].split(",")})


def create_vit(name, image_size, pretrained, seed):
    """A timm ViT without its classifier; pretrained weights come from weights/NAME.safetensors or the hub."""
    local, options = WEIGHTS_DIR / f"{name}.safetensors", {}
    if pretrained and local.exists():
        options["pretrained_cfg_overlay"] = {"file": str(local), "custom_load": False}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=image_size, **options)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if not pretrained or "img_size" in reason or isinstance(error, AssertionError):
            raise UserError(f"timm cannot build {name} as a ViT for pictures of {image_size} px ({reason}).")
        raise UserError(f"no pretrained weights for {name}: without a network, put them at {local}. ({reason})")
    if not all(hasattr(vit, attribute) for attribute in ("blocks", "forward_intermediates", "num_prefix_tokens")):
        raise UserError(f"trunk {name} is not a ViT, expected one such as eva02_base_patch14_224.mim_in22k.")
    if image_size % vit.patch_embed.patch_size[0]:
        raise UserError(f"IMAGE_SIZE is {image_size}, expected a multiple of {vit.patch_embed.patch_size[0]}.")
    return vit


class FeatureProjection(nn.Module):
    """1x1 convolution, then one learned spatial pooling map per latent unit: their outer product, on EVA02-base 190
    times fewer weights than a dense projection. Batch norm is applied by Head.combine."""

    def __init__(self, n_tokens, n_channels, latent_dim):
        super().__init__()
        self.spatial = nn.Parameter(uniform(latent_dim, n_tokens))  # S
        self.channel = nn.Parameter(uniform(latent_dim, n_channels))  # W
        self.norm = nn.BatchNorm1d(latent_dim)

    def forward(self, x):
        y = F.linear(x, self.channel)  #                                    (n, n_tokens, latent_dim)
        pooling = self.spatial.T.to(y.dtype).contiguous()  # else autograd copies products to transpose them
        return (y * pooling).sum(1, dtype=torch.promote_types(y.dtype, torch.float32))  # (n, latent_dim)


class Head(nn.Module):
    """The multi-subject encoding head.

    feature_shapes: (n_tokens, n_channels) per layer. With Table 1's sizes on EVA02-base and 39,548 vertices:
    25,200,640 trainable and 106,234,492 parameters in all.
    """

    def __init__(self, feature_shapes, latent_dim, pca_dim, n_subjects, n_vertices, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.projections = nn.ModuleList(FeatureProjection(t, c, latent_dim) for t, c in feature_shapes)
        self.shared = nn.Parameter(uniform(pca_dim, latent_dim))  # A
        self.subject_weight = nn.Parameter(uniform(n_subjects, pca_dim, latent_dim))  # B
        self.subject_bias = nn.Parameter(uniform(n_subjects, pca_dim, fan_in=latent_dim))  # b
        self.embed_weight = nn.Parameter(torch.zeros(n_vertices, pca_dim), requires_grad=False)  # E, frozen
        self.embed_bias = nn.Parameter(torch.zeros(n_vertices), requires_grad=False)  # mean, frozen

    def forward(self, features, subject=None):
        """features: per layer (n, n_tokens, n_channels); subject (n,) int64, None: group -> z (n, pca_dim)."""
        p = self.project(features)  #                                       (n_layers, n, latent_dim)
        h = self.combine(p)  #                                              (n, latent_dim)
        return self.encode(h, subject)  #                                   (n, pca_dim)

    def project(self, features, generator=None):
        """features -> p (n_layers, n, latent_dim) float32, each sample by itself. generator: of the dropout."""
        dropping = self.training and self.dropout > 0
        p = []
        for projection, x in zip(self.projections, features):
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))  # halves the traffic of dropout
            if dropping:
                x = x * torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
            p.append(projection(x))
        # dropout's factor in float32: in float16 it would overflow for features above 6,550
        return torch.stack(p) / (1 - self.dropout) if dropping else torch.stack(p)

    def combine(self, p):
        """p (n_layers, n, latent_dim) -> h (n, latent_dim). In training batch norm uses these n samples."""
        with autocast(p.device):
            return torch.stack([f.norm(p_l) for f, p_l in zip(self.projections, p)]).mean(0)

    def encode(self, h, subject=None):
        """h (n, latent_dim), subject (n,) int64 or None -> z (n, pca_dim)."""
        with autocast(h.device):
            z = F.linear(h, self.shared)  #                                 (n, pca_dim)
            if subject is not None:
                every = F.linear(h, self.subject_weight.flatten(0, 1), self.subject_bias.flatten())
                every = every.view(len(h), *self.subject_bias.shape)  #     (n, n_subjects, pca_dim)
                z = z + every[torch.arange(len(h), device=h.device), subject]
        return z

    def decode(self, z):
        """z (n, pca_dim) -> activity y (n, n_vertices)."""
        with autocast(z.device):
            return F.linear(z, self.embed_weight, self.embed_bias)

    def with_parameters(self, **tensors):
        """A copy with some parameters replaced; all others are shared with this head."""
        head = copy.copy(self)
        replaced = {n: nn.Parameter(t, requires_grad=self._parameters[n].requires_grad) for n, t in tensors.items()}
        head._parameters = {**self._parameters, **replaced}
        return head


def uniform(*shape, fan_in=None):
    """Uniform in +-1/sqrt(fan_in), as nn.Linear; fan_in is the last dimension by default."""
    bound = (fan_in or shape[-1]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


def autocast(device, precision=torch.float32):
    """float32 switches an outer autocast off: the head after its projections costs a thousandth of the trunk."""
    return torch.autocast(torch.device(device).type, precision, enabled=precision != torch.float32)


class Encoder(nn.Module):
    """Trunk and head: pictures in, activity out. layers: those of the trunk's that the head takes (default: all)."""

    def __init__(self, trunk, head, layers=None):
        super().__init__()
        self.trunk, self.head = trunk, head
        self.layers = parse_layers(layers) if layers else trunk.layers
        self.chosen = [trunk.layers.index(layer) for layer in self.layers]

    def choose(self, features):
        return [features[i] for i in self.chosen]

    def latents(self, features):
        """The trunk's features -> h (n, latent_dim)."""
        return self.head.combine(self.head.project(self.choose(features)))

    def forward(self, images, subject=None):
        """images (n, 3, size, size) normalised, subject (n,) int64 or None -> z (n, pca_dim)."""
        return self.head(self.choose(self.trunk(images)), subject)

    def predict(self, h, subject=None):
        """Activity (n, n_vertices) of one subject (an index; None: group) from h (n, latent_dim)."""
        if subject is not None:
            subject = torch.full((len(h),), subject, device=h.device)
        return self.head.decode(self.head.encode(h, subject))


@torch.inference_mode()
def trunk_outputs(trunk, images, functions, batch_size=64, precision=torch.float32, update=None):
    """Apply functions to the trunk's features of whole pictures (report: evaluation resizes only).

    images (n, 256, 256, 3) uint8, array or tensor; functions: features -> tensor (n, …); update: called with the size
    of each batch -> per function its results for all pictures. Every prediction comes through here.
    """
    if images.shape[1:] != (PICTURE_SIZE, PICTURE_SIZE, 3) or "uint8" not in str(images.dtype):
        raise UserError(f"pictures are {images.dtype} of shape {tuple(images.shape)}, expected uint8 (n, 256, 256, 3).")
    device = next(trunk.parameters()).device
    crops = Crops(trunk, device=device)
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        batch = (batch if isinstance(batch, torch.Tensor) else torch.from_numpy(np.array(batch))).to(device)
        with autocast(device, precision):
            features = trunk(crops.whole(batch))
            parts.append([function(features) for function in functions])
        if update:
            update(len(batch))
    return [torch.cat(part) for part in zip(*parts)]


class Crops:
    """Square crops of a batch of pictures, each with its own box, resized on the device in two matrix products.

    Antialiased bicubic, equal to torchvision's resized_crop on floats. smallest_area: of the boxes, as a fraction.
    """

    def __init__(self, trunk, smallest_area=1.0, device="cpu"):
        self.size, self.device = trunk.image_size, device
        self.smallest = smallest = int(np.rint(PICTURE_SIZE * np.sqrt(smallest_area)))  # px
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (trunk.mean, trunk.std))
        # weights of every crop size with zeros on both sides: a box that starts at pixel i is a shift by i
        table = torch.zeros(PICTURE_SIZE - smallest + 1, self.size, 3 * PICTURE_SIZE)
        for k, crop in enumerate(range(smallest, PICTURE_SIZE + 1)):
            table[k, :, PICTURE_SIZE : PICTURE_SIZE + crop] = resize_weights(crop, self.size)
        self.table = table.to(device)

    def __call__(self, images, top, left, size):
        """images (n, 256, 256, 3) uint8; top, left, size (n,) int64 px -> (n, 3, size, size) float32, normalised."""
        n = len(images)
        with autocast(images.device):
            rows, columns = self.weights(top, size), self.weights(left, size)  #  (n, size, 256)
            x = torch.bmm(rows, images.flatten(2).float())  #                     (n, size, 256 * 3)
            x = x.view(n, self.size, PICTURE_SIZE, 3).permute(0, 3, 1, 2)  #      (n, 3, size, 256)
            x = torch.bmm(x.reshape(n, -1, PICTURE_SIZE), columns.transpose(1, 2))
            x = x.view(n, 3, self.size, self.size)
            return x.sub_(self.mean).div_(self.std)

    def weights(self, start, size):
        pixel = torch.arange(PICTURE_SIZE, device=self.device) + PICTURE_SIZE
        out = torch.arange(self.size, device=self.device)
        return self.table[(size - self.smallest)[:, None, None], out[None, :, None], (pixel - start[:, None])[:, None]]

    def whole(self, images):
        """Evaluation: resize only."""
        start = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        return self(images, start, start, start + PICTURE_SIZE)


def resize_weights(source, size):
    """Antialiased bicubic resampling, source px -> size px: weights (size, source). Resizing is linear: what it makes
    of the identity."""
    identity = torch.eye(source, dtype=torch.float64)[None, None]
    return F.interpolate(identity, (size, source), mode="bicubic", antialias=True)[0, 0].float()


def random_boxes(n, smallest_area, rng):
    """Square boxes of area uniform in [smallest_area, 1]: top, left, size, each (n,) int64 px."""
    size = np.rint(PICTURE_SIZE * np.sqrt(rng.uniform(smallest_area, 1, n))).astype(np.int64)
    top, left = (rng.random((2, n)) * (PICTURE_SIZE - size + 1)).astype(np.int64)
    return [torch.from_numpy(v) for v in (top, left, size)]
