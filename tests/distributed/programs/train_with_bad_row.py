"""Train as pretrain.py does, with one embedding so large that dropout makes it infinite.

train_with_bad_row.py CONFIG.json TOKEN
"""

import faulthandler
import sys
from pathlib import Path

import torch

from myllm.cli.errors import exit_on_error
from myllm.cli.launch import PretrainArgs
from myllm.config import ModelConfig, RunConfig, load_config
from myllm.model.transformer import Transformer
from myllm.training import setup

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import pretrain


def poisoned(config: ModelConfig, seed: int) -> Transformer:
    model = Transformer(config, seed)
    with torch.no_grad():
        model.embedding.weight[int(sys.argv[2])] = 3.4e38
    return model


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150)  # should it hang, the test shows where
    setup.Transformer = poisoned
    with exit_on_error():
        pretrain.pretrain(PretrainArgs(load_config(Path(sys.argv[1]), RunConfig())))
