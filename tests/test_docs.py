"""README and docs are true: their code runs, and what they name exists."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_safe import SAFE, GymVecEnv, NonFiniteError, SampleCallback, StabilityCallback
from sb3_safe.controller import SafeController
from sb3_safe.finite import check_observations, check_rollout

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    if "_build" not in path.parts
}
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = {
    ("README.md", "needs the Hugging Face hub and a GPU"),
    ("docs/large-models.md", "needs the Hugging Face hub and a GPU"),
    ("docs/quickstart.md", "needs the Hugging Face hub"),
    ("docs/zoo.md", "trains by the command line's arguments, with the extra zoo"),
}
MAX_ROLLOUTS = 1


class Block(NamedTuple):
    code: str
    line: int
    reason: str | None
    """Why it is not run."""


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(match["code"], text.count("\n", 0, match.start("code")) + 1, match["reason"])
        for match in BLOCK.finditer(text)
    ]


def read_all() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in PAGES.values())


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks have the budgets that a user would write; here `learn()` ends after a few rollouts."""
    learn = OnPolicyAlgorithm.learn

    def learn_briefly(self: Any, total_timesteps: int, *args: Any, **kwargs: Any) -> Any:
        return learn(self, min(total_timesteps, MAX_ROLLOUTS * self.n_steps * self.n_envs), *args, **kwargs)

    monkeypatch.setattr(OnPolicyAlgorithm, "learn", learn_briefly)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
@pytest.mark.usefixtures("few_rollouts")
def test_every_python_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason is None:
            # Line numbers of a traceback are those of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(PAGES[page]), "exec")
            exec(code, namespace)


def test_only_these_blocks_are_not_run() -> None:
    marked = [(page, block.reason) for page in PAGES for block in blocks(page) if block.reason is not None]
    assert len(marked) == len(NOT_RUN)
    assert set(marked) == NOT_RUN


def test_blocks_that_are_not_run_are_valid_python_with_arguments_that_exist() -> None:
    """What can be known of them without running them: every argument is one of SAFE or of the text environment."""
    from textgen_env import TextGenVectorEnv

    known = {*inspect.signature(SAFE.__init__).parameters, *inspect.signature(TextGenVectorEnv.__init__).parameters}
    for page in PAGES:
        for block in blocks(page):
            if block.reason is not None:
                compile(block.code, page, "exec")
                # Four or eight spaces deep: the arguments of SAFE, the keys of env_kwargs.
                named = re.findall(r"^ {4}(\w+)=|^ {8}\"(\w+)\":", block.code, re.MULTILINE)
                assert {argument or key for argument, key in named} <= known


def test_every_comment_that_marks_a_block_stands_directly_above_one() -> None:
    comments = read_all().count("<!-- not run: ")
    mentions = PAGES["docs/contributing.md"].read_text(encoding="utf-8").count("<!-- not run: ")
    assert comments - mentions == len(NOT_RUN)


# -- names -------------------------------------------------------------------------------------------------------------


class Keys(KVWriter):
    """An output of SB3's logger that keeps the names of what is logged."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.seen |= set(key_values)


def documented_keys(page: str) -> set[str]:
    """What the first column of a page's tables names like a logged key."""
    rows = re.findall(r"^\| (`\w+/.*?) \|", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(\w+/\w+)`", row)}


def test_every_logged_key_is_in_the_log_reference_and_the_other_way_round() -> None:
    import gymnasium as gym

    keys = Keys()
    small = {"n_steps": 32, "batch_size": 32, "n_epochs": 1}
    texts = gym.make_vec("TextGenEnv-v0", 2, vectorization_mode="vector_entry_point", max_new_tokens=4)
    for model, callback in (
        (SAFE("CartPole-v1", **small), StabilityCallback()),
        (SAFE("MlpPolicy", "Pendulum-v1", n_steps=256, clip_range_vf=0.2, n_epochs=1), None),
        (SAFE("CartPole-v1", kl_controller="adaptive", **small), None),
        (SAFE("TextGenEnv-v0", n_envs=4, env_kwargs={"max_new_tokens": 4}, **small), SampleCallback(GymVecEnv(texts))),
        (
            SAFE(
                "TextGenEnv-v0",
                n_envs=4,
                env_kwargs={"max_new_tokens": 4, "model_kwargs": {"dtype": "bfloat16"}},
                policy_kwargs={"lora": {"r": 2}},
                **small,
            ),
            None,
        ),
    ):
        model.set_logger(Logger(None, [keys]))
        model.learn(3 * model.n_steps * model.n_envs, callback=callback)
    documented = documented_keys("docs/log.md")
    assert keys.seen <= documented
    assert documented - keys.seen == {"rollout/success_rate"}


def test_the_readme_explains_every_key_of_safe() -> None:
    ours = {key for key in documented_keys("docs/log.md") if key.startswith("safe/")}
    assert documented_keys("README.md") == ours


def test_every_argument_of_ppo_is_one_of_safe_with_the_same_default() -> None:
    safe = inspect.signature(SAFE.__init__).parameters
    for name, parameter in inspect.signature(PPO.__init__).parameters.items():
        if name not in ("self", "policy", "env"):
            assert safe[name].default == parameter.default, name


def test_every_argument_of_its_own_is_explained_to_users_of_ppo() -> None:
    own = set(inspect.signature(SAFE.__init__).parameters) - set(inspect.signature(PPO.__init__).parameters)
    text = PAGES["docs/from-ppo.md"].read_text(encoding="utf-8")
    assert own <= set(re.findall(r"`(\w+)`", text))


def test_every_constant_of_the_paper_that_is_no_default_is_in_its_settings_and_among_the_departures() -> None:
    paper = {"huber_delta": 0.5, "clip_range": 0.2, "clip_range_vf": 0.2, "vf_coef": 0.5, "critic_tau": 0.05,
             "ent_coef": 0.01, "max_preview_kl": 0.5}  # fmt: skip
    controller = {"coef": 0.1, "price": 0.0, "tau_base": 0.3, "threshold": "paper", "max_drift": None,
                  "entropy_floor": 2.0, "kp": 0.3, "ki": 0.01, "kd": 0.05, "target_velocity": 0.001,
                  "reward_decay": 0.95, "kl_short_decay": 0.9, "kl_long_decay": 0.99, "warmup": 50,
                  "window": 50}  # fmt: skip

    def other(constants: dict[str, Any], owner: Any) -> dict[str, Any]:
        defaults = {name: parameter.default for name, parameter in inspect.signature(owner).parameters.items()}
        return {name: value for name, value in constants.items() if defaults[name] != value}

    expected = other(paper, SAFE) | {"kl_controller_kwargs": other(controller, SafeController)}
    (code,) = [block.code for block in blocks("docs/from-ppo.md") if "critic_tau" in block.code]
    call = ast.parse(code).body[0].value
    assert {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords} == expected
    departures = PAGES["docs/departures.md"].read_text(encoding="utf-8")
    assert all(f"`{name}`" in departures for name in other(paper, SAFE))


def test_whatever_number_is_not_finite_is_in_the_table_of_errors() -> None:
    good, bad = np.zeros((1, 1)), np.full((1, 1), np.nan)
    rollouts: Any = [SimpleNamespace(values=bad, rewards=good), SimpleNamespace(values=good, rewards=bad)]
    checks = [partial(check_observations, {"...": bad}), *(partial(check_rollout, rollout) for rollout in rollouts)]
    for check in checks:
        with pytest.raises(NonFiniteError) as caught:
            check(1)
        begin, _, _ = str(caught.value).partition(" 0 ")
        assert f"| `{begin} ...` |" in PAGES["docs/errors.md"].read_text(encoding="utf-8")


def test_every_test_named_in_the_docs_exists() -> None:
    existing = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert set(re.findall(r"`(test_\w+)`", read_all())) <= existing


def test_every_make_target_named_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", read_all())) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", PAGES[page].read_text(encoding="utf-8"))
    for link in links:
        assert (PAGES[page].parent / link).exists(), link


# -- the API reference -------------------------------------------------------------------------------------------------


def sphinx_configuration() -> ModuleType:
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def referenced_modules() -> set[str]:
    pages = (path.read_text(encoding="utf-8") for page, path in PAGES.items() if page.startswith("docs/api/"))
    return {module for text in pages for module in re.findall(r"^\.\. automodule:: ([\w.]+)$", text, re.MULTILINE)}


def test_every_module_is_in_the_api_reference() -> None:
    modules = {
        ".".join(path.relative_to(source).with_suffix("").parts)
        for source, package in ((ROOT, "sb3_safe"), (ROOT / "envs", "textgen_env"))
        for path in (source / package).rglob("*.py")
        # How the embedded task was made is no interface.
        if not path.stem.startswith("_") and "assets" not in path.parts
    }
    assert referenced_modules() == modules


def test_a_public_name_that_is_not_documented_is_found() -> None:
    undocumented = sphinx_configuration().undocumented
    documented = {"sb3_safe.language.policy.LanguagePolicy"}
    assert undocumented(("sb3_safe.language",), documented) == ["sb3_safe.language.SegmentBuffer"]


@pytest.mark.slow
def test_the_docs_build_without_a_warning(tmp_path: Path) -> None:
    """The build itself fails where a public name is missing or a cross-reference leads nowhere."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "trees", DOCS, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
