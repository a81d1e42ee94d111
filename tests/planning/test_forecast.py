"""`myllm plan`: does a run fit on given GPUs, and how long does it take?"""

import re
from pathlib import Path

import pytest
from conftest import with_train

from myllm.cli.main import main
from myllm.errors import UserError
from myllm.planning.batch import batch_plan
from myllm.planning.forecast import EXPECTED_MFU, describe, parse_hardware, predict
from myllm.planning.gpu_specs import GPU_SPECS
from myllm.planning.hardware_table import HARDWARE, page
from myllm.planning.memory_estimate import predicted_bytes
from myllm.presets import PRESETS, get_preset

DOCS = Path(__file__).parents[2] / "docs"


def test_dolma_75m_fits_rtx_3060() -> None:
    """12 GB, with the micro-batch that the preset has."""
    forecast = predict(get_preset("dolma-75m"), parse_hardware("1xRTX3060"))
    assert forecast.configured_batch_fits
    assert predicted_bytes(forecast.config, forecast.mode) <= forecast.hardware.budget_bytes < 11 * 2**30


def test_hardware_page_is_up_to_date() -> None:
    assert (DOCS / "hardware.md").read_text(encoding="utf-8") == page(), "run: myllm plan --table > docs/hardware.md"


@pytest.mark.parametrize("gpus", HARDWARE)
@pytest.mark.parametrize("name", PRESETS)
def test_largest_fitting_micro_batch(name: str, gpus: str) -> None:
    """It fits, keeps the batch exact, and the next one does not fit."""
    config, hardware = get_preset(name), parse_hardware(gpus)
    try:
        forecast = predict(config, hardware)
    except UserError:
        assert not batch_plan(config, hardware.count).micro_batch_sizes()
        return
    sizes = batch_plan(config, hardware.count).micro_batch_sizes()
    used = {n: predicted_bytes(with_train(config, micro_batch_size=n), forecast.mode) for n in sizes}
    assert list(used.values()) == sorted(used.values())
    assert forecast.largest == max((n for n in sizes if used[n] <= hardware.budget_bytes), default=None)


def test_time_matches_manual_calculation() -> None:
    """The reference run on 8 x A100: 2.3235 GFLOP x 524,288 tokens over 8 x 312 TFLOP/s."""
    forecast = predict(get_preset("lf-llm-269m"), parse_hardware("8xA100-80"))
    low, high = EXPECTED_MFU
    whole = 2_323_525_632 * 524_288 / (8 * 312e12)
    assert forecast.step_s == pytest.approx((whole / high, whole / low))
    assert forecast.tokens_per_s == pytest.approx((524_288 / forecast.step_s[1], 524_288 / forecast.step_s[0]))
    assert forecast.hours == pytest.approx(tuple(19_073 * seconds / 3_600 for seconds in forecast.step_s))
    # What it really took there: 346K tokens/s.
    assert forecast.tokens_per_s[0] < 346e3 < forecast.tokens_per_s[1]
    slower = predict(with_train(get_preset("lf-llm-269m"), activation_checkpointing=True), parse_hardware("8xA100-80"))
    assert slower.step_s[0] == pytest.approx(forecast.step_s[0] * 4 / 3)


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["plan", *words])
    return capsys.readouterr().out


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    output = plan(capsys, "lf-llm-269m", "--gpus", "8xA100-80", "--train.max-steps", "100")
    assert "lf-llm-269m on 8 x A100-80 (DDP)" in output
    assert "100 steps = 52,428,800 tokens" in output
    assert re.search(
        r"micro-batch  16, as set, fits; the largest that fits is \d+: --train.micro-batch-size \d+, or auto", output
    )
    memory = output.partition("\nmemory ")[2].partition("\nprecision ")[0]
    parts = [float(size) for size in re.findall(r"^  \w[\w' ,]+ +([\d.]+) GiB$", memory, re.MULTILINE)]
    (whole,) = re.findall(r"memory +([\d.]+) GiB predicted", output)
    assert sum(parts) == pytest.approx(float(whole), abs=0.05)
    assert "assuming 30 % to 50 % of 312 TFLOP/s per GPU" in output
    sharded = plan(capsys, "lf-llm-269m", "--gpus", "8xRTX3060", "--train.parallel", "fsdp")
    assert "(FSDP)" in sharded
    assert "gathered matrices" in sharded
    assert "16, as set, does not fit" in sharded


def test_cost_matches_manual_calculation(capsys: pytest.CaptureFixture[str]) -> None:
    low, high = predict(get_preset("lf-llm-269m"), parse_hardware("8xA100-80")).hours
    words = ("lf-llm-269m", "--gpus", "8xA100-80", "--dollars-per-hour", "12")
    assert f"\ncost         ${12 * low:.2f} to ${12 * high:.2f} for these hours" in plan(capsys, *words)


def test_multiple_gpus_print_table(capsys: pytest.CaptureFixture[str]) -> None:
    gpus = ("--gpus", "1xRTX4090", "8xA100-80", "cpu")
    header, first, second, third = plan(
        capsys, "lf-llm-269m", *gpus, "--dollars-per-hour", "0.5", "12", "1"
    ).splitlines()
    assert re.split(r"  +", header) == ["GPUs", "micro-batch", "peak memory", "tokens/s", "hours", "cost"]
    largest = predict(get_preset("lf-llm-269m"), parse_hardware("1xRTX4090")).largest
    assert re.split(r"  +", first)[:2] == ["1 x RTX4090", f"16 (too large: {largest} fits)"]
    assert re.split(r"  +", second)[1] == "16"
    assert second.endswith("5.2 to 8.6     $62.06 to $103.43")
    assert third.endswith("unknown         unknown        unknown")
    assert "cost" not in plan(capsys, "lf-llm-269m", *gpus)


def test_plan_shows_run_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """As set, even if it does not fit; with auto, the largest that is predicted to fit."""
    config, hardware = get_preset("small-50m"), parse_hardware("RTX3060")
    for size in (16, 64, "auto"):
        output = plan(capsys, "small-50m", "--gpus", "RTX3060", "--train.micro-batch-size", str(size))
        used = predict(config, hardware).largest if size == "auto" else size
        assert f"\nbatch        {used} sequences x 1,024 tokens" in output
        predicted = predicted_bytes(with_train(config, micro_batch_size=used), predict(config, hardware).mode)
        assert f"\nmemory       {predicted / 2**30:.2f} GiB predicted" in output
    assert "micro-batch  auto: 32, the largest that is predicted to fit" in output


def test_unknowns_and_limits_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    old = plan(capsys, "small-50m", "--gpus", "T4")
    assert "precision    float16 with a loss scale" in old
    assert "of 65 TFLOP/s per GPU in float16" in old
    output = plan(capsys, "small-50m", "--gpus", "T4", "--train.precision", "bfloat16")
    assert "bfloat16, which a T4 cannot compute in" in output
    cpu = plan(capsys, "debug", "--gpus", "cpu")
    assert "resident memory of the process" in cpu
    assert "time         unknown for a CPU" in cpu
    assert "12, as set, does not divide the batch" in plan(capsys, "dolma-75m", "--gpus", "8xH100")
    nothing = plan(capsys, "lf-llm-269m", "--gpus", "RTX3070", "--model.n-layers", "80")
    assert "fits         no" in nothing
    assert "--train.activation-checkpointing" in nothing


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["debug", "--gpus", "8xFOO"], "known GPUs: "),
        (["debug", "--gpus", "8xA100"], "matches several GPUs: A100-80, A100-40"),
        (["debug", "--gpus", "v100"], "matches several GPUs: V100-32, V100-16"),
        (["debug"], "missing --gpus, for example"),
        (["debug", "--gpus", "7xH100"], "on 7 ranks train.batch_tokens 512 is not a multiple"),
        (["nothing", "--gpus", "H100"], "unknown preset 'nothing'"),
        (["debug", "--gpus", "H100", "--dollars-per-hour", "0"], "--dollars-per-hour is 0.0, but must be above 0"),
        (["debug", "--gpus", "H100", "L4", "--dollars-per-hour", "2"], "1 --dollars-per-hour for 2 --gpus; give one"),
    ],
)
def test_invalid_arguments(words: list[str], output: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *words])
    assert caught.value.code == 2
    assert output in capsys.readouterr().err


def test_help_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as caught:
            plan(capsys, *words)
        assert caught.value.code == code
        assert "usage: myllm plan PRESET" in capsys.readouterr().out
    assert plan(capsys, "--table") == page()


def test_description_is_complete_for_all_gpus() -> None:
    for gpu in GPU_SPECS:
        output = describe(predict(get_preset("small-50m"), parse_hardware(gpu.name)))
        for line in ("steps", "memory", "GPU", "time"):
            assert f"\n{line} " in output
