"""Short runs of a parent of S3RL, for the tests to learn from: python -m tests.teacher SCRIPT

They lie in runs/tests/SCRIPT__ENV and are made anew each time.
"""

import shutil
import sys

from tests.launch import ROOT, run

OFF_POLICY = {
    "Hopper-v5": "--total-timesteps 600 --learning-starts 100 --batch-size 16",
    "Pendulum-v1": "--total-timesteps 3000 --learning-starts 500",
}
RUNS = {"td3_continuous_action": OFF_POLICY, "sac_continuous_action": OFF_POLICY}
RUNS["ppo_continuous_action"] = {
    "Hopper-v5": "--num-steps 256 --total-timesteps 1024",
    "InvertedPendulum-v5": "--num-steps 256 --total-timesteps 10240",
}


def make(script, env_id, folder):
    """A new run in `folder`, which is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = f"--env-id {env_id} {RUNS[script][env_id]} --eval-episodes 1"
    run(script, 1, *flags.split(), "--run-dir", folder)
    return folder


if __name__ == "__main__":
    for name in RUNS[sys.argv[1]]:
        make(sys.argv[1], name, ROOT / "runs" / "tests" / f"{sys.argv[1]}__{name}")
