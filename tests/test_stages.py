from tests.conftest import *
def test_a(finetuned_dir, subjects): print(list(finetuned_dir.iterdir()))
def test_b(data_dir, tmp_path, run_dir):
    s = HEAD | TRAINING | dict(STEPS=4, VALIDATE_EVERY=2, LEARNING_RATE=0.01, DATA_DIR=data_dir, RUN_DIR=tmp_path)
    print(run_process("train_head.py", ("core.training", "train_step", 3), **s))
    print(run_process("train_head.py", **s))
    print(run_process("train_head.py", **s|dict(STEPS=1)))
