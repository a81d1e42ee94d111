"""`myllm export`, `myllm import` and `myllm publish`: checkpoints in formats other tools can read, and the Hub."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Literal

import tyro

from myllm import paths
from myllm.config import HubConfig, RunConfig, load_config, saved_config
from myllm.errors import UserError
from myllm.paths import check_writable, user_path
from myllm.planning.config_checks import hub_errors

Positional = tyro.conf.Positional

TUNING_EPOCHS = 3
TUNING_BATCH_TOKENS = 32_768
"""Approximate tokens per step. A few megabytes of text then give some tens of updates per epoch."""


def export(
    model: Positional[str],
    to: Path | None = None,
    to_onnx: Path | None = None,
    to_gguf: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Export a checkpoint to transformers, ONNX or GGUF.

    Args:
        model: name or folder of a run (exports its newest checkpoint), or folder of a checkpoint.
        to: folder for transformers (an earlier export is replaced).
        to_onnx: ONNX file, in float32 (needs the extra onnx).
        to_gguf: GGUF file (needs the extra gguf).
        dtype: type of the weights.
        overwrite: move an existing folder aside, or replace an existing file.
    """
    if to is None and to_onnx is None and to_gguf is None:
        raise UserError("missing output: --to FOLDER, --to-onnx FILE or --to-gguf FILE")
    for file in filter(None, (to_onnx, to_gguf)):
        if user_path(file).is_dir() or (user_path(file).exists() and not overwrite):
            raise UserError(f"{file} exists; give another path, or --overwrite to replace a file")
        check_writable(user_path(file), "--to-onnx" if file is to_onnx else "--to-gguf")
    paths.check_model_path(model, hub=False)  # before torch is imported, which takes seconds
    from myllm.checkpoint.locate import find_checkpoint
    from myllm.hub.export.source import load_export_source
    from myllm.hub.export.transformers import export_transformers

    source = load_export_source(find_checkpoint(model, paths.runs_dir()))
    if to is not None:
        result = export_transformers(source, to, dtype, overwrite=overwrite)
        print(result.parity)
        if result.rounding:
            print(f"rounding to {dtype} changes a logit by at most {result.rounding:.1e}")
        print(f"exported {result.architecture} to {result.folder}")
    if to_onnx is not None:
        from myllm.hub.export.onnx import export_onnx

        print("writing ONNX in float32")
        difference = export_onnx(source, to_onnx)
        print(f"exported to {to_onnx}; logits of onnxruntime differ by at most {difference:.1e}")
    if to_gguf is not None:
        from myllm.hub.export.gguf import export_gguf

        print(f"writing GGUF in {dtype}")
        count = export_gguf(source, to_gguf, dtype)
        print(f"exported to {to_gguf}; read back and compared {count} tensors")


def import_model(
    source: Positional[str],
    name: str | None = None,
    revision: str | None = None,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Import a Llama, Qwen3 or GPT-2 model as a run.

    Args:
        source: folder of transformers (Llama, Qwen3, GPT-2, our exports), the reference run's pytorch_model.pth, or a
            Hub repository, NAMESPACE/NAME.
        name: name of the run (default: from the source).
        revision: branch, tag or commit of the repository.
        overwrite: move an existing run of that name aside.
    """
    if not paths.may_be_model(source):  # before torch is imported, which takes seconds
        raise UserError(paths.NO_MODEL.format(source))
    from myllm.hub.import_model import import_model

    run = import_model(source, name, revision, overwrite=overwrite)
    name = shlex.quote(run.root.name)
    print(f"imported as run {run.root.name}, in {run.root}")
    print(f"  sample     myllm sample {name} --prompt 'Once upon a time'")
    length = load_config(run.config, RunConfig()).model.max_seq_len
    batch_tokens = -(-TUNING_BATCH_TOKENS // length) * length
    print(
        f"  train on   python pretrain.py --config {shlex.quote(str(run.config))} --init.from {name} "
        f"--name {name}-tuned --data.source files:/path/to/texts --train.epochs {TUNING_EPOCHS} "
        f"--train.batch-tokens {batch_tokens} --train.micro-batch-size auto --optim.max-lr 5e-5"
    )


def publish(
    run: Positional[str],
    repo: str | None = None,
    private: bool = False,
    every_checkpoint: bool = False,
    license: str | None = None,
) -> None:
    """Publish a run to the Hugging Face Hub (rerun to resume).

    Args:
        run: name or folder of the run.
        repo: repository on the Hub, NAMESPACE/NAME (default: the run's hub.repo).
        private: create the repository as a private one.
        every_checkpoint: publish each checkpoint as a revision (default: only the newest).
        license: license of the weights, as the Hub abbreviates it, such as mit or apache-2.0.
    """
    wanted = HubConfig(repo, private, every_checkpoint, license)
    if repo is not None and (errors := hub_errors(wanted, "--")):
        raise UserError("; ".join(errors))
    paths.check_model_path(run, hub=False)  # before torch is imported, which takes seconds
    from myllm.checkpoint.locate import resolve_checkpoints

    _, checkpoints = resolve_checkpoints(run, paths.runs_dir())
    run_paths = paths.RunPaths(checkpoints[0].parent.parent)
    from myllm.hub import publish as publishing
    from myllm.hub.client import check_token
    from myllm.runs.history import read_json_or_empty

    saved = saved_config(read_json_or_empty(run_paths.config), run_paths.config).hub
    wanted = replace(wanted, repo=repo or saved.repo)
    if wanted.repo is None:
        raise UserError("missing --repo NAMESPACE/NAME, for example --repo my-account/my-model")
    if errors := hub_errors(wanted, "--"):
        raise UserError("; ".join(errors))
    check_token()
    hub = replace(wanted, private=private or saved.private, license=license or saved.license)
    checkpoints = publishing.select_checkpoints(run_paths, every_checkpoint)
    try:
        publishing.publish(run_paths, checkpoints, hub, publishing.export_checkpoint, print)
    except UserError as error:
        raise UserError(f"{error}\nNothing is lost: rerun the same command to resume") from None
