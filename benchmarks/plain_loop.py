"""PPO as one plain loop, in the manner of single-file implementations: the peer that speed is measured against.

No abstractions, torch distributions, per-tensor Adam; the same networks, losses and minibatches as SB3's PPO.
"""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn
from torch.distributions import Categorical, Normal


def layer(inputs: int, outputs: int, gain: float = np.sqrt(2)) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class PlainLoop:
    """PPO on a vector environment, for vector and image observations."""

    def __init__(self, env: Any, task: dict[str, Any]) -> None:
        defaults = {
            "n_steps": 2048, "batch_size": 64, "n_epochs": 10, "gamma": 0.99, "gae_lambda": 0.95, "clip_range": 0.2,
            "ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": 0.5, "learning_rate": 3e-4,
        }  # fmt: skip
        self.settings = defaults | task["ppo"]
        self.env, self.n_steps = env, self.settings["n_steps"]
        shape, self.discrete = env.observation_space.shape, isinstance(env.action_space, spaces.Discrete)
        actions = env.action_space.n if self.discrete else env.action_space.shape[0]
        width, activation = task.get("net_arch", [64, 64])[0], nn.ReLU if "net_arch" in task else nn.Tanh
        self.body: nn.Module = nn.Flatten()
        if len(shape) == 3:
            convolutions = [nn.Conv2d(shape[0], 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)]
            stages = [stage for convolution in convolutions for stage in (convolution, nn.ReLU())]
            self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU())
            self.actor, self.critic = layer(512, actions, 0.01), layer(512, 1, 1.0)
        else:
            sizes = (int(np.prod(shape)), width)

            def mlp(out: int, gain: float) -> nn.Sequential:
                hidden = [layer(*sizes), activation(), layer(width, width), activation()]
                return nn.Sequential(*hidden, layer(width, out, gain))

            self.actor, self.critic = mlp(actions, 0.01), mlp(1, 1.0)  # type: ignore[assignment]
        self.log_std = nn.Parameter(th.zeros(actions))
        modules = [self.body, self.actor, self.critic]
        self.parameters = [p for module in modules for p in module.parameters()] + [self.log_std] * (not self.discrete)
        self.optimizer = th.optim.Adam(self.parameters, lr=self.settings["learning_rate"], eps=1e-5)
        self.scale = 255.0 if len(shape) == 3 else 1.0
        self.obs = env.reset()
        self.starts = np.ones(env.num_envs, dtype=np.float32)

    def distribution(self, features: th.Tensor) -> Any:
        output = self.actor(features)
        return Categorical(logits=output) if self.discrete else Normal(output, self.log_std.exp())

    def log_prob(self, distribution: Any, actions: th.Tensor) -> th.Tensor:
        log_prob = distribution.log_prob(actions)
        return log_prob if self.discrete else log_prob.sum(-1)  # type: ignore[no-any-return]

    def learn(self, steps: int, reset_num_timesteps: bool = True) -> None:
        for _ in range(steps // (self.n_steps * self.env.num_envs)):
            self.collect()
            self.train()

    def collect(self) -> None:
        rows: list[tuple[Any, ...]] = []
        for _ in range(self.n_steps):
            with th.no_grad():
                features = self.body(th.as_tensor(self.obs).float() / self.scale)
                distribution = self.distribution(features)
                actions = distribution.sample()
                log_prob, value = self.log_prob(distribution, actions), self.critic(features).flatten()
            chosen = actions.numpy()
            if not self.discrete:
                chosen = np.clip(chosen, self.env.action_space.low, self.env.action_space.high)
            obs, rewards, dones, _ = self.env.step(chosen)
            rows.append((th.as_tensor(self.obs), actions, log_prob, value, th.as_tensor(rewards), self.starts))
            self.obs, self.starts = obs, dones.astype(np.float32)
        with th.no_grad():
            next_value = self.critic(self.body(th.as_tensor(self.obs).float() / self.scale)).flatten()
        observations, actions, log_probs, values, rewards = (th.stack(column) for column in list(zip(*rows))[:5])  # noqa: B905
        advantages, last = th.zeros_like(rewards), th.zeros(self.env.num_envs)
        starts = [th.as_tensor(row[5]) for row in rows[1:]] + [th.as_tensor(self.starts)]
        for t in reversed(range(self.n_steps)):
            alive = 1.0 - starts[t]
            delta = rewards[t] + self.settings["gamma"] * next_value * alive - values[t]
            last = delta + self.settings["gamma"] * self.settings["gae_lambda"] * alive * last
            advantages[t], next_value = last, values[t]
        stored = (observations, actions, log_probs, advantages, advantages + values)
        self.data = [tensor.flatten(0, 1) for tensor in stored]

    def train(self) -> None:
        settings, total = self.settings, len(self.data[0])
        for _ in range(settings["n_epochs"]):
            order = np.random.permutation(total)
            for start in range(0, total, settings["batch_size"]):
                index = order[start : start + settings["batch_size"]]
                observations, actions, old, advantages, returns = (tensor[index] for tensor in self.data)
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                features = self.body(observations.float() / self.scale)
                distribution = self.distribution(features)
                ratio = (self.log_prob(distribution, actions) - old).exp()
                clipped = ratio.clamp(1 - settings["clip_range"], 1 + settings["clip_range"])
                policy_loss = -th.min(advantages * ratio, advantages * clipped).mean()
                value_loss = (returns - self.critic(features).flatten()).square().mean()
                entropy = distribution.entropy()
                entropy_loss = -(entropy if self.discrete else entropy.sum(-1)).mean()
                loss = policy_loss + settings["vf_coef"] * value_loss + settings["ent_coef"] * entropy_loss
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, settings["max_grad_norm"])
                self.optimizer.step()
