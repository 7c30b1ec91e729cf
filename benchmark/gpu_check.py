"""Every script for a few updates on the GPU, against the same updates on the CPU.

    python -m benchmark gpu-check

Each script runs on the CPU and on one GPU with the same seed; where there are N GPUs, also on N of
them under torchrun, with nccl. Noise and shuffles are drawn on the CPU everywhere, so the losses of
the first update must agree up to rounding. Prints a table; exit code 1 if anything failed. Without
a CUDA GPU it says so and exits 0.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ALGOS = Path(__file__).parents[1] / "algos"
TOLERANCE = 0.02  # of a first update's losses, relative, with a floor of 1e-3 (see `compare`)
# A few updates of each script. num_envs and batch sizes divide by up to 8 GPUs.
OFF_POLICY = (  # a line of losses for each update, since only the first is compared
    "--num-envs 8 --log-every 1 --learning-starts 504 --updates-per-step 0.125 "
    "--total-timesteps 1600"
)
STT = "--no-snapshots --snapshot-timesteps"  # without a teacher
# the first round of updates has one, since only it is compared
S3RL = f"{STT} 800 --num-envs 8 --log-every 1 --learning-starts 511 --total-timesteps 1600"
GROUPS = "--total-episodes 192 --batch-size 64 --eval-prompts 16 --eval-samples 4"
FLAGS = {
    "ppo": "--num-envs 8 --total-timesteps 4096",
    "ppo_continuous_action": "--num-envs 8 --num-steps 256 --total-timesteps 8192",
    "sac_continuous_action": OFF_POLICY,
    "td3_continuous_action": OFF_POLICY,
    "srl": OFF_POLICY.replace("learning-starts", "random-steps") + " --no-eval-lengths",
    "s3rl_td3": S3RL,
    "s3rl_sac": S3RL,
    "s3rl_ppo": f"{STT} 4096 --num-envs 8 --num-steps 256 --total-timesteps 8192",
    "ppo_rlhf_fsdp": "--total-episodes 192 --eval-prompts 16",
    "grpo_fsdp": GROUPS,
    "rft_fsdp": GROUPS,
}


def run(script: str, device: str, processes: int, folder: Path) -> tuple[dict, dict] | str:
    """First and last value of each metric of a run, or the last line of what went wrong."""
    run_dir = folder / f"{script}-{device}-{processes}"
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launch += [str(processes)]
    command = [*launch, str(ALGOS / f"{script}.py"), *FLAGS[script].split(), "--device", device]
    command += ["--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line]
        return (lines or [f"exit code {done.returncode}"])[-1].strip()[:200]
    first, last = {}, {}
    with (run_dir / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            first.setdefault(row["key"], float(row["value"]))
            last[row["key"]] = float(row["value"])
    return first, last


def compare(ours: dict[str, float], reference: dict[str, float]) -> tuple[float, str]:
    """Largest difference of a first update's losses, relative, and which loss it is."""
    differences = {
        name: abs(ours[name] - value) / max(abs(value), 1e-3)
        for name, value in reference.items()
        if name.startswith("losses/")
    }
    worst = max(differences, key=differences.get)
    return differences[worst], worst


def main(flags: list[str]) -> None:
    argparse.ArgumentParser("python -m benchmark gpu-check", description=__doc__).parse_args(flags)
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA GPU on this machine, nothing was checked")
        return
    gpus = torch.cuda.device_count()
    print(f"{gpus} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    print("| script | device | rate | worst first loss | off by | result |")
    print("|---|---|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for script in sorted(path.stem for path in ALGOS.glob("*.py")):
            if script not in FLAGS:
                print(f"| {script} | - | - | - | - | FAILED: no flags in benchmark/gpu_check.py |")
                failed = True
                continue
            reference = run(script, "cpu", 1, Path(folder))
            # With N processes the draws are others: that run must finish, and is not compared.
            for device, processes in [("cuda", 1)] + ([("cuda", gpus)] if gpus > 1 else []):
                result = run(script, device, processes, Path(folder))
                cells = [script, f"{device} x {processes}", "-", "-", "-"]
                problem = next((r for r in (reference, result) if isinstance(r, str)), None)
                if problem is None:
                    rate = result[1].get("charts/SPS", result[1].get("charts/tokens_per_second"))
                    cells[2] = f"{rate:.0f}/s"
                    if processes == 1:
                        off, name = compare(result[0], reference[0])
                        cells[3:] = [name, f"{off:.2g}"]
                        problem = f"off by more than {TOLERANCE}" if off > TOLERANCE else None
                failed |= problem is not None
                print(f"| {' | '.join(cells)} | {f'FAILED: {problem}' if problem else 'ok'} |")
    sys.exit(1 if failed else 0)
