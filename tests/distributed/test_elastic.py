"""The decisions of the launcher, without processes (test_elastic_processes.py starts some)."""

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import DistNetworkError, run
from torch.distributed.elastic.agent.server import api as agents
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher import api

from myllm.distributed import elastic
from myllm.distributed.elastic import Agent, default_arguments, main

NEWER = ("--signals-to-handle", "--shutdown-timeout")


@pytest.fixture
def recorded_arguments(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records torchrun's arguments instead of running it."""
    found: list[Any] = []
    monkeypatch.setattr(run, "run", found.append)
    # Of the process, once it is a launcher.
    monkeypatch.setattr(elastic, "use_new_store_each_start", lambda: None)
    monkeypatch.setattr(elastic, "record_exit_code_in", lambda file: None)
    return found


def without(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """An older torchrun lacks some options."""
    real = run.get_args_parser

    def parser() -> Any:
        argument_parser = real()
        for action in [
            candidate for candidate in argument_parser._actions if set(candidate.option_strings) & set(names)
        ]:
            argument_parser._actions.remove(action)
            argument_parser._optionals._group_actions.remove(action)
            for word in action.option_strings:
                del argument_parser._option_string_actions[word]
        return argument_parser

    monkeypatch.setattr(run, "get_args_parser", parser)


@pytest.mark.parametrize("lacking", [(), NEWER[1:], NEWER])
def test_older_torchrun_gets_only_supported_options(
    lacking: tuple[str, ...], recorded_arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name for name in NEWER if name in run.get_args_parser().format_help()}
    without(lacking, monkeypatch)
    assert main(["--nproc_per_node=2", "--max-restarts=1", "train.py", "--shutdown-timeout", "5"]) == 0
    (arguments,) = recorded_arguments
    assert (arguments.nproc_per_node, arguments.max_restarts) == ("2", 1)  # the user's word is the last one
    assert arguments.training_script_args == ["--shutdown-timeout", "5"]
    words = default_arguments(run.get_args_parser().format_help())
    assert words[0] == "--max-restarts=3"
    assert {word.partition("=")[0] for word in words[1:]} == known - set(lacking)


@pytest.mark.parametrize(
    ("words", "address"),
    [
        (["--standalone"], "127.0.0.1"),
        (["--standalone", "--local-addr=10.0.0.1"], "10.0.0.1"),
        (["--nnodes=2", "--rdzv_endpoint=10.0.0.1:29500"], None),
    ],
    ids=["one machine", "chosen", "two machines"],
)
def test_ranks_of_one_machine_meet_at_loopback(
    words: list[str], address: str | None, recorded_arguments: list[Any]
) -> None:
    """Its own name may resolve nowhere, for example in a container."""
    assert main([*words, "train.py"]) == 0
    assert recorded_arguments[0].local_addr == address


@pytest.mark.parametrize(
    "options",
    [
        ("--nproc_per_node=x",), ("--nproc-per-node=0",), ("--nproc_per_node=-1",), ("--nnodes=x",), ("--nnodes=0",),
        ("--nnodes=2:1",), ("--nnodes=1:2:3",), ("--master-port=65536",), ("--master_port=-1",),
    ],
)  # fmt: skip
def test_invalid_options_report_error(
    options: tuple[str, ...], recorded_arguments: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "train.py"]) == 2
    assert not recorded_arguments
    assert re.fullmatch(r"error: .*[,;] expected .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("error", [DistNetworkError("EADDRINUSE\nmore"), RendezvousConnectionError("EADDRINUSE")])
def test_port_in_use_reports_error(
    error: Exception, recorded_arguments: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr(run, "run", fail)
    assert main(["--nnodes=2", "--master-addr=10.0.0.1", "--master-port=29500", "train.py"]) == 1
    expected = (
        "error: the machines cannot connect at 10.0.0.1:29500: EADDRINUSE; use a free port, the same on all machines\n"
    )
    assert capsys.readouterr().err == expected


def ended_with(codes: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """The remaining restarts after processes that failed with these codes."""
    failures = {rank: SimpleNamespace(exitcode=code) for rank, code in enumerate(codes)}
    result = agents.RunResult(state=agents.WorkerState.FAILED, failures=failures)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: result)
    agent = Agent.__new__(Agent)
    agent._remaining_restarts = 3
    assert agent._monitor_workers(None) is result
    return agent._remaining_restarts


def test_deliberate_exits_not_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended_with([-9, 1], monkeypatch) == 3
    assert ended_with([1, 2], monkeypatch) == 0
    assert ended_with([65], monkeypatch) == 0


def test_torch_agent_has_overridden_method() -> None:
    """No option of torchrun says which agent it starts, nor what is started again: both are names inside torch. Where a
    version moves one, this fails, and not a run that is started again and again."""
    assert api.LocalElasticAgent is LocalElasticAgent
    assert "LocalElasticAgent(" in inspect.getsource(api.launch_agent)
    monitored = inspect.getsource(agents.SimpleElasticAgent._invoke_run)
    assert "self._monitor_workers(" in monitored
    assert "self._remaining_restarts > 0" in monitored
    assert "_monitor_workers" in vars(LocalElasticAgent)
