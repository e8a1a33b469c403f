# SPDX-License-Identifier: Apache-2.0
"""The C++ examples beside the Python ones: the same losses, the same checkpoints, the same tokens, no Python."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cpp_build import BUILD, is_for_this_torch

import mixture_of_mamba
from mixture_of_mamba import models

ROOT = Path(__file__).resolve().parents[3]
STEPS = 50
SIZES = ["--size", "tiny", "--concepts", "24", "--codes", "64", "--batch", "4", "--eval-samples", "36"]
MODEL = ["--d-model", "32", "--layers", "2", "--lr", "0.01"]
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``train`` and ``generate``: of the C++ tests' build, else built for the installed package."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    package = Path(mixture_of_mamba.__file__).resolve().parent
    build = BUILD
    if cmake is None or not (shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("needs cmake and a C++ compiler")
    if (build / "examples/cpp").is_dir():
        if not is_for_this_torch():
            pytest.skip("the C++ tests are built for another torch")
        programs = build / "examples/cpp"
    elif not (package / "lib/cmake").is_dir():
        pytest.skip(
            "neither the C++ tests are built (make test-cpp) nor is a package for C++ installed (pip install .)"
        )
    elif torch.version.cuda and not shutil.which("nvcc"):
        pytest.skip("find_package(Torch) needs the CUDA toolkit where torch is built with CUDA")
    else:
        programs = build = tmp_path_factory.mktemp("build")
        options = [f"-DCMAKE_PREFIX_PATH={package}", f"-DTorch_DIR={torch.utils.cmake_prefix_path}/Torch"]
        options += ["-DCMAKE_CXX_FLAGS_RELEASE=-O0"]  # a third less to wait; what counts is in torch and the operators
        quiet([cmake, "-S", str(ROOT / "examples/cpp"), "-B", str(build), *options])
    quiet([cmake, "--build", str(build), "--parallel", "2", "--target", "train", "generate"])
    return programs


def quiet(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@dataclass(frozen=True)
class PythonRun:
    """What chameleon.py trained, on the batches that ``stream`` holds."""

    folder: Path
    stream: Path
    task: Any

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def vocabulary_file(self) -> Path:
        return self.stream / "vocabulary.txt"

    @property
    def model(self) -> models.Chameleon:
        return self.task.model.model


@pytest.fixture(scope="module")
def python(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonRun]:
    stream, folder = (tmp_path_factory.mktemp(name) for name in ("stream", "python"))
    where, count = ["--data", str(data)], ["--steps", str(STEPS)]
    importlib.import_module("export_stream").main([*SIZES, *where, *count, "--output", str(stream)])
    arguments = [*SIZES, *MODEL, *where, *count, "--eval-every", str(STEPS), "--output", str(folder)]
    args = importlib.import_module("discrete_kit.arguments").parse_chameleon("", arguments)
    trainer = importlib.import_module("training_kit.trainer")
    trainer.make_deterministic(args.seed)
    scenes = importlib.import_module("discrete_kit.data").load_scenes(args)
    world = importlib.import_module("training_kit.parallel").World(torch.device("cpu"))
    task = importlib.import_module("discrete_kit.task").DiscreteTask(args, scenes, world, {})
    assert trainer.train(task, args, {}, None)
    yield PythonRun(folder, stream, task)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(programs: Path, python: PythonRun, output: Path, *more: str) -> list[str]:
    data = str(python.stream / "stream.bin")
    return [str(programs / "train"), "--data", data, "--output", str(output), *MODEL, *more]


def launch(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(arguments: list[str]) -> str:
    run = launch(arguments)
    output = run.communicate(timeout=PATIENCE)[0]
    assert run.returncode == 0, output
    return output


def records(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def cpp(programs: Path, python: PythonRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a C++ run with the settings of the Python run, and nothing of it but the batches and the seed."""
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "output.txt").write_text(finish(command(programs, python, folder)))
    return folder


def test_every_step_has_the_losses_of_python(cpp: Path, python: PythonRun) -> None:
    ours, theirs = records(cpp, "train"), records(python.folder, "train")
    assert [one["step"] for one in ours] == list(range(1, STEPS + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert one["lr"] == pytest.approx(other["lr"], rel=1e-12)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        for name in ("loss", "text", "image"):
            assert one[name] == pytest.approx(other[name], abs=1e-4), one["step"]
    assert ours[-1]["loss"] < 0.7 * ours[0]["loss"]
    held_out, expected = records(cpp, "validation")[-1], records(python.folder, "validation")[-1]
    for name in ("text", "image"):
        assert held_out[name] == pytest.approx(expected[name], abs=1e-3)


def test_the_progress_line(cpp: Path) -> None:
    line = next(line for line in (cpp / "output.txt").read_text().splitlines() if line.startswith("step 50/50"))
    assert {"text", "image", "tokens/s", "ETA"} <= set(line.split())


def test_python_reads_the_checkpoint_of_cpp(cpp: Path, python: PythonRun) -> None:
    content = torch.load(cpp / "checkpoint.pt", weights_only=True)
    expected = torch.load(python.checkpoint, weights_only=True)
    assert content["step"] == STEPS
    model = models.Chameleon(python.model.config, python.model.vocabulary, tied=True)
    model.load_state_dict(content["model"])
    for (name, got), value in zip(model.named_parameters(), expected["model"].values(), strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=1e-4, msg=name)
    torch.testing.assert_close(content["optimizer"]["state"], expected["optimizer"]["state"], rtol=1e-3, atol=1e-5)
    optimizer = importlib.import_module("training_kit.optimizer").make_adamw(model, 0.1)
    optimizer.load_state_dict(content["optimizer"])
    assert [set(group) for group in optimizer.state_dict()["param_groups"]] == [
        set(group) for group in content["optimizer"]["param_groups"]
    ]


def test_cpp_begins_with_the_weights_of_python(programs: Path, python: PythonRun, tmp_path: Path) -> None:
    finish(command(programs, python, tmp_path, "--weights", str(python.checkpoint), "--seed", "5", "--steps", "1"))
    with torch.no_grad():
        expected = python.task.training_step(0).loss.item()
    assert records(tmp_path, "train")[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.cuda
def test_a_gpu_has_the_losses_of_python(programs: Path, python: PythonRun, tmp_path: Path) -> None:
    finish(command(programs, python, tmp_path, "--device", "cuda"))
    for one, other in list(zip(records(tmp_path, "train"), records(python.folder, "train"), strict=True))[:20]:
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3), one["step"]


def test_autocast_has_the_first_losses_of_python_and_trains_nearly_the_same(
    programs: Path, python: PythonRun, tmp_path: Path, device: torch.device
) -> None:
    finish(command(programs, python, tmp_path, "--device", device.type, "--amp"))
    ours, theirs = records(tmp_path, "train"), records(python.folder, "train")
    torch.manual_seed(python.task.args.seed)
    model = python.task.build().model.to(device)
    batch = python.task.training_batch(0)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        loss = model.loss(batch.inputs[0].to(device)).total().item()
    assert ours[0]["loss"] != theirs[0]["loss"]
    assert ours[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    programs: Path, python: PythonRun, tmp_path: Path, number: int
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = ("--steps", "200", "--save-every", "7", "--mixer", "mamba")
    finish(command(programs, python, whole, *more))
    run = launch(command(programs, python, stopped, *more))
    deadline = time.monotonic() + PATIENCE
    while not (stopped / "checkpoint.pt").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    run.send_signal(number)
    assert run.communicate(timeout=PATIENCE)[0] is not None
    assert run.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert "going on from step" in finish(command(programs, python, stopped, *more))
    assert (stopped / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--nonsense", "1"], "unknown argument '--nonsense'"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "0"], "--steps must be an integer, 1 or more, got '0'"),
        (["--steps", "4.5"], "--steps must be an integer, 1 or more, got '4.5'"),
        (["--lr", "nan"], "--lr must be a number, 0 or more, got 'nan'"),
        (["--mixer", "attention"], "--mixer must be mom, mamba, or some of in_proj"),
        (["--mixer", "in_proj,in_proj"], "with commas, got 'in_proj,in_proj'"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--data", "/nowhere/stream.bin"], "/nowhere/stream.bin does not exist"),
        (["--data", __file__], "is not a stream"),
        (["--weights", "/nowhere/checkpoint.pt"], "/nowhere/checkpoint.pt cannot be opened"),
        (["--weights", __file__], "is not a torch.save file"),
        (["--lr", "1e30", "--clip", "1e30"], "a smaller --lr may help"),
    ],
)
def test_one_line_says_what_is_wrong(
    programs: Path, python: PythonRun, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    run = subprocess.run(
        command(programs, python, tmp_path, *arguments), capture_output=True, text=True, env=environment()
    )
    assert run.returncode == 2
    assert run.stderr.startswith("train: ") and run.stderr.count("\n") == 1, run.stderr
    assert reason in run.stderr


def test_what_does_not_fit_is_refused(programs: Path, python: PythonRun, cpp: Path, tmp_path: Path) -> None:
    shapes = command(programs, python, tmp_path, "--weights", str(python.checkpoint), "--d-model", "16")
    settings = command(programs, python, cpp, "--seed", "3")
    cut = tmp_path / "cut.bin"
    cut.write_bytes((python.stream / "stream.bin").read_bytes()[:-4])
    for arguments, reason in (
        (shapes, "embedding.weight must have shape [117, 16], got [117, 32]"),
        (settings, "seed 3; choose another --output, or --fresh to start over"),
        ([*command(programs, python, tmp_path), "--data", str(cut)], "bytes by its header"),
    ):
        run = subprocess.run(arguments, capture_output=True, text=True, env=environment())
        assert run.returncode == 2
        assert reason in run.stderr and run.stderr.count("\n") == 1, run.stderr


def words_of(python: PythonRun, ids: list[int]) -> str:
    words = python.vocabulary_file.read_text().splitlines()[1:]
    return " ".join(words[token] if token < len(words) else f"[{token - len(words)}]" for token in ids)


def prompts(python: PythonRun) -> list[list[int]]:
    """A caption to draw, a picture to describe, the shortest: lengths at which nothing was exported."""
    special = importlib.import_module("scene_streams.vocabulary")
    words = python.vocabulary_file.read_text().splitlines()[1:]
    caption = [words.index(word) for word in ["ant", "on", "rose"]]
    _, image = python.model.vocabulary.ranges
    picture = [python.model.vocabulary.first(1) + (7 * index) % image.size for index in range(image.length)]
    whole = [special.BOS, special.BOI, *picture, special.EOI]
    return [[special.BOS, *caption, special.BOI], whole, [special.BOS], whole[:9]]


def check_generation(
    programs: Path, python: PythonRun, model: Path, folder: Path, device: torch.device, tolerance: dict[str, float]
) -> None:
    eos = importlib.import_module("scene_streams.vocabulary").EOS
    for prompt in prompts(python):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            logits = python.model(tokens)
        drawn = python.model.generate(tokens, 70, sampling=models.Sampling(0), stop=eos)[0]
        saved = folder / "logits.pt"
        files = ["--model", str(model), "--vocabulary", str(python.vocabulary_file), "--logits", str(saved)]
        wanted = ["--prompt", words_of(python, prompt), "--new", "70", "--device", device.type]
        text = finish([str(programs / "generate"), *files, *wanted])
        results = torch.load(saved, weights_only=True)
        torch.testing.assert_close(results["logits"], logits, **tolerance)
        assert results["drawn"].tolist() == drawn[drawn >= 0].tolist()
        assert text.split() == words_of(python, results["drawn"].tolist()).split()


@pytest.fixture
def tolerance(device: torch.device) -> dict[str, float]:
    """Python computes on the CPU."""
    return {"rtol": 1e-5, "atol": 1e-5} if device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-3}


def test_a_checkpoint_generates_what_python_generates(
    programs: Path, python: PythonRun, tmp_path: Path, device: torch.device, tolerance: dict[str, float]
) -> None:
    check_generation(programs, python, python.checkpoint, tmp_path, device, tolerance)


def test_a_package_generates_what_python_generates(
    programs: Path, python: PythonRun, tmp_path: Path, device: torch.device, tolerance: dict[str, float]
) -> None:
    package, export = tmp_path / "model.pt2", importlib.import_module("export_model")
    files = ["--checkpoint", str(python.checkpoint), "--vocabulary", str(python.vocabulary_file)]
    export.main([*files, "--output", str(package), "--device", device.type])
    check_generation(programs, python, package, tmp_path, device, tolerance)


def test_sampling_is_decided_by_its_seed(programs: Path, python: PythonRun) -> None:
    words, model = str(python.vocabulary_file), str(python.checkpoint)
    sample = [str(programs / "generate"), "--model", model, "--vocabulary", words, "--prompt", "<bos> <boi>"]
    first, again, other = (finish([*sample, "--temperature", "1", "--seed", seed]) for seed in ("1", "1", "2"))
    assert first == again != other
    assert [word.startswith("[") for word in first.split()[:64]] == [True] * 64


def test_no_python_is_linked(programs: Path) -> None:
    for name in ("train", "generate"):
        libraries = subprocess.run(["ldd", str(programs / name)], capture_output=True, text=True, check=True).stdout
        assert "libmixture_of_mamba.so" in libraries
        assert "libpython" not in libraries and "libtorch_python" not in libraries


def test_generation_says_in_one_line_what_is_wrong(programs: Path, python: PythonRun) -> None:
    words, model = str(python.vocabulary_file), str(python.checkpoint)
    for more, reason in (
        (
            ["--prompt", "<bos> dragon"],
            "--prompt must hold words of vocabulary.txt and image codes [0] .. [63], got 'dragon'",
        ),
        (["--prompt", "[64]"], "got '[64]'"),
        (["--prompt", " "], "--prompt must hold at least one token"),
        ([], "--prompt is required"),
        (["--prompt", "<bos>", "--model", "/nowhere.pt2"], "--model must be a file, got /nowhere.pt2"),
        (["--prompt", "<bos>", "--vocabulary", model], "is not a vocabulary.txt"),
    ):
        arguments = [str(programs / "generate"), "--model", model, "--vocabulary", words, *more]
        run = subprocess.run(arguments, capture_output=True, text=True, env=environment())
        assert run.returncode == 2
        assert run.stderr.startswith("generate: ") and reason in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_exporting_says_in_one_line_what_is_wrong(
    data: Path, python: PythonRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, model = (importlib.import_module(name) for name in ("export_stream", "export_model"))
    words, nothing = ["--vocabulary", str(python.vocabulary_file)], tmp_path / "nothing.pt"
    torch.save({"model": {"weight": torch.zeros(1)}}, nothing)
    for main, arguments, reason in (
        (stream.main, ["--data", str(data), "--concepts", "33"], "--concepts must be at most 32, the size of"),
        (stream.main, ["--concepts", "1"], "--concepts must be at least 2, got 1"),
        (stream.main, ["--eval-samples", "0"], "must be a positive integer"),
        (model.main, words, "the following arguments are required: --checkpoint"),
        (model.main, [*words, "--checkpoint", "/nowhere.pt"], "--checkpoint must be a file, got /nowhere.pt"),
        (model.main, [*words, "--checkpoint", str(nothing)], "is not a checkpoint of the Chameleon example"),
        (model.main, ["--vocabulary", __file__, "--checkpoint", str(nothing)], "is not a vocabulary.txt"),
        (model.main, [*words, "--checkpoint", str(nothing), "--output", "x.so"], "--output must end in .pt2, got x.so"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert reason in error and error.count("\n") == 1, error


def test_the_overhead_benchmark_prints_both_languages() -> None:
    program = BUILD / "benchmarks/cpp/overhead"
    if not program.is_file() or not is_for_this_torch():
        pytest.skip("the benchmark is not built for this torch (make test-cpp builds it)")
    script = [sys.executable, str(ROOT / "benchmarks/cpp/overhead.py"), "--turns", "1", "--calls", "4"]
    lines = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].split() == ["Python", "C++"]
    assert [line.split()[0] for line in lines[1:]] == ["training", "routing", "forward", "step"]
