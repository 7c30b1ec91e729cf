"""How the contract tests run each script. A new script in algos/ needs an entry in CASES."""

from dataclasses import dataclass, field

import pytest


@dataclass(frozen=True)
class Case:
    smoke: str
    """flags of a run of a few seconds with at least 20 updates, for 1 and for 2 processes; it
    evaluates at least once on the way"""
    changed: str
    """a flag with another value than in `smoke`, which a resumed run must refuse"""
    learning: str
    """flags of a run that learns within two minutes of CPU"""
    score: tuple[str, float]
    """key of metrics.csv, and what its last value must reach in the learning run"""
    processes: int = 1
    """of the learning run"""
    prepare: str = ""
    """module to run before the first run, where a script needs something in the cache"""
    bad: dict[str, str] = field(default_factory=dict)
    """flags of bad input -> words of the one line that answers them"""


# the buffer is full before the end, so that its oldest rows are written over
OFF_POLICY = (
    "--env-id Hopper-v5 --num-envs 2 --batch-size 16 --learning-starts 100 "
    "--updates-per-step 0.5 --log-every 10 --total-timesteps 800 --buffer-size 500 "
    "--eval-every 150 --eval-episodes 2"
)
OFF_POLICY_BAD = {
    "--env-id Nope-v0": "--env-id Nope-v0",
    "--env-id CartPole-v1": "ppo.py",
    "--num-envs 0": "--num-envs 0",
    "--batch-size 0": "--batch-size 0",
    "--buffer-size 1": "--buffer-size 1",
    "--updates-per-step 0": "--updates-per-step 0",
    "--total-timesteps 1": "--total-timesteps 1",
    "--device cuda": "--device cpu",
}
# a teacher of tests/teacher.py; the phases change in the middle of the run
S3RL = "--teacher runs/tests/{}__Hopper-v5 --snapshot-timesteps {} --truncation 20 "
S3RL_BAD = {
    "--teacher no/folder": "no/folder",
    "--env-id Walker2d-v5": "acts in Hopper-v5",
    "--truncation 0": "--truncation 0",
    "--clusters 0": "--clusters 0",
    "--snapshot-every 0": "--snapshot-every 0",
    "--teacher-episodes 0": "--teacher-episodes 0",
    "--env-id Nope-v0": "--env-id Nope-v0",
    "--env-id CartPole-v1": "ppo.py",
    "--num-envs 0": "--num-envs 0",
    "--total-timesteps 1": "--total-timesteps 1",
    "--device cuda": "--device cpu",
}


def s3rl_case(parent: str, bad: dict[str, str]) -> Case:
    """Of S3RL with an off-policy parent; bad: what only this one refuses."""
    return Case(
        smoke="--env-id Hopper-v5 --num-envs 2 --batch-size 16 --learning-starts 100 "
        "--log-every 10 --total-timesteps 800 --buffer-size 500 --eval-every 300 "
        "--eval-episodes 2 " + S3RL.format(parent, 400),
        changed="--truncation 30",
        learning="--env-id Pendulum-v1 --total-timesteps 8000 --learning-starts 1000 "
        f"--teacher runs/tests/{parent}__Pendulum-v1 --snapshot-timesteps 2000",
        score=("eval/deterministic_return", -250),  # that of the parent
        prepare=f"tests.teacher {parent}",
        bad=S3RL_BAD | {flag: flag for flag in ("--batch-size 0", "--buffer-size 1")} | bad,
    )


CASES = {
    "ppo": Case(
        smoke="--env-id CartPole-v1 --num-envs 4 --num-steps 64 --total-timesteps 8192 "
        "--eval-every 12 --eval-episodes 2",
        changed="--gamma 0.9",
        learning="--env-id CartPole-v1",  # three seeds of three gave 500
        score=("eval/deterministic_return", 475),
        bad={
            "--env-id Nope-v0": "--env-id Nope-v0",
            "--env-id Pendulum-v1": "ppo_continuous_action.py",
            "--num-envs 0": "--num-envs 0",
            "--num-minibatches 7": "--num-minibatches 7",
            "--total-timesteps 10": "--total-timesteps 10",
            "--device cuda": "--device cpu",
        },
    ),
    "ppo_continuous_action": Case(
        smoke="--env-id Hopper-v5 --num-envs 2 --num-steps 64 --num-minibatches 4 "
        "--update-epochs 4 --total-timesteps 4096 --eval-every 12 --eval-episodes 2",
        changed="--gamma 0.9",
        learning="--env-id InvertedPendulum-v5 --total-timesteps 100000",
        score=("eval/deterministic_return", 950),
        bad={
            "--env-id Nope-v0": "--env-id Nope-v0",
            "--env-id CartPole-v1": "ppo.py",
            "--num-envs 0": "--num-envs 0",
            "--num-minibatches 7": "--num-minibatches 7",
            "--total-timesteps 10": "--total-timesteps 10",
            "--device cuda": "--device cpu",
        },
    ),
    "sac_continuous_action": Case(
        smoke=OFF_POLICY + " --eval-lengths",
        changed="--gamma 0.9",
        # nine seeds of nine gave more than -140; at 6000 steps one of them gave -269
        learning="--env-id Pendulum-v1 --total-timesteps 8000 --learning-starts 1000",
        score=("eval/deterministic_return", -250),
        bad=OFF_POLICY_BAD | {"--alpha -1": "--alpha -1", "--action-repeat 0": "--action-repeat 0"},
    ),
    "td3_continuous_action": Case(
        smoke=OFF_POLICY,
        changed="--gamma 0.9",
        learning="--env-id Pendulum-v1 --total-timesteps 8000 --learning-starts 1000",
        score=("eval/deterministic_return", -250),
        bad=OFF_POLICY_BAD
        | {"--policy-noise -1": "--policy-noise -1", "--action-repeat 0": "--action-repeat 0"},
    ),
    "srl": Case(
        smoke=OFF_POLICY.replace("learning-starts", "random-steps") + " --sequence-length 3",
        changed="--gamma 0.9",
        # smaller batches than the paper's, for the sake of time
        learning="--env-id Pendulum-v1 --sequence-length 2 --batch-size 64 "
        "--total-timesteps 6000 --random-steps 1000 --no-eval-lengths",
        score=("eval/deterministic_return", -250),
        bad=OFF_POLICY_BAD | {"--sequence-length 0": "--sequence-length 0"},
    ),
    "s3rl_td3": s3rl_case("td3_continuous_action", {"--policy-noise -1": "--policy-noise -1"}),
    "s3rl_sac": s3rl_case("sac_continuous_action", {}),
    "s3rl_ppo": Case(
        smoke="--env-id Hopper-v5 --num-envs 2 --num-steps 64 --num-minibatches 4 "
        "--update-epochs 4 --total-timesteps 4096 --eval-every 12 --eval-episodes 2 "
        + S3RL.format("ppo_continuous_action", 2048),
        changed="--truncation 30",
        learning="--env-id InvertedPendulum-v5 --total-timesteps 100000 --snapshot-timesteps 20000 "
        "--teacher runs/tests/ppo_continuous_action__InvertedPendulum-v5",
        score=("eval/deterministic_return", 950),  # that of the parent
        prepare="tests.teacher ppo_continuous_action",
        bad=S3RL_BAD
        | {
            "--num-minibatches 7": "--num-minibatches 7",
            "--env-id CartPole-v1": "acts in Hopper-v5",
        },
    ),
    "ppo_rlhf_fsdp": Case(
        smoke="--total-episodes 320 --batch-size 16 --eval-prompts 16 --eval-every 8",
        changed="--temperature 0.9",
        learning="--total-episodes 1920",  # the SFT model has about 0.2, its samples a std of 1
        score=("eval/gold", 1.2),
        processes=2,
        prepare="rlhf.tiny_lm",
        bad={
            "--batch-size 0": "--batch-size 0",
            "--total-episodes 4": "--total-episodes 4",
            "--temperature 0": "temperature",
            "--model no/folder/here --data x.jsonl --reward x:y": "no/folder/here",
            "--device cuda": "--device cpu",
        },
    ),
    "grpo_fsdp": Case(
        smoke="--total-episodes 640 --batch-size 32 --group-size 4 --dynamic-sampling --curriculum "
        "--num-minibatches 2 --response-length 12 --eval-prompts 8 --eval-samples 4 --eval-every 8",
        changed="--group-size 8",
        learning="--total-episodes 6400 --learning-rate 3e-4 --eval-prompts 100 --eval-samples 8",
        score=("eval/pass@1", 0.55),
        processes=2,
        prepare="rlhf.tiny_lm --task number_sorting --levels 2 3",
        bad={
            "--batch-size 0": "--batch-size 0",
            "--group-size 1": "--group-size 1",
            "--group-size 64": "--batch-size 32",  # which cannot hold the group
            "--num-minibatches 5": "(5)",
            "--total-episodes 8": "--total-episodes 8",
            "--temperature 0": "temperature",
            "--kl-coef -1": "kl-coef",
            "--task nope": "unknown task 'nope'",
            "--levels 2 99": "levels 2 to 99",
            "--task-config {": "--task-config {",
            "--max-prompt-tokens 3": "--max-prompt-tokens",
            "--response-length 250": "every prompt has over 6 tokens",  # of 256 positions
            "--reward nowhere:f": "nowhere",
            "--data x.jsonl": "--data needs",
            "--model no/folder/here": "no/folder/here",
            "--device cuda": "--device cpu",
        },
    ),
    "rft_fsdp": Case(
        smoke="--total-episodes 320 --batch-size 16 --group-size 4 --curriculum "
        "--response-length 12 --eval-prompts 16 --eval-samples 4 --eval-every 8",
        changed="--temperature 0.9",
        learning="--total-episodes 5120 --learning-rate 3e-4 --source policy",
        score=("eval/pass@1", 0.5),
        prepare="rlhf.tiny_lm --task number_sorting --levels 2 3",
        bad={
            "--batch-size 0": "--batch-size 0",
            "--group-size 3": "--group-size 3",
            "--total-episodes 4": "--total-episodes 4",
            "--temperature 0": "temperature",
            "--source demonstrations --model x": "--source demonstrations",
            "--model no/folder/here": "no/folder/here",
            "--levels 2 2": "--curriculum",
            "--device cuda": "--device cpu",
        },
    ),
}


def case(script: str) -> Case:
    if script not in CASES:
        pytest.fail(
            f'algos/{script}.py is not covered: add CASES["{script}"] to tests/cases.py, with the '
            f"flags of a smoke run and of a learning run and the score to reach"
        )
    return CASES[script]
