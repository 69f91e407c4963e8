"""Tests of common.py, prepare_data.py and fit_pca.py: pytest test_prepare.py. No network, no GPU; under a minute.

Beside test_model.py's tests of the same stages: what they refuse and tell, who may write, what is noticed
when inputs change, and numbers against independent ones.
"""

import errno
import hashlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import signal
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

import checkpoint
import common
import demo
import fit_pca
import prepare_data
from common import Problem
from shared_fixtures import another_process, hemis, here, run

pictures_of = "{}/training_split/training_images"
fmri = "{}/training_split/training_fmri/{}_training_fmri.npy"


def message_of(main, **namespace):
    """What run_script prints when it ends with an error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["stage.py", *namespace.pop("arguments", [])])
        common.run_script(main, {"__file__": prepare_data.__file__, "__doc__": "", **namespace})
    assert end.value.code.startswith("error: ")
    return end.value.code


def contents(folder):
    """{file: its bytes and date}, but for the lock, which means nothing."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.name != ".lock"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A challenge folder of two subjects, 40 and 37 training pictures."""
    folder = tmp_path_factory.mktemp("original") / "challenge"
    demo.simulate(folder, subjects=(1, 6), n_train=40, n_test=5, picture_size=80, vertex_step=16, seed=2)
    return folder


@pytest.fixture
def challenge(original, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(original, tmp_path / "challenge")


@pytest.fixture(scope="module")
def prepared(original):
    run(prepare_data, CHALLENGE_DIR=str(original), DATA_DIR=str(original.parent / "data"))
    run(fit_pca, DATA_DIR=str(original.parent / "data"), PCA_DIM=8)
    return original.parent / "data"


@pytest.fixture
def data(prepared, tmp_path):
    """A copy of the prepared data with their PCA, to be changed."""
    return shutil.copytree(prepared, tmp_path / "data")


def activity_of(folder, subject):
    return np.concatenate([np.load(folder / fmri.format(subject, hemi)) for hemi in hemis], axis=1)


# ---- constants ----------------------------------------------------------------------------------

scripts = sorted(path.stem for path in here.glob("*.py") if not re.match("test_|conftest|shared_fixtures", path.name))


def test_every_constant_has_a_kind():
    found = {name: script for script in scripts for name in common.constants(vars(importlib.import_module(script)))}
    assert len(found) > 50
    new = {name: script for name, script in found.items() if name not in common.kinds}
    assert not new, "add these to kinds in common.py"


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("STEPS", 5e0, "5.0, expected a whole number"),
        ("STEPS", "6", "'6', expected a whole number"),
        ("STEPS", True, "True, expected a whole number"),
        ("BATCH_SIZE", (64,), r"\(64,\), expected a whole number"),
        ("LEARNING_RATE", "1e-3", "'1e-3', expected a number"),
        ("LEARNING_RATE", float("nan"), "nan, expected a number"),
        ("LEARNING_RATE", float("inf"), "inf, expected a number"),
        ("BETAS", [0.9, 0.99], r"\[0.9, 0.99\], expected numbers with commas"),
        ("BETAS", (0.9, "0.99"), "expected numbers with commas"),
        ("BETAS", 0.9, "expected numbers with commas"),
        ("N_SESSIONS", (40, 40.0), "expected whole numbers with commas"),
        ("OVERWRITE", "false", "'false', expected true or false"),
        ("OVERWRITE", 1, "1, expected true or false"),
        ("DATA_DIR", None, "None, expected text"),
        ("LAYERS", ("blocks.0",), r"\('blocks.0',\), expected text"),
    ],
)
def test_edited_constants_are_checked_before_any_work(name, value, expected):
    ran = []
    message = message_of(lambda: ran.append(1), **{name: value})
    assert not ran and re.fullmatch(rf"error: {name} is .*{expected}.* \(at the top of prepare_data.py\)", message)
    for check in (common.constants, common.check_least):  # which every main() calls
        with pytest.raises(Problem, match=expected):
            check({name: value})


def test_edited_constants_of_a_main_that_python_calls(prepared):
    with pytest.raises(Problem, match="SEED is '1', expected a whole number"):
        run(prepare_data, SEED="1")
    with pytest.raises(Problem, match="PCA_DIM is 8.0, expected a whole number"):
        run(fit_pca, DATA_DIR=str(prepared), PCA_DIM=8.0)


def test_a_number_edited_to_a_whole_one_stays_a_number(monkeypatch):
    for name, edited, text, parsed in [
        ("LEARNING_RATE", 1, "0.5", 0.5),
        ("BETAS", (0, 1), "0.5,0.75", (0.5, 0.75)),
        ("N_SESSIONS", (1,), "3,4", (3, 4)),
    ]:
        namespace = {name: edited, "__doc__": "", "__file__": prepare_data.__file__}
        monkeypatch.setattr(sys, "argv", ["stage.py", f"--{name.lower()}", text])
        common.run_script(lambda: None, namespace)
        assert namespace[name] == parsed and type(namespace[name]) is type(parsed)
    with pytest.raises(Problem, match="--learning_rate is 'nan', expected a number"):
        common.parse_constant("LEARNING_RATE", "nan", 0.1)


def test_arguments_that_a_shell_split_hint_at_quotes():
    message = message_of(lambda: None, LAYERS="blocks.0", arguments=["--layers", "blocks.1", "blocks.3"])
    assert "not understood: blocks.3" in message and 'need quotes, as in --layers "blocks.{1,3}"' in message
    message = message_of(lambda: None, LAYERS="blocks.0", arguments=["--layer", "blocks.1"])
    assert "not understood: --layer blocks.1" in message and "quotes" not in message


# ---- progress -----------------------------------------------------------------------------------


def test_progress_is_a_plain_line_every_30_seconds_where_output_is_no_terminal():
    """A fake clock that goes on by 9 s an update; the loss is that of the last update, time left its share."""
    file, now = io.StringIO(), [100.0]
    with common.progress(total=10, initial=2, desc="train", unit="step", file=file, clock=lambda: now[0]) as bar:
        for i in range(8):
            now[0] += 9
            bar.set_postfix_str(f"loss {i}")
            bar.update()
    assert file.getvalue().splitlines() == [  # after 36 s and 72 s
        "train: 6 of 10 (step),  9.00s/step, 00:36 left, loss 3",
        "train: 10 of 10 (step),  9.00s/step, 00:00 left, loss 7",
    ]
    file = io.StringIO()
    assert list(common.progress(range(5), "short", file=file)) == list(range(5)) and not file.getvalue()
    with common.progress(total=1, file=file, disable=True, clock=lambda: now[0]) as bar:
        now[0] += 100
        bar.update()
    assert not file.getvalue()
    for item in common.progress(range(5), "rows", file=file, unit="row", clock=lambda: now[0]):
        now[0] += 31 if item == 1 else 1
    assert file.getvalue().splitlines() == [  # the end is told of what took longer than a line
        "rows: 2 of 5 (row), 16.00s/row, 00:48 left",
        "rows: 5 of 5 (row),  7.00s/row, 00:00 left",
    ]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with common.progress(total=3, desc="bar", file=Terminal()) as bar:
        bar.update(3)
    assert "100%|" in bar.fp.getvalue() and bar.fp.getvalue().count("\r") >= 2


# ---- memory, disk, files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [lambda: torch.empty(10**15), lambda: np.empty(10**15), lambda: bytearray(10**16)],
    ids=["torch", "numpy", "python"],
)
def test_too_little_host_memory_is_one_message(work):
    assert "too little host memory; see README" in message_of(work)
    assert "too little host memory; set MICRO_BATCH below BATCH_SIZE" in message_of(work, MICRO_BATCH=0, BATCH_SIZE=8)


def test_memory_that_runs_out_is_not_a_damaged_file(tmp_path, monkeypatch):
    """Where a reader takes any error for a damaged file."""

    def fail(*arguments, **options):
        raise MemoryError

    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    torch.save({}, tmp_path / "a.pt")
    monkeypatch.setattr(Image, "open", fail)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        prepare_data.decode_picture([tmp_path / "a.png"])
    with pytest.raises(MemoryError):
        common.read_torch(tmp_path / "a.pt", "anything")


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "nothing there", "x"), KeyError("x")):

        def fail(error=error):
            raise error

        with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(sys, "argv", ["stage.py"])
            common.run_script(fail, {"__file__": prepare_data.__file__, "__doc__": ""})


def write_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", bytes(300_000))


@pytest.mark.skipif(common.resource is None, reason="Windows cannot limit the size of files")
@pytest.mark.parametrize(
    "write",
    [
        lambda file: torch.save({"a": torch.zeros(100_000)}, file),
        lambda file: np.save(file, np.zeros(100_000)),
        lambda file: file.write(bytes(300_000)),
        lambda file: [file.write(bytes(1000)) for _ in range(101)],  # stays in a buffer until it is flushed
        write_zip,
    ],
    ids=["torch", "numpy", "bytes", "buffered", "zip"],
)
def test_full_disk_names_the_file(write, tmp_path):
    path = tmp_path / "folder" / "result.pt"
    with common.write_whole(path) as file:
        file.write(b"before")

    def main():
        limits = common.resource.getrlimit(common.resource.RLIMIT_FSIZE)
        common.resource.setrlimit(common.resource.RLIMIT_FSIZE, (100_500, limits[1]))
        try:
            with common.write_whole(path) as file:
                write(file)
        finally:
            common.resource.setrlimit(common.resource.RLIMIT_FSIZE, limits)

    assert f"error: {path}: File too large. Free disk" in message_of(main)
    assert path.read_bytes() == b"before" and os.listdir(path.parent) == ["result.pt"]


def test_files_are_hashed_while_they_are_written(tmp_path):
    digest, expected = hashlib.sha256(), tmp_path / "expected.npy"
    with common.write_whole(tmp_path / "a.npy", digest) as file:
        np.save(file, np.arange(10))
    np.save(expected, np.arange(10))
    assert (tmp_path / "a.npy").read_bytes() == expected.read_bytes()
    assert digest.hexdigest() == hashlib.sha256(expected.read_bytes()).hexdigest()


def test_fingerprints_tell_items_apart():
    a, t = np.arange(6, dtype=np.int32), torch.arange(6, dtype=torch.int32)
    different = [
        (2048, 4, 10), (2048, 41, 0), (2048, 410), ("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), (b"ab", b"c"), (),
        ("",), (1,), (1.0,), (True,), ("1",), (None,), ([1, 2],), ((1, 2),), (1, 2), (bytes(4),),
        (np.zeros(4, np.uint8),),
        (a,), (a[:3], a[3:]), (a[:2], a[2:]), (a.reshape(2, 3),), (a.astype(">i4"),), (a.view(np.float32),),
        (a.astype(np.int64),), (t,), (t.view(torch.float32),), (t[:3], t[3:]), (t.reshape(3, 2),), (torch.tensor(1),),
        (torch.tensor([1]),), (torch.tensor(1.0),), (torch.zeros(0, 3),), (torch.zeros(2, dtype=torch.bfloat16),),
        (torch.zeros(2, dtype=torch.float16),), (b"abbytesc",), (b"ab", "c"), (b"abstr'c'",),
    ]  # fmt: skip
    found = [common.fingerprint(*items) for items in different]
    assert len(set(found)) == len(found) and all(len(f) == 16 for f in found)
    square = torch.arange(9.0).reshape(3, 3)  # the memory's layout does not count
    assert common.fingerprint(square.T) == common.fingerprint(square.T.contiguous()) != common.fingerprint(square)
    assert common.fingerprint(square.numpy().T) == common.fingerprint(square.numpy().T.copy())


@pytest.mark.parametrize("script", scripts)
def test_windows_can_import(script, monkeypatch):
    """Without what Python on Windows lacks."""
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        monkeypatch.setitem(sys.modules, name, None)
    for module, names in {os: "fork O_DIRECTORY sched_getaffinity getuid", signal: "SIGKILL SIGHUP SIGUSR1"}.items():
        for name in names.split():
            monkeypatch.delattr(module, name)
    spec = importlib.util.spec_from_file_location("on_windows", here / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_windows", module)  # dataclasses look there
    spec.loader.exec_module(module)


def test_without_locks_and_folders_that_open(tmp_path, monkeypatch, capsys):
    """As on Windows, or on shared file systems that have no locks: it goes on, and says so."""
    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(common, "resource", None)
    for refusal in (None, SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=raise_no_locks)):
        monkeypatch.setattr(common, "fcntl", refusal)
        with common.sole_writer(tmp_path, "a.py") as outer, common.sole_writer(tmp_path, "a.py") as inner:
            assert outer is inner is False
            with common.write_whole(tmp_path / "file") as file:
                file.write(b"1")
        assert capsys.readouterr().out.count("file system without locks") == 1
    assert "not known" in common.peak_memory()


def raise_no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_one_writer_at_a_time(original, data, capsys):
    """The second is refused at once and deletes nothing; kill -9 of the first frees the folder."""
    (data / "prepared.pt").rename(data / "elsewhere")
    stage = dict(CHALLENGE_DIR=str(original), DATA_DIR=str(data))
    with another_process(data) as process:
        before = contents(data)
        refusal = f"{data} is being written to by prepare_data.py, process {process.pid} on .*: wait until it ends"
        with pytest.raises(Problem, match=refusal):
            run(prepare_data, **stage | dict(CHALLENGE_DIR="before anything is read"))
        (data / "elsewhere").rename(data / "prepared.pt")
        with pytest.raises(Problem, match=refusal):
            run(prepare_data, **stage, OVERWRITE=True)
        with pytest.raises(Problem, match=refusal):
            run(fit_pca, DATA_DIR=str(data), PCA_DIM=8, OVERWRITE=True)
        run(prepare_data, **stage)  # what is finished says so all the same
        run(fit_pca, DATA_DIR=str(data), PCA_DIM=8)
        assert capsys.readouterr().out.count("already") == 2
        before["prepared.pt"] = before.pop("elsewhere")
        assert contents(data) == before
    assert (data / ".pca.pt.partial").exists()
    run(prepare_data, **stage, OVERWRITE=True)
    assert not (data / ".pca.pt.partial").exists() and (data / ".lock").exists()
    assert not common.folders_held


def test_sole_writer_leaves_no_empty_folder(tmp_path):
    new, old = tmp_path / "a" / "new", tmp_path / "old"
    old.mkdir()
    for folder in (new, old):
        with pytest.raises(Problem), common.sole_writer(folder, "a.py") as is_sole:
            assert is_sole and (folder / ".lock").exists()
            raise Problem("bad input")
    assert not new.exists() and [p.name for p in old.iterdir()] == [".lock"]
    with common.sole_writer(new, "a.py"):
        (new / "result").touch()
    assert sorted(p.name for p in new.iterdir()) == [".lock", "result"]
    with common.sole_writer(new, "a.py"), common.sole_writer(new, "a.py"):  # blocks nest
        pass


# ---- splits, ids, changed inputs ----------------------------------------------------------------


def test_areas_are_told_by_their_names():
    """Not by the numbers of a person's own mapping file; the challenge's stay as they are."""
    vertices, people = {h: np.arange(4) for h in prepare_data.hemis}, []
    mappings = [{0: "Unknown", 1: "early", 2: "ventral"}, {1: "ventral", 2: "lateral", 3: "early"}]
    for i, mapping in enumerate(mappings):
        labels = {"lh": np.array([0, 1, 2, 0], np.int16), "rh": np.array([2, 2, 1, 3 * i], np.int16)}
        people.append(prepare_data.Subject(f"subj{i}", vertices=vertices, rois={"streams": (mapping, labels)}))
    found = prepare_data.build_space(people).rois["streams"]
    assert {n: found["names"][n] for n in mappings[0]} == mappings[0]
    for s, (mapping, labels) in enumerate(person.rois["streams"] for person in people):
        expected = [mapping.get(n, "Unknown") for n in np.concatenate([labels[h] for h in prepare_data.hemis])]
        assert [found["names"][int(n)] for n in found["labels"][s]] == expected


def authors_split(name, n):
    """The rule, written anew -> {split: rows}."""
    text = "('generate_splits', 'training-official', '" + name + "', 2023)"
    seed = int.from_bytes(hashlib.md5(text.encode("ascii")).digest(), "big") & (2**31 - 1)
    order = np.random.default_rng(seed).permutation(n)
    a, b = round(0.85 * n), round(0.95 * n)
    return {"train": set(order[:a]), "val": set(order[a:b]), "test": set(order[b:])}


def test_authors_splits(original, tmp_path, capsys):
    seed = 0x2CFE11DA & 0x7FFFFFFF  # the last digits that md5sum gives for the text with subj01 in it
    split = prepare_data.split_as_authors("subj01", 9841)
    order = np.random.default_rng(seed).permutation(9841)
    assert split[order].tolist() == [0] * 8365 + [1] * (9349 - 8365) + [2] * (9841 - 9349)

    stage = dict(CHALLENGE_DIR=str(original), DATA_DIR=str(tmp_path / "data"))
    run(prepare_data, **stage, SPLITS="authors")
    data, trained, leaks = prepare_data.load(tmp_path / "data"), set(), []
    assert data.splits == "authors"
    for s, name in enumerate(data.space.subjects):
        rows = np.flatnonzero(data.subject == s)
        for part, expected in authors_split(name, len(rows)).items():
            assert set(data.samples(part, s) - rows[0]) == expected
        trained |= set(data.image[data.samples("train", s)])
    leaks = [data.image[row] in trained for part in ("val", "test") for row in data.samples(part)]
    assert f"{sum(leaks)} of {len(leaks)} validation and private test samples" in capsys.readouterr().out and sum(leaks)
    with pytest.raises(Problem, match="SPLITS: authors there, pictures now"):
        run(prepare_data, **stage)
    run(prepare_data, **stage, SPLITS="authors", SEED=5)  # theirs have a seed of their own
    assert "is prepared already" in capsys.readouterr().out
    with pytest.raises(Problem, match="SPLITS is 'picture', expected pictures or authors"):
        run(prepare_data, **stage, SPLITS="picture")


def test_seed_governs_the_splits(original, prepared, tmp_path):
    run(prepare_data, CHALLENGE_DIR=str(original), DATA_DIR=str(tmp_path / "data"), SEED=1)
    a, b = prepare_data.load(prepared), prepare_data.load(tmp_path / "data")
    assert np.array_equal(a.image, b.image) and 0.5 < (a.split == b.split).mean() < 0.95  # chance: 0.735
    assert a.fingerprint != b.fingerprint


def test_nsd_ids_are_those_of_the_files(original, prepared):
    data = prepare_data.load(prepared)
    assert data.splits == "pictures" and data.nsd_id.dtype == np.int64 and data.nsd_id.shape == (len(data.images),)
    for s, name in enumerate(data.space.subjects):
        images = {"training": data.image[data.subject == s], "test": data.test_image[data.test_subject == s]}
        for part, image in images.items():
            paths = sorted((original / name / f"{part}_split/{part}_images").iterdir())
            assert data.nsd_id[image].tolist() == [int(path.stem[-5:]) for path in paths]
    assert (np.diff(data.nsd_id[: data.n_training_images]) > 0).all()


def test_one_persons_test_picture_may_be_anothers_training_picture(challenge, tmp_path):
    """It is kept once."""
    path = sorted((challenge / pictures_of.format("subj01")).iterdir())[30]
    test = challenge / "subj06/test_split/test_images"
    shutil.copy(path, test / f"test-0999_nsd-{path.stem[-5:]}.png")
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path / "data"))
    data = prepare_data.load(tmp_path / "data")
    assert len(np.unique(data.nsd_id)) == len(data.nsd_id) == len(data.images)
    assert data.test_image[-1] == data.image[30] < data.n_training_images


def test_two_pictures_under_one_nsd_id_are_refused(challenge, tmp_path):
    """Another file of the same picture is not another picture."""
    folders = [challenge / pictures_of.format(name) for name in ("subj01", "subj06")]
    ids = [{path.stem[-5:]: path for path in folder.iterdir()} for folder in folders]
    shared = sorted(ids[0].keys() & ids[1].keys())
    path = ids[1][shared[0]]
    before = path.read_bytes()
    Image.open(path).save(path, compress_level=9)
    assert path.read_bytes() != before
    stage = dict(CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path / "data"))
    run(prepare_data, **stage)
    Image.open(path).rotate(180).save(path)
    with pytest.raises(Problem, match=f"{path} and {ids[0][shared[0]]} show different pictures under one nsd id"):
        run(prepare_data, **stage, OVERWRITE=True)


def test_labels_without_a_name_are_no_region(challenge, tmp_path, capsys):
    path = challenge / "subj06/roi_masks/rh.streams_challenge_space.npy"
    labels = np.load(path)
    labels[[2, 5]] = 77
    np.save(path, labels)
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path / "data"))
    assert f"{path}: 2 labels have no name in mapping_streams.npy, taken as Unknown" in capsys.readouterr().out
    space = prepare_data.load(tmp_path / "data").space
    expected = np.where(labels == 77, 0, labels)
    assert np.array_equal(space.rois["streams"]["labels"][1][space.hemisphere(1, "rh")], expected)


def test_interrupted_between_two_files(challenge, tmp_path, monkeypatch):
    """Old description and new arrays never go together; the same command, without overwriting, makes it whole."""
    stage = dict(CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path / "data"))
    run(prepare_data, **stage)
    replace_value(challenge)
    replace, replaced = os.replace, []

    def interrupted(aside, path):
        if replaced:
            raise KeyboardInterrupt
        replaced.append(path)
        replace(aside, path)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(prepare_data, **stage, OVERWRITE=True)
    monkeypatch.undo()
    with pytest.raises(Problem, match="not completely. prepared"):
        prepare_data.load(tmp_path / "data")
    run(prepare_data, **stage)
    data = prepare_data.load(tmp_path / "data")
    rows = np.flatnonzero(data.subject == 1)
    found = data.read_activity(rows)[:, data.space.mask[1]]
    assert np.array_equal(found, activity_of(challenge, "subj06").astype(np.float16))


def test_a_finished_run_says_so(challenge, tmp_path, capsys):
    """Without the folder's dates, and without the folder; other inputs are named."""
    stage = dict(CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path / "data"))
    run(prepare_data, **stage)
    before = contents(tmp_path / "data")
    for path in challenge.rglob("*"):
        os.utime(path, (1, 1))
    run(prepare_data, **stage)
    assert "is prepared already, from these inputs" in capsys.readouterr().out
    with pytest.raises(Problem, match="SEED: 0 there, 1 now"):
        run(prepare_data, **stage, SEED=1)
    with pytest.raises(Problem, match=r"subjects: \['subj01', 'subj06'\] there, \['subj06'\] now"):
        run(prepare_data, **stage, SUBJECTS="subj06")

    shutil.move(challenge, tmp_path / "elsewhere")
    for values in ({}, {"SUBJECTS": "subj06 subj01"}):
        run(prepare_data, **stage, **values)
        assert "challenge is not there to compare with" in capsys.readouterr().out
    for values, message in (({"SEED": 1}, "SEED: 0 there"), ({"SUBJECTS": "subj01"}, r"\['subj01'\] now")):
        with pytest.raises(Problem, match=message):
            run(prepare_data, **stage, **values)
    with pytest.raises(Problem, match="no folder subjXX; found none"):
        run(prepare_data, **stage, OVERWRITE=True)
    assert contents(tmp_path / "data") == before


def replace_picture(folder):
    """Another picture in a file of the same name, size and date."""
    path = sorted((folder / pictures_of.format("subj01")).iterdir())[3]
    size, date = path.stat().st_size, path.stat().st_mtime_ns
    Image.new("RGB", (80, 80), (10, 20, 30)).save(path)
    content = path.read_bytes()
    filler = size - len(content) - 12  # a text chunk behind the header, which no reader minds
    assert filler > 2
    chunk = b"tEXta\0" + b"x" * (filler - 2)
    crc = zipfile.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(content[:33] + (len(chunk) - 4).to_bytes(4, "big") + chunk + crc + content[33:])
    os.utime(path, ns=(date, date))
    assert path.stat().st_size == size and Image.open(path).load()


def replace_value(folder):
    path = folder / fmri.format("subj06", "rh")
    activity = np.load(path)
    activity[5, 7] += 1
    np.save(path, activity)
    os.utime(path, (2, 2))


def replace_type(folder):
    """Other sizes under the old date."""
    for hemi in hemis:
        path = folder / fmri.format("subj06", hemi)
        date = path.stat().st_mtime_ns
        np.save(path, 1.5 * np.load(path).astype(np.float64))
        os.utime(path, ns=(date, date))


def replace_label(folder):
    path = folder / "subj01/roi_masks/lh.streams_challenge_space.npy"
    labels = np.load(path)
    labels[labels == 1] = 2
    np.save(path, labels)


@pytest.mark.parametrize(
    "replace, what",
    [
        (replace_picture, "subj01 pictures: "),
        (replace_value, "subj06 rh activity: other values"),
        (replace_type, "subj06 lh activity: other values; subj06 rh activity: other values"),
        (replace_label, "subj01 masks and ROIs: "),
    ],
)
def test_corrected_input_is_noticed(replace, what, original, challenge, data, monkeypatch):
    """By preparation, and, once prepared, by what follows: the fingerprint is of every byte, not of samples."""
    shutil.copytree(original, challenge, copy_function=shutil.copy2, dirs_exist_ok=True)
    replace(challenge)
    with pytest.raises(Problem, match=f"prepared from other inputs .*{what}"):
        run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(data))
    before = prepare_data.load(data).fingerprint
    monkeypatch.setattr(prepare_data, "sample_fingerprint", lambda path: "as if it had met other bytes")
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(data), OVERWRITE=True)
    prepared = prepare_data.load(data)
    if replace is replace_label:  # nothing that is trained on
        assert prepared.fingerprint == before and fit_pca.load(data, prepared)
        return
    with pytest.raises(Problem, match=f"fitted to data {before}, .*holds {prepared.fingerprint}; run python fit_pca"):
        fit_pca.load(data, prepared)


def test_formats_of_before_are_refused_with_the_command(data):
    for name, kind, script in (("prepared.pt", "prepared", "prepare_data"), ("pca.pt", "pca", "fit_pca")):
        content = torch.load(data / name)
        torch.save(content | {"format": f"{kind}-1"}, data / name)
        message, command = f"{kind}-1 of an earlier version, expected {kind}-2", f"{script}.py --data_dir {data}"
        with pytest.raises(Problem, match=f"{message}: .*{command} --overwrite true"):
            run(fit_pca, DATA_DIR=str(data))
        torch.save(content, data / name)
    with pytest.raises(Problem, match="has format encoder-1, expected prepared-2"):
        common.check_format({"format": "encoder-1"}, "x", "prepared-2", "prepared data")


# ---- activity and folders that are not the challenge's ------------------------------------------


def scale(folder, subject, factor, offset):
    for hemi in hemis:
        path = folder / fmri.format(subject, hemi)
        np.save(path, np.load(path) * np.float32(factor) + np.float32(offset))


def test_activity_that_is_not_z_scored(challenge, tmp_path, capsys):
    stage = dict(CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path / "data"))
    subjects, findings = prepare_data.read_folder(challenge, "")
    prepare_data.scan_activity(subjects, findings)
    assert not findings and capsys.readouterr().out == ""  # z-scored activity is nothing to talk about

    for factor, offset in ((1.8, 0), (1 / 1.8, -0.7)):  # told by the deviation, by the mean
        scale(challenge, "subj06", factor, offset)
        run(prepare_data, **stage, OVERWRITE=True)
        text = capsys.readouterr().out
        y = np.load(challenge / fmri.format("subj06", "lh")).astype(float)
        mean, deviation = np.median(np.abs(y.mean(0))), np.median(y.std(0))
        assert f"subj06 lh: mean {mean:.3g} away from 0, deviation {deviation:.3g}" in text
        assert "expected about 0" in text and "subj06 rh: mean" in text and "subj01 lh" not in text

    for factor, offset in ((40, 500), (1, 6), (5, 0), (0.1, 0)):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        scale(challenge, "subj01", factor, offset)
        message = "(?s)2 found.*subj01.*lh_training_fmri.npy: mean .*raise ACTIVITY_LIMIT.*rh_training"
        with pytest.raises(Problem, match=message):
            run(prepare_data, **stage)
        assert not (tmp_path / "data").exists()
        scale(challenge, "subj01", 1 / factor, -offset / factor)
    scale(challenge, "subj01", 40, 500)
    run(prepare_data, **stage, ACTIVITY_LIMIT=1000.0)
    assert prepare_data.load(tmp_path / "data").activity.dtype == np.float32


def test_odd_vertices_are_told(challenge, tmp_path, capsys):
    path = challenge / fmri.format("subj01", "rh")
    activity = np.load(path)
    activity[:, 4] = 0.25
    activity[:, 9] *= 50
    activity[:, [11, 12]] -= 8
    np.save(path, activity)
    run(prepare_data, CHALLENGE_DIR=str(challenge), DATA_DIR=str(tmp_path / "data"))
    text = capsys.readouterr().out
    assert "subj01 rh: 1 vertices are constant, which nothing predicts (columns 4)" in text
    assert "subj01 rh: 3 vertices have a mean or deviation above 3 (columns 9, 11, 12)" in text
    assert "subj01 lh" not in text and "deviation 0" not in text


def test_folders_of_other_names(challenge, tmp_path, capsys):
    shutil.copytree(challenge / "subj06", challenge / "sub-09")
    (challenge / "subj7").mkdir()
    (challenge / "subj12.zip").touch()
    stage = dict(CHALLENGE_DIR=str(challenge))
    run(prepare_data, **stage, DATA_DIR=str(tmp_path / "a"))
    assert f"{challenge}: left out sub-09, subj7, not named subj01" in capsys.readouterr().out
    assert prepare_data.load(tmp_path / "a").space.subjects == ["subj01", "subj06"]
    run(prepare_data, **stage, DATA_DIR=str(tmp_path / "b"), SUBJECTS="sub-09, subj01")
    assert "left out" not in capsys.readouterr().out
    space = prepare_data.load(tmp_path / "b").space
    assert space.subjects == ["sub-09", "subj01"]
    weights = {"embed.weight": torch.zeros(space.n_vertices, 2), "embed.bias": torch.zeros(space.n_vertices)}
    weights |= dict.fromkeys(("shared_proj.weight", "subj_proj.fc.weight", "subj_proj.fc.bias"))
    torch.save({"trunk": None, "encoder": weights}, tmp_path / "theirs.pt")
    with pytest.raises(Problem, match="authors' weights of subj01 to subj08, but the prepared data .*sub-09"):
        checkpoint.load_checkpoint(tmp_path / "theirs.pt", space=space)
    for name in ("../subj01", "all", "group", "-x", "a/b", "ä"):
        with pytest.raises(Problem, match="SUBJECTS names"):
            run(prepare_data, **stage, DATA_DIR=str(tmp_path / "c"), SUBJECTS=f"subj01,{name}")
    with pytest.raises(Problem, match="no folder subj02; found sub-09, subj01, subj06, subj7"):
        run(prepare_data, **stage, DATA_DIR=str(tmp_path / "c"), SUBJECTS="subj01,subj02")


def test_one_persons_folder(original, tmp_path):
    folder = shutil.copytree(original / "subj06", tmp_path / "anybody")
    findings = prepare_data.Findings()
    subject = prepare_data.read_subject(folder, findings)
    assert not findings and subject.name == "anybody" and len(subject.pictures) == len(subject.nsd_ids) == 37
    found = subject.read_activity()
    assert found.dtype == np.float32 and np.array_equal(found, activity_of(original, "subj06"))
    pictures = list(prepare_data.decode_pictures([[path] for path in subject.pictures]))
    path = sorted((folder / "training_split/training_images").iterdir())[20]
    assert np.array_equal(pictures[20], np.asarray(Image.open(path).resize((256, 256), Image.Resampling.BICUBIC)))


def test_full_disk_is_seen_before_the_work(challenge, tmp_path, monkeypatch):
    """What a stage writes has to fit: refused just below, done just above."""
    data = tmp_path / "data"
    stages = [
        (prepare_data, dict(CHALLENGE_DIR=str(challenge), DATA_DIR=str(data)), ("images.npy", "activity.npy")),
        (fit_pca, dict(DATA_DIR=str(data), PCA_DIM=30), ("pca.pt",)),
    ]
    for stage, values, names in stages:
        monkeypatch.undo()
        run(stage, **values)
        written = sum((data / name).stat().st_size for name in names)
        (data / names[0]).unlink()
        before = contents(data)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0.98 * written))
        with pytest.raises(Problem, match=f"{data}: .* GB of disk free, expected .* free some or choose another"):
            run(stage, **values, OVERWRITE=True)
        assert contents(data) == before
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2.2 * written))
        run(stage, **values, OVERWRITE=True)


def test_other_sources_write_the_same_data(original, prepared, tmp_path):
    """write_prepared, from generators: what prepare_data.py makes of files; wrong counts leave nothing."""
    expected = prepare_data.load(prepared)
    names = ("subject", "image", "split", "test_subject", "test_image")
    what = dict(
        space=expected.space, samples={name: getattr(expected, name) for name in names}, splits="pictures",
        nsd_id=expected.nsd_id, n_training_images=expected.n_training_images, dtype=np.float16, inputs={"a": 1},
        made_with={}, script="prepare_other.py",
    )  # fmt: skip

    def write(activity, images):
        prepare_data.write_prepared(tmp_path / "data", **what, activity=activity, images=images)

    blocks = [np.array(expected.activity[i : i + 7]) for i in range(0, len(expected.activity), 7)]
    for activity, images in [
        (blocks[1:], expected.images), (blocks, expected.images[1:]), (blocks * 2, expected.images),
        ([b[:, 1:] for b in blocks], expected.images), (blocks, expected.images[:, :9]),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            write(iter(activity), iter(images))
        assert not (tmp_path / "data").exists()
    write(iter(blocks), iter(expected.images))
    found = prepare_data.load(tmp_path / "data")
    assert found.fingerprint == expected.fingerprint and found.splits == "pictures"
    for name in ("images.npy", "activity.npy"):
        assert (tmp_path / "data" / name).read_bytes() == (prepared / name).read_bytes()
    rows = np.array([70, 3, 3, 41])
    assert np.array_equal(found.read_activity(rows), expected.activity[rows])
    run(fit_pca, DATA_DIR=str(tmp_path / "data"), PCA_DIM=8)
    with pytest.raises(Problem, match="prepared from other inputs .a: 1 there, None now"):
        run(prepare_data, CHALLENGE_DIR=str(original), DATA_DIR=str(tmp_path / "data"))


# ---- PCA ----------------------------------------------------------------------------------------


def test_pca_of_other_constants_is_refused(data, capsys):
    before = contents(data)
    run(fit_pca, DATA_DIR=str(data), PCA_DIM=8)
    assert "is there already for these data and constants" in capsys.readouterr().out
    for values, message in (
        (dict(PCA_DIM=9), "PCA_DIM: 8 there, 9 now"),
        (dict(PCA_DIM=8, PASSES=5), "PASSES: 4 there, 5 now"),
        (dict(PCA_DIM=8, SEED=3), "SEED: 0 there, 3 now"),
    ):
        with pytest.raises(Problem, match=f"pca.pt was fitted with {message}. --overwrite true"):
            run(fit_pca, DATA_DIR=str(data), **values)
    assert contents(data) == before
    run(fit_pca, DATA_DIR=str(data), PCA_DIM=9, OVERWRITE=True)
    assert fit_pca.load(data, prepare_data.load(data)).components.shape[1] == 9


def in_memory(y):
    """What fit_pca.py reads of prepared data, for activity y (n, n_vertices)."""
    space = SimpleNamespace(n_vertices=y.shape[1])
    data = SimpleNamespace(space=space, activity=y, read_activity=lambda rows: y[rows])
    return fit_pca.Activity(data, np.arange(len(y)), torch.device("cpu"))


def test_nothing_is_left_outside_of_a_whole_basis():
    rng = np.random.default_rng(0)
    y, basis = rng.standard_normal((200, 40)).astype(np.float32), np.linalg.qr(rng.standard_normal((40, 40)))[0]
    latents, residual = fit_pca.project(in_memory(y), torch.from_numpy(basis).float())
    np.testing.assert_allclose(latents, y @ basis, atol=1e-5)
    assert residual.min() >= 0 and residual.max() < 1e-4  # rounding, on either side of 0


def test_default_passes_on_a_slowly_falling_spectrum():
    """The exact components' variance that ours lack: less than scikit-learn's solver loses with as many products."""
    n, n_vertices, n_components = 1200, 800, 100
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal(shape))[0] for shape in ((n, n_vertices), (n_vertices, n_vertices)))
    y = (100 * left * np.arange(1, n_vertices + 1) ** -0.5 @ right.T).astype(np.float32)
    components, total = fit_pca.fit(in_memory(y), n_components, fit_pca.PASSES, 0)
    exact = PCA(n_components, svd_solver="full").fit(y.astype(float))
    other = PCA(n_components, svd_solver="randomized", iterated_power=fit_pca.PASSES - 1, random_state=0).fit(y)
    best = exact.explained_variance_.sum()
    lost, theirs = (
        1 - (y.astype(float) @ basis).var(0, ddof=1).sum() / best
        for basis in (components.double().numpy(), other.components_.T.astype(float))
    )
    assert 0 < lost < theirs < 0.004  # a pass less loses 0.005
    assert (components.amax(0) >= -components.amin(0)).all()  # the sign is settled: refitted, it is the same
    assert total == pytest.approx(exact.explained_variance_.sum() / exact.explained_variance_ratio_.sum(), rel=1e-5)


def test_latents_are_float16_only_where_that_changes_nothing():
    """Below 6e-5 float16 goes by steps of 6e-8, above 65504 it ends: such latents stay float32."""
    latents = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    for factor, dtype in ((1, torch.float16), (300, torch.float16), (1e-5, torch.float32), (1e5, torch.float32)):
        stored = fit_pca.narrow(factor * latents)
        assert stored.dtype == dtype
        assert (stored.double() - factor * latents.double()).square().sum() < 1e-7 * (factor * latents).square().sum()
