import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_safe import SAFE, demo
from sb3_safe.callbacks import read_json_lines, write_texts


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "N_EVALUATED", 24)


def test_the_demo_shows_what_changed_and_leaves_a_model_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show, saved = demo.show_texts, []

    def show_texts(samples: Any) -> None:
        saved.append((tmp_path / "model.zip").exists())
        show(samples)

    monkeypatch.setattr(demo, "show_texts", show_texts)
    demo.main(["--timesteps", "2000", "--out", str(tmp_path), "--seed", "3"])
    printed = capsys.readouterr().out
    for label in demo.LABELS.values():
        assert re.search(rf"^{re.escape(label)} +-?\d+\.\d+ +-?\d+\.\d+$", printed, flags=re.MULTILINE), label
    assert printed.count("  before (") == printed.count("  after  (") == demo.N_SHOWN
    assert str(tmp_path / "model.zip") in printed and str(tmp_path / "report.html") in printed

    assert saved == [True]  # nothing that is shown, wherever to, can cost the model

    rows = read_json_lines(tmp_path / "stability.jsonl")
    assert rows and all(0 <= row["gold"] <= 1 for row in rows)
    page = (tmp_path / "report.html").read_text()
    assert '<figure id="gold">' in page and demo.LABELS["kl_per_text"] in page

    model = SAFE.load(tmp_path / "model.zip", device="cpu")
    assert len(write_texts(model, demo.text_env(2))) == 2


def test_the_help_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--help"])
    printed = capsys.readouterr().out
    assert "Aligning a small language model with a reward model." in printed
    assert "`" not in printed


def test_the_policy_has_no_divergence_from_itself_and_the_measure_agrees_with_the_rollouts() -> None:
    model = SAFE(demo.ENV_ID, seed=0, device="cpu", n_steps=32, n_envs=32, batch_size=256)
    texts = write_texts(model, demo.text_env(24))
    same = demo.divergence(model, texts)
    assert same["kl_per_token"] == pytest.approx(0, abs=1e-6)

    with th.no_grad():
        for parameter in model.policy.reference.parameters():
            parameter.mul_(0.97)
    measured = demo.divergence(model, texts)
    # Text by text, token by token, through the plain language models.
    drifts, entropies = [], []
    for text in texts:
        length, start = (int(text["terminal_observation"][key][0]) for key in ("length", "prompt_length"))
        ids = th.as_tensor(text["terminal_observation"]["input_ids"][:length])[None].long()
        assert ids[0, start:].tolist() == text["completion_ids"]
        log_pi, log_ref = (
            lm(input_ids=ids).logits.double().detach().numpy()[0] for lm in (model.policy.lm, model.policy.reference)
        )
        # The end token may not come first (min_new_tokens = 1).
        eos, early = model.policy.distribution.eos_token_id, start - 1
        for logits in (log_pi, log_ref):
            logits[early, eos] = -np.inf
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        steps = np.arange(start - 1, length - 1)
        tokens = ids[0, 1:].numpy()[steps]
        drifts.append(log_pi[steps, tokens] - log_ref[steps, tokens])
        probabilities = np.exp(log_pi[steps])
        surprise = np.where(probabilities > 0, -np.nan_to_num(log_pi[steps], neginf=0.0), 0.0)
        entropies.append((probabilities * surprise).sum(-1))
    assert measured["kl_per_token"] == pytest.approx(np.concatenate(drifts).mean(), rel=1e-3)
    assert measured["kl_per_text"] == pytest.approx(np.mean([drift.sum() for drift in drifts]), rel=1e-3)
    assert measured["entropy"] == pytest.approx(np.concatenate(entropies).mean(), rel=1e-3)
