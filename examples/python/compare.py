# SPDX-License-Identifier: Apache-2.0
"""Dense Mamba against Mixture-of-Mamba at equal FLOPs, with several seeds, in one of the three settings.

    python examples/python/compare.py --setting chameleon --seeds 3                       # two CPU cores, an hour
    python examples/python/compare.py --setting three --seeds 3 --device cuda --jobs 6    # one GPU, minutes

Writes a table (.md), everything (.json) and a picture for each modality (.png) to benchmarks/results/<device>/. What is
not an argument of its own goes to the setting's script: --steps 500 --amp --compile ... Runs stay in runs/compare; the
same command goes on where it stopped.
"""

from __future__ import annotations

from training_kit.startup import imports_explained

with imports_explained():
    import argparse
    import sys
    from pathlib import Path

    import torch
    from chameleon import CHAMELEON
    from compare_kit.analysis import analyse
    from compare_kit.output import as_json, as_markdown, plot_modality
    from compare_kit.runs import Run, RunError, carry_out
    from three_modalities import THREE_MODALITIES
    from training_kit.app import Setting, finish
    from training_kit.arguments import REPOSITORY, OneLineParser, chosen_device, mixer, positive_int
    from training_kit.failure import fail
    from training_kit.packs import MissingPackagesError
    from transfusion import TRANSFUSION

    import mixture_of_mamba as mom

SETTINGS = {
    "chameleon": ("chameleon.py", CHAMELEON),
    "transfusion": ("transfusion.py", TRANSFUSION),
    "three": ("three_modalities.py", THREE_MODALITIES),
}
VALIDATIONS = 20  # of a run


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(description=__doc__ or "")
    parser.add_argument("--setting", choices=tuple(SETTINGS), required=True)
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs of each mixer (3)")
    parser.add_argument("--mixer", type=mixer, default="mom", help="what dense Mamba is compared with (mom)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--size", help="preset of model and run (small on a CPU, base on a GPU)")
    parser.add_argument("--jobs", type=positive_int, default=1, help="runs at a time, on the same device (1)")
    parser.add_argument(
        "--runs", type=Path, default=REPOSITORY / "runs" / "compare", help="their folder (runs/compare)"
    )
    parser.add_argument("--output", type=Path, help="folder of the results (benchmarks/results/<device>)")
    args, rest = parser.parse_known_args()
    if args.mixer == "mamba":
        fail("--mixer must be another one than mamba, which it is compared with")
    args.size = args.size or ("base" if args.device.startswith("cuda") else "small")
    args.output = args.output or REPOSITORY / "benchmarks" / "results" / device_name(args.device)
    return args, rest


def device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device).replace(" ", "-").lower()


def plan(args: argparse.Namespace, rest: list[str], script: str, setting: Setting) -> tuple[list[Run], int]:
    """All runs, those of the same seed side by side; and the steps of each. Builds the packs that they will share."""
    common = ["--device", args.device, "--size", args.size, "--draw", "0", *rest]
    settings = setting.parse("", common)
    if "--eval-every" not in rest:
        common += ["--eval-every", str(-(-settings.steps // VALIDATIONS))]
    setting.load(settings)
    runs = []
    for seed in range(args.seeds):
        for name in ("mamba", args.mixer):
            folder = args.runs / f"{args.setting}-{args.size}-{name.replace(',', '+')}-{seed}"
            own = ["--mixer", name, "--seed", str(seed), "--output", str(folder)]
            runs.append(Run(name, seed, [str(Path(__file__).with_name(script)), *common, *own], folder))
    return runs, settings.steps


def main() -> int:
    args, rest = parse_arguments()
    script, setting = SETTINGS[args.setting]
    chosen_device(args)
    try:
        runs, steps = plan(args, rest, script, setting)
        carry_out(runs, steps, args.jobs)
        write_results(args, runs, setting)
    except (OSError, MissingPackagesError, RunError) as error:
        fail(str(error))
    return 0


def write_results(args: argparse.Namespace, runs: list[Run], setting: Setting) -> None:
    comparison = analyse(runs, ("mamba", args.mixer), setting.task.baseline_name)
    args.output.mkdir(parents=True, exist_ok=True)
    stem = f"compare-{args.setting}-{args.size}" + ("" if args.mixer == "mom" else f"-{args.mixer.replace(',', '+')}")
    about = {
        "command": "python examples/python/compare.py " + " ".join(sys.argv[1:]),
        "device": device_name(args.device),
        "versions": {"mixture_of_mamba": mom.__version__, "torch": torch.__version__},
    }
    table = as_markdown(comparison)
    (args.output / f"{stem}.md").write_text(table)
    (args.output / f"{stem}.json").write_text(as_json(comparison, about))
    for name in comparison.losses:
        units = setting.task.units[name.rpartition("_")[2]]
        plot_modality(args.output / f"{stem}-{name}.png", comparison, name, units)
    print(table)
    print(f"written to {args.output}: {stem}.md, .json and -*.png")


if __name__ == "__main__":
    finish(main)
