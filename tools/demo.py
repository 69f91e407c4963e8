"""Everything on a simulated challenge folder with known answers (tools/simulate.py): no data, network or GPU needed.

The five stages, evaluation, one's own pictures, explanations and a new person, each as the command that a user types.
Everything is written below DEMO_DIR, which the next run replaces. Some 3 minutes on two cores.
"""

import importlib
import shlex
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from core.files import output_folder
from core.settings import override, run
from tools.simulate import planted_fields, simulate

DEMO_DIR: str = "demo"  # output
SEED: int = 0  # of the simulated data
STEPS: int = 80  # of phase 1; phase 2 takes half as many

# an untrained trunk, as weights need a network; early layers and small pictures, which are fast
TRUNK = dict(trunk="eva02_tiny_patch14_224.mim_in22k", pretrained="false", layers="0,1", image_size=112)
TRAINING = dict(weight_decay=0.1, feature_dropout=0.2)  # little data: less regularisation than in the report


def start(script, **constants):
    """Show a command as a user types it, and run it in this process: importing torch and timm takes seconds."""
    options = [word for name, value in constants.items() for word in (f"--{name}", str(value))]
    command = ["-m", script] if script.startswith("tools.") else [script]
    print(f"\n$ python {shlex.join(command + options)}", flush=True)
    before, module = time.perf_counter(), importlib.import_module(script.removesuffix(".py"))
    override(vars(module), options)
    module.main()
    print(f"{script}: {time.perf_counter() - before:.0f} s", flush=True)


def main():
    with output_folder(DEMO_DIR, overwrite=True, marker="made_by_demo.txt") as folder:
        (folder / "made_by_demo.txt").write_text("The next run of the demo replaces this folder.\n")
        print("simulating eight people who look at about 390 pictures each, and a ninth", flush=True)
        simulate(folder / "challenge", picture_size=160, seed=SEED)  # px, small for speed
        simulate(folder / "new_person", subjects=[9], picture_size=160, seed=SEED)
        for name, photo in zip(("temple", "flower"), load_sample_images().images):
            (folder / "photos").mkdir(exist_ok=True)
            Image.fromarray(photo).save(folder / f"photos/{name}.jpg")
    demo = Path(DEMO_DIR)
    challenge, data, run_dir = demo / "challenge", demo / "data", demo / "run"
    folders = dict(data_dir=data, run_dir=run_dir)
    start("prepare_data.py", challenge_dir=challenge, data_dir=data)
    start("fit_pca.py", data_dir=data, pca_dim=64)
    rates = dict(steps=STEPS, warmup_steps=STEPS // 10, learning_rate=5e-3, min_learning_rate=1e-4)
    start("train_head.py", **folders, **TRUNK, **TRAINING, **rates, latent_dim=256, batch_size=64)
    rates = dict(steps=STEPS // 2, warmup_steps=STEPS // 20, learning_rate=1e-3)
    start("finetune.py", **folders, **TRAINING, **rates, batch_size=32)
    start("predict.py", **folders, submission_dir=demo / "submission")
    start("tools.evaluate", **folders, challenge_dir=challenge)
    photos = dict(run_dir=run_dir, images=demo / "photos")
    start("tools.predict_pictures", **photos, subject="subj01,group", output_dir=demo / "predictions")
    start("tools.explain", **folders, images=demo / "photos", output_dir=demo / "explanations")
    planted, fields = planted_fields(1, seed=SEED), np.load(demo / "explanations/fields.npz")
    early = planted["streams"] == "early"
    r = {c: np.corrcoef(fields[c].ravel()[early], planted[c][early])[0, 1] for c in ("x", "y")}
    print(f"Centres of planted receptive fields are recovered with r {r['x']:.2f} (x) and {r['y']:.2f} (y).")
    start("prepare_data.py", challenge_dir=demo / "new_person", data_dir=demo / "new_person_data")
    start("tools.adapt", data_dir=demo / "new_person_data", run_dir=run_dir, output_dir=demo / "subj09")
    print(f"\nOpen {run_dir}/evaluation_finetuned_val/report.html: scores, the report's figures, the cortex in 3D.")


if __name__ == "__main__":
    run(main, globals())
