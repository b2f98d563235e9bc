import gc
import json
import math
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO
from stable_baselines3.common import callbacks as sb3_callbacks
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

from sb3_safe import SAFE, FixedKL, ProgressCallback, StabilityCallback, cli
from sb3_safe.callbacks import episode_columns, read_json_lines, write_json_lines

ALWAYS = {"timesteps", "seconds", "episodes", "entropy", "update_kl", "explained_variance", "clip_fraction"}
OF_SAFE = {"critic_gap", "kl", "threshold", "kl_short", "gate", "entropy_floor", "phase"}
OF_EPISODES = {"reward", "reward_std", "length"}


def make(algorithm: type[Any], **kwargs: Any) -> Any:
    arguments = {"n_steps": 128, "batch_size": 64, "n_epochs": 2, "seed": 0, "device": "cpu"}
    return algorithm("MlpPolicy", "CartPole-v1", **(arguments | kwargs))


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "stability.jsonl").read_text().splitlines()]


class Witness(BaseCallback):
    """An independent account of the returns and log-probabilities of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[list[float]] = []
        self.entropies: list[float] = []

    def _on_rollout_start(self) -> None:
        self.returns.append([])

    def _on_step(self) -> bool:
        self.returns[-1] += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.entropies.append(float(-np.mean(self.locals["rollout_buffer"].log_probs)))


@pytest.mark.parametrize(("algorithm", "columns"), [(SAFE, ALWAYS | OF_SAFE), (PPO, ALWAYS)])
def test_every_rollout_has_a_complete_row_in_the_file(algorithm: type[Any], columns: set[str], tmp_path: Path) -> None:
    witness, callback = Witness(), StabilityCallback(tmp_path)
    make(algorithm).learn(512, callback=[witness, callback])
    rows = rows_of(tmp_path)
    assert rows == callback.rows
    assert [row["timesteps"] for row in rows] == [128, 256, 384, 512]
    for row, returns, entropy in zip(rows, witness.returns, witness.entropies, strict=True):
        assert columns | OF_EPISODES <= set(row)
        assert all(math.isfinite(value) for value in row.values())
        assert row["episodes"] == len(returns)
        assert row["reward"] == pytest.approx(np.mean(returns))
        assert row["reward_std"] == pytest.approx(np.std(returns, ddof=1))
        assert row["entropy"] == pytest.approx(entropy)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


class Recorder(KVWriter):
    """Everything that is logged, dump by dump."""

    def __init__(self) -> None:
        self.dumps: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.dumps.append(dict(key_values))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("algorithm", [SAFE, PPO])
def test_a_row_holds_the_update_that_was_made_on_its_rollout(algorithm: type[Any]) -> None:
    recorder, callback = Recorder(), StabilityCallback()
    model = make(algorithm)
    model.set_logger(Logger(None, [recorder]))
    model.learn(512, callback=callback)
    # SB3 writes the log of an update after the next rollout.
    for row, dump in zip(callback.rows[:-1], recorder.dumps[1:], strict=True):
        assert row["update_kl"] == pytest.approx(dump["train/approx_kl"])
        assert row["explained_variance"] == pytest.approx(float(dump["train/explained_variance"]))
    assert len({row["update_kl"] for row in callback.rows}) == 4
    assert {"stability/crashes", "stability/kl_spikes", "stability/entropy_floor_hits"} <= set(recorder.dumps[-1])


class Wordy(FixedKL):
    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"reward": -1.0, "own": 2.0}


def test_a_controller_of_ones_own_adds_columns_and_replaces_none() -> None:
    rows = []
    for controller in (FixedKL, Wordy):
        callback = StabilityCallback()
        make(SAFE, kl_controller=controller, kl_controller_kwargs={"coef": 0.1}).learn(256, callback=callback)
        rows.append([{name: value for name, value in row.items() if name != "seconds"} for row in callback.rows])
    assert rows[1] == [row | {"own": 2.0} for row in rows[0]]


def test_numbers_of_every_kind_are_columns_and_none_is_a_missing_one() -> None:
    callback = StabilityCallback(
        extra=lambda _: {"a": np.float32(0.5), "b": th.tensor(2.0), "c": True, "d": None, "e": math.nan}
    )
    make(PPO).learn(128, callback=callback)
    assert {name: callback.rows[0].get(name) for name in "abcde"} == {"a": 0.5, "b": 2, "c": 1, "d": None, "e": None}


@pytest.mark.parametrize("column", ["timesteps", "reward", "update_kl", "threshold", "kl", "seconds"])
def test_a_column_that_a_row_has_is_not_replaced_but_refused(column: str, tmp_path: Path) -> None:
    callback = StabilityCallback(tmp_path, extra=lambda _: {column: 1e6, "own": 1.0})
    with pytest.raises(ValueError, match=rf"extra returned .*\['{column}'\]"):
        make(SAFE).learn(256, callback=callback)
    assert callback.rows == rows_of(tmp_path) == []


@pytest.mark.parametrize(
    "returned", ["a", None, [1.0], {"a": "high"}, {"a": "1.5"}, {"a": th.ones(2)}, {"a": [1.0]}, {1: 2.0}], ids=str
)
def test_columns_that_are_no_numbers_are_refused_before_the_update(returned: Any, tmp_path: Path) -> None:
    callback, model = StabilityCallback(tmp_path, extra=lambda _: returned), make(PPO)
    with pytest.raises(ValueError, match=r"extra (must return a mapping.*got|returned ('a'|1): )"):
        model.learn(256, callback=callback)
    assert callback.rows == rows_of(tmp_path) == []
    assert model._n_updates == 0


def test_entropy_is_per_action_dimension(tmp_path: Path) -> None:
    callback = StabilityCallback()
    PPO("MlpPolicy", gym.make("Tiny-vector-box-v0"), n_steps=64, batch_size=64, seed=0).learn(64, callback=callback)
    # The first policy is a normal distribution of deviation 1 in each of two dimensions.
    assert callback.rows[0]["entropy"] == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.15)


def test_a_run_that_goes_on_continues_its_file_and_a_new_run_begins_one(tmp_path: Path) -> None:
    model = make(PPO)
    model.learn(256, callback=StabilityCallback(tmp_path))
    model.learn(256, callback=StabilityCallback(tmp_path), reset_num_timesteps=False)
    rows = rows_of(tmp_path)
    assert [row["timesteps"] for row in rows] == [128, 256, 384, 512]
    assert rows[2]["seconds"] >= rows[1]["seconds"]
    model.num_timesteps = 256  # as after loading an earlier checkpoint
    model.learn(128, callback=StabilityCallback(tmp_path), reset_num_timesteps=False)
    assert [row["timesteps"] for row in rows_of(tmp_path)] == [128, 256, 384]
    model.learn(128, callback=StabilityCallback(tmp_path))
    assert [row["timesteps"] for row in rows_of(tmp_path)] == [128]


def test_the_row_of_an_update_that_failed_is_not_written_when_training_goes_on() -> None:
    callback, model = StabilityCallback(), make(PPO)
    train = model.train

    def fails() -> None:
        model.train = train
        raise ConnectionError

    model.train = fails
    with pytest.raises(ConnectionError):
        model.learn(128, callback=callback)
    model.learn(128, callback=callback, reset_num_timesteps=False)
    assert [row["timesteps"] for row in callback.rows] == [256]


def test_a_run_goes_on_from_a_file_with_empty_lines_and_rows_without_seconds(tmp_path: Path) -> None:
    """Which the report takes too."""
    write_json_lines(tmp_path / "stability.jsonl", [{"timesteps": 64, "seconds": 50.0}, {"timesteps": 128}])
    text = (tmp_path / "stability.jsonl").read_text()
    (tmp_path / "stability.jsonl").write_text("\n" + text.replace("\n", "\n \n"))
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 0
    model = make(PPO)
    model.num_timesteps = 128
    model.learn(128, callback=StabilityCallback(tmp_path), reset_num_timesteps=False)
    rows = rows_of(tmp_path)
    assert [row["timesteps"] for row in rows] == [64, 128, 256]
    assert rows[2]["seconds"] >= 50


@pytest.mark.parametrize("line", ['{"reward": 1.0}', "[1, 2]", '{"timesteps": null}'])
def test_a_row_that_no_run_can_go_on_from_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "stability.jsonl").write_text('\n{"timesteps": 1}\n' + line + "\n")
    model = make(PPO)
    model.num_timesteps = 128
    with pytest.raises(ValueError, match=r"stability\.jsonl: line 3 has no timesteps"):
        model.learn(128, callback=StabilityCallback(tmp_path), reset_num_timesteps=False)


def test_a_rollout_without_a_finished_episode_has_no_reward() -> None:
    assert episode_columns([]) == {"episodes": 0}
    assert "reward_std" not in episode_columns([{"episode": {"r": 1.0, "l": 3}}])


def test_columns_of_texts_are_means_over_the_texts_that_ended() -> None:
    texts = [
        {
            "episode": {"r": 1.0, "l": 3},
            "completion_ids": [1, 2, 1],
            "finish_reason": "stop",
            "reward_parts": {"a": 2.0, "b": -1.0},
        },
        {
            "episode": {"r": 4.0, "l": 2},
            "completion_ids": [1, 2],
            "finish_reason": "length",
            "reward_parts": {"a": 4.0, "b": 0.0},
        },
    ]
    assert episode_columns(texts) == pytest.approx(
        {
            "episodes": 2,
            "reward": 2.5,
            "length": 2.5,
            "reward_std": math.sqrt(4.5),
            "stop_share": 0.5,
            "distinct_2": 2 / 3,
            "part/a": 3.0,
            "part/b": -0.5,
        }
    )


def test_a_part_of_the_reward_is_averaged_over_the_texts_that_have_it() -> None:
    text = {"episode": {"r": 1.0, "l": 1}, "completion_ids": [1], "finish_reason": "stop"}
    parts = [{"a": 2.0}, {"b": 3.0}, {"a": 4.0, "b": 5.0}, {}]
    columns = episode_columns([text | {"reward_parts": of_text} for of_text in parts])
    assert (columns["part/a"], columns["part/b"]) == (3.0, 4.0)


def test_an_algorithm_without_rollouts_is_refused() -> None:
    with pytest.raises(ValueError, match="DQN has none"):
        DQN("MlpPolicy", "CartPole-v1", learning_starts=0).learn(1, callback=StabilityCallback())


def test_a_line_cut_off_by_a_crash_is_left_out_and_any_other_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_json_lines(path, [{"a": 1}, {"a": 2}])
    path.write_text(path.read_text() + '{"a": 3, "b"')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 1 is not JSON"):
        read_json_lines(path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"timesteps": 1, "größe": 2}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.jsonl is not a text in UTF-8"):
        read_json_lines(path)


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """The bar as it stands at the end of training, which is what a file gets in place of a terminal."""
    return capsys.readouterr().out.strip().splitlines()[-1]


@pytest.mark.usefixtures("wide_terminal")
def test_progress_shows_steps_rate_reward_kl_and_threshold(capsys: pytest.CaptureFixture[str]) -> None:
    callback = ProgressCallback()
    model = make(SAFE).learn(2048, callback=callback)  # a rate takes two looks at the clock, a tenth of a second apart
    reward = np.mean([episode["r"] for episode in model.ep_info_buffer])
    threshold = model.controller.metrics()["threshold"]
    line = shown(capsys)
    assert re.search(r" 2048/2048 0:00:00 [\d,]+ steps/s ", line)
    assert line.endswith(f"reward {reward:.4g} KL {model.measured_kl:.3f}/{threshold:.3f}")


@pytest.mark.usefixtures("wide_terminal")
@pytest.mark.parametrize(("algorithm", "kwargs"), [(PPO, {}), (SAFE, {"kl_controller": "none"})])
def test_progress_without_a_kl_controller_shows_the_reward(
    algorithm: type[Any], kwargs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ProgressCallback()
    model = make(algorithm, **kwargs).learn(256, callback=callback)
    reward = np.mean([episode["r"] for episode in model.ep_info_buffer])
    assert shown(capsys).endswith(f"steps/s reward {reward:.4g}")


@pytest.mark.usefixtures("wide_terminal")
def test_progress_without_a_threshold_shows_the_kl(capsys: pytest.CaptureFixture[str]) -> None:
    callback = ProgressCallback()
    model = make(SAFE, kl_controller="fixed").learn(256, callback=callback)
    assert shown(capsys).endswith(f" KL {model.measured_kl:.3f}")


@pytest.mark.usefixtures("wide_terminal")
def test_progress_of_a_run_that_goes_on_counts_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    callback = ProgressCallback()
    model = make(PPO).learn(128)
    model.learn(256, callback=callback, reset_num_timesteps=False)
    assert " 256/256 " in shown(capsys)


@pytest.mark.usefixtures("wide_terminal")
@pytest.mark.parametrize("form", ["none", "function", "callback", "list"])
def test_the_progress_bar_of_safe_shows_the_kl_beside_every_form_of_callback(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    witness = Witness()
    forms = {"none": None, "function": lambda *_: calls.append(1) or True, "callback": witness, "list": [witness]}
    make(SAFE).learn(256, callback=forms[form], progress_bar=True)
    assert re.search(r" 256/256 .* KL \d\.\d{3}/\d\.\d{3}$", shown(capsys))
    assert len(calls) == (256 if form == "function" else 0)
    assert len(witness.entropies) == (2 if form in ("callback", "list") else 0)


def test_progress_does_not_change_training() -> None:
    alone, watched = make(SAFE).learn(256), make(SAFE).learn(256, callback=ProgressCallback())
    for one, other in zip(alone.policy.parameters(), watched.policy.parameters(), strict=True):
        assert th.equal(one, other)


def test_an_interrupted_run_gives_back_the_terminal() -> None:
    class Interrupt(BaseCallback):
        def _on_step(self) -> bool:
            raise KeyboardInterrupt

    callback = ProgressCallback()
    with pytest.raises(KeyboardInterrupt):
        make(PPO).learn(128, callback=[callback, Interrupt()])
    bar = callback.pbar
    assert not bar.disable
    del callback
    gc.collect()
    assert bar.disable


def test_progress_without_rich_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3_callbacks, "tqdm", None)
    with pytest.raises(ImportError, match="tqdm and rich"):
        ProgressCallback()
