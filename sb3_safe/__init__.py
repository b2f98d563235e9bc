"""SAFE for Stable-Baselines3: stable policy optimisation of control tasks and language models.

``import sb3_safe`` registers ``TextGenEnv-v0`` with gymnasium and stays light: transformers is imported when a text
environment is made.
"""

import textgen_env  # noqa: F401  (registers TextGenEnv-v0)

from sb3_safe.callbacks import ProgressCallback, StabilityCallback
from sb3_safe.controller import AdaptiveKL, FixedKL, KLController, NoKL, SafeController
from sb3_safe.finite import NonFiniteError
from sb3_safe.policies import TwinCriticCnnPolicy, TwinCriticMultiInputPolicy, TwinCriticPolicy
from sb3_safe.safe import SAFE
from sb3_safe.text_callbacks import SampleCallback
from sb3_safe.vec_env import GymVecEnv

__all__ = [
    "SAFE",
    "AdaptiveKL",
    "FixedKL",
    "GymVecEnv",
    "KLController",
    "NoKL",
    "NonFiniteError",
    "ProgressCallback",
    "SafeController",
    "SampleCallback",
    "StabilityCallback",
    "TwinCriticCnnPolicy",
    "TwinCriticMultiInputPolicy",
    "TwinCriticPolicy",
]
__version__ = "0.1.0"
