"""Speed of SAFE against SB3's PPO, SBX's PPO (JAX) and a plain single-file loop, same hyperparameters, interleaved.

    python benchmarks/speed.py [--threads 1] [--repeats 5] [--sbx PYTHON] [--only cartpole-1 ...]

One process a measurement, one after the other, in turns, so that a busy machine slows all alike; seconds of an
iteration (rollout and update) once everything is warm. With one thread CPU seconds count; with more, wall seconds,
because threads that wait for one another use the CPU too, so the machine must be otherwise idle.

SBX brings JAX and lives in an environment of its own: `make bench-speed` creates it. Results go to
benchmarks/results/speed.json, or with more threads to speed-threads-N.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# Hyperparameters: SB3's defaults for the first, the RL Zoo's for the others (without gSDE, which SBX does not have).
TASKS: dict[str, dict[str, Any]] = {
    "cartpole-1": {"env": "CartPole-v1", "n_envs": 1, "iterations": 2, "ppo": {}},
    "cartpole-8": {
        "env": "CartPole-v1", "n_envs": 8, "iterations": 16,
        "ppo": {
            "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "learning_rate": 1e-3,
        },
    },
    "pendulum-4": {
        "env": "Pendulum-v1", "n_envs": 4, "iterations": 1,
        "ppo": {"n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "learning_rate": 1e-3},
    },
    "halfcheetah": {
        "env": "HalfCheetah-v5", "n_envs": 1, "iterations": 2, "normalize": True,
        "ppo": {
            "n_steps": 512, "batch_size": 64, "gamma": 0.98, "learning_rate": 2.0633e-5, "ent_coef": 0.000401762,
            "clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.92, "max_grad_norm": 0.8, "vf_coef": 0.58096,
        },
        "net_arch": [256, 256],
    },
    "images": {
        "env": "images", "n_envs": 4, "iterations": 1, "policy": "CnnPolicy",
        "ppo": {"n_steps": 32, "batch_size": 64, "n_epochs": 4},
    },
}  # fmt: skip
SAFE_OFF = {"huber_delta": None, "kl_controller": "none", "max_preview_kl": None}


Clock = Callable[[], float]


def make_env(task: dict[str, Any], clock: Clock) -> Any:
    """The vector environment of a task, with the seconds its steps take counted in ``.seconds``."""
    import gymnasium as gym
    import numpy as np
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage

    class Images(gym.Env):
        observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
        action_space = gym.spaces.Discrete(6)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.frame = self.np_random.integers(0, 256, (84, 84, 4), dtype=np.uint8)
            self.t = 0
            return self.frame, {}

        def step(self, action):
            self.t += 1
            return self.frame, float(action == 0), False, self.t >= 100, {}

    env = make_vec_env(Images if task["env"] == "images" else task["env"], task["n_envs"], seed=0)
    if task["env"] == "images":
        env = VecTransposeImage(env)
    if task.get("normalize"):
        env = VecNormalize(env, gamma=task["ppo"]["gamma"])
    step = env.step

    def timed(actions):
        start = clock()
        try:
            return step(actions)
        finally:
            env.seconds += clock() - start

    env.seconds, env.step = 0.0, timed
    return env


def make_model(algorithm: str, task: dict[str, Any], clock: Clock) -> Any:
    """An algorithm on a task; ``safe-off`` is SAFE with every layer off."""
    env, kwargs = make_env(task, clock), dict(task["ppo"]) | {"seed": 0}
    policy = task.get("policy", "MlpPolicy")
    policy_kwargs: dict[str, Any] = {"net_arch": task["net_arch"]} if "net_arch" in task else {}
    if algorithm == "sbx":
        from sbx import PPO

        return PPO(policy, env, policy_kwargs=policy_kwargs, **kwargs)
    if "net_arch" in task:
        import torch as th

        policy_kwargs["activation_fn"] = th.nn.ReLU
    if algorithm == "ppo":
        from stable_baselines3 import PPO

        return PPO(policy, env, policy_kwargs=policy_kwargs, device="cpu", **kwargs)
    from sb3_safe import SAFE

    if algorithm == "safe-off":
        return SAFE(policy, env, policy_kwargs=policy_kwargs | {"n_critics": 1}, device="cpu", **SAFE_OFF, **kwargs)
    return SAFE(policy, env, policy_kwargs=policy_kwargs, device="cpu", **kwargs)


def measure(algorithm: str, name: str, threads: int) -> dict[str, float]:
    """Seconds per environment step of one algorithm on one task: in all, in the environment, acting, updating."""
    task, clock = TASKS[name], time.process_time if threads == 1 else time.perf_counter
    if algorithm != "sbx":
        import torch as th

        th.set_num_threads(threads)
    if algorithm == "loop":
        from plain_loop import PlainLoop

        model: Any = PlainLoop(make_env(task, clock), task)
    else:
        model = make_model(algorithm, task, clock)
    update = {"seconds": 0.0}
    train = model.train

    def timed_train() -> None:
        start = clock()
        train()
        update["seconds"] += clock() - start

    model.train = timed_train
    steps_per_iteration = model.n_steps * task["n_envs"]
    model.learn(2 * steps_per_iteration)  # warm: allocations, and JAX's compilation
    update["seconds"] = model.env.seconds = 0.0
    start = clock()
    model.learn(task["iterations"] * steps_per_iteration, reset_num_timesteps=False)
    steps = task["iterations"] * steps_per_iteration
    total = clock() - start
    return {
        "total": total / steps,
        "env": model.env.seconds / steps,
        "act": (total - model.env.seconds - update["seconds"]) / steps,
        "update": update["seconds"] / steps,
    }


def run(algorithm: str, name: str, threads: int, sbx_python: str) -> dict[str, float] | None:
    """One measurement in a process of its own, on ``threads`` cores."""
    python = sbx_python if algorithm == "sbx" else sys.executable
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [python, "-W", "ignore", __file__, "--measure", algorithm, name, "--threads", str(threads)]
    if threads == 1 and sys.platform == "linux":
        # Not the first core, which interrupts are served on.
        command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{algorithm} on {name} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def table(results: dict[str, Any]) -> str:
    """Markdown: env steps per second, over SB3's PPO, and shares of the time."""
    from reporting import markdown

    lines: list[list[str]] = []
    for name, algorithms in results["tasks"].items():
        for algorithm, rows in algorithms.items():
            if not rows:
                continue
            middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            pairs = zip(algorithms["ppo"], rows, strict=False)
            ratio = statistics.median(base["total"] / row["total"] for base, row in pairs)
            shares = [f"{middle[key] / middle['total']:.0%}" for key in ("env", "act", "update")]
            lines.append([name, algorithm, f"{1 / middle['total']:.0f}", f"{ratio:.2f}", *shares])
    return markdown(["task", "algorithm", "steps/s", "x SB3 PPO", "env", "acting", "update"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sbx", default=".venv-sbx/bin/python", help="python of an environment with sbx-rl")
    parser.add_argument("--only", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--algorithms", nargs="*", default=["ppo", "safe", "safe-off", "loop", "sbx"])
    parser.add_argument("--out", type=Path, help="file of the results")
    parser.add_argument("--measure", nargs=2, metavar=("ALGORITHM", "TASK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments.threads)))
        return
    suffix = "" if arguments.threads == 1 else f"-threads-{arguments.threads}"
    out = arguments.out or RESULTS / f"speed{suffix}.json"
    algorithms = [a for a in arguments.algorithms if a != "sbx" or Path(arguments.sbx).exists()]
    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "tasks": {name: {algorithm: [] for algorithm in algorithms} for name in arguments.only},
    }
    for repeat in range(arguments.repeats):
        for name in arguments.only:
            for algorithm in algorithms:
                row = run(algorithm, name, arguments.threads, arguments.sbx)
                if row is not None:
                    results["tasks"][name][algorithm].append(row)
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"after repeat {repeat + 1}:\n{table(results)}\n", flush=True)


if __name__ == "__main__":
    main()
