"""The model: a multi-subject linear fMRI encoding head on a pretrained vision trunk.

Lane & Kiar 2023, "A Parameter-efficient Multi-subject Model for Predicting fMRI Activity"
("the report"). For layer l with features x_l (n_tokens x n_channels), latent unit d, subject s:

    p_l[d] = sum_n S_l[d,n] sum_c W_l[d,c] dropout(x_l)[n,c]     feature projection
    h      = mean_l BatchNorm_l(p_l)                             (latent_dim,)
    z      = A h + B_s h + b_s                                   (pca_dim,)
    y      = E z + mean                                          (n_vertices,)

Without a subject z = A h: the subject-agnostic group prediction.

In this file: trunk features, head, encoder, crops, vertex space. It imports no stage; scores.py scores,
checkpoint.py saves and loads, training.py trains.
"""

import dataclasses
import difflib
import fnmatch
import functools
import glob
import itertools
import math
import re
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

from common import Problem, explain

picture_size = 256  # px, side of the prepared pictures (prepare_data.py writes them)
weights_dir = Path("weights")  # local pretrained trunks, looked at before the network
weights_suffixes = (".safetensors", ".bin", ".pth", ".pt")  # of the files in it, behind the trunk's whole name
which_work = "README, Trunk, says which work"  # ends what refuses a trunk
dropout_chunk = 16  # samples whose dropout is drawn together


# ---- trunk: token features of a timm ViT -------------------------------------------------------


class Trunk(nn.Module):
    """Raw token features (class and register tokens included, no final norm) of named layers of a timm ViT.

    name: timm model; layers: patterns of module names inside its blocks, separated by spaces,
    with braces and wildcards, as "blocks.{0,2,4}", "blocks.{0..11}", "blocks.*.attn".
    image_size: px; position embeddings are resized to it where the weights have another size.
    Nothing above the last block in use is kept or computed.
    """

    def __init__(self, name, layers, *, image_size=224, pretrained=True, seed=0):
        super().__init__()
        name = whole_name(name)
        self.settings = dict(name=name, layers=layers, image_size=image_size, pretrained=pretrained, seed=seed)
        self.vit = create_vit(name, image_size, pretrained, seed)
        self.layers = match_layers([n for n, _ in self.vit.named_modules()], layers)
        last = max(int(layer.split(".")[1]) for layer in self.layers)
        self.vit.prune_intermediate_layers([last], prune_norm=True, prune_head=True)
        # names of weights that a checkpoint holds: those of the pretrained file itself it knows by a fingerprint
        self.stored = {f"vit.{n}" for n in resized_weights(self.vit, name, image_size)} if pretrained else set()
        self.features = {}
        for layer in self.layers:  # copies and pickles of a partial take its dict along, those of a closure do not
            hook = functools.partial(keep_output, self.features, layer)
            self.vit.get_submodule(layer).register_forward_hook(hook)
        self.image_size = image_size
        self.mean, self.std = (self.vit.pretrained_cfg[k] for k in ("mean", "std"))
        self.requires_grad_(False).eval()
        self.feature_shapes = self.find_shapes()  # (n_tokens, n_channels)
        n_patches = math.prod(self.vit.patch_embed.grid_size)
        self.n_prefix = [n_tokens - n_patches for n_tokens, _ in self.feature_shapes]  # tokens ahead of the picture's

    def find_shapes(self):
        """(n_tokens, n_channels) of every layer, by one black picture; refuses what gives no tokens of it."""
        name, size, n_patches = self.settings["name"], self.image_size, math.prod(self.vit.patch_embed.grid_size)
        try:
            with torch.no_grad():
                self.vit.forward_features(torch.zeros(1, 3, size, size))
        except Exception as error:
            if explain(error, {}):  # memory ran out
                raise
            raise Problem(f"trunk {name} takes no pictures of {size} px ({one_line(error)}); {which_work}")
        features = [self.features.get(layer) for layer in self.layers]  # some modules are never called
        self.features.clear()
        for layer, x in zip(self.layers, features):
            shape = tuple(x.shape) if isinstance(x, torch.Tensor) else None
            if shape is None or len(shape) != 3 or shape[1] < n_patches:
                raise Problem(
                    f"layer {layer} of trunk {name} gives features of shape {shape}, expected (n_images, n_tokens, "
                    f"n_channels), {n_patches} tokens or more: name whole blocks of a ViT in LAYERS, for example "
                    f'"blocks.{{0,2,4,6,8,10}}"; {which_work}'
                )
        return [tuple(x.shape[1:]) for x in features]

    def train(self, mode=True):
        return super().train(False)  # the trunk keeps its inference behaviour in both phases

    def forward(self, images):
        """images (n, 3, image_size, image_size), normalised -> per layer (n, n_tokens, n_channels)."""
        self.vit.forward_features(images)
        features = [self.features[layer] for layer in self.layers]
        self.features.clear()
        return features

    def attention_parameters(self):
        """Names of the q, k, v and output projections of all blocks kept (report: phase 2).

        A trunk is refused when any of its blocks has an attention without one of the four, or none.
        """
        kind = re.compile(r"(qkv|qk|v|[qkv]_proj|proj)\.(weight|bias)|[qkv]_bias")  # proj: the output
        parts = {"qkv": "qkv", "qk": "qk", "v": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "o"}
        names = []
        for i, block in enumerate(self.vit.blocks):
            attentions = {n: m for n, m in block.named_modules() if n.rpartition(".")[2] == "attn"}
            complete = bool(attentions)
            for path, attention in attentions.items():
                found = [n for n, _ in attention.named_parameters() if kind.fullmatch(n)]
                weights = "".join(parts.get(n.removesuffix(".weight"), "") for n in found)
                complete = complete and set(weights) == set("qkvo")
                names += [f"vit.blocks.{i}.{path}.{n}" for n in found]
            if not complete:
                present = [n for n, _ in block.named_parameters() if "mlp" not in n]
                raise Problem(
                    f"blocks.{i} of trunk {self.settings['name']} has no self-attention with q, k, v and output "
                    f"weights of its own, which phase 2 trains (it has {', '.join(present)}); {which_work}"
                )
        return names


def keep_output(features, layer, module, inputs, output):
    """A forward hook, when features and layer are given."""
    features[layer] = output


def whole_name(name):
    """timm's name of a model with the tag of its weights, by default timm's; without where it has no weights."""
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:  # there is no such tag
        known = None
    if known is None:
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_models(pretrained=True), 3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise Problem(f"unknown trunk {name}, expected a timm model name{hint}")
    return f"{known.architecture}.{known.tag}" if known.tag and known.has_weights else name


def create_vit(name, image_size, pretrained, seed):
    """timm model without a classifier. name: from whole_name; pretrained weights come from weights/NAME.safetensors
    (or another of weights_suffixes) or the hub."""
    local = [path for suffix in weights_suffixes if (path := weights_dir / f"{name}{suffix}").exists()]
    overlay = {"pretrained_cfg_overlay": {"file": str(local[0]), "custom_load": False}} if pretrained and local else {}
    unusable = Problem(
        f"trunk {name.partition('.')[0]} has no transformer blocks on a grid of patches, expected a ViT such as "
        f"eva02_base_patch14_224.mim_in22k; {which_work}"
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=image_size, **overlay)
    except Exception as error:
        if explain(error, {}):  # memory or disk ran out
            raise
        if isinstance(error, TypeError) and "img_size" in str(error):  # convolutional networks take none
            raise unusable
        if not pretrained:
            raise Problem(f"timm cannot build trunk {name} at {image_size} px: {one_line(error)}")
        raise Problem(no_weights(name, local, one_line(error)))
    if not all(hasattr(vit, part) for part in ("blocks", "prune_intermediate_layers", "forward_features")):
        raise unusable
    if not hasattr(getattr(vit, "patch_embed", None), "grid_size"):
        raise unusable
    patch = vit.patch_embed.patch_size[0]
    if image_size % patch:
        raise Problem(f"IMAGE_SIZE is {image_size}, expected a multiple of {patch}, the patch size of {name}")
    return vit


def no_weights(name, local, reason):
    """What to say where timm cannot load a trunk's weights."""
    known, random = timm.get_pretrained_cfg(name), "or, for random weights, train_head.py --pretrained false"
    source = known.url  # of some that are not on the hub
    if known.hf_hub_id:
        source = f"{known.hf_hub_filename or 'model.safetensors'} of huggingface.co/{known.hf_hub_id}"
    if local:
        expected = f"expected {source or 'these'}; {random}"
        return f"{local[0]} cannot be read as weights of trunk {name} ({reason}), {expected}"
    if not source:
        return f"timm knows no pretrained weights for trunk {name}: take another; {random}"
    place = weights_dir / f"{name}{'.safetensors' if 'safetensors' in source else '.pth'}"
    others = sorted(path.name for path in weights_dir.glob(f"{glob.escape(name.partition('.')[0])}.*"))
    hint = f" (there is {', '.join(others)}, for another trunk)" if others else ""
    return (
        f"no pretrained weights for trunk {name}: the hub gave {reason}\nWithout network, fetch {source} elsewhere and "
        f"put it at {place}{hint}; {random}"
    )


def resized_weights(vit, name, image_size):
    """Names of vit's weights whose shape depends on the size of the picture: position embeddings and the like.

    timm resamples them where the file's are of another size, which differs in the last bits between processors.
    """
    with torch.device("meta"):
        other = timm.create_model(name, num_classes=0, img_size=2 * image_size).state_dict()
    return [n for n, v in vit.state_dict().items() if v.is_floating_point() and v.shape != other[n].shape]


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")[:300]


def match_layers(names, patterns):
    """Names, in module order, that the patterns match; every pattern must match something."""
    blocks = [n for n in names if re.match(r"blocks\.\d+(\.|$)", n)]
    matched = set()
    for pattern in [p for part in split_patterns(patterns) for p in expand_braces(part)]:
        # a wildcard stands for one part of a name, so that blocks.* means blocks, not their insides
        found = [n for n in blocks if n.count(".") == pattern.count(".") and fnmatch.fnmatchcase(n, pattern)]
        if not found:
            top = [n for n in blocks if n.count(".") == 1]
            raise Problem(
                f"layer pattern {pattern} (from {patterns!r}) matches nothing in the trunk, "
                f"which has {top[0]} … {top[-1]} and their submodules"
            )
        matched.update(found)
    if not matched:
        raise Problem(f"LAYERS {patterns!r} names no layer, expected for example blocks.{{0,2,4}}")
    return [n for n in blocks if n in matched]


def split_patterns(patterns):
    return re.findall(r"(?:\{[^}]*\}|[^\s{,;])+", patterns)


def expand_braces(pattern):
    """'blocks.{0,2}' -> ['blocks.0', 'blocks.2']; '{0..3}' counts."""
    parts = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        counts = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if counts:
            parts.append([str(i) for i in range(int(counts[1]), int(counts[2]) + 1)])
        elif part.startswith("{"):
            parts.append([p.strip() for p in part[1:-1].split(",")])
        else:
            parts.append([part])
    return ["".join(choice) for choice in itertools.product(*parts)]


# ---- head ---------------------------------------------------------------------------------------


class FeatureProjection(nn.Module):
    """1x1 convolution, then a learned spatial pooling map per latent unit, then batch norm.

    spatial S (latent_dim, n_tokens), channel W (latent_dim, n_channels): the full projection of
    latent unit d is the outer product of S[d] and W[d]: on EVA02-base 190 times fewer weights than a
    dense one.
    """

    def __init__(self, n_tokens, n_channels, latent_dim):
        super().__init__()
        self.spatial = nn.Parameter(uniform(latent_dim, n_tokens))
        self.channel = nn.Parameter(uniform(latent_dim, n_channels))
        self.norm = nn.BatchNorm1d(latent_dim)

    def forward(self, x):
        """x (n, n_tokens, n_channels) -> p (n, latent_dim), float32 at least; norm() comes after."""
        return ProjectAndPool.apply(x, self.channel, self.spatial)


class ProjectAndPool(torch.autograd.Function):
    """p[n,d] = sum_t S[d,t] sum_c W[d,c] x[n,t,c], computed in the type of x.

    Both products with S run over a few images at a time, while these are in the cache: on a CPU
    the step's whole head takes 0.6 of what autograd's einsum needs (benchmark.py), and the
    (n, n_tokens, latent_dim) product with S is never stored.
    """

    @staticmethod
    def forward(ctx, x, channel, spatial):
        wide = torch.promote_types(x.dtype, torch.float32)
        w, s = channel.to(x.dtype), spatial.T.to(x.dtype).contiguous()
        ctx.at_once = 64 if x.is_cuda else 8  # 8 measured; on a GPU 64 only bounds memory, unmeasured
        y = [F.linear(part, w) for part in x.split(ctx.at_once)]  #       (at_once, n_tokens, latent_dim)
        p = torch.cat([(part * s).sum(1, dtype=wide) for part in y])  #   (n, latent_dim)
        ctx.save_for_backward(x, w, s, *y)
        return p

    @staticmethod
    def backward(ctx, grad):
        x, w, s, *y = ctx.saved_tensors
        parts = grad.to(x.dtype)[:, None].split(ctx.at_once)  #           (at_once, 1, latent_dim)
        grad_spatial = sum((part * g).sum(0, dtype=grad.dtype) for part, g in zip(y, parts))
        grad_y = torch.cat([g * s for g in parts])  #                     (n, n_tokens, latent_dim)
        grad_channel = (grad_y.flatten(0, 1).T @ x.flatten(0, 1)).to(grad.dtype)
        grad_x = grad_y @ w if ctx.needs_input_grad[0] else None  #       phase 2 only
        return grad_x, grad_channel, grad_spatial.T


def dropout_mask(x, p, seed, first=0):
    """1 where a feature is kept, 0 where it is dropped, of x (n, n_tokens, n_channels).

    The mask of a sample depends on seed (ints) and its place in the whole batch, first and following, not on
    how the batch is divided over micro-batches or processes: chunks of the batch are drawn one by one.
    """
    n, masks = len(x), []
    generator = torch.Generator(x.device)
    for chunk in range(first // dropout_chunk, -(-(first + n) // dropout_chunk)):
        generator.manual_seed(int(np.random.default_rng([*seed, chunk]).integers(2**62)))
        draws = torch.empty(dropout_chunk, *x.shape[1:], dtype=x.dtype, device=x.device)
        start = chunk * dropout_chunk
        masks.append(draws.bernoulli_(1 - p, generator=generator)[max(first - start, 0) : first + n - start])
    return torch.cat(masks)


class Head(nn.Module):
    """The multi-subject encoding head.

    feature_shapes: (n_tokens, n_channels) of each trunk layer. Table 1 on EVA02-base with 39,548
    vertices: 25,200,640 trainable and 106,234,492 total parameters.
    """

    def __init__(self, feature_shapes, latent_dim, pca_dim, n_subjects, n_vertices, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.bias_count = 1  # the authors' published weights: 2, see convert_published
        self.projections = nn.ModuleList(FeatureProjection(t, c, latent_dim) for t, c in feature_shapes)
        self.shared = nn.Parameter(uniform(pca_dim, latent_dim))  # A
        self.subject_weight = nn.Parameter(uniform(n_subjects, pca_dim, latent_dim))  # B
        self.subject_bias = nn.Parameter(uniform(n_subjects, pca_dim, fan_in=latent_dim))  # b
        # group PCA, frozen: set_embedding fills it
        self.embed_weight = nn.Parameter(torch.zeros(n_vertices, pca_dim), requires_grad=False)  # E
        self.embed_bias = nn.Parameter(torch.zeros(n_vertices), requires_grad=False)  # mean

    def set_embedding(self, components, mean):
        """components (n_vertices, pca_dim), orthonormal columns; mean (n_vertices,): used, not copied."""
        self.embed_weight = nn.Parameter(components, requires_grad=False)
        self.embed_bias = nn.Parameter(mean, requires_grad=False)

    def replaced(self, subject_weight, subject_bias, embed_weight, embed_bias):
        """A head with these subjects' maps and this embedding; all else is this one's, not copied."""
        shapes = [(p.spatial.shape[1], p.channel.shape[1]) for p in self.projections]
        with torch.device("meta"):
            head = Head(shapes, self.shared.shape[1], self.shared.shape[0], len(subject_bias), len(embed_bias))
        head.projections, head.shared, head.bias_count = self.projections, self.shared, self.bias_count
        head.subject_weight, head.subject_bias = nn.Parameter(subject_weight), nn.Parameter(subject_bias)
        head.set_embedding(embed_weight, embed_bias)
        return head.train(self.training)

    def forward(self, features, subject=None):
        """features: per layer (n, n_tokens, n_channels); subject (n,) int64 or None for the group
        prediction -> activity latents z (n, pca_dim), float32."""
        return self.encode(self.combine(self.project(features)), subject)

    def project(self, features, seed=None, first=0):
        """features -> p of every layer (n_layers, n, latent_dim), each sample by itself.

        seed, first: of the dropout in training, see dropout_mask; no seed: torch's generator gives one.
        """
        p = []
        dropping = self.training and self.dropout > 0
        if dropping and seed is None:
            seed = (int(torch.randint(2**62, ())),)
        for layer, (projection, x) in enumerate(zip(self.projections, features)):
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))  # half the traffic of dropout
            if dropping:
                x = x * dropout_mask(x, self.dropout, (*seed, layer), first)
            p.append(projection(x))  #                              (n, latent_dim)
        p = torch.stack(p)  #                                       (n_layers, n, latent_dim)
        # dropout's factor stands here, in float32: in float16 it would send features above 6,550 to infinity
        return p / (1 - self.dropout) if dropping else p

    def combine(self, p):
        """p (n_layers, n, latent_dim) -> feature latents h (n, latent_dim), the same for all subjects.
        In training batch norm takes its statistics from these n samples."""
        return torch.stack([projection.norm(x) for projection, x in zip(self.projections, p)]).mean(0)

    def encode(self, h, subject=None):
        """h (n, latent_dim) -> z (n, pca_dim)."""
        # the maps cost a thousandth of the trunk: full precision keeps rounding out of z
        with torch.autocast(h.device.type, enabled=False):
            z = F.linear(h, self.shared)  #                     (n, pca_dim)
            if subject is not None:
                n_subjects, pca_dim = self.subject_bias.shape
                own = F.linear(h, self.subject_weight.flatten(0, 1), self.subject_bias.flatten())
                own = own.view(-1, n_subjects, pca_dim)  #      (n, n_subjects, pca_dim), of all subjects
                z = z + own[torch.arange(len(z), device=z.device), subject]
        return z

    def decode(self, z, group=False):
        """z (n, pca_dim) -> activity y (n, n_vertices), float32. group: z is a group prediction."""
        return F.linear(z, self.embed_weight, self.embed_bias * (1 if group else self.bias_count))


def uniform(*shape, fan_in=None):
    """Uniform in +-1/sqrt(fan_in), as nn.Linear; fan_in defaults to the last dimension."""
    bound = (fan_in or shape[-1]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


class Encoder(nn.Module):
    """Trunk and head together: pictures in, activity out.

    layers: pattern of the trunk's layers that the head takes; empty: all that the trunk computes.
    """

    def __init__(self, trunk, head, layers=""):
        super().__init__()
        self.trunk, self.head = trunk, head
        self.layers = layers or trunk.settings["layers"]
        self.chosen = [trunk.layers.index(layer) for layer in match_layers(trunk.layers, self.layers)]

    def forward(self, images, subject=None):
        """images (n, 3, size, size) normalised, subject (n,) or None -> z (n, pca_dim)."""
        return self.head(self.choose(self.trunk(images)), subject)

    def latents(self, features):
        """The trunk's features -> h (n, latent_dim)."""
        return self.head.combine(self.head.project(self.choose(features)))

    def choose(self, features):
        """Of the trunk's features those that the head takes."""
        return [features[i] for i in self.chosen]

    def trunk_settings(self):
        """Settings of the trunk that this encoder needs, nothing above its last layer."""
        return self.trunk.settings | {"layers": self.layers}

    def trunk_state(self):
        """{name: weight} of that trunk."""
        last = max(int(self.trunk.layers[i].split(".")[1]) for i in self.chosen)
        block = re.compile(r"vit\.blocks\.(\d+)\.")
        state = self.trunk.state_dict()
        return {name: v for name, v in state.items() if not (m := block.match(name)) or int(m[1]) <= last}

    def rearranged(self, subjects, columns):
        """An encoder of the subjects with these indices, and of the vertices in these columns, -1: one that is
        predicted as 0. columns: (n_vertices,) int64 array."""
        head, columns = self.head, torch.from_numpy(columns).to(self.head.embed_bias.device)
        known = columns >= 0
        weight, bias = head.embed_weight.detach()[columns] * known[:, None], head.embed_bias.detach()[columns] * known
        maps = head.subject_weight.detach()[subjects], head.subject_bias.detach()[subjects]
        return Encoder(self.trunk, head.replaced(*maps, weight, bias), self.layers)

    def n_parameters(self):
        """(trainable, total) of the head."""
        parameters = list(self.head.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def predict(self, images, subjects, *, batch_size=64, precision=torch.float32):
        """Activity of whole pictures, see predict_mean."""
        return predict_mean([self], images, subjects, batch_size=batch_size, precision=precision)

    def decode(self, h, subject):
        """Feature latents h (n, latent_dim) -> activity (n, n_vertices) of one subject (an index; None: group)."""
        head = self.head
        z = F.linear(h, head.shared)  #                             (n, pca_dim)
        if subject is not None:  # of this subject alone: Head.encode maps for all
            z = z + F.linear(h, head.subject_weight[subject], head.subject_bias[subject])
        return head.decode(z, group=subject is None)


@torch.inference_mode()
def predict_mean(encoders, images, subjects, *, batch_size=64, precision=torch.float32):
    """Activity of whole pictures for several subjects, mean over encoders of one vertex space.

    images: (n, 256, 256, 3) uint8 array or tensor; subjects: indices, None for the group prediction
    -> a list with one (n, n_vertices of the common space) float32 tensor on the CPU for each of subjects.
    """
    latents = feature_latents(encoders, images, batch_size=batch_size, precision=precision)
    parts = list(zip(*(h.split(batch_size) for h in latents)))  # decoded a batch at a time: bounds a GPU's memory
    return [torch.cat([decode_mean(encoders, part, s).cpu() for part in parts]) for s in subjects]


def decode_mean(encoders, latents, subject):
    """Mean over encoders of the activity that each decodes from its feature latents: (n, n_vertices)."""
    first, *others = (encoder.decode(h, subject) for encoder, h in zip(encoders, latents))
    for activity in others:
        first += activity
    return first.div_(len(encoders)) if others else first


@torch.inference_mode()
def feature_latents(encoders, images, *, batch_size=64, precision=torch.float32, update=None):
    """h of whole pictures as of_features reads them; a trunk that several encoders share runs once.

    -> for each encoder h (n, latent_dim) float32 on its device. The only way to predict: training's validation,
    submission, evaluation and own pictures all come through here. update: told of the first trunk's batches.
    """
    latents, options = {}, dict(batch_size=batch_size, precision=precision)
    for trunk in dict.fromkeys(encoder.eval().trunk for encoder in encoders):
        own = [i for i, encoder in enumerate(encoders) if encoder.trunk is trunk]
        found = of_features(trunk, images, [encoders[i].latents for i in own], update=update, **options)
        latents |= dict(zip(own, found))
        update = None
    return [latents[i] for i in range(len(encoders))]


@torch.inference_mode()
def of_features(trunk, images, functions, *, batch_size=64, precision=torch.float32, update=None):
    """Functions of the trunk's features of whole pictures, resized only (report: evaluation); the trunk runs once.

    images: (n, 256, 256, 3) uint8 array, also a mapped one, or tensor; functions: of features as trunk gives
    them, per layer (n, n_tokens, n_channels), to a tensor (n, …); update: called after every batch with its size
    -> for each function its results of all pictures, on the trunk's device.
    """
    check_images(images)
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


def check_images(images):
    """Refuse what is not (n, 256, 256, 3) uint8, n 1 or more."""
    found = f"{str(getattr(images, 'dtype', type(images).__name__)).removeprefix('torch.')}"
    shape = tuple(getattr(images, "shape", ()))
    if found != "uint8" or len(shape) != 4 or shape[1:] != (picture_size, picture_size, 3) or not shape[0]:
        raise Problem(
            f"pictures are {found} of shape {shape}, expected uint8 values 0 to 255 of shape (n, {picture_size}, "
            f"{picture_size}, 3): pictures.read_picture(path) reads a file so"
        )


def autocast(device, precision):
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


# ---- crops --------------------------------------------------------------------------------------


class Crops:
    """Square crops of a batch of pictures, resized on the device in two matrix products.

    Antialiased bicubic, equal to torchvision's resized_crop on floats. Every crop has its own box;
    the resampling weights of each crop size are computed once, since sizes are whole pixels.

    source: px of the pictures; size: px of the result; smallest: px of the smallest crop.
    """

    def __init__(self, trunk, smallest=picture_size, source=picture_size, device="cpu"):
        self.source, self.size, self.smallest, self.device = source, trunk.image_size, smallest, device
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (trunk.mean, trunk.std))
        self.mean, self.std = mean, std
        # weights of all crop sizes, zeros on both sides: a box that starts at pixel i is a shift by i
        table = torch.zeros(source - smallest + 1, self.size, 3 * source)
        for k, crop in enumerate(range(smallest, source + 1)):
            table[k, :, source : source + crop] = resize_weights(crop, self.size)
        self.table = table.to(device)

    def __call__(self, images, top, left, size):
        """images (n, source, source, 3) uint8; top, left, size (n,) int64 px, on self.device
        -> (n, 3, size, size) float32, normalised with the trunk's mean and std."""
        n = len(images)
        with torch.autocast(images.device.type, enabled=False):
            rows, columns = self.weights(top, size), self.weights(left, size)  # (n, size, source)
            x = torch.bmm(rows, images.flatten(2).float())  #                     (n, size, source*3)
            x = x.view(n, self.size, self.source, 3).permute(0, 3, 1, 2)
            x = torch.bmm(x.reshape(n, -1, self.source), columns.transpose(1, 2))
            x = x.view(n, 3, self.size, self.size)
            return x.sub_(self.mean).div_(self.std)

    def weights(self, start, size):
        pixel = torch.arange(self.source, device=self.device) + self.source  # (source,)
        out = torch.arange(self.size, device=self.device)
        return self.table[(size - self.smallest)[:, None, None], out[None, :, None], (pixel - start[:, None])[:, None]]

    def whole(self, images):
        """Evaluation: resize only. images (n, source, source, 3) uint8 on self.device."""
        start = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        return self(images, start, start, start + self.source)


def resize_weights(source, size):
    """Antialiased bicubic resampling (a = -0.5), source px -> size px: weights (size, source)."""
    scale = max(source / size, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * source / size
    first = (centre - 2 * scale + 0.5).long().clamp(min=0)
    last = (centre + 2 * scale + 0.5).long().clamp(max=source)
    pixel = torch.arange(source)
    x = ((pixel + 0.5 - centre[:, None]) / scale).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    weights *= (pixel >= first[:, None]) & (pixel < last[:, None])
    return (weights / weights.sum(1, keepdim=True)).float()


def random_boxes(n, smallest_area, rng, source=picture_size):
    """Square boxes of area uniform in [smallest_area, 1]: top, left, size, each (n,) int64 px."""
    size = np.rint(source * np.sqrt(rng.uniform(smallest_area, 1, n))).astype(np.int64)
    top, left = (rng.random((2, n)) * (source - size + 1)).astype(np.int64)
    return tuple(torch.from_numpy(v) for v in (top, left, size))


def smallest_crop(smallest_area, source=picture_size):
    """Side in px of the smallest box that random_boxes draws."""
    if not 0 < smallest_area <= 1:
        raise Problem(f"CROP_SCALE is {smallest_area}, expected an area fraction above 0 and up to 1")
    return int(np.rint(source * np.sqrt(smallest_area)))


# ---- vertex space -------------------------------------------------------------------------------


@dataclasses.dataclass
class Space:
    """The common vertex space: the union over subjects of their vertices, left hemisphere first.

    subjects: names, n_subjects of them. vertices (n_vertices,) int64: index on fsaverage (of one
    hemisphere, 163,842). n_lh: how many of them are left. mask (n_subjects, n_vertices) bool: which
    vertices a subject has. rois: {group: {"names": {label: name}, "labels": (n_subjects,
    n_vertices) int16, 0 where unlabelled}}; groups are streams, prf-visualrois, floc-…. unit: what is
    called vertices here; of NSD-Flat's they are "pixels", counted row by row over its maps.
    """

    subjects: list
    vertices: torch.Tensor
    n_lh: int
    mask: torch.Tensor
    rois: dict
    unit: str = "vertices"

    @property
    def n_vertices(self):
        return len(self.vertices)

    def hemisphere(self, subject, hemi):
        """Columns of the common space that subject (an index; None: the group) has in hemi ("lh" or "rh"), in
        the order of the challenge's columns: (n,) int64."""
        columns = torch.arange(self.n_vertices)
        side = columns < self.n_lh if hemi == "lh" else columns >= self.n_lh
        return columns[side & torch.from_numpy(self.present(subject))]

    def present(self, subject=None):
        """(n_vertices,) bool array: which vertices a subject (an index) has; the group has all."""
        return self.mask[subject].numpy() if subject is not None else np.ones(self.n_vertices, bool)

    def find(self, other):
        """Columns of this space that are the vertices of another, (other.n_vertices,) int64 array, -1 where none is."""
        keys = [2 * s.vertices.numpy() + (np.arange(s.n_vertices) >= s.n_lh) for s in (self, other)]
        order = np.argsort(keys[0])
        place = order[np.searchsorted(keys[0], keys[1], sorter=order).clip(max=self.n_vertices - 1)]
        return np.where(keys[0][place] == keys[1], place, -1)

    def begins_with(self, other):
        """Whether this is another space, or that with subjects added."""
        names = self.subjects[: len(other.subjects)]
        same = self.n_lh == other.n_lh and torch.equal(self.vertices, other.vertices)
        return same and names == other.subjects and torch.equal(self.mask[: len(names)], other.mask)

    def roi_labels(self, group, subject=None):
        """Labels (n_vertices,) of a subject; the group's are those that most subjects give a vertex."""
        labels = self.rois[group]["labels"].numpy()
        if subject is not None:
            return labels[subject]
        votes = {v: ((labels == v) & self.mask.numpy()).sum(0) for v in np.unique(labels)}
        return np.array(list(votes))[np.argmax(list(votes.values()), axis=0)]

    def regions(self, subject=None):
        """{(ROI group, ROI): (n_vertices,) bool}: all vertices, then each group's ROIs, together, singly, and in one
        piece those that are labelled in parts: V1 of V1v and V1d, FFA of FFA-1 and FFA-2."""
        has = self.present(subject)
        found = {("all", "all"): has}
        for group, roi in self.rois.items():
            labels = self.roi_labels(group, subject)
            found[group, "all"] = has & (labels > 0)
            found |= {(group, name): has & (labels == v) for v, name in roi["names"].items() if v > 0}
            for v, name in roi["names"].items():
                part = re.fullmatch(r"(?P<whole>V\d)[vd]|(?P<area>.+)-\d", name)
                if part and v > 0:
                    area = group, part["whole"] or part["area"]
                    found[area] = found.get(area, False) | found[group, name]
        return found
