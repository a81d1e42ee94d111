"""Write what tests/earlier/test_earlier.py reads, with the code of whatever checkout is on PYTHONPATH:

    PYTHONPATH=CHECKOUT/src python tests/earlier/make.py tests/earlier/COMMIT

A small data set, a run that is complete, with a best checkpoint and an evaluation, and one that diverged.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

WORDS = "the river ran under old stone bridge while children counted boats and sang of salt wind light"


def main(to: Path) -> None:
    os.environ["MYLLM_DATA"] = str(to.absolute())
    from myllm.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
    from myllm.data.prepare.prepare import prepare
    from myllm.data.tokenizer.train import train_tokenizer
    from myllm.distributed.collectives import process_group
    from myllm.errors import TrainingDiverged
    from myllm.training import loop

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "texts"
        scratch.mkdir()
        chance = random.Random(7)
        texts = [" ".join(chance.choices(WORDS.split(), k=100)) for _ in range(40)]
        for number, text in enumerate(texts):
            (scratch / f"{number:02d}.txt").write_text(text)
        vocabulary = train_tokenizer(texts, 300, Path(folder) / "tokenizer.json", progress=False)
        source = DataConfig(f"files:{scratch}", tokenizer=str(vocabulary), val_tokens=400, workers=1)
        dataset = prepare(source, progress=False)
    config = RunConfig(
        name="done",
        model=ModelConfig(300, max_seq_len=32, d_model=8, n_layers=1, n_heads=2, d_ff=16, dropout_ffn=0.1),
        data=DataConfig(dataset=dataset.name),
        optim=OptimConfig(max_lr=3e-3, warmup_steps=2),
        train=TrainConfig(
            max_steps=8, batch_tokens=64, micro_batch_size=1, log_every_steps=1, save_every_steps=4, keep_last=1,
            early_stop_patience=50, device="cpu",
        ),
        eval=EvalConfig(
            validation_every_steps=4, validation_tokens=128, cloze_every_steps=0, hellaswag_every_steps=0,
            sample_every_steps=4, sample_prompts=("the river",), sample_new_tokens=8,
        ),
    )  # fmt: skip
    with process_group("cpu") as process:
        loop.train(config, dataset, process)
        bad = replace(config, name="diverged", optim=replace(config.optim, max_lr=1e30, warmup_steps=0))
        with suppress(TrainingDiverged):
            loop.train(bad, dataset, process)
    words = ("eval", "done", "--tasks", "validation", "--device", "cpu")
    subprocess.run([sys.executable, "-m", "myllm", *words], check=True)
    for path in (*to.rglob("*.json"), *to.rglob("log.txt")):
        if not {"checkpoints", "best"} & {*path.parts}:  # their manifests have hashes
            text = path.read_text()
            for here, anywhere in ((str(to.absolute()), "temp_data"), (folder, "/tmp/made"), (sys.argv[0], "make.py")):
                text = text.replace(here, anywhere)
            path.write_text(text)
    for lock in to.rglob(".*lock"):
        lock.unlink()
    for folder in (".locks", "listings"):  # of paths that are gone
        shutil.rmtree(to / folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
