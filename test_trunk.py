"""The trunk and the checkpoint: features, layers and weights of timm's ViTs, and what a checkpoint keeps of them.

The trunk's features are compared with those of the whole timm model, taken by hooks of the test's own.
"""

import copy
import functools
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import model
import train_head
import training
from checkpoint import load_checkpoint, save_checkpoint
from common import Problem, constants
from model import Encoder, Head, Space, Trunk
from shared_fixtures import beit_attention, block_outputs, tiny


@pytest.fixture
def create(monkeypatch):
    """A function that sets what timm.create_model is called with besides: depth=1, for speed."""
    original = timm.create_model
    return lambda **options: monkeypatch.setattr(timm, "create_model", lambda *a, **o: original(*a, **o, **options))


# ---- features -----------------------------------------------------------------------------------

vit_attention = ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
eva_attention = ["q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias"] + vit_attention[2:]
trunks = {  # how many tokens stand before the picture's, and the weights that phase 2 trains
    "vit_base_patch16_224.mae": (1, vit_attention),  # the report's Table 4
    "vit_base_patch16_224.dino": (1, vit_attention),
    "vit_base_patch16_224.augreg_in21k_ft_in1k": (1, vit_attention),
    "vit_base_patch16_clip_224.openai": (1, vit_attention),
    "vit_base_patch14_dinov2.lvd142m": (1, vit_attention),
    "vit_base_patch16_clip_224.laion2b": (1, vit_attention),
    "beitv2_base_patch16_224.in1k_ft_in22k": (1, beit_attention),
    "eva02_base_patch14_224.mim_in22k": (1, eva_attention),
    "eva02_base_patch16_clip_224.merged2b": (1, eva_attention),
    "vit_base_patch16_dinov3.lvd1689m": (5, [n for n in vit_attention if n != "qkv.bias"]),  # newer ones
    "vit_base_patch16_siglip_224.v2_webli": (0, vit_attention),
    "vit_pe_core_base_patch16_224.fb": (1, vit_attention),
}


@pytest.mark.parametrize("name", trunks)
def test_trunk_is_timm_with_hooks(name, monkeypatch):
    n_prefix, attention = trunks[name]
    size, depth, layers, used = 112, 3, "blocks.{0,1}", [0, 1]  # 3 blocks, which are alike, for speed
    if name == train_head.TRUNK:  # the report's own whole
        depth, layers, used = 12, train_head.LAYERS, [0, 2, 4, 6, 8, 10]
    create, whole = timm.create_model, []

    def create_and_keep(*arguments, **options):
        vit = create(*arguments, **options, depth=depth)
        for parameter_name, p in vit.named_parameters():
            if "gamma" in parameter_name:
                nn.init.constant_(p, 0.3)  # from 1e-5, at which every block gives nearly its input
        whole.append(copy.deepcopy(vit))
        return vit

    monkeypatch.setattr(timm, "create_model", create_and_keep)
    trunk = Trunk(name, layers, image_size=size, pretrained=False).train()
    own, patch = timm.get_pretrained_cfg(name), trunk.vit.patch_embed.patch_size[0]
    assert trunk.feature_shapes == [(n_prefix + (size // patch) ** 2, 768)] * len(used)
    assert (trunk.mean, trunk.std) == (own.mean, own.std)
    assert not any(p.requires_grad for p in trunk.parameters()) and not any(m.training for m in trunk.modules())
    kept = range(used[-1] + 1)  # nothing above the last block in use
    assert {n.split(".")[2] for n, _ in trunk.named_parameters() if ".blocks." in n} == set(map(str, kept))
    assert set(trunk.attention_parameters()) == {f"vit.blocks.{i}.attn.{n}" for i in kept for n in attention}

    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images[1] = images[0]
    images[1, :, 2 * patch : 3 * patch, 5 * patch : 6 * patch] += 3  # seen first by the patch in row 2, column 5
    expected = block_outputs(whole[0], images)
    with torch.no_grad():
        found = trunk(images)
    assert len(expected) == depth and len(found) == len(used)
    for i, x in zip(used, found):  # the same operations; room for another order of sums
        torch.testing.assert_close(x, expected[i], rtol=1e-5, atol=1e-5)
        assert (x - expected[i + 1]).abs().max() > 0.01
    place = (found[0][1] - found[0][0]).norm(dim=1).argmax()
    assert trunk.n_prefix == [n_prefix] * len(used) and place == n_prefix + 2 * (size // patch) + 5


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("blocks.{0,2,10}", ["blocks.0", "blocks.2", "blocks.10"]),
        ("blocks.{9..11}", ["blocks.9", "blocks.10", "blocks.11"]),
        ("blocks.7 blocks.3", ["blocks.3", "blocks.7"]),  # in the trunk's order
        ("blocks.*", [f"blocks.{i}" for i in range(12)]),  # whole blocks, not what is in them
        ("blocks.1?", ["blocks.10", "blocks.11"]),
        ("blocks.{2,5}.*", ["blocks.2.attn", "blocks.5.attn"]),
        ("blocks.*.attn", [f"blocks.{i}.attn" for i in range(12)]),
        ("blocks.{0,12}", "layer pattern blocks.12 .*matches nothing.*blocks.0 … blocks.11"),
        ("blocks.0 blocks.9'", "layer pattern blocks.9' .*matches nothing"),
        ("patch*", "layer pattern .*matches nothing"),
        ("", "names no layer"),
    ],
)
def test_layer_patterns(pattern, expected):
    names = ["patch_embed", *(f"blocks.{i}{part}" for i in range(12) for part in ("", ".attn", ".attn.proj"))]
    if isinstance(expected, list):
        assert model.match_layers(names, pattern) == expected
    else:
        with pytest.raises(Problem, match=expected):
            model.match_layers(names, pattern)


no_blocks = "has no transformer blocks on a grid of patches"


@pytest.mark.parametrize(
    "name, message",
    [
        *((name, f"{name} {no_blocks}") for name in (
            "resnet50", "swin_tiny_patch4_window7_224", "xcit_nano_12_p8_224", "tnt_s_patch16_224", "twins_svt_small",
            "mixer_s32_224", "hiera_tiny_224", "crossvit_tiny_240", "naflexvit_base_patch16_gap",
        )),
        ("samvit_base_patch16_224", r"gives features of shape \(1, 14, 14, 768\), expected"),
        ("pit_ti_224", "no transformer blocks"),
        ("vit_base_patch16_224.mai", "unknown trunk .*near it: vit_base_patch16_224.mae"),
        ("eva02_tiny_patch14_224.mim_in2k", f"unknown trunk .*near it: {tiny}"),
        (tiny, "layer pattern blocks.30 .*matches nothing"),
    ],
)  # fmt: skip
def test_unusable_trunks_are_refused(name, message):
    with pytest.raises(Problem, match=message):
        Trunk(name, "blocks.{0,30}" if name == tiny else "blocks.0", pretrained=False)


def test_unusable_layers_and_sizes_are_refused():
    with pytest.raises(Problem, match="layer blocks.0.attn.attn_drop .*gives features of shape None"):
        Trunk(tiny, "blocks.0.attn.attn_drop", image_size=56, pretrained=False)
    with pytest.raises(Problem, match="IMAGE_SIZE is 57, expected a multiple of 14"):
        Trunk(tiny, "blocks.0", image_size=57, pretrained=False)


def random_images(n=2, size=56):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["copied", "pickled"])
@torch.no_grad()
def test_a_copy_gives_its_own_features(duplicate):
    """The copy takes on other weights, as of a trunk with another seed, and either keeps to its own."""
    layers = "blocks.{0,1}.attn blocks.2"
    trunk, other = (Trunk(tiny, layers, image_size=56, pretrained=False, seed=seed) for seed in (1, 2))
    assert not trunk.features  # those of no picture travel along
    images, expected = random_images(), [trunk(random_images()), other(random_images())]
    encoder = duplicate(Encoder(trunk, Head(trunk.feature_shapes, 4, 3, 2, 5)))
    encoder.trunk.load_state_dict(other.state_dict())
    found = [trunk(images), encoder.trunk(images), trunk(images)]
    for features, of in zip(found, [*expected, expected[0]]):
        assert len(features) == 3 and all(torch.equal(a, b) for a, b in zip(features, of))


def test_compiled_trunk(monkeypatch):
    """Same features, same gradients, same names; a compiler that fails is told in one message. All of torch.compile
    but the C++ compiler, which takes half a minute (benchmark.py --parts step has it)."""
    images = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    trunks = [Trunk(tiny, "blocks.0", image_size=112, pretrained=False) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(Trunk, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
        training.compile_trunk(trunks[1], images, torch.float32)
    trunks.append(copy.deepcopy(trunks[1]))
    results = []
    for trunk in trunks:
        parameters = [trunk.get_parameter(name).requires_grad_(True) for name in trunk.attention_parameters()]
        (features,) = trunk(images)
        features.square().mean().backward()
        results.append((features.detach(), *(p.grad for p in parameters)))
    for plain, compiled, copied in zip(*results):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())
        assert torch.equal(copied, plain)  # a copy is not compiled
    assert trunks[1].state_dict().keys() == trunks[0].state_dict().keys()
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(Problem, match="torch.compile fails here .*no-such-compiler.*--compile false"):
        training.compile_trunk(Trunk(tiny, "blocks.0", image_size=112, pretrained=False), images, torch.float32)


# ---- self-attention -----------------------------------------------------------------------------


def test_convits_attention_is_trained_and_its_class_token_comes_late(create):
    create(depth=4, local_up_to_layer=2)
    trunk = Trunk("convit_tiny", "blocks.{0..3}", pretrained=False)
    gated, plain = ["qk.weight", "v.weight", "proj.weight", "proj.bias"], ["qkv.weight", "proj.weight", "proj.bias"]
    expected = {f"vit.blocks.{i}.attn.{n}" for i in range(4) for n in (gated if i < 2 else plain)}
    assert set(trunk.attention_parameters()) == expected
    assert trunk.n_prefix == [0, 0, 1, 1] and [n for n, _ in trunk.feature_shapes] == [196, 196, 197, 197]
    for name in expected:
        trunk.get_parameter(name).requires_grad_(True)
    trunk(random_images(1, 224))[-1].square().mean().backward()
    assert {n for n, p in trunk.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == expected


@pytest.mark.parametrize("name, lost", [(tiny, "attn.qkv"), (tiny, "attn.proj"), (tiny, "attn")])
def test_phase_2_refuses_a_block_without_attention(name, lost):
    trunk = Trunk(name, "blocks.{0..2}", image_size=56, pretrained=False)
    trunk.vit.blocks[1].set_submodule(lost, nn.Identity())
    with pytest.raises(Problem, match="blocks.1 of trunk .* has no self-attention with q, k, v and output weights"):
        trunk.attention_parameters()


def test_attention_in_other_places(create):
    """Several in a block are all trained; weights that hold more than attention are refused."""
    create(depth=1)
    trunk = Trunk("vit_small_patch16_18x2_224", "blocks.0", image_size=32, pretrained=False)
    expected = {f"vit.blocks.0.attns.{k}.attn.{n}" for k in range(2) for n in vit_attention}
    assert set(trunk.attention_parameters()) == expected
    trunk = Trunk("vit_pwee_patch16_reg1_gap_256", "blocks.0", image_size=32, pretrained=False)
    with pytest.raises(Problem, match="blocks.0 of trunk vit_pwee.*has no self-attention .*in_proj.weight"):
        trunk.attention_parameters()


# ---- weights ------------------------------------------------------------------------------------


def test_trunk_weights_come_from_the_seed():
    a, b, c = (Trunk(tiny, "blocks.0", image_size=56, pretrained=False, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(v, b[n]) for n, v in a.items())
    assert not torch.equal(b["vit.patch_embed.proj.weight"], c["vit.patch_embed.proj.weight"])


def write_weights(path, name, seed, **options):
    """A pretrained file, as the hub has it -> the model it is of."""
    torch.manual_seed(seed)
    vit = timm.create_model(name, pretrained=False, **options)
    path.parent.mkdir(exist_ok=True)
    state = {n: v.contiguous() for n, v in vit.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return vit


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_a_local_file_is_found_by_its_exact_name(name, tmp_path, monkeypatch):
    """By the whole name only; the message that there is none says where to fetch it and where to put it."""
    monkeypatch.chdir(tmp_path)
    whole = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    others = ["vit_tiny_patch16_224.augreg_in21k.safetensors", f"{whole}.safetensors.part", f"{whole}_384.safetensors"]
    for other in others:
        write_weights(tmp_path / "weights" / other, whole, seed=1)
    with pytest.raises(Problem) as told:  # no network
        Trunk(name, "blocks.0", image_size=32)
    for part in (f"for trunk {whole}:", f"model.safetensors of huggingface.co/timm/{whole} ", *others, "--pretrained"):
        assert part in str(told.value)
    advice = str(told.value).partition(" and put it at ")[2].split()[0]
    there = write_weights(tmp_path / advice, whole, seed=2)
    trunk = Trunk(name, "blocks.{0,3}")
    assert trunk.settings["name"] == whole
    with torch.no_grad():
        found = trunk(random_images(1, 224))[1]
    torch.testing.assert_close(found, block_outputs(there, random_images(1, 224))[3], rtol=1e-5, atol=1e-5)
    (tmp_path / advice).unlink()
    there = write_weights((tmp_path / advice).with_suffix(".pth"), whole, seed=3)
    assert torch.equal(Trunk(name, "blocks.0").vit.patch_embed.proj.weight, there.patch_embed.proj.weight)


def test_weights_that_cannot_be_had_are_told_in_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / f"{tiny}.safetensors"
    write_weights(path, "vit_tiny_patch16_224", seed=0)  # of another model
    message = f"weights/{tiny}.safetensors cannot be read as weights of trunk {tiny} .*"
    message += f"expected model.safetensors of huggingface.co/timm/{tiny};"
    with pytest.raises(Problem, match=message):
        Trunk(tiny, "blocks.0", image_size=56)
    path.write_bytes(b"not weights")
    with pytest.raises(Problem, match=message):
        Trunk(tiny, "blocks.0", image_size=56)
    with pytest.raises(Problem, match="no pretrained weights for trunk mixer_s32_224: .*--pretrained false"):
        Trunk("mixer_s32_224", "blocks.0")
    path.unlink()

    def fail(error):
        def create(*arguments, **options):
            raise error

        monkeypatch.setattr(timm, "create_model", create)

    fail(ConnectionError())  # without a word
    with pytest.raises(Problem, match="the hub gave ConnectionError\nWithout network"):
        Trunk(tiny, "blocks.0")
    for error in (MemoryError(), OSError(28, "No space left on device")):  # told by their own names
        fail(error)
        with pytest.raises(type(error)):
            Trunk(tiny, "blocks.0")


# ---- checkpoint ---------------------------------------------------------------------------------

small_beit = dict(depth=1, embed_dim=48, num_heads=4)
tables = ["blocks.0.attn.relative_position_bias_table"]


@pytest.mark.parametrize(
    "name, options, resampled",
    [(tiny, dict(depth=1), ["pos_embed"]), ("beit_base_patch16_224.in22k_ft_in22k_in1k", small_beit, tables)],
    ids=["position embedding", "relative positions"],
)
def test_a_checkpoint_moves_between_machines_but_not_between_weights(name, options, resampled, tmp_path, monkeypatch):
    """Resampling gives other last bits on another processor; the pretrained file's own weights have to be the same."""
    monkeypatch.chdir(tmp_path)
    create, elsewhere = timm.create_model, []

    def create_small(*arguments, **others):
        vit = create(*arguments, **others, **options)
        for n in elsewhere:
            p = vit.get_parameter(n)
            p.data = torch.nextafter(p.data, torch.tensor(torch.inf, device=p.device))
        return vit

    weights = tmp_path / "weights" / f"{name}.safetensors"
    write_weights(weights, name, seed=0, **options)
    monkeypatch.setattr(timm, "create_model", create_small)

    def build():
        torch.manual_seed(0)
        trunk = Trunk(name, "blocks.0", image_size=112)
        encoder = Encoder(trunk, Head(trunk.feature_shapes, 5, 3, 1, 9)).eval()
        settings, cpu = constants(vars(train_head)), torch.device("cpu")
        learner = training.Learner(encoder, settings, "head.pt", {}, cpu, torch.float32)
        return encoder, learner.inputs

    encoder, inputs = build()
    here = {n: v.clone() for n, v in encoder.state_dict().items()}
    about = dict(space=Space(["subj01"], torch.arange(9), 5, torch.ones(1, 9, dtype=torch.bool), {}), made_with={})
    save_checkpoint("head.pt", encoder, **about, scores={}, step=1)
    resampled = {f"vit.{n}" for n in resampled}
    assert set(torch.load("head.pt")["trunk"]) == resampled

    elsewhere.extend(n.removeprefix("vit.") for n in resampled)
    other, other_inputs = build()
    changed = {n for n, v in other.trunk.state_dict().items() if not torch.equal(v, here[f"trunk.{n}"])}
    assert changed == resampled and other_inputs == inputs  # training continues there, too
    attention = set(encoder.trunk.attention_parameters())
    for path, stored in {"head.pt": resampled, "finetuned.pt": resampled | attention}.items():
        loaded = load_checkpoint(path)[0]
        found = loaded.state_dict()
        assert found.keys() == here.keys() and all(torch.equal(v, here[n]) for n, v in found.items())
        assert set(torch.load(path)["trunk"]) == stored
        for n in attention:  # phase 2 starts from it
            loaded.trunk.get_parameter(n).requires_grad_(True).data.add_(1)
        here = {n: v.clone() for n, v in loaded.state_dict().items()}
        save_checkpoint("finetuned.pt", loaded, **about, scores={}, step=1)

    state = load_file(weights)
    state["blocks.0.norm1.weight"][0] += 1e-6
    save_file(state, weights)
    for path in ("head.pt", "finetuned.pt"):
        with pytest.raises(Problem, match=f"{path}: the trunk {name} built here has weights .* was made with"):
            load_checkpoint(path)
