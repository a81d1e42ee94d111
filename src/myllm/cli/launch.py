"""Command lines that begin with a preset: from their words to a RunConfig."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import tyro

from myllm.config import DataConfig, ModelConfig, RunConfig, TrainConfig, from_dict, read_config_json
from myllm.data.mixture.spec import find_mixture
from myllm.distributed import launcher as ranks
from myllm.errors import UserError
from myllm.evals.registry import check_training_tasks
from myllm.evals.validation_sets import parse_validation_sets
from myllm.paths import RunPaths, user_path
from myllm.planning.config_checks import check_config, check_name
from myllm.presets import describe_presets, get_preset

from .parse import argument_help, parse_arguments, version, wrap_help


@dataclass(frozen=True)
class RunArgs:
    """What all commands that begin with a preset share."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]  # no prefix: --train.max-steps
    own_text: tyro.conf.Suppress[bool] = False
    """The text is not the preset's and no length was given, so the text decides (planning.length)."""

    @property
    def planning(self) -> bool:
        """True if this process does not start the run: WORLD_SIZE is then the number of ranks to plan for."""
        return False


@dataclass(frozen=True)
class PretrainArgs(RunArgs):
    """Train a language model. The same command resumes an interrupted run."""

    dry_run: bool = False
    """Check everything, print the plan (what differs from the preset, memory, time), and stop."""
    prepare_only: bool = False
    """Prepare the data set if it does not exist yet, and stop."""
    profile: bool = False
    """Record a few of the first steps, show which kernels take their time, and continue training."""

    @property
    def planning(self) -> bool:
        return self.dry_run or self.prepare_only


def parse_args(words: list[str], fetch: Callable[[RunConfig], None] | None = None) -> PretrainArgs:
    return parse_run_args(PretrainArgs, words, "python pretrain.py", fetch)


def parse_run_args(
    kind: type[RunArgs], words: list[str], program: str, fetch: Callable[[RunConfig], None] | None = None
) -> Any:
    """Parse and check a command line of the form [PRESET] [--config FILE.json] [options].

    Args:
        kind: a subclass of RunArgs; its fields are the options beside the config's.
        fetch: called before the run's folder is looked at, to bring its checkpoints from `checkpoint.mirror`.

    Raises:
        UserError: unknown preset, invalid config file or config.
        SystemExit: after --help or --version (code 0), or for an unknown option (code 2).
    """
    if words[:1] == ["--version"]:
        print(version())
        raise SystemExit(0)
    if not words or words[0] in ("-h", "--help"):
        print(describe_usage(kind, program))
        raise SystemExit(0 if words else 2)
    files, words = read_config_files(words)
    args = _parse(kind, files, words, program)
    if fetch is not None and args.config.checkpoint.mirror is not None and not args.planning:
        check_name(args.config.name)
        fetch(args.config)
    if args.config.init.source is not None:
        from myllm.inference.initial_weights import check_fits, find_source, initial_model, resumes

        source = None if resumes(args.config) else find_source(args.config)
        args = _parse(kind, files, words, program, initial_model(args.config, source))
        if source is not None:
            check_fits(source, args.config)
    # Without torchrun, WORLD_SIZE is a plan for later, not the number of processes of this command.
    check_config(args.config, ranks.world_size() if args.planning or ranks.is_launched() else 1)
    check_training_tasks(args.config.eval.tasks)
    parse_validation_sets(args.config.eval.validation_sets)
    if args.config.train.trackers:
        from myllm.runs.trackers.destinations import check_installed

        check_installed(args.config.train.trackers)
    if find_mixture(args.config.data):
        args = replace(args, own_text=False)  # no single text decides the length
        if args.config.train.epochs is not None:
            raise UserError(
                "train.epochs counts passes over one data set; set the length of a mixture with --train.max-steps"
            )
    if RunPaths.of(args.config.name).checkpoints.is_dir():
        from myllm.runs.saved_settings import keep_saved_settings

        config, own_text = keep_saved_settings(args.config, args.own_text, _options(words))
        args = replace(args, config=config, own_text=own_text)
    return args


def _parse(
    kind: type[RunArgs], files: list["ConfigFile"], words: list[str], program: str, model: ModelConfig | None = None
) -> RunArgs:
    """Parse and convert the words. `model` takes the place of the preset's."""
    own_text = uses_own_text(files, words)
    base, words = base_config(files, words, model)
    return parse_arguments(
        kind,
        words,
        f"{program} {base.name}",
        kind(base, own_text),
        "Every setting of the run, with its value in this preset. The same command resumes an interrupted run.",
    )


def describe_usage(kind: type[RunArgs], program: str) -> str:
    """The presets, and the options of the command; without the settings of the config."""
    options = {"--config FILE.json": "Apply a config file on top of the preset (the preset is then optional)."}
    hints = get_type_hints(kind)
    for name, text in argument_help(kind).items():
        value = "" if hints[name] is bool else " VALUE ..." if get_origin(hints[name]) is tuple else " VALUE"
        options[f"--{name.replace('_', '-')}{value}"] = text
    options["overrides"] = f"Any setting, such as --train.max-steps 100; `{program} PRESET --help` lists all."
    width = max(map(len, options))
    listed = "\n".join(f"  {option:<{width}}  {text}" for option, text in options.items())
    about = "\n\n".join(" ".join(paragraph.split()) for paragraph in (kind.__doc__ or "").split("\n\n"))
    usage = f"usage: {program} PRESET [options]\n\n{about}"
    return wrap_help(f"{usage}\n\npresets:\n{describe_presets()}\n\noptions:\n{listed}")


ConfigFile = tuple[Path, Any]
"""A path given with --config, and the content of the file."""


def read_config_files(words: list[str]) -> tuple[list[ConfigFile], list[str]]:
    """Read the files of --config, and return them with the remaining words. Each is read only once: it may be a pipe,
    as in `--config <(jq ...)`."""
    rest, files = [], []
    remaining = iter(words)
    for word in remaining:
        if word == "--config" or word.startswith("--config="):
            value = word.partition("=")[2] if "=" in word else next(remaining, None)
            if not value:
                raise UserError("--config needs the path of a JSON file")
            path = user_path(value)
            files.append((path, read_config_json(path)))
        else:
            rest.append(word)
    return files, rest


def base_config(
    files: list[ConfigFile], words: list[str], model: ModelConfig | None = None
) -> tuple[RunConfig, list[str]]:
    """The config before overrides (a preset, a file, or a file over a preset), and the remaining words.

    `model` takes the place of the preset's.
    """
    base = RunConfig()
    if words and not words[0].startswith("-"):
        base, words = get_preset(words[0]), words[1:]
    elif not files and not {"-h", "--help"} & set(words):
        raise UserError(f"missing PRESET (or --config FILE.json); presets:\n{wrap_help(describe_presets())}")
    if model is not None:
        base = replace(base, model=model)
    given = _options(words)
    base = _for_text(base, given.get("--data.source", base.data.source), given.get("--data.dataset"))
    for path, values in files:
        data = from_dict(values, base, path).data
        base = _for_text(base, data.source, data.dataset)
        base = from_dict(values, _for_source(base, data.source), path)
    if "--train.max-steps" in given:
        if given.get("--train.epochs") not in (None, "None"):
            raise UserError("--train.max-steps and --train.epochs both set the length of the training; give only one")
        base = replace(base, train=replace(base.train, epochs=None))
    return _for_source(base, given.get("--data.source", base.data.source)), words


def _for_source(base: RunConfig, source: str) -> RunConfig:
    """The config with defaults for settings that belong to the preset's own source, if the source is another one.

    So a preset with another source uses the same data set that `myllm data prepare` makes of it.
    """
    if source == base.data.source:
        return base
    names = ("val_tokens", "target_tokens", "max_documents", "text_column", "shard_tokens")
    return replace(base, data=replace(base.data, **{name: getattr(DataConfig(), name) for name in names}))


def _for_text(base: RunConfig, source: str, dataset: str | None) -> RunConfig:
    """The config without the preset's prompts, if the text is another one: they come from its held-out documents."""
    if (source, dataset) == (base.data.source, base.data.dataset):
        return base
    return replace(base, eval=replace(base.eval, sample_prompts=()))


def _options(words: list[str]) -> dict[str, str]:
    """The options among the words, spelled as in help, each with the word that follows."""
    found = {}
    for word, following in pairwise([*words, ""]):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found[name.replace("_", "-")] = value if equals else following
    return found


def uses_own_text(files: list[ConfigFile], words: list[str]) -> bool:
    """True if the words or a config file choose other text than the preset and no length of the training."""
    given, own_text = _options(words), False
    unset = RunConfig(data=DataConfig("", ""), train=TrainConfig(max_steps=-1, epochs=-1))
    for path, values in files:
        found = from_dict(values, unset, path)
        if found.train.max_steps != -1 or found.train.epochs not in (-1, None):
            own_text = False
        elif found.data.source or found.data.dataset:
            own_text = True
    if given.keys() & {"--train.max-steps", "--train.epochs"}:
        return False
    return own_text or bool(given.keys() & {"--data.source", "--data.dataset"})
