"""Runs of a parent of S3RL, for tests to learn from: python -m tests.teacher SCRIPT [ENV ...]

They lie in runs/tests/SCRIPT__ENV and are made anew each time.
"""

import shutil
import sys

from tests.launch import ROOT, run

OFF_POLICY = {  # the first has learned nothing, the second enough
    "Hopper-v5": "--total-timesteps 600 --learning-starts 100 --batch-size 16",
    "Pendulum-v1": "--total-timesteps 8000 --learning-starts 1000",
}
ON_POLICY = {
    "Hopper-v5": "--total-timesteps 512 --num-steps 256",
    "InvertedPendulum-v5": "--total-timesteps 100000",
}
RUNS = {f"{base}_continuous_action": OFF_POLICY for base in ("td3", "sac")}
RUNS["ppo_continuous_action"] = ON_POLICY


if __name__ == "__main__":
    script = sys.argv[1]
    for env_id in sys.argv[2:] or RUNS[script]:
        folder = ROOT / "runs" / "tests" / f"{script}__{env_id}"
        shutil.rmtree(folder, ignore_errors=True)
        words = f"--env-id {env_id} {RUNS[script][env_id]} --eval-episodes 10 --run-dir {folder}"
        run(script, 1, *words.split(), timeout=600, fresh=True)
